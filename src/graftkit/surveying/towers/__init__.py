"""Which part of a model serves which modality."""
