"""A recipe is read with defaults, and refused with file, line and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from graftkit.errors import RecipeError
from graftkit.recipes.recipe import find_recipe, read_recipe
from graftkit.recipes.training import training_of


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_model_is_all_it_takes(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, "model: gemma4\n"))
    assert recipe.fields.model == "gemma4"
    assert recipe.fields.trainer == "sft"
    assert recipe.fields.adapter.plan_kwargs() == {
        "targets": "all-linear",
        "scope": None,
        "method": "lora",
        "r": None,
        "alpha": None,
        "dropout": None,
        "allow_unmatched": False,
        "strict": False,
    }


def test_the_adapter_is_planned(tmp_path: Path, e2b: nn.Module) -> None:
    text = "model: x\nadapter:\n  targets: attention\n  scope: [language]\n  r: 4\n  options: {lora_bias: true}\n"
    made = read_recipe(written(tmp_path, text)).plan(e2b)
    assert made.scope == ("language",)
    assert (made.peft_config.r, made.peft_config.lora_bias) == (4, True)


@pytest.mark.parametrize(
    ("text", "place", "help"),
    [
        pytest.param("model: x\nadapter:\n  target: q_proj\n", ":3:3", "targets", id="misspelt key"),
        pytest.param(
            "model: x\nadapter:\n  init_lora_weights: pissa\n",
            ":3:3",
            "adapter: {options: {init_lora_weights: VALUE}}",
            id="an option of PEFT's",
        ),
        pytest.param("model: x\nadapter:\n  lora_alpha: 3\n", ":3:3", "use alpha", id="an option with a key here"),
        pytest.param("model: x\nadapter:\n  rank: 3\n", ":3:3", "use r", id="rank is called r"),
        pytest.param("model: x\nadapter:\n  options: {r: 4}\n", ":3:13", "adapter: {r: VALUE}", id="r in options"),
        pytest.param(
            "model: x\nadapter:\n  r: 8\n  options: {use_dora: true, r: 4}\n",
            ":4:29",
            "adapter: {r: VALUE}",
            id="r twice",
        ),
        pytest.param(
            "model: x\nadapter:\n  options:\n    quantization: 4bit\n",
            ":4:5",
            "quantization: VALUE",
            id="quantization as an option",
        ),
        pytest.param("model: x\nadaptor: {}\n", ":2:1", "adapter", id="misspelt section"),
        pytest.param("model: x\ntrainer: ppo\n", ":2:1", None, id="unknown trainer"),
        pytest.param("model: x\nadapter:\n  r: many\n", ":3:3", None, id="a word for a number"),
        pytest.param("trainer: sft\n", "", None, id="no model"),
        pytest.param("model: x\ndata:\n  modalities: [smell]\n", ":3:16", None, id="unknown modality"),
        pytest.param("model: x\nchecks:\n  ignored: [GK1]\n", ":3:3", "ignore", id="misspelt setting"),
    ],
)
def test_a_wrong_recipe_is_refused_at_its_line(tmp_path: Path, text: str, place: str, help: str | None) -> None:
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert caught.value.code == "recipe-invalid"
    assert str(caught.value.where).startswith(f"{path}{place}")
    assert help is None or help in str(caught.value.help)


def test_an_override_of_an_option_is_refused_where_it_has_a_key(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(written(tmp_path, "model: x\n"), ["adapter.options.method=dora"])
    assert (caught.value.code, caught.value.where) == ("recipe-invalid", "--set adapter.options.method")


def test_lines_of_keys(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, "model: x\nargs:\n  packing: true\n"))
    assert recipe.line("args.packing") == 3
    assert recipe.line("args.bf16") == 2
    assert recipe.line("adapter.r") is None


def test_the_recipe_of_a_folder(tmp_path: Path) -> None:
    assert find_recipe(tmp_path) is None
    path = written(tmp_path, "model: x\n")
    assert find_recipe(tmp_path) == path


ZERO3 = {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("args", "seen"),
    [
        pytest.param({}, {"checkpointing": True, "reentrant": False, "precision": "bf16"}, id="trl's defaults"),
        pytest.param(
            {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
            {
                "reentrant": True,
                "reentrant_because": "args",
                "reentrant_key": "args.gradient_checkpointing_kwargs.use_reentrant",
            },
            id="asked for",
        ),
        pytest.param(
            {
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
                "activation_checkpointing_kwargs": {"use_reentrant": False},
            },
            {"reentrant": False},
            id="the new name wins",
        ),
        pytest.param(
            {"activation_checkpointing_kwargs": {"preserve_rng_state": False}}, {"reentrant": True}, id="not said"
        ),
        pytest.param({"gradient_checkpointing": False}, {"checkpointing": False, "reentrant": False}, id="off"),
        pytest.param(
            {"activation_checkpointing": False, "gradient_checkpointing": True},
            {"checkpointing": False},
            id="off by its new name",
        ),
        pytest.param(
            {"deepspeed": ZERO3, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
            {"reentrant": True, "reentrant_because": "zero3", "zero_stage": 3},
            id="forced by trl",
        ),
        pytest.param({"deepspeed": ZERO3}, {"reentrant": False, "zero_stage": 3}, id="forced in vain"),
        pytest.param({"padding_free": True}, {"packing": True}, id="padding free packs"),
        pytest.param({"fp16": True, "bf16": False}, {"precision": "fp16"}, id="fp16"),
        pytest.param({"bf16": False}, {"precision": "fp32"}, id="fp32"),
        pytest.param(
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
            {"batch_size": 1, "accumulation": 4},
            id="accumulation",
        ),
    ],
)
def test_what_arguments_amount_to(tmp_path: Path, args: dict[str, Any], seen: dict[str, Any]) -> None:
    path = written(tmp_path, f"model: x\nargs: {json.dumps(args)}\n")
    training = training_of(read_recipe(path))
    assert {name: getattr(training, name) for name in seen} == seen


CHECKPOINTING = [
    {},
    {"gradient_checkpointing": False},
    {"activation_checkpointing": False, "gradient_checkpointing": True},
    {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"activation_checkpointing_kwargs": {"use_reentrant": False}, "gradient_checkpointing_kwargs": {"a": 1}},
]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("args", CHECKPOINTING, ids=json.dumps)
def test_checkpointing_is_what_trl_makes_of_it(tmp_path: Path, args: dict[str, Any]) -> None:
    trl = pytest.importorskip("trl")
    real = trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, **args)
    training = training_of(read_recipe(written(tmp_path, f"model: x\nargs: {json.dumps(args)}\n")))
    assert training.checkpointing == real.activation_checkpointing
    assert training.reentrant == bool((real.activation_checkpointing_kwargs or {}).get("use_reentrant", False))


@pytest.mark.parametrize("odd", ["{zero_optimization: 3}", "{zero_optimization: {stage: high}}", "[3]", "{}"])
def test_an_odd_deepspeed_configuration_has_no_stage(tmp_path: Path, odd: str) -> None:
    assert training_of(read_recipe(written(tmp_path, f"model: x\nargs: {{deepspeed: {odd}}}\n"))).zero_stage == 0


def test_a_deepspeed_file_is_read_from_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(ZERO3))
    assert training_of(read_recipe(written(tmp_path, "model: x\nargs: {deepspeed: ds.json}\n"))).zero_stage == 3
    with pytest.raises(RecipeError) as caught:
        training_of(read_recipe(written(tmp_path, "model: x\nargs: {deepspeed: absent.json}\n")))
    assert caught.value.code == "recipe-invalid"
    assert str(tmp_path / "absent.json") in str(caught.value.where)
