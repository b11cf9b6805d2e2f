"""A valid batch for any model: candidates for each input, a search among them, and the recipe that was found."""
