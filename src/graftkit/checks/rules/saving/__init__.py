"""Rules on what saving loses."""
