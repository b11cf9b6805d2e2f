"""Rules on what only shows on several devices."""
