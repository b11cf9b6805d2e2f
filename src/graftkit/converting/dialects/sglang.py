"""SGLang's form: PEFT's files with one scale and one rank, every group of fused projections whole.

Sources, of 0.5.23: ``sglang/srt/lora/lora.py`` (``LoRAAdapter``: the scale, ``normalize_qkv_proj``, the names that
are kept), ``sglang/srt/lora/utils.py`` (``get_normalized_target_modules``, ``_KNOWN_LORA_TARGET_MODULES``),
``sglang/srt/models/gemma4_causal.py`` (``load_weights`` gives the values the keys' weight).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from graftkit.converting.base import ConvertBase
from graftkit.converting.delta import Deltas, Slice
from graftkit.converting.dialects import _pairs
from graftkit.converting.dialects._base import DialectFormat
from graftkit.converting.dialects._engine_names import EngineNames
from graftkit.converting.dialects._refused import refused

_LEAVES: Mapping[str, str] = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# The names that its memory pool has a place for.
_KNOWN = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj"),
        *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"),
        *("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "in_proj"),
    }
)
_OUTSIDE_LAYERS = frozenset({"embed_tokens", "lm_head"})
_NUMBER = re.compile(r"layers\.\d+\.")


@dataclass(frozen=True)
class SglangDialect(DialectFormat):
    """What SGLang reads."""

    name: ClassVar[str] = "sglang"
    engine: ClassVar[str | None] = "sglang"
    # B with another scale than most is kept in single precision.
    rounding: ClassVar[float] = 2.0**-24

    def refusals(self, deltas: Deltas, base: ConvertBase) -> dict[str, str]:
        return {**_nameless(deltas, _names(base)), **refused(deltas, base, "sglang")}

    def write(self, deltas: Deltas, base: ConvertBase, folder: Path) -> None:
        names = _names(base)
        pairs = _pairs.completed(_pairs.pairs_of(deltas, names), names)
        _pairs.write_pairs(pairs.values(), deltas.config, folder)

    def read(self, folder: Path, base: ConvertBase) -> Deltas:
        return _pairs.PairFile.open(folder, _pairs.one_scale).read(_names(base))

    def places(self, at: Slice, base: ConvertBase) -> tuple[Slice, ...]:
        return _names(base).copies(at)


def _names(base: ConvertBase) -> EngineNames:
    return EngineNames(base, _LEAVES, _GROUPS)


def _nameless(deltas: Deltas, names: EngineNames) -> dict[str, str]:
    """Return the updates whose names SGLang drops, or has no place for."""
    found = {}
    for factors in deltas:
        for module, _ in names.parts(factors.at):
            leaf = module.rpartition(".")[2]
            if leaf not in _KNOWN:
                found[factors.at.parameter] = f"SGLang has no place for LoRA on {leaf}"
            elif leaf not in _OUTSIDE_LAYERS and not _NUMBER.search(module):
                found[factors.at.parameter] = "SGLang drops names without a layer's number"
    return found


DIALECT = SglangDialect()
