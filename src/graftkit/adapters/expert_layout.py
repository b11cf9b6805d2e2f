"""How an adapter orders the columns of B where one tensor holds the B of all experts.

Stock PEFT reads (out, r * experts) with the experts fastest. unsloth trained and saved it with the experts slowest
until September 2026; since then it says which in ``adapter_config.json``. The shapes are the same.
Source: unslothai/unsloth-zoo pull requests 1232 and 1269.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

FIELD = "lora_B_layout"


class ExpertLayout(StrEnum):
    """Which of rank and expert is the slower index of B's columns; the values are unsloth's."""

    RANK_MAJOR = "rank_major"
    BY_EXPERT = "grouped_by_expert"
    UNKNOWN = "unknown"


def expert_layout(config: Mapping[str, Any]) -> ExpertLayout:
    """Return the layout that a configuration states; ``UNKNOWN`` where unsloth wrote it and it does not say.

    Args:
        config: the JSON object in ``adapter_config.json``.
    """
    stated = config.get(FIELD)
    if stated in (ExpertLayout.RANK_MAJOR, ExpertLayout.BY_EXPERT):
        return ExpertLayout(stated)
    mapping = config.get("auto_mapping")
    by_unsloth = isinstance(mapping, Mapping) and bool(mapping.get("unsloth_fixed"))
    return ExpertLayout.UNKNOWN if by_unsloth or stated is not None else ExpertLayout.RANK_MAJOR


UNKNOWN_WHY = (
    "unsloth saved it, whose older versions order the columns by expert and whose newer ones, like PEFT, by rank; "
    "the shapes are the same"
)
UNKNOWN_HELP = (
    f'state it in adapter_config.json: "{FIELD}": "{ExpertLayout.BY_EXPERT}" if it was trained before '
    f'September 18, 2026, else "{ExpertLayout.RANK_MAJOR}"'
)
