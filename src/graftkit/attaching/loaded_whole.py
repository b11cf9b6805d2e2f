"""Did an adapter load whole? PEFT and transformers load what fits, and at most warn of the rest."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from graftkit.errors import AdapterError
from graftkit.text import some

if TYPE_CHECKING:
    from torch import nn


def check_loaded_whole(
    model: Any, adapter_name: str, result: Any, source: str, *, sizes_may_differ: bool = False
) -> None:
    """Check that every tensor of a file went into an adapter, and that the adapter took none from elsewhere.

    Args:
        model: a ``PeftModel``, or a transformers model with an adapter.
        result: what its ``load_adapter`` returned.
        source: the adapter's folder or hub id.
        sizes_may_differ: whether the caller accepts that tensors of another size stay out of the model.

    Raises:
        AdapterError: ``adapter-partly-loaded``.
    """
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    config = model.peft_config[adapter_name]
    if config.is_prompt_learning:
        # PEFT loads a prompt apart from the model's modules, and raises where it does not fit.
        return
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    judged = prefix and not sizes_may_differ
    missing = _not_loaded(model, prefix, adapter_name, result.missing_keys) if judged else []
    dropped = sorted(result.unexpected_keys)
    if not missing and not dropped:
        return
    faults = [
        f"{len(dropped)} of its tensors have no place in the model: {some(dropped, 2)}" if dropped else "",
        f"{len(missing)} of the adapter's own were not in the file: {some(missing, 2)}" if missing else "",
    ]
    raise AdapterError(
        "the adapter did not load completely",
        where=source,
        why="; ".join(filter(None, faults)),
        help="gk.migrate(adapter, base, out) rewrites the names that other tools give to wrapped linears, or says "
        "which tensors do not fit this base; load the base again before you retry",
        code="adapter-partly-loaded",
    )


def _not_loaded(model: nn.Module, prefix: str, adapter_name: str, missing: Iterable[str]) -> list[str]:
    """Return the adapter's tensors that kept their initial values.

    A tensor that layers share (VB-LoRA's vectors) has many names, and is saved under one of them.
    """
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    own = {name: id(tensor) for name, tensor in named if _is_of(name, prefix, adapter_name)}
    absent = set(missing) & own.keys()
    loaded = {tensor for name, tensor in own.items() if name not in absent}
    return sorted(name for name in absent if own[name] not in loaded)


def _is_of(name: str, prefix: str, adapter_name: str) -> bool:
    """Check whether a tensor belongs to the adapter: PEFT keeps it as ``lora_A.<adapter name>``."""
    kinds = (prefix, "modules_to_save", "trainable_tokens")
    return any(kind.startswith(kinds) and of == adapter_name for kind, of in pairwise(name.split(".")))
