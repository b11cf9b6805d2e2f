"""Refuse adapters that cannot be merged, with what to do instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from graftkit.adapters.file import AdapterFile
from graftkit.adapters.trained_bounds import TrainedBounds, stated_bounds
from graftkit.errors import MergeError, reraise_as
from graftkit.merging.checkpoint.base import Base
from graftkit.merging.errors import base_unreadable
from graftkit.modeling.bounded_wrappers import bounded_wrappers
from graftkit.planning.initializers import initializer_of
from graftkit.surveying.checkpoint.scalars import read_scalars

_Reason = tuple[str, str, str, str]

# PEFT's types whose update depends on a router.
_ROUTED = frozenset({"LILY", "POLY", "XLORA", "MIXED"})


def rebuilds_base(config: Any) -> bool:
    """Check whether PEFT changes the base weights before it loads this adapter: B·A alone is not the update."""
    init = initializer_of(getattr(config, "init_lora_weights", None))
    return init is not None and init.moves_base and init.rebuilt_on_load is True


def refuse(file: AdapterFile, config: Any) -> None:
    """Raise if an adapter has no merged form; the first reason counts.

    Raises:
        MergeError: ``merge-prompt``, ``merge-depends-on-input``, ``merge-layer-replication``, ``merge-base-lost``.
    """
    for check in _CHECKS:
        reason = check(config)
        if reason is not None:
            code, what, why, help = reason
            raise MergeError(what, where=str(file.folder), why=why, help=help, code=code)


def refuse_other_bounds(file: AdapterFile, base: Base, params: Iterable[str]) -> None:
    """Raise if an adapter was, or may have been, trained without the bounds that the base has around its linears.

    Args:
        params: the base's parameters that the adapter changes.

    Raises:
        MergeError: ``merge-trained-without-bounds``, ``merge-trained-bounds-unknown``.
    """
    bounds = stated_bounds(file)
    if bounds is None or bounds is TrainedBounds.KEPT:
        return
    changed = tuple(params)
    bounded = [w for w in bounded_wrappers(base.model) if any(p.startswith(f"{w.path}.") for p in changed)]
    names = [f"{wrapper.path}.{name}" for wrapper in bounded for name in wrapper.bounds]
    with reraise_as(base_unreadable, base.folder):
        values = read_scalars(base.model, base.folder, names)
    finite = [name for name, value in values.items() if math.isfinite(value)]
    if not finite:
        return
    removed = bounds is TrainedBounds.REMOVED
    raise MergeError(
        f"the adapter {'was' if removed else 'may have been'} trained without bounds that this base has",
        where=str(file.folder),
        why=f"a merged linear stays within them, and computes something else than was trained: {finite[0]} is "
        f"{values[finite[0]]:g}",
        help="serve it unmerged under gk.unwrap(model, allow_change=True)"
        if removed
        else "find out how it was trained, and let gk.migrate(…, trained_without_clamp=True or False) state it",
        code="merge-trained-without-bounds" if removed else "merge-trained-bounds-unknown",
    )


def changes_no_weights(peft_type: str) -> bool:
    """Check whether adapters of a method cannot be merged: they add tokens or modules, or depend on the input.

    Args:
        peft_type: in capitals, as a configuration has it; of one that PEFT does not know nothing is said.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = next((kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value == peft_type), None)
    if kind is None:
        return False
    return peft_type in _ROUTED or _adds_to_the_model(PEFT_TYPE_TO_CONFIG_MAPPING[kind], kind)


def _adds_to_the_model(config: Any, peft_type: Any) -> bool:
    """Check whether adapters of a method, by its configuration or the class of it, add tokens or modules."""
    from peft import PeftType
    from peft.config import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    of_prompts = issubclass(config if isinstance(config, type) else type(config), PromptLearningConfig)
    in_weights = peft_type == PeftType.TRAINABLE_TOKENS or peft_type in PEFT_TYPE_TO_PREFIX_MAPPING
    return of_prompts or not in_weights


def _prompt(config: Any) -> _Reason | None:
    if not _adds_to_the_model(config, config.peft_type):
        return None
    return (
        "merge-prompt",
        f"an adapter of type {config.peft_type.value} cannot be merged",
        "it adds tokens or modules to the model instead of changing weights",
        "serve it unmerged",
    )


def _depends_on_input(config: Any) -> _Reason | None:
    fields = (("alora_invocation_tokens", "aLoRA"), ("arrow_config", "Arrow"), ("use_qalora", "QALoRA"))
    named = next((word for field, word in fields if getattr(config, field, None)), None)
    if named is None and config.peft_type.value not in _ROUTED:
        return None
    return (
        "merge-depends-on-input",
        f"an adapter of type {named or config.peft_type.value} cannot be merged",
        "its update depends on the input (on the place of a trigger, or on a router), so no weight can hold it",
        "serve it unmerged with PEFT, or train a plain LoRA adapter",
    )


def _replication(config: Any) -> _Reason | None:
    if not getattr(config, "layer_replication", None):
        return None
    return (
        "merge-layer-replication",
        "an adapter with replicated layers cannot be merged",
        "several of its layers share one weight of the base, and each has its own update",
        "serve it unmerged; or build the deeper model, save it, and train on that",
    )


def _lost_base(config: Any) -> _Reason | None:
    """Refuse an adapter whose base weights PEFT changed when training began, and cannot change again.

    For LoftQ, PEFT quantizes the base and starts from the quantization error. It needs a GPU for that, and from
    the second iteration on the result depends on the last bits of a decomposition: another machine may get
    another base. Source: ``peft.utils.loftq_utils.loftq_init``.
    """
    init = initializer_of(getattr(config, "init_lora_weights", None))
    if init is None or init.rebuilt_on_load:
        return None
    if init.rebuilt_on_load is None:
        return (
            "merge-base-lost",
            "an adapter with init_lora_weights='loftq' does not fit the published base",
            "PEFT quantized the base weights when training began, and the update corrects the error: on weights "
            "that were not quantized it is wrong",
            "where it can be loaded with PEFT (on a GPU): base = model.unload(), base.save_pretrained(DIR), set "
            "init_lora_weights to true in adapter_config.json, and merge onto DIR",
        )
    return (
        "merge-base-lost",
        f"the base of an adapter with init_lora_weights={config.init_lora_weights!r} cannot be rebuilt",
        "PEFT changed the base weights when training began, with data or random numbers that the adapter lacks",
        "in the process that trained it: save_pretrained(..., path_initial_model_for_weight_conversion=...), "
        "which turns it into a plain LoRA adapter",
    )


_CHECKS: tuple[Callable[[Any], _Reason | None], ...] = (_prompt, _depends_on_input, _replication, _lost_base)
