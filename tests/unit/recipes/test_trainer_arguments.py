"""A recipe's arguments reach TRL unchanged, and what TRL does not know is refused at its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graftkit.errors import RecipeError
from graftkit.recipes.arguments import argument_names
from graftkit.recipes.recipe import Recipe, read_recipe
from graftkit.recipes.trainer_arguments import trainer_arguments
from graftkit.recipes.trainers import TrainerName

trl = pytest.importorskip("trl")

# Without a GPU transformers needs use_cpu, and bf16 is TRL's default.
CPU = {"use_cpu": True, "bf16": False}


def recipe(folder: Path, args: dict[str, Any], trainer: str = "sft", overrides: tuple[str, ...] = ()) -> Recipe:
    path = folder / "mine.yaml"
    path.write_text(json.dumps({"model": "x", "trainer": trainer, "args": {**CPU, **args}}, indent=1))
    return read_recipe(path, overrides)


@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo"])
def test_arguments_arrive_as_they_are_written(tmp_path: Path, trainer: str) -> None:
    given = {"learning_rate": 3e-4, "max_steps": 7, "output_dir": str(tmp_path), "save_steps": 0.5}
    made: Any = trainer_arguments(recipe(tmp_path, given, trainer))
    assert type(made).__name__ == f"{trainer.upper()}Config"
    assert {name: getattr(made, name) for name in given} == given


def test_what_is_left_open(tmp_path: Path) -> None:
    made: Any = trainer_arguments(recipe(tmp_path, {}))
    assert made.output_dir == str(Path("out") / "mine")
    assert made.report_to == []
    assert made.activation_checkpointing
    assert not made.activation_checkpointing_kwargs


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_no_recomputation_under_either_name(tmp_path: Path, name: str) -> None:
    made: Any = trainer_arguments(recipe(tmp_path, {name: False}))
    assert not made.activation_checkpointing


def test_a_recomputation_that_is_asked_for_stays(tmp_path: Path) -> None:
    given = {"activation_checkpointing_kwargs": {"use_reentrant": True}}
    made: Any = trainer_arguments(recipe(tmp_path, given))
    assert made.activation_checkpointing_kwargs == {"use_reentrant": True}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_a_recomputation_under_its_old_name_stays(tmp_path: Path) -> None:
    made: Any = trainer_arguments(recipe(tmp_path, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}))
    assert made.activation_checkpointing_kwargs == {"use_reentrant": True}


def test_how_the_model_is_loaded_is_not_for_the_trainer(tmp_path: Path) -> None:
    made: Any = trainer_arguments(recipe(tmp_path, {"model_init_kwargs": {"dtype": "float32"}}))
    assert made.model_init_kwargs is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [("learning_rat", "learning_rate"), ("num_epochs", "num_train_epochs"), ("zzz", "import trl")],
)
def test_unknown_arguments_are_refused_at_their_line(tmp_path: Path, name: str, meant: str) -> None:
    wrong = recipe(tmp_path, {name: 1})
    line = next(at for at, text in enumerate(wrong.path.read_text().splitlines(), 1) if name in text)
    with pytest.raises(RecipeError) as caught:
        trainer_arguments(wrong)
    assert caught.value.code == "recipe-invalid"
    assert str(caught.value.where).startswith(f"{wrong.path}:{line}:")
    assert meant in str(caught.value.help)


def test_an_argument_of_another_trainer_is_refused(tmp_path: Path) -> None:
    assert "num_generations" in argument_names(TrainerName.GRPO)
    with pytest.raises(RecipeError) as caught:
        trainer_arguments(recipe(tmp_path, {"num_generations": 4}))
    assert caught.value.code == "recipe-invalid"
    assert "num_generations" in caught.value.what


def test_an_unknown_argument_of_an_override_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        trainer_arguments(recipe(tmp_path, {}, overrides=("args.beta=1",)))
    assert caught.value.code == "recipe-invalid"
    assert "beta" in caught.value.what


@pytest.mark.parametrize(
    ("args", "said"),
    [
        pytest.param({"eval_strategy": "now and then"}, "now and then", id="a value it has not"),
        pytest.param({"bf16": True, "fp16": True}, "fp16", id="two that exclude each other"),
    ],
)
def test_refusals_of_trl_are_quoted(tmp_path: Path, args: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        trainer_arguments(recipe(tmp_path, args))
    assert caught.value.code == "recipe-invalid"
    assert said in str(caught.value.why)
