"""The facts a run can supply to its rules: given ones, and costly ones computed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from torch import Tensor

    from graftkit.adapters.file import AdapterFile
    from graftkit.checks.saved import Fit, Saved, TensorData
    from graftkit.errors import AdapterError
    from graftkit.surveying.sites import ModelMap


@dataclass(frozen=True)
class Facts:
    """What is known about one run. A field that is None is missing, and rules that need it stay unknown.

    Attributes:
        model: the live adapted model.
        batch: one valid batch for it, labels included where it computes a loss.
        folder: of a saved adapter.
        adapter: what that folder holds, read from headers alone; None where it cannot be read.
        refusal: why it cannot be read, or None. No rule needs it: it explains a missing adapter.
        data: the adapter's data, read when it is first asked for.
        base: the map of the base that the adapter is meant for.
    """

    model: PeftModel | None = None
    batch: Mapping[str, Any] | None = None
    folder: Path | None = None
    adapter: AdapterFile | None = None
    refusal: AdapterError | None = None
    data: TensorData | None = None
    base: ModelMap | None = None

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

    @cached_property
    def saved(self) -> Saved:
        """The adapter, with its configuration read as PEFT reads it."""
        from graftkit.checks.saved import Saved

        assert self.adapter is not None
        return Saved(self.adapter, () if self.base is None else self.base.module_paths)

    @cached_property
    def fit(self) -> Fit:
        """The adapter held against the base."""
        from graftkit.checks.saved import Fit

        assert self.base is not None
        return Fit(self.saved, self.base)
