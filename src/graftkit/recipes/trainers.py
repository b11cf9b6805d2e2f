"""TRL's trainers that a recipe can name."""

from __future__ import annotations

from enum import StrEnum


class TrainerName(StrEnum):
    """A trainer as a recipe names it, and TRL's class of its arguments."""

    config_class: str

    def __new__(cls, value: str, config_class: str) -> TrainerName:
        name = str.__new__(cls, value)
        name._value_, name.config_class = value, config_class
        return name

    SFT = "sft", "SFTConfig"
    DPO = "dpo", "DPOConfig"
    GRPO = "grpo", "GRPOConfig"
