"""What goes wrong while training, and shows in no error: gradients, caches, packing, masks."""
