"""Whether the installed packages know the model and work together."""
