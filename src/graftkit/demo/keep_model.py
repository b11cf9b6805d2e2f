"""A callback that hands out what a trainer trained."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class KeepModel(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Keep the model that a trainer trains, which only its callbacks see."""

    model: Any = None

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        self.model = model
