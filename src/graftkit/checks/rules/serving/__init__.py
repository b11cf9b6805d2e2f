"""Rules on what an engine does with the adapter."""
