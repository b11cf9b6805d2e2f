"""The columns of an expert's ``lora_B`` must stand where PEFT looks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    if context.saved.problems:
        return unknown(f"the configuration cannot be used: {context.saved.problems[0]}")
    stacked = [name for name in context.adapter.tensors if _is_stacked(context, name)]
    if not stacked:
        return passed("no stacked experts are adapted")
    marker = context.adapter.config.get(_MARKER)
    if marker not in {None, _PEFTS}:
        return failed(f"the configuration says that lora_B is laid out as {marker!r}", where=stacked[0])
    if context.given.data is None:
        return _told(marker, "the data was not read")
    seen = [_Columns.of(context, name) for name in stacked]
    wrong = [columns.name for columns in seen if columns.by_expert and not columns.by_rank]
    right = [columns.name for columns in seen if columns.by_rank and not columns.by_expert]
    if wrong:
        message = f"in {len(wrong)} of {len(stacked)} tensors whole experts are zero only if columns go by expert"
        return failed(f"{message}: {some(wrong)}", where=wrong[0], by_expert=len(wrong), by_rank=len(right))
    if right:
        return passed(f"experts that were never used are zero where PEFT looks, in {len(right)} tensors")
    return _told(marker, "every expert was used, so the numbers do not tell")


def _told(marker: Any, why: str) -> Observation:
    """What the configuration alone says."""
    if marker == _PEFTS:
        return passed("the configuration says that lora_B is laid out as PEFT reads it")
    return unknown(f"nothing says how lora_B is laid out, and {why}", help=_COMPARE)


def _is_stacked(context: CheckContext, name: str) -> bool:
    module = context.saved.module_of(name)
    wide = len(context.saved.file.tensors[name].shape) == 2 and ".lora_B." in name
    return wide and module in context.saved.parameters and _experts(context, name) > 1


def _experts(context: CheckContext, name: str) -> int:
    """How many experts share the tensor, by its width; 0 where that is no multiple of the rank."""
    rank = context.saved.rank(str(context.saved.module_of(name)))
    columns: int = context.saved.file.tensors[name].shape[1]
    return columns // rank if rank > 1 and columns % rank == 0 else 0


@dataclass(frozen=True)
class _Columns:
    """Which reading of a tensor explains its columns of zeros: an expert that no token reached stays at zero.

    Attributes:
        name: of the tensor.
        by_rank: whether PEFT's reading does: column ``k * experts + e`` is expert e's.
        by_expert: whether the other one does: column ``e * rank + k`` is.
    """

    name: str
    by_rank: bool
    by_expert: bool

    @classmethod
    def of(cls, context: CheckContext, name: str) -> _Columns:
        zero = context.adapter.tensor(name).eq(0).all(0)
        experts = _experts(context, name)
        return cls(name, _explained(zero.view(-1, experts).T), _explained(zero.view(experts, -1)))


def _explained(by_expert: Tensor) -> bool:
    """Whether the zero columns, (experts, rank), are those of whole experts, of some and not of all."""
    whole = by_expert.all(1)
    return bool(whole.any() and not whole.all() and (by_expert.any(1) == whole).all())


_COMPARE = (
    "compare the logits of the loaded adapter with those of the run that trained it; columns that go by expert "
    "are put right by B.view(out, experts, rank).transpose(1, 2).reshape(out, -1)"
)

RULE = Rule(
    code="GK506",
    title="the columns of an expert's lora_B are where PEFT looks for them",
    severity=Severity.ERROR,
    needs=("adapter",),
    check=_check,
    why=(
        "the shape is the same either way, so that every expert is loaded with the updates of others, and the "
        "adapter seems merely weak"
    ),
    example=(
        "A trainer that keeps `lora_B` of stacked experts as (out, experts, rank) saves it beside a configuration "
        "of PEFT's, which reads (out, rank, experts)."
    ),
    help=_COMPARE,
    safety="Reordering changes no value, but which order is right must be known: both are valid files.",
    since="0.1.0",
    sources=(
        "https://github.com/unslothai/unsloth/issues/6930",
        "https://github.com/unslothai/unsloth-zoo/pull/1269",
        "peft: tuners.lora.layer.ParamWrapper.get_delta_weight",
    ),
    source=Source.FILE,
)
