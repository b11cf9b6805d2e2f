"""The recipe to begin with, and the schema: what they say is what is read, and what TRL takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from graftkit.errors import RecipeError
from graftkit.recipes.recipe import RecipeFields, read_recipe
from graftkit.recipes.trainers import TrainerName
from graftkit.recipes.write import initial_recipe, main, recipe_schema

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))
SCHEMA = Path(__file__).parents[3] / "docs" / "recipe.schema.json"


def initial(folder: Path, trainer: TrainerName) -> Path:
    (folder / "recipe.yaml").write_text(initial_recipe(trainer))
    return folder / "recipe.yaml"


def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(recipe_schema())
    return found


@pytest.mark.parametrize("trainer", TrainerName)
def test_the_initial_recipe_is_one(tmp_path: Path, trainer: TrainerName) -> None:
    recipe = read_recipe(initial(tmp_path, trainer))
    assert recipe.fields.trainer == trainer
    assert recipe.fields.data.path is not None
    assert (recipe.fields.data.reward is not None) == (trainer is TrainerName.GRPO)


@pytest.mark.parametrize("trainer", TrainerName)
def test_trl_takes_the_initial_arguments(tmp_path: Path, trainer: TrainerName) -> None:
    pytest.importorskip("trl")
    from graftkit.recipes.trainer_arguments import trainer_arguments

    # Without a GPU transformers needs use_cpu, and bf16 is TRL's default.
    recipe = read_recipe(initial(tmp_path, trainer), ["args.use_cpu=true", "args.bf16=false"])
    made: Any = trainer_arguments(recipe)
    assert {name: getattr(made, name) for name in recipe.args} == recipe.args
    assert type(made.learning_rate) is float


@pytest.mark.parametrize("trainer", TrainerName)
def test_what_the_comments_offer_is_taken(tmp_path: Path, trainer: TrainerName) -> None:
    pytest.importorskip("trl")
    from graftkit.recipes.trainer_arguments import trainer_arguments

    path = initial(tmp_path, trainer)
    offered = re.compile(r"^( *)# (\w+: .*#.*)$", re.MULTILINE)
    assert offered.search(path.read_text())
    path.write_text(offered.sub(r"\1\2", path.read_text()))
    recipe = read_recipe(path, ["args.use_cpu=true", "args.bf16=false"])
    assert recipe.fields.quantization == "4bit"
    assert ("assistant_only_loss" in recipe.args) == (trainer == "sft")
    assert trainer_arguments(recipe)


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert schema()["$schema"] == jsonschema.Draft202012Validator.META_SCHEMA["$id"]


@pytest.mark.parametrize("trainer", TrainerName)
def test_the_schema_takes_the_initial_recipe(trainer: TrainerName) -> None:
    jsonschema.Draft202012Validator(schema()).validate(YAML(typ="safe").load(initial_recipe(trainer)))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_schema_takes_the_examples(path: Path) -> None:
    jsonschema.Draft202012Validator(schema()).validate(YAML(typ="safe").load(path.read_text()))
    read_recipe(path)


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"text", "dpo", "grpo"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"adapter": {}},
        {"model": "x", "trainer": "ppo"},
        {"model": "x", "adaptor": {}},
        {"model": "x", "adapter": {"target": "q_proj"}},
        {"model": "x", "data": {"eval_share": 1}},
        {"model": "x", "quantization": "2bit"},
    ],
    ids=json.dumps,
)
def test_the_schema_refuses_what_the_reader_refuses(tmp_path: Path, wrong: dict[str, Any]) -> None:
    assert not jsonschema.Draft202012Validator(schema()).is_valid(wrong)
    (tmp_path / "recipe.yaml").write_text(json.dumps(wrong))
    with pytest.raises(RecipeError):
        read_recipe(tmp_path / "recipe.yaml")


def test_the_schema_describes_every_key() -> None:
    told = schema()
    sections = [told, *(told["$defs"][name] for name in ("AdapterSection", "DataSection", "CheckSettings"))]
    assert set(told["properties"]) == set(RecipeFields.model_fields)
    silent = [
        f"{section['title']}.{name}"
        for section in sections
        for name, field in section["properties"].items()
        if "description" not in field and "$ref" not in field and name not in {"trainer"}
    ]
    assert silent == []


def test_the_published_schema_is_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert SCHEMA.read_text() == recipe_schema()
    assert main([str(SCHEMA), "--check"]) == 0
    file = tmp_path / "schema.json"
    assert main([str(file), "--check"]) == 1
    assert main([str(file)]) == 0
    assert main([str(file), "--check"]) == 0
    assert "out of date" in capsys.readouterr().err


BASE = "model: x\nadapter: {r: 8}\nargs:\n  max_steps: 5\n  betas: [1, 2]\n"


@pytest.mark.parametrize(
    ("pair", "key", "value"),
    [
        ("args.max_steps=10", ("args", "max_steps"), 10),
        ("args.learning_rate=1e-4", ("args", "learning_rate"), 1e-4),
        ("args.packing=true", ("args", "packing"), True),
        ("args.output_dir=a=b", ("args", "output_dir"), "a=b"),
        ("args.run_name='10'", ("args", "run_name"), "10"),
        ("args.max_length=null", ("args", "max_length"), None),
        ("args.betas=[0.9, 0.99]", ("args", "betas"), [0.9, 0.99]),
        (
            "args.activation_checkpointing_kwargs.use_reentrant=false",
            ("args", "activation_checkpointing_kwargs"),
            {"use_reentrant": False},
        ),
        ("model=y", ("model",), "y"),
        ("adapter.scope=[language, vision]", ("adapter", "scope"), ["language", "vision"]),
        ("data.path=rows.jsonl", ("data", "path"), "rows.jsonl"),
        ("quantization=4bit", ("quantization",), "4bit"),
    ],
)
def test_overrides_replace_one_value(tmp_path: Path, pair: str, key: tuple[str, ...], value: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE)
    before = read_recipe(path).fields.model_dump()
    after = read_recipe(path, [pair]).fields.model_dump()
    at, was = after, before
    for part in key[:-1]:
        at, was = at[part], was[part]
    assert at.pop(key[-1]) == value
    was.pop(key[-1], None)
    assert after == before
    assert path.read_text() == BASE


def test_the_last_override_counts(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(BASE)
    changed = read_recipe(tmp_path / "recipe.yaml", ["adapter.r=4", "args.max_steps=1", "adapter.r=2"])
    assert (changed.fields.adapter.r, changed.args["max_steps"]) == (2, 1)


@pytest.mark.parametrize(
    ("pair", "code", "said"),
    [
        ("args.max_steps", "recipe-override", "args.max_steps"),
        ("=3", "recipe-override", "=3"),
        ("args..max_steps=3", "recipe-override", "args..max_steps"),
        (".=3", "recipe-override", ".=3"),
        ("args.max_steps=[1", "recipe-syntax", "--set args.max_steps"),
        ("adapter.rank=4", "recipe-invalid", "adapter.rank"),
        ("model.name=x", "recipe-invalid", "--set model.name"),
        ("trainer=ppo", "recipe-invalid", "trainer"),
    ],
)
def test_overrides_that_mean_nothing_are_refused(tmp_path: Path, pair: str, code: str, said: str) -> None:
    (tmp_path / "recipe.yaml").write_text(BASE)
    with pytest.raises(RecipeError) as caught:
        read_recipe(tmp_path / "recipe.yaml", [pair])
    assert caught.value.code == code
    assert said in str(caught.value)
