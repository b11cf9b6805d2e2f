"""Activation checkpointing on a live model: the mode it is in, and trying another one for a block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any

from graftkit.modeling.unwrapping import base_model_of

if TYPE_CHECKING:
    from torch import nn

    from graftkit.recipes.training import Training

# Where transformers keeps a module's mode (PreTrainedModel._set_gradient_checkpointing), and the handles that
# PreTrainedModel.enable_input_require_grads leaves on the model.
_FLAG, _FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"
_HANDLES = ("_require_grads_hooks", "_require_grads_hook")


class Mode(StrEnum):
    """How activations are recomputed in the backward pass."""

    OFF = "off"
    NON_REENTRANT = "non-reentrant"
    REENTRANT = "re-entrant"
    CUSTOM = "custom"


@dataclass(frozen=True)
class InUse:
    """The mode that training will use.

    Attributes:
        mode: None where it is not known.
        live: whether only the model is in this mode, and the training settings do not ask for it.
        because: what decides it: as ``Training.reentrant_because``, "model", or "" where the mode is not known.
    """

    mode: Mode | None
    live: bool
    because: str


def in_use(model: nn.Module, training: Training | None) -> InUse:
    """Return the model's mode if checkpointing is enabled on it, else that of the training settings.

    Where both agree, the settings are the cause, and what can be changed.
    """
    mode = mode_of(model)
    wanted = None if training is None else _wanted(training)
    if mode is not Mode.OFF and (wanted is None or wanted.mode is not mode):
        return InUse(mode, live=True, because="model")
    return InUse(None, live=False, because="") if wanted is None else wanted


def _wanted(training: Training) -> InUse:
    if not training.checkpointing:
        return InUse(Mode.OFF, live=False, because="args")
    mode = Mode.REENTRANT if training.reentrant else Mode.NON_REENTRANT
    return InUse(mode, live=False, because=training.reentrant_because)


def mode_of(model: nn.Module) -> Mode:
    """Return the mode of the model's layers; where they differ, the one that may do most harm."""
    modes = {_mode_of_function(getattr(m, _FUNCTION, None)) for m in _layers(model) if getattr(m, _FLAG)}
    return next((mode for mode in (Mode.CUSTOM, Mode.REENTRANT, Mode.NON_REENTRANT) if mode in modes), Mode.OFF)


def can_checkpoint(model: nn.Module) -> bool:
    """Check whether any of the model's layers can recompute its activations."""
    return bool(_layers(model))


@contextmanager
def checkpointing(model: nn.Module, mode: Mode | None) -> Iterator[None]:
    """Put the model's layers into ``mode`` for the block; None leaves each in its own mode.

    transformers recomputes a layer only while it is in training mode. Only the layers themselves are put into
    training mode, whatever the mode that is tried, so that two modes differ in nothing else; their submodules keep
    their mode, and their own dropout rates are set to zero. Where a mode is tried, the model's inputs require
    gradients, as TRL and PEFT arrange it. Everything is restored after the block.
    """
    layers = _layers(model)
    kept = [(vars(owner), _own(owner)) for owner in _owners(layers)]
    try:
        for module in layers:
            if mode is not None:
                _set(module, mode)
            module.training = mode is not None or bool(getattr(module, _FLAG))
        for fields, _ in kept:
            fields.update(dict.fromkeys(_dropout(fields), 0.0))
        with _inputs_in_the_graph(model, mode), _quiet():
            yield
    finally:
        for fields, own in kept:
            for name in (_FLAG, _FUNCTION):
                fields.pop(name, None)
            fields.update(own)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(getattr(module, _FLAG, None), bool)]


def _owners(layers: list[nn.Module]) -> list[Any]:
    """Return the layers and their configurations, which may have dropout rates that a layer reads."""
    # A few layers hold a part of their model's configuration as a plain mapping.
    configs = [config for layer in layers if hasattr(config := getattr(layer, "config", None), "__dict__")]
    return list({id(owner): owner for owner in (*layers, *configs)}.values())


def _own(owner: Any) -> dict[str, Any]:
    names = (_FLAG, _FUNCTION, "training", *_dropout(vars(owner)))
    return {name: vars(owner)[name] for name in names if name in vars(owner)}


def _dropout(fields: Mapping[str, Any]) -> list[str]:
    """Return the names of the fields that functional dropout reads: ``dropout``, ``layerdrop`` …"""
    return [name for name, value in fields.items() if "drop" in name and isinstance(value, float)]


def _set(module: Any, mode: Mode) -> None:
    from torch.utils.checkpoint import checkpoint

    setattr(module, _FLAG, mode is not Mode.OFF)
    setattr(module, _FUNCTION, partial(checkpoint, use_reentrant=mode is Mode.REENTRANT))


def _mode_of_function(function: Any) -> Mode:
    """Return the mode that a layer's checkpointing function implements.

    transformers sets a ``functools.partial`` of torch's function, or of one of its own that calls it. Without
    ``use_reentrant``, torch takes the re-entrant implementation (torch.utils.checkpoint.checkpoint).
    """
    from torch.utils.checkpoint import checkpoint

    called, keywords = (function.func, function.keywords) if isinstance(function, partial) else (function, {})
    if called is not checkpoint and "use_reentrant" not in keywords:
        return Mode.CUSTOM
    return Mode.NON_REENTRANT if keywords.get("use_reentrant") is False else Mode.REENTRANT


@contextmanager
def _inputs_in_the_graph(model: Any, mode: Mode | None) -> Iterator[None]:
    """Make the outputs of the input embeddings require gradients for the block, if ``mode`` is to be tried."""
    base = base_model_of(model)
    if mode in {None, Mode.OFF} or not hasattr(base, "enable_input_require_grads"):
        yield
        return
    kept = {name: vars(base).pop(name) for name in _HANDLES if name in vars(base)}
    base.enable_input_require_grads()
    try:
        yield
    finally:
        for handle in vars(base).get(_HANDLES[0], ()):
            handle.remove()
        for name in _HANDLES:
            vars(base).pop(name, None)
        vars(base).update(kept)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warnings on ``use_reentrant`` and on inputs without gradients: both are measured here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*use_reentrant")
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        yield
