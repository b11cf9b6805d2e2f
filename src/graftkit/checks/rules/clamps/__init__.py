"""Rules on wrappers that clamp the inputs and outputs of their linears."""
