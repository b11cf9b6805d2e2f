"""What quantizing the frozen base would reach, what it would leave in 16 bit, and what that costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError
from graftkit.surveying.sites import ModelMap, Site
from graftkit.text import size, table

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

# Bytes a weight. 4-bit blocks of 64 share a scale that is itself kept in 8 bit, with one float32 for 256 of them.
# Source: bitsandbytes' NF4 with double quantization (QLoRA, section 3); 8-bit rows share one float32.
_BYTES = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}
_KEPT_BYTES = 2  # bfloat16
_UPCAST_BYTES = 2  # more, when it becomes float32


@dataclass(frozen=True, slots=True)
class Kept:
    """Weights of one tower and role that stay in 16 bit.

    Attributes:
        role: as on the sites; "other" for what is not a site (norms, biases).
        params: elements.
    """

    tower: str
    role: str
    params: int
    reason: str


@dataclass(frozen=True)
class QuantizationPlan:
    """The base model under bitsandbytes, in bytes.

    Attributes:
        bits: "4bit" or "8bit".
        quantized: paths of the linears.
        quantized_params: their elements.
        kept: what is not, largest first.
        kept_params: its elements.
        skip_modules: module paths to name to bitsandbytes, so that nothing else is quantized.
    """

    bits: str
    quantized: tuple[str, ...]
    quantized_params: int
    kept: tuple[Kept, ...]
    kept_params: int
    skip_modules: tuple[str, ...]

    @property
    def quantized_bytes(self) -> int:
        """Quantized weights with their scales."""
        return round(self.quantized_params * _BYTES[self.bits])

    @property
    def kept_bytes(self) -> int:
        """What stays, in bfloat16."""
        return self.kept_params * _KEPT_BYTES

    @property
    def upcast_bytes(self) -> int:
        """What ``prepare_model_for_kbit_training`` adds: it turns all that stayed in 16 bit into float32.

        Source: ``peft.utils.other.prepare_model_for_kbit_training``.
        """
        return self.kept_params * _UPCAST_BYTES

    @property
    def total_bytes(self) -> int:
        """The base as loaded, before any preparation."""
        return self.quantized_bytes + self.kept_bytes

    @property
    def config(self) -> BitsAndBytesConfig:
        """The configuration to load the base with."""
        import torch
        from transformers import BitsAndBytesConfig

        skip = list(self.skip_modules)
        if self.bits == "8bit":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=skip,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "quantized_sites": len(self.quantized),
            "quantized_bytes": self.quantized_bytes,
            "kept_bytes": self.kept_bytes,
            "upcast_bytes": self.upcast_bytes,
            "total_bytes": self.total_bytes,
            "kept": [asdict(kept) for kept in self.kept],
            "skip_modules": list(self.skip_modules),
        }

    def __str__(self) -> str:
        rows = [(k.tower, k.role, size(k.params * _KEPT_BYTES), k.reason) for k in self.kept]
        head = (
            f"base in {self.bits}: {size(self.quantized_bytes)} quantized and {size(self.kept_bytes)} in 16 bit, "
            f"{size(self.total_bytes)} in all; k-bit preparation would add {size(self.upcast_bytes)}"
        )
        return f"{head}\n\n{table(('tower', 'role', '>stays', 'because'), rows)}"


def check_bits(bits: str) -> None:
    """Refuse what bitsandbytes does not quantize to.

    Raises:
        PlanError: ``quantization-unknown``.
    """
    if bits not in _BYTES:
        raise PlanError(
            f"unknown quantization {bits!r}",
            where="quantization",
            why="bitsandbytes quantizes to 4 or to 8 bits",
            help=" or ".join(_BYTES),
            code="quantization-unknown",
        )


def plan_quantization(model_map: ModelMap, bits: str) -> QuantizationPlan:
    """Plan what bitsandbytes quantizes of this model and what it leaves, with towers and routers skipped.

    Only linears are quantized. Stacked experts and embeddings are parameters of other modules and stay, whatever
    is asked for; towers other than language, heads and routers are small and sensitive, and are skipped.

    Raises:
        PlanError: ``quantization-unknown``.
    """
    check_bits(bits)
    reasons = {site.path: _reason_to_keep(site) for site in model_map}
    quantized = [site for site in model_map if reasons[site.path] is None]
    kept: Counter[tuple[str, str, str]] = Counter()
    counted: set[str] = set()
    for site in model_map:
        reason = reasons[site.path]
        if reason is not None and site.path not in counted:
            counted.update(site.tied_to)
            kept[site.tower, site.role, reason] += site.params
    quantized_params = sum(site.params for site in quantized)
    rest = model_map.model.params - quantized_params - sum(kept.values())
    rows = [Kept(tower, role, params, reason) for (tower, role, reason), params in kept.most_common()]
    if rest:
        rows.append(Kept("all", "other", rest, "norms, biases and other small parameters"))
    return QuantizationPlan(
        bits=bits,
        quantized=tuple(site.path for site in quantized),
        quantized_params=quantized_params,
        kept=tuple(rows),
        kept_params=model_map.model.params - quantized_params,
        skip_modules=_skip_modules(model_map, {site.path for site in quantized}),
    )


def _reason_to_keep(site: Site) -> str | None:
    """Return why bitsandbytes leaves a site in 16 bit, or None where it quantizes it."""
    if not site.is_linear:
        what = {"parameter": "a bare parameter", "embedding": "an embedding", "conv": "a convolution"}
        return f"{what.get(site.kind, site.kind)}: only linears are quantized"
    if site.tower != "language":
        return f"the {site.tower} tower is skipped"
    if site.tied_to:
        return f"tied to {site.tied_to[0]}"
    return f"{site.role} is skipped" if site.role in {"router", "lm_head"} else None


def _skip_modules(model_map: ModelMap, quantized: set[str]) -> tuple[str, ...]:
    """Return the shortest paths that cover every linear that is not quantized, and none that is."""
    prefixes = {prefix for path in quantized for prefix in _prefixes(path)}
    linears = [s.path for s in model_map if s.is_linear and s.path not in quantized]
    shortest = (next(p for p in _prefixes(path) if p not in prefixes) for path in linears)
    return tuple(dict.fromkeys(shortest))


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
