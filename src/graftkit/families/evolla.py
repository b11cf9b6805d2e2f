"""Evolla: layers that a few of the language model's read proteins through."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="evolla",
    model_types=("evolla",),
    # Each num_hidden_layers // aligner_num_add_layers-th layer gets one (EvollaDecoderLayer): one of two.
    twin_overrides={"aligner_num_add_layers": 1},
)
