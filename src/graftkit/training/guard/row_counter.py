"""The rows that a run really trained on: how many were full, and how many had nothing to learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftkit.checks.engine.rule import Observation, failed, passed
from graftkit.families import IGNORED_LABEL
from graftkit.recipes.row_options import RowOptions
from graftkit.text import percent

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class RowCounter:
    """Counts the rows of each batch that the model trains on, on the model's device, without waiting for it."""

    def __init__(self, model: nn.Module, options: RowOptions) -> None:
        self._limit = -1 if options.max_length is None or options.packing is not None else options.max_length
        self._totals: dict[torch.device, Tensor] = {}
        self._labelled = True
        self._handle = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def stop(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def observed(self, *, none_is_cut: bool = False) -> Observation | None:
        """Return what was counted; None where nothing was.

        Args:
            none_is_cut: whether the rows are known to be whole, so that one as long as ``max_length`` just fits.
        """
        rows, full, nothing_left = sum((total.cpu() for total in self._totals.values()), start=_zeros()).tolist()
        if not rows:
            return None
        evidence = {"rows": rows, "full": full, "nothing_left": nothing_left if self._labelled else None}
        if self._labelled and nothing_left:
            return failed(f"{_share(nothing_left, rows)} of the rows had no token to learn", **evidence)
        if full and not none_is_cut:
            message = f"{_share(full, rows)} of the rows had exactly {self._limit:,} tokens, where TRL cuts"
            return failed(message, **evidence)
        return passed(f"{rows:,} rows, none of them cut or without a token to learn", **evidence)

    def _before_forward(self, module: nn.Module, _args: Any, given: Mapping[str, Any]) -> None:
        """Count a batch, unless it is one of an evaluation or of a reference model."""
        import torch

        ids = given.get("input_ids")
        if not (module.training and torch.is_grad_enabled() and isinstance(ids, torch.Tensor) and ids.ndim == 2):
            return
        labels = _labels_of(ids, given)
        self._labelled = self._labelled and labels is not None
        with torch.no_grad():
            counted = _count(ids, labels, given, self._limit)
            self._totals[ids.device] = self._totals.get(ids.device, torch.zeros_like(counted)) + counted


def clipped(shares: list[float], allowed: float) -> Observation | None:
    """Return what was logged of completions that ended at their greatest length; None if nothing was."""
    if not shares:
        return None
    mean = sum(shares) / len(shares)
    message = f"{percent(mean)} of the completions ended at max_completion_length"
    if mean <= allowed:
        return passed(message, clipped=mean)
    return failed(message, help="args: {max_completion_length: TOKENS}, or a shorter answer", clipped=mean)


def _labels_of(ids: Tensor, given: Mapping[str, Any]) -> Tensor | None:
    """Return a label for each token; None where there are none, or where it is not known whose they are.

    A trainer that asks for the logits of the last tokens alone (``logits_to_keep``) cuts the labels to match.
    """
    from torch.nn.functional import pad

    labels = given.get("labels")
    if labels is None or labels.ndim != 2 or len(labels) != len(ids) or labels.shape[1] > ids.shape[1]:
        return None
    return pad(labels, (ids.shape[1] - labels.shape[1], 0), value=IGNORED_LABEL)


def _count(ids: Tensor, labels: Tensor | None, given: Mapping[str, Any], limit: int) -> Tensor:
    """Return three int64: the rows of a batch, those of ``limit`` tokens, and those without a label.

    In a batch without padding a row of the batch may hold several, whose positions restart at 0.
    """
    import torch

    mask, positions = (given.get(name) for name in ("attention_mask", "position_ids"))
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[:, 0] = True
    if mask is None and positions is not None and positions.shape == ids.shape:
        starts |= positions == 0
    row = starts.flatten().cumsum(0) - 1
    present = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask.long()
    learned = present if labels is None else (labels != IGNORED_LABEL).long()
    sums = [torch.zeros_like(row).index_add_(0, row, values.flatten()) for values in (present, learned)]
    is_row = torch.arange(row.numel(), device=row.device) <= row[-1]
    return torch.stack([row[-1] + 1, (is_row & (sums[0] == limit)).sum(), (is_row & (sums[1] == 0)).sum()])


def _zeros() -> Tensor:
    import torch

    return torch.zeros(3, dtype=torch.int64)


def _share(number: int, rows: int) -> str:
    return f"{percent(number / rows)} ({number:,} of {rows:,})"
