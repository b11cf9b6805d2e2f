"""``graft train``: recipes to begin with, errors that name their place, and results in both forms."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.running import fields_of, forked, graft, refused
from tests.training.small import save_model, word_tokenizer, write_rows

from graftkit.recipes.recipe import read_recipe

RECIPE = """\
model: {model}
adapter: {{targets: attention, r: 4}}
data: {{path: rows.jsonl, eval_share: 0.2}}
args:
  bf16: false
  activation_checkpointing: false
  dataloader_pin_memory: false
  max_steps: 50
  logging_steps: 1
  learning_rate: 1.0e-3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a recipe and its data; the model is missing."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model="base"))
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(9)])
    return tmp_path


def test_without_a_recipe(tmp_path: Path) -> None:
    error = refused("train", cwd=tmp_path)
    assert error["code"] == "usage"
    assert "graft init" in error["help"]


@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo"])
def test_a_recipe_to_begin_with_can_be_read(tmp_path: Path, trainer: str) -> None:
    done = graft("train", "--init", trainer, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "recipe.yaml").write_text(done.stdout)
    assert read_recipe(tmp_path / "recipe.yaml").fields.trainer == trainer


def test_a_recipe_to_begin_with_as_json(tmp_path: Path) -> None:
    done = graft("train", "--init", "dpo", "--json", cwd=tmp_path)
    assert "trainer: dpo" in fields_of(done)["recipe"]


def test_a_trainer_that_is_none(tmp_path: Path) -> None:
    error = refused("train", "--init", "ppo", cwd=tmp_path)
    assert error["code"] == "usage"
    assert "grpo" in error["what"]


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    error = refused("train", "nowhere.yaml", cwd=tmp_path)
    assert error["code"] == "recipe-not-found"
    assert "nowhere.yaml" in error["where"]


def test_a_key_that_is_none_has_its_place(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.format(model="base").replace("data:", "date:"))
    error = refused("train", "recipe.yaml", cwd=folder)
    assert error["code"] == "recipe-invalid"
    assert error["where"].endswith("recipe.yaml:3:1")
    assert "data" in error["help"]


def test_an_argument_that_is_none_has_its_place_and_a_suggestion(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.format(model="qwen3").replace("learning_rate", "learnig_rate"))
    error = refused("train", "recipe.yaml", cwd=folder)
    assert error["code"] == "recipe-invalid"
    assert error["where"].endswith("recipe.yaml:10:3")
    assert "learning_rate" in error["help"]


def test_a_recipe_is_read_before_processes_are_started(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.format(model="base").replace("data:", "date:"))
    done = forked("train", "recipe.yaml", "--launch", "2", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.count("recipe-invalid") == 1
    assert "recipe.yaml:3:1" in done.stderr


@pytest.mark.parametrize(
    ("pair", "code"),
    [
        ("args.max_steps", "recipe-override"),
        ("args.max_step=3", "recipe-invalid"),
        ("trainer=ppo", "recipe-invalid"),
    ],
    ids=["no value", "no such argument", "no such trainer"],
)
def test_an_override_that_means_nothing(folder: Path, pair: str, code: str) -> None:
    (folder / "recipe.yaml").write_text(RECIPE.format(model="qwen3"))
    assert refused("train", "recipe.yaml", "--set", pair, cwd=folder)["code"] == code


def test_a_model_that_is_not_there(folder: Path) -> None:
    error = refused("train", "recipe.yaml", cwd=folder)
    assert error["code"] == "not-ready"
    assert "base" in error["why"]


def test_nothing_to_resume(folder: Path) -> None:
    save_model(folder / "base", word_tokenizer(["+", "="]))
    error = refused("train", "recipe.yaml", "--resume", cwd=folder)
    assert error["code"] == "nothing-to-resume"
    assert error["where"] == "out/recipe"


def test_a_run_and_its_result(folder: Path) -> None:
    save_model(folder / "base", word_tokenizer([*map(str, range(11)), "+", "="]))
    done = forked("train", "recipe.yaml", "--json", "--set", "args.max_steps=3", cwd=folder)
    assert done.returncode == 0, done.stderr
    fields = fields_of(done)
    assert fields["steps"] == 3
    assert [entry["step"] for entry in fields["history"] if "loss" in entry] == [1, 2, 3]
    assert fields["metrics"]["eval_loss"] > 0
    assert not {"eval_runtime", "epoch"} & fields["metrics"].keys()
    assert fields["summary"]["error"] == 0
    assert not fields["interrupted"]
    assert (folder / fields["report"]).is_file()
    assert (folder / fields["folder"] / "adapter_model.safetensors").is_file()
    assert "loading the model" in done.stderr


def test_a_model_is_compiled_where_the_recipe_asks_for_it(folder: Path) -> None:
    save_model(folder / "base", word_tokenizer([*map(str, range(11)), "+", "="]))
    asked = ("args.torch_compile=true", "args.torch_compile_backend=eager", "args.max_steps=1")
    changes = [word for change in asked for word in ("--set", change)]
    done = graft("train", "recipe.yaml", *changes, cwd=folder, TORCH_LOGS="graph_code")
    assert done.returncode == 0, done.stderr
    assert "TRACED GRAPH" in done.stderr
