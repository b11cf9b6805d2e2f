"""The methods of the matrix: PEFT's, LoRA's variants, and LoRA from each initializer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graftkit.planning.config.methods import is_method_name, method_named, method_names, unknown_method
from graftkit.planning.initializers import Initializer, initializer_names, initializer_of

# A rank that fits the narrowest layers of twins.
_RANK = 2
# What a configuration requires, or what PEFT's defaults, made for real widths, have to become on a twin.
_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "adalora": {"total_step": 10},
    "fourierft": {"n_frequency": 16},
    "frod": {"progressbar": False},
    "waveft": {"n_frequency": 16},
}
# What cannot be tried here although PEFT attaches it, and why.
_UNDECIDED: Mapping[str, str] = {"poly": "it routes by task, which a batch has to name"}
_NEEDS_GPU: Mapping[str, str] = {"loftq": "it quantizes on a GPU, and there is none"}
# An initializer that is a pattern in PEFT's own list, written out.
_WRITTEN_OUT = {"pissa_niter_[number of iters]": "pissa_niter_4"}


@dataclass(frozen=True)
class MatrixMethod:
    """One way to adapt a family.

    Attributes:
        name: the method's, as a plan takes it, or the initializer's.
        method: as ``plan`` takes it.
        options: further arguments of ``plan``: what makes it fit a twin, and the initializer.
        initializer: where it is LoRA from an initializer.
        undecided: why nothing can be tried beyond the plan; None where all can.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    initializer: Initializer | None = None
    undecided: str | None = None


def matrix_methods() -> tuple[str, ...]:
    """Return every method of the installed PEFT that adapts layers, then LoRA's initializers, by name."""
    return (*method_names(), *_initializers())


def _initializers() -> tuple[str, ...]:
    return tuple(_WRITTEN_OUT.get(name, name) for name in initializer_names())


def matrix_method(name: str) -> MatrixMethod:
    """Return a method by its name.

    Raises:
        PlanError: ``method-unknown``, or ``method-not-for-layers``.
    """
    if is_method_name(name):
        method = method_named(name)
        ranked = bool(method.defaults.get(method.rank_field or ""))
        fields = {**({"r": _RANK} if ranked else {}), **_FIELDS.get(name, {})}
        return MatrixMethod(name, name, fields, undecided=_UNDECIDED.get(name))
    if name in _initializers():
        fields = {"r": _RANK, "init_lora_weights": name}
        return MatrixMethod(name, "lora", fields, initializer_of(name), _without_gpu(name))
    raise unknown_method(name, _initializers())


def _without_gpu(name: str) -> str | None:
    import torch

    return None if torch.cuda.is_available() else _NEEDS_GPU.get(name)
