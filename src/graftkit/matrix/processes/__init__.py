"""The processes of a run, each of which works on one family at a time."""
