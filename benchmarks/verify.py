"""``graft verify --recipe --twin``, every rule that can run, next to what one tries by hand before training.

For a text model that is TRL's training of two steps, for Gemma 4 a script that shrinks the model, trains, saves,
reloads and merges (``benchmarks/scripts/rehearse_by_peft.py``). Either tells that the run does not crash; which
rules hold it does not say.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.contest import Contest, Figure, Figures, Row, Setting, in_turns
from benchmarks.harness.processes import GRAFT, cold
from benchmarks.train import SCRIPTS, Scale, write_text_base

TRL, PEFT = "TRL, two steps", "PEFT script"
GEMMA = "google/gemma-4-E2B-it"
_TINY = Scale(hidden=128, layers=2, vision=64, steps=2, batch=2, words=16, rows=16)


def contests(_setting: Setting) -> Iterator[Contest]:
    """Yield a text model, and Gemma 4 with its vision tower."""
    with tempfile.TemporaryDirectory(prefix="graft-verify-") as name:
        folder = Path(name)
        write_text_base(folder, _TINY)
        arguments = {"output_dir": str(folder / "out"), "max_steps": 2, "use_cpu": True, "bf16": False}
        (folder / "arguments.json").write_text(json.dumps(arguments), encoding="utf-8")
        recipe = _write_recipe(folder / "llama.yaml", str(folder / "base"), {"targets": "all-linear"}, arguments)
        given = (folder / "base", folder / "rows", folder / "arguments.json")
        yield _contest("Llama", recipe, TRL, SCRIPTS / "sft_by_trl.py", *given)
        adapter = {"targets": "all-linear", "scope": ["language", "vision"]}
        recipe = _write_recipe(folder / "gemma.yaml", GEMMA, adapter, arguments)
        config = _write_config(folder / "gemma.json")
        yield _contest("Gemma 4 E2B", recipe, PEFT, SCRIPTS / "rehearse_by_peft.py", config)


def _write_recipe(file: Path, model: str, adapter: dict[str, Any], arguments: dict[str, Any]) -> Path:
    recipe = {"model": model, "adapter": {**adapter, "r": 8}, "data": {"path": "rows"}, "args": arguments}
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return file


def _write_config(file: Path) -> Path:
    from graftkit.families import geometry

    known = geometry(GEMMA)
    assert known is not None
    file.write_text(json.dumps(known, default=dict), encoding="utf-8")
    return file


def _contest(model: str, recipe: Path, peer: str, *script: Path) -> Contest:
    sides = {
        "graftkit": partial(_run, *GRAFT, "verify", "--recipe", recipe, "--twin"),
        peer: partial(_run, sys.executable, *script),
    }
    rows = tuple(Row("graft verify --twin", peer, figure) for figure in (Figure.CPU, Figure.PEAK))
    return Contest(model, rows, in_turns(sides))


def _run(*command: str | Path) -> Figures:
    return cold(*command, env={"OMP_NUM_THREADS": "1"}).figures
