"""Linears with bounds around them: that the bounds are the checkpoint's, and that the adapter stays inside."""
