"""Is a saved adapter whole, safe to load, and taken by its base?"""
