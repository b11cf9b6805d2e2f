"""What a configuration adapts, and what it leaves."""
