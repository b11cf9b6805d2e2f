"""What every trainer is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.data.load import Data
from graftkit.recipes.recipe import Recipe
from graftkit.training.model import LoadedBase

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True)
class TrainerInputs:
    """A recipe, and what was loaded for it.

    Attributes:
        args: TRL's configuration, made of the recipe's ``args``.
    """

    recipe: Recipe
    base: LoadedBase
    data: Data
    args: Any
    callbacks: Sequence[TrainerCallback] = ()

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments that TRL's trainers share; the trainer attaches the adapter itself."""
        from graftkit.training.initialization.start import config_to_attach

        return {
            "model": self.base.model,
            "args": self.args,
            "train_dataset": self.data.train,
            "eval_dataset": self.data.held_out,
            "processing_class": self.base.processor,
            "peft_config": config_to_attach(self.base.peft_config),
            "callbacks": list(self.callbacks),
        }
