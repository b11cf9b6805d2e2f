"""A tiny, random, live model of any architecture, and a batch to run it on."""
