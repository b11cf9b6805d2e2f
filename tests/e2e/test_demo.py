"""The demo as a newcomer runs it: one command, real digits, and every claim on its page checked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.cli.running import graft, refused


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """(the JSON on stdout, the output folder, stderr) of one run."""
    out = tmp_path_factory.mktemp("demo") / "out"
    done = graft("demo", "--json", "--out", out, COLUMNS="120")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), out, done.stderr


def test_the_crash_is_the_real_one(demo: tuple[dict[str, Any], Path, str]) -> None:
    assert re.match(r"Target module Gemma4ClippableLinear\(.*\) is not supported\.$", demo[0]["stock_peft_error"])


def test_adapters_learn_and_vision_helps(demo: tuple[dict[str, Any], Path, str]) -> None:
    accuracy = demo[0]["held_out_accuracy"]
    assert accuracy["language_vision"] > 0.85
    assert 0.5 < accuracy["language"] < accuracy["language_vision"]


def test_every_check_ran_and_passed(demo: tuple[dict[str, Any], Path, str]) -> None:
    checks = demo[0]["checks"]
    contract = {"GK115", "GK203", "GK508", "GK601", "GK607"}
    assert contract | {"fresh_process_reload", "merged_in_memory", "merged_checkpoint"} == checks.keys()
    assert {check["verdict"] for check in checks.values()} == {"ok"}
    for name in ("fresh_process_reload", "merged_in_memory", "merged_checkpoint"):
        assert checks[name]["adapter_effect"] > 100 * checks[name]["difference"]


def test_its_files_are_where_it_says(demo: tuple[dict[str, Any], Path, str]) -> None:
    figures, out, _ = demo
    assert Path(figures["report"]) == out / "report.html"
    assert Path(figures["adapter"], "adapter_model.safetensors").is_file()
    assert Path(figures["adapter"], "report.html").is_file()
    assert Path(figures["merged"], "model.safetensors").is_file()
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]


def test_the_adapter_is_a_stock_one(demo: tuple[dict[str, Any], Path, str]) -> None:
    from peft import LoraConfig, PeftConfig

    config = PeftConfig.from_pretrained(demo[0]["adapter"])
    assert type(config) is LoraConfig
    assert isinstance(config.target_modules, str)
    assert ".linear" in config.target_modules
    assert config.base_model_name_or_path == "base"  # beside the adapter, wherever the folder is


def test_the_page_is_self_contained_and_shows_the_figures(demo: tuple[dict[str, Any], Path, str]) -> None:
    page = Path(demo[0]["report"]).read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert "<script" not in page
    for share in demo[0]["held_out_accuracy"].values():
        assert f"{100 * share:.3g} %" in page


def test_progress_and_steps_go_to_stderr(demo: tuple[dict[str, Any], Path, str]) -> None:
    assert "200/200" in demo[2]
    assert "projector" in demo[2]  # a tower, in the table of what can be adapted


def test_an_occupied_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    assert refused("demo", "--out", tmp_path)["code"] == "output-not-empty"
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_a_read_only_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    try:
        assert refused("demo", "-o", locked / "x")["code"] == "output-not-writable"
    finally:
        locked.chmod(0o755)
    assert not list(locked.iterdir())


@pytest.mark.parametrize("step", ["projector", "1/200"], ids=["before training", "while training"])
def test_ctrl_c_leaves_nothing(tmp_path: Path, step: str) -> None:
    import signal

    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from graftkit.cli.main import main; main()",
            "demo",
            "--json",
            "-o",
            str(tmp_path / "x"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:  # wait until the demo is at that step; a progress bar ends its lines with \r
        if step in line:
            break
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(stdout)["error"]["code"] == "interrupted"
    assert not list(tmp_path.iterdir())
