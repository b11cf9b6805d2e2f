"""Asking a live server what its model answers, and telling from it what became of an adapter; without torch."""
