"""What a sharded base excludes is refused before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from peft import LNTuningConfig, LoraConfig
from tests.training.small import write_recipe

import graftkit as gk
from graftkit.errors import TrainingError
from graftkit.recipes.recipe import Recipe, read_recipe
from graftkit.recipes.trainer_arguments import trainer_arguments
from graftkit.training.distributed.fsdp2 import check_attachable, check_sharding
from graftkit.training.model import LoadedBase

if TYPE_CHECKING:
    from pathlib import Path


def recipe(folder: Path, requested: Any, *, quantization: str | None = None, **args: Any) -> Recipe:
    fields = {"quantization": quantization} if quantization else {}
    args = {"model_init_kwargs": {"distributed_config": requested}, "save_only_model": True, **args}
    return read_recipe(write_recipe(folder / "sft.yaml", folder, [], args=args, **fields))


@dataclass(frozen=True)
class Args:
    """Return the trainer's arguments where several processes train together."""

    given: Any
    world_size: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.given, name)


def refusal(asked: Recipe, *, processes: int = 2, resume: bool = False) -> TrainingError:
    with pytest.raises(TrainingError) as caught:
        check_sharding(asked, Args(trainer_arguments(asked), processes), resume)
    assert caught.value.code == "sharding"
    return caught.value


def test_what_is_possible(tmp_path: Path) -> None:
    for args in ({}, {"save_only_model": False, "save_strategy": "no"}):
        requested = recipe(tmp_path, {"fsdp_size": 2}, **args)
        check_sharding(requested, Args(trainer_arguments(requested), 2), resume=False)
    plain = recipe(tmp_path, None, save_only_model=False)
    check_sharding(plain, trainer_arguments(plain), resume=True)


def test_a_key_that_transformers_would_ignore(tmp_path: Path) -> None:
    assert refusal(recipe(tmp_path, {"fspd_size": 2})).help == "did you mean fsdp_size?"


def test_sizes_for_other_processes(tmp_path: Path) -> None:
    assert refusal(recipe(tmp_path, {"fsdp_size": 3})).help == "graft train RECIPE --launch 3"
    assert refusal(recipe(tmp_path, {"fsdp_size": 2}), processes=1).help == "graft train RECIPE --launch 2"


def test_values_that_transformers_refuses(tmp_path: Path) -> None:
    assert "must be >= 1" in str(refusal(recipe(tmp_path, {"fsdp_size": 0})).why)


def test_a_quantized_base(tmp_path: Path) -> None:
    assert "quantization" in str(refusal(recipe(tmp_path, {"fsdp_size": 2}, quantization="4bit")).help)


def test_checkpoints_that_could_not_be_resumed(tmp_path: Path) -> None:
    requested = recipe(tmp_path, {"fsdp_size": 2}, save_only_model=False)
    assert "save_only_model" in str(refusal(requested).help)
    assert refusal(recipe(tmp_path, {"fsdp_size": 2}), resume=True).help == "start without --resume"


def sharded_base(config: Any) -> LoadedBase:
    """Return a base that is marked as sharded; its weights are complete, as one process has them."""
    model = gk.twin("qwen3")
    model._is_distributed_loading_by_transformers = True
    return LoadedBase(model=model, processor=None, peft_config=config, map=gk.survey(model), plan=None)


@pytest.mark.parametrize(
    ("config", "option"),
    [
        pytest.param(LoraConfig(use_dora=True), "DoRA", id="dora"),
        pytest.param(LoraConfig(init_lora_weights="pissa"), "init_lora_weights: pissa", id="pissa"),
        pytest.param(LoraConfig(modules_to_save=["lm_head"]), "modules_to_save", id="modules to save"),
        pytest.param(LoraConfig(trainable_token_indices=[1]), "trainable_token_indices", id="tokens"),
        pytest.param(LNTuningConfig(), "ln_tuning", id="norms"),
    ],
)
def test_adapters_that_need_full_weights(config: Any, option: str) -> None:
    base = sharded_base(config)
    with pytest.raises(TrainingError) as caught:
        check_attachable(base)
    assert option in caught.value.what
    base.model._is_distributed_loading_by_transformers = False
    check_attachable(base)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_adapters_that_do_not(init: Any) -> None:
    check_attachable(sharded_base(LoraConfig(init_lora_weights=init)))
