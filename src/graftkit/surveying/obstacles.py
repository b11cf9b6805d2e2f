"""What stands against an adapter on a module. Ordered rules; the first that objects decides."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from graftkit.families import Family
from graftkit.surveying.kinds import CONV, EMBEDDING, LINEAR, MULTIHEAD
from graftkit.surveying.quantized import missing_package, quantization_of
from graftkit.surveying.sites import Objection, Obstacle

if TYPE_CHECKING:
    from torch import nn


def objection(path: str, module: nn.Module, kind: str, family: Family | None) -> Objection | None:
    """Return why no adapter can go on the module at ``path``, or None."""
    return (
        _bypassed(path, family)
        or _quantizer_missing(module)
        or _own_forward(module, kind)
        or _grouped(module, kind)
        or _not_floating(module, kind)
    )


def _bypassed(path: str, family: Family | None) -> Objection | None:
    for weight in family.bypassed if family else ():
        if fnmatchcase(path, weight.pattern):
            return Obstacle.BYPASSED.because(reader=weight.reason)
    return None


def _own_forward(module: nn.Module, kind: str) -> Objection | None:
    """Object to a subclass that computes something else than its base class (a router that is an nn.Linear)."""
    from torch import nn

    bases: dict[str, tuple[type[nn.Module], ...]] = {
        LINEAR: (nn.Linear,),
        CONV: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        EMBEDDING: (nn.Embedding,),
    }
    base = next((b for b in bases.get(kind, ()) if isinstance(module, b)), None)
    if base is None or type(module).forward is base.forward or quantization_of(module) is not None:
        return None
    # An embedding that only scales its rows is understood: PEFT applies the same embed_scale to the adapter.
    if kind == EMBEDDING and hasattr(module, "embed_scale"):
        return None
    if kind == LINEAR and _computes_a_linear(module):
        return None
    return Obstacle.OWN_FORWARD.because(cls=type(module).__name__, base=base.__name__)


def is_linear_of_its_own(module: nn.Module) -> bool:
    """Check whether a module that is no ``nn.Linear`` has a linear's weight and sizes, and computes one."""
    from torch import nn

    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) or not isinstance(weight, nn.Parameter) or tuple(weight.shape) != sizes:
        return False
    # Its forward stays when the weight is adapted as a parameter, so it may return more than that.
    return _computes_a_linear(module, lambda output: output[0] if isinstance(output, tuple) else output)


def _computes_a_linear(module: nn.Module, main: Callable[[Any], Any] = lambda output: output) -> bool:
    """Check whether what ``main`` takes from a forward is ``x @ W.T + b``, by running it on a small copy."""
    import copy

    import torch
    from torch import nn

    probe: Any = copy.copy(module)
    probe._parameters = dict(module._parameters)
    generator = torch.Generator().manual_seed(0)
    probe.weight = nn.Parameter(torch.randn(3, 5, generator=generator), requires_grad=False)
    if getattr(module, "bias", None) is not None:
        probe.bias = nn.Parameter(torch.randn(3, generator=generator), requires_grad=False)
    probe.in_features, probe.out_features = 5, 3
    x = torch.randn(2, 4, 5, generator=generator)
    try:
        computed = main(type(module).forward(probe, x))
    except Exception:
        # Another signature, or more state than a weight and a bias: not the plain linear an adapter assumes.
        return False
    expected = nn.functional.linear(x, probe.weight, probe.bias)
    return isinstance(computed, torch.Tensor) and computed.shape == expected.shape and computed.allclose(expected)


def _grouped(module: nn.Module, kind: str) -> Objection | None:
    groups = getattr(module, "groups", 1)
    return Obstacle.GROUPED_CONV.because(groups=groups) if kind == CONV and groups != 1 else None


def _not_floating(module: nn.Module, kind: str) -> Objection | None:
    weight = getattr(module, "weight", None)
    if kind == MULTIHEAD or weight is None or weight.is_floating_point() or quantization_of(module) is not None:
        return None
    return Obstacle.NOT_FLOATING.because(dtype=weight.dtype)


def _quantizer_missing(module: nn.Module) -> Objection | None:
    package = missing_package(module)
    if package is None:
        return None
    return Obstacle.QUANTIZER_MISSING.because(quantizer=quantization_of(module), package=package)
