"""Rules on training faults that raise no error: gradients, caches, packing, loss masks."""
