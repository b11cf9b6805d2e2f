"""A plan from names and shapes alone, for the usual case: LoRA on matrices that have the same names on disk.

Nothing here looks at the model's class, or asks PEFT: a draft is what :func:`graftkit.merging.plan.make_plan`
will most likely say, a few seconds earlier. What was written by it counts only once that plan is the same.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from graftkit.adapters.file import DEFAULT_ALPHA, AdapterFile
from graftkit.merging.adapter.effects import Effects, core_path
from graftkit.merging.adapter.tensors import AdapterTensors
from graftkit.merging.arithmetic.changes import LowRank
from graftkit.merging.checkpoint.base import Base
from graftkit.merging.checkpoint.block_map import matrix_shape, parameter_blocks
from graftkit.merging.checkpoint.shards import FLOATS, Weights
from graftkit.merging.checkpoint.tied_weights import Ties
from graftkit.merging.checkpoint.weight_conversion import Group
from graftkit.merging.plan import Job, MergePlan, Part, WeightedAdapter
from graftkit.modeling.unwrapping import PEFT_PREFIX
from graftkit.planning.initializers import initializer_of

_A, _B = ".lora_A.weight", ".lora_B.weight"


def draft_plan(base: Base, adapters: Sequence[WeightedAdapter]) -> MergePlan | None:
    """Return the plan that the names suggest, None where they do not suggest one.

    Args:
        base: what is merged into; its model is not built.
        adapters: one or more.
    """
    effects = []
    for adapter in adapters:
        changes = _changes(adapter.file, base.weights)
        if changes is None:
            return None
        effects.append(Effects(AdapterTensors(adapter.file), MappingProxyType(changes), adapter.weight))
    params = sorted({param for effect in effects for param in effect.changes})
    jobs = {param: _job(param, base.weights, effects) for param in params}
    return MergePlan(base, tuple(adapters), MappingProxyType(jobs), Ties({}, {}))


def _changes(file: AdapterFile, weights: Weights) -> dict[str, tuple[LowRank]] | None:
    """Return what an adapter changes, by the weight's name; None where a tensor is not A or B of a matrix."""
    firsts = [name for name in file.tensors if name.startswith(PEFT_PREFIX) and name.endswith(_A)]
    if not _is_plain_lora(file.config) or 2 * len(firsts) != len(file.tensors):
        return None
    changes = {}
    for a in firsts:
        path = a.removesuffix(_A)
        param = f"{core_path(path)}.weight"
        if not _fits(file, a, path + _B, weights, param):
            return None
        changes[param] = (LowRank(a, path + _B, file.tensors[a].shape[0], _scale(file, a)),)
    return changes


def _is_plain_lora(config: Mapping[str, Any]) -> bool:
    """Check that PEFT scales all layers alike, and leaves the base as it is."""
    initializer = initializer_of(config.get("init_lora_weights"))
    moves_base = initializer is not None and initializer.moves_base
    plain = str(config["peft_type"]).upper() == "LORA" and not config.get("alpha_pattern")
    alpha = config.get("lora_alpha", DEFAULT_ALPHA)
    return plain and not moves_base and isinstance(alpha, int | float) and abs(alpha) <= sys.float_info.max


def _fits(file: AdapterFile, a: str, b: str, weights: Weights, param: str) -> bool:
    """Check that A and B are matrices whose product has the shape of a matrix in the base's files."""
    if b not in file.tensors or param not in weights.shard_of:
        return False
    stored, first, second = weights.stored(param), file.tensors[a].shape, file.tensors[b].shape
    if stored.dtype not in FLOATS or {len(stored.shape), len(first), len(second)} != {2} or 0 in first:
        return False
    return stored.shape == (second[0], first[1]) and first[0] == second[1]


def _scale(file: AdapterFile, a: str) -> float:
    """Return PEFT's scaling. Source: ``peft.tuners.lora.layer.LoraLayer.update_layer``."""
    alpha, rank = file.config.get("lora_alpha", DEFAULT_ALPHA), file.tensors[a].shape[0]
    return float(alpha / (math.sqrt(rank) if file.config.get("use_rslora") else rank))


def _job(param: str, weights: Weights, effects: Sequence[Effects]) -> Job:
    stored = weights.stored(param)
    blocks = parameter_blocks(param, stored.shape, stacked=False)
    parts = tuple(Part(c, param, effect, blocks) for effect in effects for c in effect.changes.get(param, ()))
    group = Group({param: ""}, (param,), None, param, {param: param})
    return Job(param, param, stored, matrix_shape(stored.shape, stacked=False)[2], group, parts)
