"""What is wrong with an environment is said at once, all of it, with the cure, and not as a crash of graftkit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.cli.running import fields_of, graft
from tests.cli.without import broken, hiding
from tests.training.small import save_model, word_tokenizer, write_rows

RECIPE = """\
model: {model}
adapter: {{targets: attention, r: 4}}
data: {{path: rows.jsonl}}
args:
  max_steps: 1
"""
WORDS = [*map(str, range(11)), "+", "="]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a recipe, its data and a place for what the environment lacks."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model="qwen3"))
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(9)])
    return tmp_path


def error_of(folder: Path, *words: str, **variables: str) -> dict[str, Any]:
    done = graft(*words, "--json", cwd=folder, **variables)
    assert done.returncode == 2, done.stdout + done.stderr
    error: dict[str, Any] = fields_of(done)["error"]
    return error


def errors_of(folder: Path, **variables: str) -> dict[str, dict[str, Any]]:
    """Return the doctor's errors by code."""
    done = graft("doctor", "--recipe", "recipe.yaml", "--json", cwd=folder, **variables)
    assert done.returncode == 1, done.stdout + done.stderr
    return {found["code"]: found for found in fields_of(done)["findings"] if found["severity"] == "error"}


@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError"])
def test_bitsandbytes_that_does_not_load(folder: Path, error: str) -> None:
    pytest.importorskip("trl")
    variables = broken(folder / "lib", "bitsandbytes", error)
    planned = error_of(folder, "plan", "qwen3", **variables)
    assert (planned["code"], "bitsandbytes" in planned["what"]) == ("missing-dependency", True)
    assert "pip uninstall bitsandbytes" in planned["help"]
    found = errors_of(folder, **variables)
    assert found.keys() == {"GK004"}
    (fault,) = found["GK004"]["evidence"]["faults"]
    assert (fault["code"], "bitsandbytes" in fault["message"]) == ("broken", True)


def test_training_with_bitsandbytes_that_does_not_load(folder: Path) -> None:
    pytest.importorskip("trl")
    refused = error_of(folder, "train", "recipe.yaml", **broken(folder / "lib", "bitsandbytes", "RuntimeError"))
    assert (refused["code"], "GK004" in refused["what"]) == ("not-ready", True)


def test_bitsandbytes_that_is_not_installed(folder: Path) -> None:
    pytest.importorskip("trl")
    variables = hiding(folder / "lib", "bitsandbytes")
    assert graft("plan", "qwen3", "--quantization", "4bit", "--json", cwd=folder, **variables).returncode == 0
    (folder / "recipe.yaml").write_text(RECIPE.format(model="qwen3") + "quantization: 4bit\n")
    found = errors_of(folder, **variables)
    assert found.keys() == {"GK004"}
    assert (found["GK004"]["line"], "graftkit[quant]" in found["GK004"]["help"]) == (6, True)
    assert error_of(folder, "train", "recipe.yaml", **variables)["where"] == "recipe.yaml:6"
    rehearsed = error_of(folder, "verify", "--recipe", "recipe.yaml", "--twin", **variables)
    assert rehearsed["code"] == "missing-dependency"


def test_packages_that_training_needs(folder: Path) -> None:
    found = errors_of(folder, **hiding(folder / "lib", "accelerate", "datasets", "trl"))
    missing = {fault["message"].partition(" ")[0] for fault in found["GK004"]["evidence"]["faults"]}
    assert missing == {"accelerate", "datasets", "trl"}


def test_everything_that_is_wrong_is_said_at_once(folder: Path) -> None:
    pytest.importorskip("trl")
    (folder / "recipe.yaml").write_text(
        "model: qwen3\n"
        "adapter: {targets: attention, options: {init_lora_weights: loftq}}\n"
        "data: {path: rosw.jsonl}\n"
        "trainer: grpo\n"
        "args:\n"
        "  fp16: true\n"
        "  use_cpu: true\n"
        "  report_to: no_tracker\n"
        "  learnig_rate: 1.0e-4\n"
        "  output_dir: rows.jsonl/out\n"
    )
    found = errors_of(folder)
    lines = {
        code: [fault["line"] for fault in finding["evidence"]["faults"]]
        for code, finding in found.items()
        if code != "GK212"
    }
    assert lines["GK005"][0] == 6
    assert lines["GK006"] == [3, 10]
    assert lines["GK007"] == [3, 8]
    assert found["GK212"]["line"] == 9
    assert "rows.jsonl" in found["GK006"]["help"]
    refused = error_of(folder, "train", "recipe.yaml")
    assert refused["code"] == "not-ready"
    assert {code for code in found if code in refused["what"]} == found.keys()
    assert not (folder / "out").exists()


def test_all_that_is_not_valid_in_a_recipe_is_said_at_once(folder: Path) -> None:
    pytest.importorskip("trl")
    (folder / "recipe.yaml").write_text(
        "model: qwen3\nadapter: {target: mlp, r: many}\ndata: {path: x, eval_share: 3}\n"
        "arg: {}\nargs:\n  learnig_rate: 1\n"
    )
    error = error_of(folder, "doctor", "--recipe", "recipe.yaml")
    assert error["code"] == "recipe-invalid"
    assert sorted(re.findall(r"recipe\.yaml:(\d+:\d+)", error["why"])) == ["2:11", "2:24", "3:17", "4:1", "6:3"]
    assert {"targets", "args", "learning_rate"} <= set(re.findall(r"\w+", error["help"]))


def test_a_recipe_without_a_word_on_precision_runs_on_this_machine(folder: Path) -> None:
    pytest.importorskip("trl")
    save_model(folder / "base", word_tokenizer(WORDS))
    (folder / "recipe.yaml").write_text(RECIPE.format(model="base"))
    done = graft("train", "recipe.yaml", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert fields_of(done)["steps"] == 1
