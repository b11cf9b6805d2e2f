"""Refuse adapters that cannot be merged, with what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graftkit.adapters.file import AdapterFile
from graftkit.errors import MergeError
from graftkit.planning.initializers import initializer_of

_Reason = tuple[str, str, str, str]


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


def _prompt(config: Any) -> _Reason | None:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    trained_tokens = config.peft_type == PeftType.TRAINABLE_TOKENS
    if not config.is_prompt_learning and (trained_tokens or config.peft_type in PEFT_TYPE_TO_PREFIX_MAPPING):
        return None
    return (
        "merge-prompt",
        f"an adapter of type {config.peft_type.value} cannot be merged",
        "it adds tokens or modules to the model instead of changing weights",
        "serve it unmerged",
    )


def _depends_on_input(config: Any) -> _Reason | None:
    from peft import PeftType

    routed = (getattr(PeftType, name, None) for name in ("LILY", "POLY", "XLORA", "MIXED"))
    fields = (("alora_invocation_tokens", "aLoRA"), ("arrow_config", "Arrow"), ("use_qalora", "QALoRA"))
    named = next((word for field, word in fields if getattr(config, field, None)), None)
    if named is None and config.peft_type not in set(routed):
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
