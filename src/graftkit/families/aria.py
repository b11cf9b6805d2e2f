"""Aria: how many queries its projector has for which number of patches."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="aria",
    model_types=("aria",),
    # The twin's pictures have 4 x 4 patches; released models have 1225 and 4900 (AriaConfig).
    twin_overrides={"projector_patch_to_query_dict": {16: 8, 64: 16}},
)
