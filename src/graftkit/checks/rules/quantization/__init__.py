"""What quantizing the base reaches, what it leaves, and what can be trained on it."""
