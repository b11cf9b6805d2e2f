"""What becomes of the experts of a mixture, and of layers that share their names."""
