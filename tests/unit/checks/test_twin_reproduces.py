"""A twin shows what settings would do to the real model, without its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tests.unit.checks.live_adapters import adapted
from tests.unit.checks.observed import seen
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

import graftkit as gk
from graftkit.planning.config.build import config_dict
from graftkit.recipes.training import Training

ERROR, OK = gk.Severity.ERROR, gk.Severity.OK

Twins = Callable[[str], nn.Module]


# ---- GK202: k-bit preparation, with its defaults, on layers that share keys and values ----


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # PEFT still calls it
@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        pytest.param({}, ERROR, id="defaults"),
        pytest.param({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, OK, id="non-reentrant"),
    ],
)
def test_k_bit_preparation_gives_wrong_gradients(
    e2b: nn.Module, tmp_path: Path, options: dict[str, Any], verdict: gk.Severity
) -> None:
    pytest.importorskip("bitsandbytes")
    batch = gk.example_batch(e2b)
    e2b.save_pretrained(tmp_path)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    quantized = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=four_bit, device_map="cpu", dtype=torch.float32
    )
    model = adapted(prepare_model_for_kbit_training(quantized, **options))
    found = seen("GK202", model=model, batch=batch)
    assert found.severity is verdict, found.message
    assert found.evidence["re-entrant"]["worst_cosine"] < 0.95
    assert found.evidence["re-entrant"]["loss_difference"] < 1e-5


# ---- GK203: towers ----


@pytest.mark.parametrize(
    ("modalities", "training", "cause"),
    [
        pytest.param(None, Training(reentrant=True), "cut off by activation checkpointing", id="re-entrant"),
        pytest.param(["text"], Training(), "in a tower that the batch does not feed", id="text alone"),
    ],
)
def test_a_tower_that_never_trains(
    e2b: nn.Module, modalities: list[str] | None, training: Training, cause: str
) -> None:
    model = adapted(e2b, targets=["q_proj"], scope=["language", "vision"])
    batch = gk.example_batch(e2b, modalities=modalities)
    found = seen("GK203", model=model, batch=batch, training=training)
    assert found.severity is ERROR
    assert found.evidence["causes"] == {cause: 4}
    assert found.evidence["towers"]["vision"] == {"tensors": 4, "dead": 4}
    assert found.evidence["towers"]["language"]["dead"] == 0


# ---- GK205: packing on hybrids ----

PACKED = Training(packing=True)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("jamba", None),
        ("falcon_mamba", None),
        ("qwen3_next", None),
        ("nemotron_h", None),
        ("lfm2", ["conv", "full_attention"]),
        ("granitemoehybrid", ["mamba", "attention"]),
    ],
)
def test_packed_samples_leak_in_a_hybrid(name: str, layers: list[str] | None) -> None:
    """Without the boundaries of samples, state leaks from one into the next."""
    twin = gk.twin(name, overrides={"layer_types": layers, "num_hidden_layers": 2} if layers else None)
    found = seen("GK205", model=adapted(twin), training=PACKED)
    assert found.severity is ERROR
    assert found.evidence["difference_without_boundaries"] > 0.1


@pytest.mark.parametrize("name", ["llama", "gemma4_text", "google/gemma-4-31B-it"])
def test_packed_samples_stay_apart_in_a_transformer(twin_of: Twins, name: str) -> None:
    assert seen("GK205", model=adapted(twin_of(name)), training=PACKED).severity is OK


# ---- GK113: a tied embedding, merged twice ----


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")  # PEFT says so, and merges
def test_a_tied_embedding_is_merged_twice() -> None:
    twin = gk.twin("qwen3", overrides={"tie_word_embeddings": True})
    config = LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True, init_lora_weights=False)
    static = seen("GK113", peft_config=config_dict(config), base=gk.survey(twin))
    assert static.severity in {ERROR, gk.Severity.WARNING}
    batch = gk.example_batch(twin)
    model = get_peft_model(twin, config)
    found = seen("GK601", model=model, batch=batch)
    assert found.severity is ERROR, found.message
    embedding = model.get_base_model().model.embed_tokens
    before = embedding.get_base_layer().weight.detach().clone()
    delta = embedding.get_delta_weight("default").detach()
    after = model.merge_and_unload().get_input_embeddings().weight.detach()
    assert float(((after - before) * delta).sum() / delta.square().sum()) == pytest.approx(2, rel=1e-4)


# ---- GK103: experts that the usual seven names never reach ----


def test_the_usual_seven_leave_the_experts_alone(twin_of: Twins, usual_seven: tuple[str, ...]) -> None:
    twin = twin_of("google/gemma-4-26B-A4B-it")
    config = LoraConfig(r=4, target_modules=list(usual_seven), exclude_modules=r".*vision.*")
    static = seen("GK103", peft_config=config_dict(config), base=gk.survey(twin))
    assert static.severity in {ERROR, gk.Severity.WARNING}
    model = get_peft_model(twin, config)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert not [name for name in trained if ".experts." in name]
    reached = adapted(twin_of("google/gemma-4-26B-A4B-it"), targets=["all-linear", "experts"])
    whole = seen("GK103", peft_config=config_dict(reached.peft_config["default"]), base=gk.survey(twin))
    assert whole.severity is OK, whole.message
