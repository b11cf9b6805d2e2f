"""``graft survey`` from a cold process, next to transformers building the same model on the meta device.

There a model costs no memory, and says its modules and shapes, which is where a survey begins.
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

PEER = "from_config on meta"

_PEER = """
import json, sys
from pathlib import Path
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
fields = json.loads(Path(sys.argv[1]).read_text())
with torch.device("meta"):
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear):
        print(name, tuple(module.weight.shape))
"""


def contests(setting: Setting) -> Iterator[Contest]:
    """Yield one contest."""
    size = setting.of(quick="E2B", full="31B")
    model = f"google/gemma-4-{size}-it"
    with tempfile.TemporaryDirectory() as folder:
        config = _write_config(model, Path(folder) / "config.json")
        sides = {"graftkit": partial(_survey, model), PEER: partial(_build, config)}
        rows = tuple(Row("graft survey", PEER, figure) for figure in (Figure.CPU, Figure.PEAK))
        yield Contest(f"Gemma 4 {size}", rows, in_turns(sides))


def _write_config(model: str, file: Path) -> Path:
    from graftkit.families import geometry

    known = geometry(model)
    assert known is not None
    file.write_text(json.dumps(known, default=dict), encoding="utf-8")
    return file


def _survey(model: str) -> Figures:
    return cold(*GRAFT, "survey", model).figures


def _build(config: Path) -> Figures:
    return cold(sys.executable, "-c", _PEER, config).figures
