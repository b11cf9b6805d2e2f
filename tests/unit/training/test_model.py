"""The base of a run: a model in its own dtype or quantized, what is adapted, the processor its data needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tests.training import gemma

import graftkit as gk
from graftkit.errors import BuildError, PlanError, SourceError, TrainingError
from graftkit.recipes.recipe import Recipe, read_recipe
from graftkit.training.model import load_base

TEXT = ("text",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small Gemma 4 in bfloat16, with tokenizer and processor."""
    folder = tmp_path_factory.mktemp("base")
    return gemma.save_base(folder, gemma.processor(), dtype=torch.bfloat16)


def recipe(folder: Path, model: Path, **fields: Any) -> Recipe:
    (folder / "recipe.yaml").write_text(json.dumps({"model": str(model), **fields}))
    return read_recipe(folder / "recipe.yaml")


def test_text_gets_a_tokenizer_and_the_language_tower(tmp_path: Path, saved: Path) -> None:
    base = load_base(recipe(tmp_path, saved, adapter={"r": 4}), TEXT)
    assert base.processor.__class__.__mro__[1].__name__.startswith("PreTrainedTokenizer")
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    assert base.plan is not None
    assert base.peft_config is base.plan.peft_config
    assert base.peft_config.r == 4
    assert {found.site.tower for found in base.plan.attached} == {"language"}
    assert not any(p.__class__.__name__.startswith("Lora") for p in base.model.modules())


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("modality", ["image", "audio"])
def test_other_data_gets_a_processor(tmp_path: Path, saved: Path, modality: str) -> None:
    scope = {"image": "vision", "audio": "audio"}[modality]
    base = load_base(recipe(tmp_path, saved, adapter={"scope": [scope]}), ("text", modality))
    assert base.processor.image_token_id
    assert base.plan is not None
    assert {found.site.tower for found in base.plan.attached} == {scope}


def test_a_base_under_other_names_loads_with_a_mapping(tmp_path: Path) -> None:
    base = gemma.save_base(tmp_path / "base", gemma.letters(), "qwen3")
    tensors = load_file(base / "model.safetensors")
    other = {key.replace("q_proj.weight", "q_proj.linear.weight"): tensor for key, tensor in tensors.items()}
    save_file(other, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError) as caught:
        load_base(recipe(tmp_path, base), TEXT)
    assert caught.value.code == "weights-incomplete"
    mapping = {"model_init_kwargs": {"key_mapping": {r"q_proj\.linear": "q_proj"}}}
    loaded = load_base(recipe(tmp_path, base, args=mapping), TEXT)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(loaded.model.get_parameter(name), tensors[name])
    # What is saved at the end is compared with what was loaded, not with the names in these files.
    assert loaded.map.checkpoint is None


def test_a_part_of_a_processor_is_refused(tmp_path: Path) -> None:
    """AutoProcessor hands out a tokenizer where it finds no more, and pictures would be lost."""
    base = gemma.save_base(tmp_path / "base", gemma.letters(), "qwen3")
    assert load_base(recipe(tmp_path, base), TEXT).processor is not None
    with pytest.raises(TrainingError) as caught:
        load_base(recipe(tmp_path, base), ("text", "image"))
    assert caught.value.code == "no-processor"
    assert "processor" in str(caught.value.help)


@pytest.mark.parametrize("model", ["qwen3", gemma.MODEL])
def test_a_missing_tokenizer_is_an_error(tmp_path: Path, model: str) -> None:
    """For some models transformers makes one without a vocabulary."""
    gk.twin(model).save_pretrained(tmp_path / "base")
    with pytest.raises(TrainingError) as caught:
        load_base(recipe(tmp_path, tmp_path / "base"), TEXT)
    assert caught.value.code == "no-processor"


def test_a_class_that_generates_nothing_is_refused(tmp_path: Path) -> None:
    base = gemma.save_base(tmp_path / "base", gemma.letters(), "bert")
    with pytest.raises(TrainingError) as caught:
        load_base(recipe(tmp_path, base), TEXT)
    assert caught.value.code == "no-generation"


def test_the_recipe_can_say_how_the_model_is_loaded(tmp_path: Path, saved: Path) -> None:
    base = load_base(recipe(tmp_path, saved, args={"model_init_kwargs": {"dtype": "float32"}}), TEXT)
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}


def test_a_stock_configuration_is_taken_as_it_is(tmp_path: Path, saved: Path) -> None:
    stock = {
        "peft_type": "LORA",
        "r": 3,
        "target_modules": r".*language_model.*\.q_proj",
        "task_type": "CAUSAL_LM",
    }
    base = load_base(recipe(tmp_path, saved, adapter={"peft_config": stock}), TEXT)
    assert base.plan is None
    assert isinstance(base.peft_config, LoraConfig)
    assert {name: getattr(base.peft_config, name) for name in stock} == stock


def test_quantization_keeps_all_but_the_language_linears(tmp_path: Path, saved: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = load_base(recipe(tmp_path, saved, quantization="4bit"), TEXT)
    kinds = (bitsandbytes.nn.Linear4bit,)
    packed = [path for path, module in base.model.named_modules() if isinstance(module, kinds)]
    assert packed
    assert all(".language_model." in path for path in packed)
    whole = [p for p in base.model.parameters() if not isinstance(p, bitsandbytes.nn.Params4bit)]
    assert {p.dtype for p in whole} == {torch.bfloat16}
    assert base.plan is not None
    assert {found.path for found in base.plan.attached} <= set(packed)


@pytest.mark.parametrize("quantization", [None, "4bit", "8bit"])
def test_the_model_is_surveyed_once(
    tmp_path: Path, saved: Path, quantization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if quantization is not None:
        pytest.importorskip("bitsandbytes")
    surveyed: list[Any] = []

    def counted(model: Any, **options: Any) -> gk.ModelMap:
        surveyed.append(model)
        return gk.survey(model, **options)

    monkeypatch.setattr("graftkit.training.model.survey", counted)
    base = load_base(recipe(tmp_path, saved, **({"quantization": quantization} if quantization else {})), TEXT)
    assert surveyed == [str(saved)]
    # The same as a survey of the loaded model, whose sites show how they are quantized.
    live = gk.survey(base.model)
    assert base.map.sites == live.sites
    assert any(site.quantized for site in live) == (quantization is not None)


def test_missing_weights_are_an_error(tmp_path: Path, saved: Path) -> None:
    shutil.copytree(saved, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(BuildError) as caught:
        load_base(recipe(tmp_path, tmp_path / "base"), TEXT)
    assert caught.value.code == "weights-missing"


def test_a_plan_that_cannot_be_met_is_an_error(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(PlanError) as caught:
        load_base(recipe(tmp_path, saved, adapter={"targets": ["targat"]}), TEXT)
    assert "targat" in str(caught.value)


def test_options_that_the_model_does_not_take_are_an_error(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        load_base(recipe(tmp_path, saved, args={"model_init_kwargs": {"attn_implementaton": "sdpa"}}), TEXT)
    assert caught.value.code == "model-options"
    assert "attn_implementaton" in str(caught.value.why)
