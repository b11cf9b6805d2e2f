"""Hashes by which an adapter's record tells the base and the tokenizer it was trained with from others."""
