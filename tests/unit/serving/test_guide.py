"""The guide's commands run in its order, as they are printed, as far as they need no engine."""

from __future__ import annotations

from pathlib import Path

from tests.unit.serving.guide import blocks, commands, run_without_engines


def test_every_block_runs(tmp_path: Path) -> None:
    assert blocks("python")
    assert {command.arguments[0] for command in commands("sh")} == {"check", "convert", "merge"}
    run_without_engines(tmp_path)
