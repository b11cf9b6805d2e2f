"""The rules that make a configuration small: which field becomes what, and which fields change together."""
