"""What each input of a forward may look like, best guess first: expressions of a recipe, by modality."""
