"""``graft survey`` from a cold process, next to transformers building the same model.

On the meta device a model costs no memory and says its modules and shapes, which is where a survey begins. On the
CPU, what people do without either, its weights are made.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.harness.contest import Contest, Figure, Figures, Row, Setting, in_turns
from benchmarks.harness.processes import GRAFT, cold

META, CPU = "from_config on meta", "from_config on the CPU"

_PEER = """
import json, sys
from pathlib import Path
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
fields = json.loads(Path(sys.argv[1]).read_text())
with torch.device(sys.argv[2]):
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear):
        print(name, tuple(module.weight.shape))
"""


def contests(setting: Setting) -> Iterator[Contest]:
    """Yield one contest."""
    with tempfile.TemporaryDirectory() as folder:
        yield _contest("E2B", setting.of(quick=(META,), full=(META, CPU)), folder)


def _contest(name: str, peers: tuple[str, ...], folder: str) -> Contest:
    model = f"google/gemma-4-{name}-it"
    config = _write_config(model, Path(folder) / f"{name}.json")
    sides = {"graftkit": partial(_survey, model)} | {peer: partial(_build, config, peer) for peer in peers}
    rows = tuple(Row("graft survey", peer, figure) for peer in peers for figure in (Figure.CPU, Figure.PEAK))
    return Contest(f"Gemma 4 {name}", rows, in_turns(sides))


def _write_config(model: str, file: Path) -> Path:
    from graftkit.families import geometry

    known = geometry(model)
    assert known is not None
    file.write_text(json.dumps(known, default=dict), encoding="utf-8")
    return file


def _survey(model: str) -> Figures:
    return cold(*GRAFT, "survey", model).figures


def _build(config: Path, peer: str) -> Figures:
    return cold(sys.executable, "-c", _PEER, config, "meta" if peer == META else "cpu").figures
