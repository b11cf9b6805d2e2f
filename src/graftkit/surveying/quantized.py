"""Quantized linears, recognised by what they store, whatever package defines their class."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True)
class Layout:
    """How one quantizer stores a linear.

    Attributes:
        name: the quantizer.
        stores: tensors or attributes that a layer of this kind has, all of them.
        package: what PEFT needs installed to put LoRA on such a layer.
    """

    name: str
    stores: tuple[str, ...]
    package: str


# First match wins: GPTQ stores what AWQ does and a group index besides.
# Source: the layer classes that peft.tuners.lora's dispatch functions (gptq, awq, hqq, eetq, aqlm) test for.
_LAYOUTS = (
    Layout("gptq", ("qweight", "qzeros", "scales", "g_idx"), "gptqmodel"),
    Layout("awq", ("qweight", "qzeros", "scales"), "gptqmodel"),
    Layout("hqq", ("W_q", "meta"), "hqq"),
    Layout("aqlm", ("codes", "codebooks", "scales"), "aqlm"),
    Layout("eetq", ("weight", "weight_scales"), "eetq"),
)
_BITSANDBYTES = {"Params4bit": "bitsandbytes 4-bit", "Int8Params": "bitsandbytes 8-bit"}


def quantization_of(module: Any) -> str | None:
    """Return the quantizer of a linear, None for a module that is not a quantized linear."""
    known = _quantizer_and_package(module)
    return known[0] if known else None


def missing_package(module: Any) -> str | None:
    """Return the package that PEFT needs for this quantized linear if it is not installed, else None."""
    known = _quantizer_and_package(module)
    return known[1] if known and find_spec(known[1]) is None else None


def _quantizer_and_package(module: Any) -> tuple[str, str] | None:
    if features_of(module) is None:
        return None
    weight = type(getattr(module, "weight", None))
    if weight.__name__ in _BITSANDBYTES:
        return _BITSANDBYTES[weight.__name__], "bitsandbytes"
    if weight.__module__.startswith("torchao."):
        return "torchao", "torchao"
    found = (layout for layout in _LAYOUTS if all(hasattr(module, name) for name in layout.stores))
    return next(((layout.name, layout.package) for layout in found), None)


def features_of(module: Any) -> tuple[int, int] | None:
    """Return (out_features, in_features) of a linear, quantized or not; None where the module has none."""
    out = getattr(module, "out_features", getattr(module, "outfeatures", None))
    into = getattr(module, "in_features", getattr(module, "infeatures", None))
    return (out, into) if isinstance(out, int) and isinstance(into, int) else None


def logical_size(parameter: Any) -> int:
    """Return the unpacked elements of a parameter: a bitsandbytes 4-bit weight keeps the shape it had."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else int(parameter.numel())
