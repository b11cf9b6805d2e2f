"""The first values of an attached LoRA: computed from batches, one file an initializer, or restored from files."""
