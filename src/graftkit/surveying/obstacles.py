"""Can an adapter go here, and if not, why not. Ordered rules; the first one that objects is the reason."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from graftkit.families import Family
from graftkit.surveying.quantized import missing_package, quantization_of

if TYPE_CHECKING:
    from torch import nn

LINEAR = "linear"
TRANSPOSED = "conv1d_transposed"
CONV = "conv"
EMBEDDING = "embedding"
MULTIHEAD = "multihead_attention"
PARAMETER = "parameter"


def kind_of(module: nn.Module) -> str | None:
    """The kind of site a module is, or None where it is none. Quantized linears are linears."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (nn.MultiheadAttention, MULTIHEAD),
        (nn.Linear, LINEAR),
        (Conv1D, TRANSPOSED),
        (nn.Embedding, EMBEDDING),
        ((nn.Conv1d, nn.Conv2d, nn.Conv3d), CONV),
    )
    if quantization_of(module) is not None:
        return LINEAR
    return next((kind for cls, kind in kinds if isinstance(module, cls)), None)


def objection(path: str, module: nn.Module, kind: str, family: Family | None) -> str | None:
    """Why no adapter can go on the module at ``path``, or None."""
    rules: tuple[Callable[[], str | None], ...] = (
        lambda: _bypassed(path, family),
        lambda: _quantizer_missing(module),
        lambda: _own_forward(module, kind),
        lambda: _grouped(module, kind),
        lambda: _not_floating(module, kind),
    )
    return next((reason for rule in rules if (reason := rule()) is not None), None)


def _bypassed(path: str, family: Family | None) -> str | None:
    for weight in family.bypassed if family else ():
        if fnmatchcase(path, weight.pattern):
            return weight.reason
    return None


def _own_forward(module: nn.Module, kind: str) -> str | None:
    """A subclass that computes something else than its base class (a router that is an nn.Linear, say)."""
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
    return (
        f"{type(module).__name__} has a forward of its own, "
        f"which an adapter made for {base.__name__} would not follow"
    )


def _computes_a_linear(module: nn.Module) -> bool:
    """Whether a subclass's own forward still is ``x @ W.T + b``: run on a small copy with weights of its own."""
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
        computed = type(module).forward(probe, x)
    except Exception:
        # Another signature, or more state than a weight and a bias: not the plain linear an adapter assumes.
        return False
    expected = nn.functional.linear(x, probe.weight, probe.bias)
    return isinstance(computed, torch.Tensor) and computed.shape == expected.shape and computed.allclose(expected)


def _grouped(module: nn.Module, kind: str) -> str | None:
    groups = getattr(module, "groups", 1)
    if kind != CONV or groups == 1:
        return None
    return f"a convolution in {groups} groups: the rank would have to be a multiple of {groups}"


def _not_floating(module: nn.Module, kind: str) -> str | None:
    weight = getattr(module, "weight", None)
    if kind == MULTIHEAD or weight is None or weight.is_floating_point() or quantization_of(module) is not None:
        return None
    return f"its weight is {weight.dtype}, and nothing says how it is quantized"


def _quantizer_missing(module: nn.Module) -> str | None:
    package = missing_package(module)
    if package is None:
        return None
    return f"unknown: quantized by {quantization_of(module)}, and PEFT needs {package}, which is not installed"
