"""Rules on the files of a saved adapter: complete, safe to load, and fitting the base."""
