"""What a plan costs: trainable parameters exactly, memory as the sum of its known parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError
from graftkit.planning.trials.skeleton import Slot, ask

if TYPE_CHECKING:
    from peft import PeftConfig

# Up to this many sites are attached whole, which takes under a second; larger models are counted by group.
_ATTACHED_WHOLE = 300


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that training needs besides activations, which depend on the batch.

    Attributes:
        base_weights: the frozen model: two bytes a parameter, or what a quantization plan says.
        adapter_weights: the adapter, at four bytes a parameter (PEFT keeps it in float32 on a 16-bit base).
        gradients: four bytes a trainable parameter.
        optimizer: AdamW's two moments, eight bytes a trainable parameter.
    """

    base_weights: int
    adapter_weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.base_weights + self.adapter_weights + self.gradients + self.optimizer

    def to_dict(self) -> dict[str, Any]:
        return {
            "base_weights": self.base_weights,
            "adapter_weights": self.adapter_weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "total": self.total,
            "unit": "bytes",
            "assumes": "a base in 16 bit unless quantized, an adapter in 32 bit, AdamW; activations not counted",
        }


def memory_of(base_bytes: int, trainable: int) -> Memory:
    """Memory for a frozen base of ``base_bytes`` and ``trainable`` trained parameters."""
    return Memory(base_bytes, 4 * trainable, 4 * trainable, 8 * trainable)


def trainable_params(config: PeftConfig, slots: Sequence[Slot], groups: Sequence[Any] = ()) -> int:
    """Trainable elements of the adapters that ``config`` puts on ``slots``, as PEFT itself makes them.

    Args:
        config: exact for the model the slots belong to.
        slots: every planned site.
        groups: what else tells slots apart, one value a slot: those that agree in it, in kind, shape and name
            carry adapters of the same size.

    Raises:
        PlanError: ``method-refused``, with PEFT's own message.
    """
    counted = _counted_without_weights(config, slots)
    if counted is not None:
        return counted
    if len(slots) <= _ATTACHED_WHOLE:
        return _count(config, slots)
    return _count_by_group(config, slots, groups or [None] * len(slots))


def _count(config: PeftConfig, slots: Sequence[Slot]) -> int:
    answer = ask(config, slots)
    if answer.refusal is not None:
        raise refused(config, answer.refusal)
    if answer.trainable is None:
        raise refused(config, "PEFT cannot size this method's adapters without the weights")
    return answer.trainable


def refused(config: PeftConfig, why: str) -> PlanError:
    """PEFT's refusal of a configuration on the planned sites."""
    return PlanError(
        f"PEFT cannot put this {type(config).__name__} on the planned sites",
        why=why,
        help="change the option that the message names, or leave those sites out of the targets",
        code="method-refused",
    )


def _count_by_group(config: PeftConfig, slots: Sequence[Slot], groups: Sequence[Any]) -> int:
    """Two of each group, then what one more of each adds: shared tensors are counted once that way."""
    members: dict[Any, list[Slot]] = defaultdict(list)
    for slot, group in zip(slots, groups, strict=True):
        members[slot.kind, slot.shape, slot.bias, slot.path.rpartition(".")[2], group].append(slot)
    few = {key: group[:2] for key, group in members.items()}
    base = [slot for group in few.values() for slot in group]
    total = _count(config, base)
    first = total
    for group in members.values():
        if len(group) > 2:
            total += (len(group) - 2) * (_count(config, [*base, group[2]]) - first)
    return total


# ---- methods that read the weights while they are made: their sizes still follow from the shapes ----


def _counted_without_weights(config: PeftConfig, slots: Sequence[Slot]) -> int | None:
    count = _BY_SHAPE.get(type(config).__name__)
    return None if count is None else sum(count(config, slot) for slot in slots)


def _shira(config: Any, slot: Slot) -> int:
    """As many as LoRA of that rank (peft.tuners.shira.layer, ``num_shira_weight``)."""
    many = int(config.r) * (slot.inputs + slot.outputs)
    if many > slot.inputs * slot.outputs:
        raise refused(config, f"rank {config.r} makes more parameters than {slot.path} has: r has to be smaller")
    return many


def _frod(config: Any, slot: Slot) -> int:
    """The diagonal, and a share of what is off it (peft.tuners.frod.model, ``_init_frod_projections``)."""
    off_diagonal = slot.inputs * (slot.inputs - 1)
    sparse = min(int(slot.inputs**2 * config.sparse_rate), off_diagonal)
    if config.sparse_rate > 0 and off_diagonal:
        sparse = max(1, sparse)
    return slot.inputs + sparse


def _adamss(config: Any, slot: Slot) -> int:
    """One row a subspace and rank, one column an output and rank (peft.tuners.adamss.layer, ``update_layer``).

    Exact while every subspace holds at least ``subspace_rank`` outputs, which clustering decides.
    """
    rank = min(config.r, slot.inputs + slot.bias, slot.outputs)
    return int(config.subspace_rank * (slot.outputs + config.num_subspaces * rank))


_BY_SHAPE: Mapping[str, Callable[[Any, Slot], int]] = MappingProxyType(
    {"ShiraConfig": _shira, "FrodConfig": _frod, "AdamssConfig": _adamss}
)
