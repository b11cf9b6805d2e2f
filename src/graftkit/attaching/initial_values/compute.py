"""The first values of an attached LoRA, computed from batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from graftkit.attaching.initial_values.corda import corda
from graftkit.attaching.initial_values.eva import eva
from graftkit.attaching.initial_values.layers import PlainLora, check_unquantized
from graftkit.attaching.initial_values.lora_ga import lora_ga
from graftkit.errors import AttachError
from graftkit.modeling.module_mode import keep_modes
from graftkit.planning.initializers import initializer_of

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel
    from torch import nn

_FROM_BATCHES: Mapping[str, Callable[[PlainLora, Sequence[Mapping[str, Any]]], None]] = {
    "eva": eva,
    "corda": corda,
    "lora_ga": lora_ga,
}


def as_plain(config: PeftConfig) -> PeftConfig:
    """Return a copy of a LoRA's configuration that PEFT attaches as plain LoRA, of the same shapes."""
    plain: Any = copy.deepcopy(config)
    plain.init_lora_weights = True
    return plain


def compute_initial_values(
    model: PeftModel, config: LoraConfig, batches: Sequence[Mapping[str, Any]], *, adapter_name: str = "default"
) -> None:
    """Give an attached plain LoRA the values of the initializer that ``config`` names.

    The model keeps its modes and its output. EVA may move ranks between layers, down to none.

    Args:
        model: with an untrained adapter from ``as_plain(config)``.
        batches: model inputs. An initializer that needs no data leaves them alone.

    Raises:
        AttachError: as ``graftkit.initialize``; the base model is then as it was, the adapter may not be.
    """
    lora = PlainLora.of(model, config, adapter_name)
    row = initializer_of(config.init_lora_weights)
    fill = _FROM_BATCHES.get(row.name) if row is not None else None
    with (
        keep_modes(model),
        _removing_new_hooks(model),
        _restoring_gradients(model),
        _peft_refusal_as_error(config),
    ):
        if fill is not None:
            fill(lora, batches)
        else:
            check_unquantized(lora)
            lora.redraw()


@contextmanager
def _peft_refusal_as_error(config: LoraConfig) -> Iterator[None]:
    """Raise PEFT's refusals, which are all of one type, as ours."""
    try:
        yield
    except ValueError as error:
        raise AttachError(
            f"PEFT cannot initialize this adapter with {config.init_lora_weights!r}",
            why=str(error),
            help="change the data or the option that the message names, or leave the initializer out",
            code="initialize-refused",
        ) from error


@contextmanager
def _removing_new_hooks(model: nn.Module) -> Iterator[None]:
    """Remove the hooks that an interrupted preprocessing leaves on the model's modules."""
    tables = [t for m in model.modules() for t in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
    before = [set(table) for table in tables]
    try:
        yield
    finally:
        for table, known in zip(tables, before, strict=True):
            for handle in [handle for handle in table if handle not in known]:
                del table[handle]


@contextmanager
def _restoring_gradients(model: nn.Module) -> Iterator[None]:
    """Restore, after an interrupted preprocessing, which parameters are trained; remove its gradients."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, requires_grad in trained:
            parameter.grad = None
            parameter.requires_grad_(requires_grad)
        raise
