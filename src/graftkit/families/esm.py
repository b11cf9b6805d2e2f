"""ESM: the padding token that its class needs, and its default configuration leaves open."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="esm",
    model_types=("esm",),
    # Positions are counted from the tokens that are not padding (EsmEmbeddings.forward).
    twin_overrides={"pad_token_id": 1},
)
