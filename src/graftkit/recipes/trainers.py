"""TRL's trainers that a recipe can name."""

from __future__ import annotations

from enum import StrEnum


class TrainerName(StrEnum):
    """One of TRL's trainers."""

    SFT = "sft"
    DPO = "dpo"
    GRPO = "grpo"

    @property
    def config_class(self) -> str:
        """The name of TRL's class of its arguments."""
        return f"{self.name}Config"
