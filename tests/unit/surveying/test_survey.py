"""The map of a model: towers, roles, kinds, ties, names on disk, and what cannot be adapted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

import graftkit as gk

GEOMETRIES = ["E2B", "E4B", "26B-A4B", "31B"]


def hub_id(geometry: str) -> str:
    return f"google/gemma-4-{geometry}-it"


# Public figures of the four released geometries: wrapped linears per tower, and parameters in billions.
@pytest.mark.parametrize(
    ("geometry", "wrapped", "billions"),
    [
        pytest.param("E2B", {"vision": 112, "audio": 120}, (4.5, 5.5), id="E2B"),
        pytest.param("E4B", {"vision": 112, "audio": 120}, (7.0, 8.5), id="E4B"),
        pytest.param("26B-A4B", {"vision": 189}, (25.0, 27.0), id="26B-A4B"),
        pytest.param("31B", {"vision": 189}, (30.0, 33.0), id="31B"),
    ],
)
def test_gemma4_geometries(geometry: str, wrapped: dict[str, int], billions: tuple[float, float]) -> None:
    model_map = gk.survey(hub_id(geometry))
    counted = Counter(s.tower for s in model_map if s.wrapper and s.wrapper.cls == "Gemma4ClippableLinear")
    assert counted == wrapped
    assert billions[0] < model_map.model.params / 1e9 < billions[1]


def test_gemma4_language_linears_are_not_wrapped(e2b: nn.Module) -> None:
    sites = [s for s in gk.survey(e2b) if s.tower == "language"]
    assert sites
    assert not any(s.wrapper for s in sites)


def test_kv_shared_layers_have_no_key_and_value_sites() -> None:
    model_map = gk.survey(hub_id("E2B"))
    queries = [s for s in model_map if s.tower == "language" and s.role == "attention.q"]
    keys = [s for s in model_map if s.tower == "language" and s.role == "attention.k"]
    assert (len(queries), len(keys)) == (35, 15)


def test_every_parameter_is_counted_in_one_tower(e2b: nn.Module) -> None:
    model_map = gk.survey(e2b)
    assert sum(tower.params for tower in model_map.towers) == sum(p.numel() for p in e2b.parameters())


def test_tied_weights_are_groups(e2b: nn.Module) -> None:
    model_map = gk.survey(e2b)
    tied = {s.path: s.tied_to for s in model_map if s.tied_to}
    assert tied == {
        "model.language_model.embed_tokens": ("lm_head",),
        "lm_head": ("model.language_model.embed_tokens",),
    }


@pytest.mark.parametrize(
    ("name", "towers"),
    [
        pytest.param("llama", {"language", "head"}, id="llama"),
        pytest.param("bert", {"language", "head"}, id="bert"),
        pytest.param("t5", {"language", "head"}, id="t5"),
        pytest.param("whisper", {"audio", "language", "head"}, id="whisper"),
        pytest.param("llava", {"vision", "projector", "language", "head"}, id="llava"),
        pytest.param("qwen3_vl", {"vision", "language", "head"}, id="qwen3_vl"),
        pytest.param("vit", {"vision", "head"}, id="vit"),
        pytest.param("mamba2", {"language", "head"}, id="mamba2"),
        pytest.param(hub_id("E2B"), {"vision", "language", "audio", "projector", "head"}, id="gemma4"),
        pytest.param(hub_id("31B"), {"vision", "language", "projector", "head"}, id="gemma4 without audio"),
    ],
)
def test_towers_come_from_structure(name: str, towers: set[str]) -> None:
    assert {tower.name for tower in gk.survey(name).towers} == towers


@pytest.mark.parametrize(
    ("name", "path", "role"),
    [
        pytest.param("llama", "model.layers.0.self_attn.q_proj", "attention.q", id="llama q"),
        pytest.param("llama", "model.layers.0.mlp.gate_proj", "mlp.gate", id="llama gate"),
        pytest.param("t5", "encoder.block.0.layer.0.SelfAttention.q", "attention.q", id="t5 q"),
        pytest.param("t5", "encoder.block.0.layer.1.DenseReluDense.wo", "mlp.down", id="t5 wo is no attention"),
        pytest.param("bert", "bert.encoder.layer.0.attention.output.dense", "attention.o", id="bert o"),
        pytest.param("bert", "bert.encoder.layer.0.intermediate.dense", "mlp.up", id="bert up"),
        pytest.param("bert", "bert.encoder.layer.0.output.dense", "mlp.down", id="bert down"),
        pytest.param("whisper", "model.encoder.layers.0.self_attn.out_proj", "attention.o", id="whisper o"),
        pytest.param("mamba2", "backbone.layers.0.mixer.in_proj", "ssm", id="mamba in_proj"),
        pytest.param("qwen3_vl", "model.visual.blocks.0.attn.qkv", "attention.qkv", id="fused qkv"),
        pytest.param("qwen3_vl", "model.visual.blocks.0.attn.proj", "attention.o", id="proj in attention"),
        pytest.param(
            "moshi", "model.layers.0.self_attn.q_proj.linear", "attention.q", id="wrapped: the outer name"
        ),
        pytest.param("mixtral", "model.layers.0.mlp.experts.gate_up_proj", "expert", id="stacked experts"),
        pytest.param("mixtral", "model.layers.0.mlp.gate.weight", "router", id="router parameter"),
        pytest.param(hub_id("26B-A4B"), "model.language_model.layers.0.router.proj", "router", id="router linear"),
        pytest.param("llama", "lm_head", "lm_head", id="head"),
    ],
)
def test_roles(name: str, path: str, role: str) -> None:
    assert gk.survey(name)[path].role == role


def test_names_on_disk_differ_from_names_in_memory() -> None:
    experts = gk.survey("mixtral")["model.layers.0.mlp.experts.gate_up_proj"]
    assert len(experts.checkpoint_keys) == 16
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in experts.checkpoint_keys
    plain = gk.survey("llama")["model.layers.0.self_attn.q_proj"]
    assert plain.checkpoint_keys == ("model.layers.0.self_attn.q_proj.weight",)


class Router(nn.Linear):
    """A Linear subclass that computes something else (llama4 and phimoe have one)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).topk(2).values


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(8, 8)
        self.router = Router(8, 4)
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8)
        self.position = nn.Parameter(torch.zeros(2, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.router(self.plain(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        pytest.param("block.router", "forward of its own", id="subclass with another forward"),
        pytest.param("block.depthwise", "8 groups", id="depthwise convolution"),
        pytest.param("block.position", "unknown", id="bare parameter"),
    ],
)
def test_what_cannot_be_adapted_says_why(path: str, reason: str) -> None:
    site = gk.survey(Net())[path]
    assert not site.adaptable
    assert reason in (site.reason or "")


def test_weights_read_past_their_module_are_not_adaptable() -> None:
    site = gk.survey("mamba2")["backbone.layers.0.mixer.out_proj"]
    assert not site.adaptable
    assert site.reason


def test_adapters_already_there_are_looked_through(e2b: nn.Module) -> None:
    before = gk.survey(e2b)
    adapted = gk.attach(e2b, gk.plan(before, scope=["language", "vision"], r=2))
    assert [s.path for s in gk.survey(adapted)] == [s.path for s in before]


def test_a_configuration_and_its_model_give_the_same_map(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("llava")
    live, meta = gk.survey(model).to_dict(), gk.survey(model.config).to_dict()
    assert live["sites"] == meta["sites"]
    assert live["towers"] == meta["towers"]


def test_json_fields_that_scripts_rely_on(e2b: nn.Module) -> None:
    fields = gk.survey(e2b).to_dict()
    assert {"schema_version", "model", "towers", "sites"} <= fields.keys()
    assert {"name", "sites", "params"} <= fields["towers"][0].keys()
    contract = {
        "path", "tower", "role", "kind", "shape", "adaptable", "reason", "wrapper", "tied_to", "checkpoint_keys",
    }  # fmt: skip
    assert all(contract <= site.keys() for site in fields["sites"])


def test_the_map_prints_as_a_table(e2b: nn.Module) -> None:
    text = str(gk.survey(e2b))
    assert "Gemma4ClippableLinear" in text
    assert "vision" in text
