"""Rules on an adapter's record: base, tokenizer and chat template are those that it was trained with."""
