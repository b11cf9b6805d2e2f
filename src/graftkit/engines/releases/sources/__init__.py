"""How to read the source of an engine: one file each, found by listing the folder. Nothing is imported or run."""
