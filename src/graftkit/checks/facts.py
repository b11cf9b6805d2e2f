"""The facts a run can supply to its rules: given ones, and costly ones computed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor


@dataclass(frozen=True)
class Facts:
    """What is known about one run. A field that is None is missing, and rules that need it stay unknown.

    Attributes:
        model: the live adapted model.
        batch: one valid batch for it, labels included where it computes a loss.
    """

    model: PeftModel | None = None
    batch: Mapping[str, Any] | None = None

    def missing(self, needs: tuple[str, ...]) -> tuple[str, ...]:
        """The needed facts that this run does not have."""
        return tuple(name for name in needs if getattr(self, name) is None)

    @cached_property
    def base_logits(self) -> Tensor:
        """The base model's logits on the batch, with the adapter switched off."""
        from graftkit.checks.live import logits_of

        assert self.model is not None
        assert self.batch is not None
        with self.model.disable_adapter():
            return logits_of(self.model, self.batch)

    @cached_property
    def pristine_logits(self) -> Tensor:
        """The logits of the base model as it was before PEFT put layers into it (a copy is made for it)."""
        from graftkit.checks.live import logits_of, without_adapter

        assert self.model is not None
        assert self.batch is not None
        return logits_of(without_adapter(self.model), self.batch)
