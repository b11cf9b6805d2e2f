"""The families that a twin must work for, as configurations."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass(frozen=True)
class Case:
    """A configuration to make a twin of.

    Attributes:
        name: a hub id of the family data or a transformers model type.
        architectures: as a released configuration has it, where the default class is another one.
        fields: configuration values beyond the class's defaults.
        unused: parameters that the model's own forward leaves without a gradient, as path fragments.
    """

    name: str
    architectures: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def config(self) -> Any:
        from transformers import CONFIG_MAPPING

        from graftkit.families import geometry

        known = geometry(self.name)
        if known is not None:
            return CONFIG_MAPPING[known["model_type"]].from_dict(dict(known))
        config = CONFIG_MAPPING[self.name](**self.fields)
        if self.architectures:
            config.architectures = list(self.architectures)
        return config


GEMMA4 = tuple(Case(f"google/gemma-4-{size}-it") for size in ("E2B", "E4B", "26B-A4B", "31B"))
CASES = (
    *GEMMA4,
    Case("llama", fields={"num_key_value_heads": 8}),
    Case("qwen3"),
    Case("mixtral"),
    Case("gpt_oss"),
    Case("t5"),
    Case("bert"),
    # Its encoder's positions are fixed sinusoids.
    Case("whisper", unused=("encoder.embed_positions",)),
    # It reads the vision tower's last layer but one.
    Case("llava", unused=("vision_tower.encoder.layers.1", "vision_tower.post_layernorm")),
    Case("qwen3_vl"),
    Case("qwen2_5_vl"),
    Case("glm4v"),
    Case("llava_onevision", unused=("vision_tower.post_layernorm",)),
    Case("mamba2"),
    # Codes are given, and the codec that makes them is not trained.
    Case(
        "moshi",
        architectures=("MoshiForConditionalGeneration",),
        fields={"audio_vocab_size": 2048},
        unused=("audio_encoder.",),
    ),
    Case("qwen3_moe"),
    Case("deepseek_v3"),
    # The pooling head of its SigLIP tower is built and not used.
    Case("gemma3", unused=("vision_tower.head",)),
    Case("gemma3n_text"),
    Case("phi3"),
    Case("vit"),
    Case("wav2vec2", unused=("masked_spec_embed",)),
    Case("qwen3_5"),
    Case("glm4_moe"),
    Case("llama4"),
    Case("granitemoe"),
    Case("nemotron_h"),
    Case("qwen3_next"),
    Case("jamba"),
    Case("zamba2"),
    Case("zamba"),
    Case("mistral4"),
    Case("dinov2", unused=("mask_token",)),
    Case("falcon_h1"),
)


@functools.cache
def _twin_of(case_index: int) -> Any:
    from graftkit.twins.twin import twin

    return twin(CASES[case_index].config())


@pytest.fixture(params=range(len(CASES)), ids=lambda i: CASES[i].name)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture
def twin_of_case(case) -> Any:
    """The case's twin, built once for all tests, without gradients."""
    model = _twin_of(CASES.index(case))
    model.zero_grad(set_to_none=True)
    return model


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
