"""Is a twin built like the full model, and if not, what must not be shrunk?"""
