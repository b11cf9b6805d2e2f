"""`merge()`: an adapter merged into a checkpoint, file by file, without building the model."""
