"""Rules on quantized bases: what is quantized, what is not, and what can be trained."""
