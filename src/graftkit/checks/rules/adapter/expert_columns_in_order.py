"""Check that the columns of the experts' ``lora_B`` are in the order in which PEFT reads them.

## Why it matters

The shape is the same in either order, so every expert is loaded with the updates of others, and the adapter
only seems weak.

## Example

A trainer keeps `lora_B` of stacked experts as (out, experts, rank) and saves it with a PEFT configuration; PEFT
reads (out, rank, experts).

## How safe that is

Reordering changes no value. Both orders are valid files: be sure which one this file has.

## Sources

- https://github.com/unslothai/unsloth/issues/6930
- https://github.com/unslothai/unsloth-zoo/pull/1269
- peft: tuners.lora.layer.ParamWrapper.get_delta_weight
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.checks.adapter_files.saved_adapter import SavedAdapter
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.findings import Severity, Source
from graftkit.text import some

if TYPE_CHECKING:
    from torch import Tensor

# Trainers that lay columns out otherwise say so since September 2026. Source: unslothai/unsloth-zoo#1232.
_MARKER = "lora_B_layout"
_PEFTS = "rank_major"


def _check(context: CheckContext) -> Observation:
    saved = context.saved
    stacked = [name for name in saved.file.tensors if _is_stacked(saved, name)]
    if not stacked:
        return passed("no stacked experts are adapted")
    marker = saved.file.config.get(_MARKER)
    if marker not in {None, _PEFTS}:
        return failed(f"the configuration says that lora_B is laid out as {marker!r}", where=stacked[0])
    if context.given.data is None:
        return _by_marker(marker, "the data was not read")
    seen = [_Columns.of(saved, name) for name in stacked]
    wrong = [columns.name for columns in seen if columns.by_expert and not columns.by_rank]
    right = [columns.name for columns in seen if columns.by_rank and not columns.by_expert]
    if wrong:
        message = f"in {len(wrong)} of {len(stacked)} tensors the zero columns are whole experts only by expert"
        return failed(f"{message}: {some(wrong)}", where=wrong[0], by_expert=len(wrong), by_rank=len(right))
    if right:
        return passed(
            f"in {len(right)} tensors, experts that were never used are zero in PEFT's order", by_rank=len(right)
        )
    return _by_marker(marker, "every expert was used, so the values do not show it")


def _by_marker(marker: Any, why: str) -> Observation:
    """Return what the configuration alone shows."""
    if marker == _PEFTS:
        return passed("the configuration says that lora_B is laid out as PEFT reads it")
    return unknown(f"the configuration does not say how lora_B is laid out, and {why}", help=_COMPARE)


def _is_stacked(saved: SavedAdapter, name: str) -> bool:
    is_matrix = len(saved.file.tensors[name].shape) == 2 and ".lora_B." in name
    return is_matrix and saved.module_of(name) in saved.parameters and _experts(saved, name) > 1


def _experts(saved: SavedAdapter, name: str) -> int:
    """Return the number of experts in a ``lora_B`` of shape (out, rank * experts), 0 for another width."""
    rank = saved.rank(str(saved.module_of(name)))
    columns: int = saved.file.tensors[name].shape[1]
    return columns // rank if rank > 1 and columns % rank == 0 else 0


@dataclass(frozen=True)
class _Columns:
    """Which order explains a tensor's columns of zeros: an expert that no token reached stays at zero.

    Attributes:
        name: the tensor's name.
        by_rank: whether PEFT's order does: column ``k * experts + e`` belongs to expert e.
        by_expert: whether the other one does: column ``e * rank + k`` belongs to expert e.
    """

    name: str
    by_rank: bool
    by_expert: bool

    @classmethod
    def of(cls, saved: SavedAdapter, name: str) -> _Columns:
        zero = saved.file.tensor(name).eq(0).all(0)
        experts = _experts(saved, name)
        return cls(name, _explained(zero.view(-1, experts).T), _explained(zero.view(experts, -1)))


def _explained(by_expert: Tensor) -> bool:
    """Check whether the zero columns, (experts, rank), are those of whole experts: of some, not of all."""
    whole = by_expert.all(1)
    return bool(whole.any() and not whole.all() and (by_expert.any(1) == whole).all())


_COMPARE = (
    "compare the logits of the loaded adapter with those of the run that trained it; columns by expert "
    "are converted by B.view(out, experts, rank).transpose(1, 2).reshape(out, -1)"
)

RULE = Rule(
    code="GK506",
    title="the columns of the experts' lora_B are in PEFT's order",
    severity=Severity.ERROR,
    needs=("adapter",),
    check=_check,
    help=_COMPARE,
    since="0.1.0",
    source=Source.FILE,
)
