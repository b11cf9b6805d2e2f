"""vLLM's form: PEFT's files, with the names of the published checkpoint and a pair for every matrix of the engine.

Sources: ``vllm/lora/utils.py`` (``parse_fine_tuned_lora_name``), ``vllm/lora/peft_helper.py`` (the scale of each
module), ``vllm/lora/model_manager.py`` (experts one by one, ``_create_merged_loras_inplace``), run with 0.32.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from graftkit.converting.base import ConvertBase
from graftkit.converting.delta import Deltas, Slice
from graftkit.converting.dialects import _pairs
from graftkit.converting.dialects._base import DialectFormat
from graftkit.converting.dialects._engine_names import EngineNames
from graftkit.converting.dialects._refused import refused
from graftkit.engines import engine_named
from graftkit.engines.releases.table import read_table


@dataclass(frozen=True)
class VllmDialect(DialectFormat):
    """What vLLM reads. It honours one scale for all modules in every version, and patterns only in the newest."""

    name: ClassVar[str] = "vllm"
    engine: ClassVar[str | None] = "vllm"
    # B with another scale than most is kept in single precision.
    rounding: ClassVar[float] = 2.0**-24

    def refusals(self, deltas: Deltas, base: ConvertBase) -> dict[str, str]:
        return refused(deltas, base, "vllm")

    def write(self, deltas: Deltas, base: ConvertBase, folder: Path) -> None:
        _pairs.write_pairs(_pairs.pairs_of(deltas, _names(base)).values(), deltas.config, folder)

    def read(self, folder: Path, base: ConvertBase) -> Deltas:
        return _pairs.PairFile.open(folder, _pairs.patterned_scale).read(_names(base))

    def places(self, at: Slice, base: ConvertBase) -> tuple[Slice, ...]:
        return EngineNames(base).copies(at)


def _names(base: ConvertBase) -> EngineNames:
    return EngineNames(base, stacks=_stacks(base))


def _stacks(base: ConvertBase) -> frozenset[str]:
    """Return the stacked parameters that vLLM takes as PEFT has them: those of the classes with 3-D weights."""
    engine = engine_named("vllm")
    assert engine.version is not None
    table = read_table(engine.name, engine.version)
    support = table.classes.get(base.architecture) if table is not None else None
    if support is None or not support.stacked:
        return frozenset()
    return frozenset(name for name in base.shapes if base.is_stacked(name))


DIALECT = VllmDialect()
