"""Can an adapter go here, and if not, why not. Ordered rules; the first one that objects is the reason."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from graftkit.families import Family

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
    return next((kind for cls, kind in kinds if isinstance(module, cls)), None)


def objection(path: str, module: nn.Module, kind: str, family: Family | None) -> str | None:
    """Why no adapter can go on the module at ``path``, or None."""
    rules: tuple[Callable[[], str | None], ...] = (
        lambda: _bypassed(path, family),
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
    if base is None or type(module).forward is base.forward or is_quantized(module):
        return None
    # An embedding that only scales its rows is understood: PEFT applies the same embed_scale to the adapter.
    if kind == EMBEDDING and hasattr(module, "embed_scale"):
        return None
    return (
        f"{type(module).__name__} has a forward of its own, "
        f"which an adapter made for {base.__name__} would not follow"
    )


def _grouped(module: nn.Module, kind: str) -> str | None:
    groups = getattr(module, "groups", 1)
    if kind != CONV or groups == 1:
        return None
    return f"a convolution in {groups} groups: the rank would have to be a multiple of {groups}"


def _not_floating(module: nn.Module, kind: str) -> str | None:
    weight = getattr(module, "weight", None)
    if kind == MULTIHEAD or weight is None or weight.is_floating_point() or is_quantized(module):
        return None
    return f"its weight is {weight.dtype}, and nothing says how it is quantized"


def is_quantized(module: nn.Module) -> bool:
    """Whether a linear's class comes from a quantization package that PEFT has a layer for (bitsandbytes)."""
    return type(module).__module__.partition(".")[0] == "bitsandbytes"
