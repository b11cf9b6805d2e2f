"""Whether an engine serves the adapter as it was trained."""
