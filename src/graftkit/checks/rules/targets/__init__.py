"""Which layers a configuration adapts, and which it leaves out."""
