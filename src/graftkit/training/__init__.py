"""Training through TRL, guarded: a recipe becomes a trainer, and what it saved is read back."""
