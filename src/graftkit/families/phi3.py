"""Phi-3: the tokenizer that llama.cpp's converter expects."""

from __future__ import annotations

from graftkit.families._base import Family, ServedTwin

FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    # llama.cpp looks these up by their texts in whatever is called phi3 (src/llama-vocab.cpp). Without a
    # SentencePiece file its converter takes the vocabulary of Phi-4's class alone (conversion/phi.py).
    served_twin=ServedTwin(
        tokens={
            "bos_token_id": "<s>",
            "eos_token_id": "<|endoftext|>",
            "pad_token_id": "<|endoftext|>",
            "</s>": "</s>",
        },
        tokenizer_class="GPT2Tokenizer",
    ),
)
