"""Whether the installed packages can do what is asked for."""
