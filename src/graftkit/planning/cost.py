"""What a plan costs: trainable parameters exactly, memory as the sum of its known parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError
from graftkit.planning.config.extras import ParameterSizes, extra_params
from graftkit.planning.decisions import Attached
from graftkit.planning.matching import value_at
from graftkit.planning.trials.skeleton import Slot, ask, method_refused, slots_of
from graftkit.surveying.sites import ModelMap

if TYPE_CHECKING:
    from peft import PeftConfig

# Up to this many sites are attached whole, which takes under a second; larger models are counted by group, unless
# they have so many groups that their trials attach more.
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
            **asdict(self),
            "total": self.total,
            "unit": "bytes",
            "assumes": "a base in 16 bit unless quantized, an adapter in 32 bit, AdamW; activations not counted",
        }


def memory_of(base_bytes: int, trainable: int) -> Memory:
    """Return the memory for a frozen base of ``base_bytes`` and ``trainable`` trained parameters."""
    return Memory(base_bytes, 4 * trainable, 4 * trainable, 8 * trainable)


def planned_params(
    config: PeftConfig, model_map: ModelMap, attached: Sequence[Attached], sizes: ParameterSizes
) -> int:
    """Return the elements that a plan's configuration trains: adapters, and whatever else it asks for.

    Raises:
        PlanError: ``method-refused`` or ``pattern-ignored``.
    """
    patterns = {f: v for f, v in vars(config).items() if f.endswith("_pattern") and isinstance(v, dict) and v}
    slots = slots_of(model_map, (a.site for a in attached))
    by_path = dict(zip((a.target_path for a in attached), slots, strict=True))
    for name, pattern in patterns.items():
        if not name.startswith(_SCALE_PATTERNS):
            _check_used(config, name, pattern, by_path)
    groups = [tuple(str(value_at(pattern, path)) for pattern in patterns.values()) for path in by_path]
    return trainable_params(config, slots, groups) + extra_params(
        model_map, config, [a.path for a in attached], sizes
    )


# Patterns of numbers that no tensor's size depends on.
_SCALE_PATTERNS = ("alpha_", "lambda_")


def _check_used(config: PeftConfig, name: str, pattern: Mapping[str, Any], slots: Mapping[str, Slot]) -> None:
    """Refuse a pattern that a method's configuration takes and its layers do not use.

    Raises:
        PlanError: ``pattern-ignored``.
    """
    usual = getattr(config, name.removesuffix("_pattern").replace("rank", "r"), None)
    slot = next((s for path, s in slots.items() if value_at(pattern, path) not in {None, usual}), None)
    if slot is None:
        return
    without = copy(config)
    setattr(without, name, {})
    answers = ask(config, [slot]), ask(without, [slot])
    if None not in {a.trainable for a in answers} and answers[0].trainable == answers[1].trainable:
        raise PlanError(
            f"{type(config).__name__} takes {name}, and this version of PEFT does not use it",
            where=slot.path,
            why="a layer gets the same number of parameters with and without it",
            help="leave it out, or plan and attach each group of sites as a separate adapter",
            code="pattern-ignored",
        )


def trainable_params(config: PeftConfig, slots: Sequence[Slot], groups: Sequence[Any] = ()) -> int:
    """Return the trainable elements of the adapters that ``config`` puts on ``slots``, as PEFT itself makes them.

    Args:
        config: exact for the model the slots belong to.
        slots: every planned site.
        groups: what else tells slots apart, one value a slot: those that agree in it, in kind, shape and name
            carry adapters of the same size.

    Raises:
        PlanError: ``method-refused``, with PEFT's own message.
    """
    count = _BY_SHAPE.get(type(config).__name__)
    if count is not None:
        return sum(count(config, slot) for slot in slots)
    if len(slots) <= max(_ATTACHED_WHOLE, attached_by_group(slots, groups)):
        return _count(config, slots)
    return count_by_group(config, slots, groups)


def _count(config: PeftConfig, slots: Sequence[Slot]) -> int:
    answer = ask(config, slots)
    if answer.refusal is not None:
        raise method_refused(config, answer.refusal)
    if answer.trainable is None:
        raise method_refused(config, "PEFT cannot size this method's adapters without the weights")
    return answer.trainable


def count_by_group(config: PeftConfig, slots: Sequence[Slot], groups: Sequence[Any] = ()) -> int:
    """Count two of each group, then what one more of each adds: shared tensors are counted once that way.

    Arguments and errors as in :func:`trainable_params`.
    """
    members = _members(slots, groups)
    two_of_each = [slot for group in members for slot in group[:2]]
    base = _count(config, two_of_each)
    larger = (group for group in members if len(group) > 2)
    return base + sum((len(g) - 2) * (_count(config, [*two_of_each, g[2]]) - base) for g in larger)


def _members(slots: Sequence[Slot], groups: Sequence[Any]) -> list[list[Slot]]:
    members: dict[Any, list[Slot]] = defaultdict(list)
    for slot, group in zip(slots, groups or [None] * len(slots), strict=True):
        members[slot.kind, slot.shape, slot.bias, slot.path.rpartition(".")[2], group].append(slot)
    return list(members.values())


def attached_by_group(slots: Sequence[Slot], groups: Sequence[Any] = ()) -> int:
    """Return how many sites :func:`count_by_group` attaches in all its trials."""
    members = _members(slots, groups)
    two_of_each = sum(len(group[:2]) for group in members)
    return two_of_each + sum(two_of_each + 1 for group in members if len(group) > 2)


# ---- methods that read the weights while they are made: their sizes still follow from the shapes ----


def _shira(config: Any, slot: Slot) -> int:
    """Count as many as LoRA of that rank has (peft.tuners.shira.layer, ``num_shira_weight``)."""
    parameters = int(config.r) * (slot.inputs + slot.outputs)
    if parameters > slot.inputs * slot.outputs:
        raise method_refused(
            config, f"rank {config.r} makes more parameters than {slot.path} has: r has to be smaller"
        )
    return parameters


def _frod(config: Any, slot: Slot) -> int:
    """Count the diagonal, and a share of what is off it (peft.tuners.frod.model, ``_init_frod_projections``)."""
    off_diagonal = slot.inputs * (slot.inputs - 1)
    sparse = min(int(slot.inputs**2 * config.sparse_rate), off_diagonal)
    if config.sparse_rate > 0 and off_diagonal:
        sparse = max(1, sparse)
    return slot.inputs + sparse


def _adamss(config: Any, slot: Slot) -> int:
    """Count a row a subspace and rank, a column an output and rank (peft.tuners.adamss.layer, ``update_layer``).

    Exact while every subspace holds at least ``subspace_rank`` outputs, which clustering decides.
    """
    rank = min(config.r, slot.inputs + slot.bias, slot.outputs)
    return int(config.subspace_rank * (slot.outputs + config.num_subspaces * rank))


def is_upper_bound(config: PeftConfig) -> bool:
    """Check whether the count of trainable parameters is the most there can be: AdaMSS clusters the weights."""
    return type(config).__name__ == "AdamssConfig"


_BY_SHAPE: Mapping[str, Callable[[Any, Slot], int]] = {
    "ShiraConfig": _shira,
    "FrodConfig": _frod,
    "AdamssConfig": _adamss,
}
