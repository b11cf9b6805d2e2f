"""Gemma 4 in small: a tokenizer with its special tokens, its processor, its chat templates, a twin that fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graftkit as gk
from graftkit.demo.processor import config_overrides, digit_processor

MODEL = "google/gemma-4-E2B-it"
# As in Gemma 4's own tokenizer_config.json.
_STANDARD = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
_NAMED = {
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "image_token": "<|image|>",
    "audio_token": "<|audio|>",
    "video_token": "<|video|>",
}
TEMPLATES = ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5")


def template(name: str = "gemma4_v5") -> str:
    """Return a revision of Gemma 4's chat template, as TRL keeps it."""
    from trl import chat_template_utils

    found: str = getattr(chat_template_utils, f"{name}_chat_template")
    return found


def letters(**options: Any) -> Any:
    """Return a tokenizer of one token a letter, with Gemma 4's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = {token: at for at, token in enumerate((*_STANDARD.values(), *alphabet, *_NAMED.values()))}
    backend = Tokenizer(models.BPE(known, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=_NAMED, model_max_length=1024, **_STANDARD, **options
    )


def processor(chat_template: str | None = None) -> Any:
    """Return Gemma 4's processor for 8x8 pictures and for sounds at 16 kHz."""
    made = digit_processor(letters())
    made.chat_template = chat_template
    return made


def save_base(folder: Path, made: Any, name: str = MODEL, **options: Any) -> Path:
    """Save a twin and the processor or tokenizer that it fits into the folder."""
    tokenizer = getattr(made, "tokenizer", made)
    gk.twin(name, overrides=config_overrides(tokenizer), **options).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
