"""Qwen 2 and 3: a token that their tokenizer's class adds."""

from __future__ import annotations

from graftkit.families._base import Family, ServedTwin

FAMILY = Family(
    name="qwen2",
    model_types=("qwen2", "qwen3"),
    # Qwen2Tokenizer adds it behind the vocabulary where it is missing (transformers' tokenization_qwen2.py).
    served_twin=ServedTwin(tokens={"<|endoftext|>": "<|endoftext|>"}),
)
