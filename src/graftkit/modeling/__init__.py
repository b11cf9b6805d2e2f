"""What several rooms ask of a live model: its mode, its device, its wrappers, and whether it is sharded."""
