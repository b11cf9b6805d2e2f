"""What the source of an engine's release says of each class of models, as tables that ``write.py`` makes."""
