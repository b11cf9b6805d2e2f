"""Data: the rows that a recipe names, as its trainer takes them."""
