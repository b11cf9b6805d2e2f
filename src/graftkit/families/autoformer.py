"""Autoformer: a decoder that begins with the end of what the encoder reads."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="autoformer",
    model_types=("autoformer",),
    # It begins with label_length of the context_length steps (AutoformerModel.forward): a twin reads eight.
    twin_overrides={"label_length": 4},
)
