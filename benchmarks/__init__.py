"""Figures of graftkit next to its peers'; ``benchmarks/harness/__init__.py`` says how one is added."""
