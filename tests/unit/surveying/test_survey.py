"""The map of a model: towers, roles, kinds, ties, names on disk, and what cannot be adapted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import graftkit as gk
from graftkit.families import family_of
from graftkit.surveying.sites import Note, Obstacle


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


def test_experts_that_a_checkpoint_counts_through_two_towers() -> None:
    found = gk.survey("ernie4_5_vl_moe")
    experts = "model.language_model.layers.1.mlp.{}_moe.experts.down_proj"
    text, vision = found[experts.format("text")], found[experts.format("vision")]
    first, last = "model.layers.1.mlp.experts.{}.down_proj.weight".format, len(text.checkpoint_keys)
    assert text.checkpoint_keys == tuple(first(n) for n in range(last))
    assert vision.checkpoint_keys == tuple(first(n) for n in range(last, last + len(vision.checkpoint_keys)))


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
    ("path", "obstacle", "fact"),
    [
        pytest.param("block.router", Obstacle.OWN_FORWARD, "Router", id="subclass with another forward"),
        pytest.param("block.depthwise", Obstacle.GROUPED_CONV, "8", id="depthwise convolution"),
        pytest.param("block.position", Obstacle.LOOSE_PARAMETER, "", id="bare parameter"),
    ],
)
def test_what_cannot_be_adapted_says_why(path: str, obstacle: Obstacle, fact: str) -> None:
    site = gk.survey(Net())[path]
    assert not site.adaptable
    assert site.obstacle is obstacle
    assert site.reason
    assert fact in site.reason
    assert "{" not in site.reason
    assert site.to_dict()["reason"] == site.reason


def test_weights_read_past_their_module_are_not_adaptable() -> None:
    site = gk.survey("mamba2")["backbone.layers.0.mixer.out_proj"]
    assert site.obstacle is Obstacle.BYPASSED
    assert site.reason in {weight.reason for weight in family_of("mamba2").bypassed}


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


class SpelledOut(nn.Linear):
    """A subclass with another forward that still is x @ W.T + b (falcon has one)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class Doubled(nn.Linear):
    """A subclass that is affine in its input, but not with this weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "adaptable"),
    [
        pytest.param(SpelledOut(4, 4), True, id="the same affine map, spelled out"),
        pytest.param(Doubled(4, 4), False, id="another map"),
        pytest.param(Router(8, 4), False, id="not affine"),
    ],
)
def test_a_linear_subclass_is_judged_by_what_it_computes(layer: nn.Linear, adaptable: bool) -> None:
    assert gk.survey(nn.ModuleDict({"layer": layer}))["layer"].adaptable is adaptable


def test_a_layer_whose_keys_are_its_values_is_noted() -> None:
    noted = [s for s in gk.survey(hub_id("31B")) if s.note]
    assert len(noted) == 10
    assert {(s.role, s.note) for s in noted} == {("attention.k", Note.KEY_IS_VALUE)}


def test_layers_that_share_keys_and_values_are_noted() -> None:
    noted = [s for s in gk.survey(hub_id("E2B")) if s.note]
    assert len(noted) == 20
    assert {(s.role, s.note) for s in noted} == {("attention.q", Note.SHARED_KV)}


class Packed(nn.Module):
    """What a quantizer leaves of a linear: packed integers, scales and the logical shape."""

    def __init__(self, **stores: torch.Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = 64, 32
        for name, tensor in stores.items():
            self.register_buffer(name, tensor)


_INTEGERS, _SCALES = torch.zeros(8, 32, dtype=torch.int32), torch.ones(1, 32)


@pytest.mark.parametrize(
    ("module", "quantizer"),
    [
        pytest.param(
            Packed(qweight=_INTEGERS, qzeros=_INTEGERS, scales=_SCALES, g_idx=_INTEGERS), "gptq", id="gptq"
        ),
        pytest.param(Packed(qweight=_INTEGERS, qzeros=_INTEGERS, scales=_SCALES), "awq", id="awq"),
        pytest.param(Packed(W_q=_INTEGERS, meta=_SCALES), "hqq", id="hqq"),
        pytest.param(Packed(codes=_INTEGERS, codebooks=_SCALES, scales=_SCALES), "aqlm", id="aqlm"),
        pytest.param(Packed(weight=_INTEGERS.to(torch.int8), weight_scales=_SCALES), "eetq", id="eetq"),
    ],
)
def test_quantized_linears_are_recognised_by_what_they_store(module: nn.Module, quantizer: str) -> None:
    site = gk.survey(nn.ModuleDict({"layer": module}))["layer"]
    assert (site.kind, site.shape, site.quantized) == ("linear", (32, 64), quantizer)
    # None of these packages is installed with the tests: PEFT could not attach here, and the survey says so.
    assert site.obstacle is Obstacle.QUANTIZER_MISSING


def test_an_integer_weight_of_unknown_making_is_not_adaptable() -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    site = gk.survey(nn.ModuleDict({"layer": layer}))["layer"]
    assert site.obstacle is Obstacle.NOT_FLOATING
    assert "int8" in (site.reason or "")


@pytest.mark.parametrize(
    ("options", "quantizer"),
    [
        pytest.param({"load_in_4bit": True}, "bitsandbytes 4-bit", id="4-bit"),
        pytest.param({"load_in_8bit": True}, "bitsandbytes 8-bit", id="8-bit"),
    ],
)
def test_bitsandbytes_linears_keep_their_logical_shape(
    twin_of: Callable[[str], nn.Module], tmp_path: Path, options: dict[str, bool], quantizer: str
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = twin_of("llama")
    model.save_pretrained(tmp_path)
    small = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    )
    plain, packed = gk.survey(model), gk.survey(small)
    for site in packed:
        if site.quantized:
            assert site.quantized == quantizer
            assert site.shape == plain[site.path].shape
            assert site.adaptable
    assert any(site.quantized for site in packed)
    assert packed.model.params == plain.model.params


class RewardModel(nn.Module):
    """A model held by a module of another library, with a head of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.score = nn.Linear(64, 1)

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.score(self.model(**batch).logits)


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        pytest.param(nn.DataParallel, "module.", id="DataParallel"),
        pytest.param(RewardModel, "model.", id="reward"),
    ],
)
def test_a_held_model_keeps_its_towers(
    twin_of: Callable[[str], nn.Module], wrap: Callable[[nn.Module], nn.Module], prefix: str
) -> None:
    model = twin_of(hub_id("E2B"))
    plain, held = gk.survey(model), gk.survey(wrap(model))
    towers = {f"{prefix}{site.path}": (site.tower, site.role) for site in plain}
    assert {s.path: (s.tower, s.role) for s in held if s.path in towers} == towers
    wanted = {f"{prefix}{a.path}" for a in gk.plan(model).attached}
    assert {a.path for a in gk.plan(wrap(model)).attached} == wanted


def test_a_changed_model_with_adapters_is_surveyed_as_it_is(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("llama")
    del model.model.layers[1:]
    before = gk.survey(model).to_dict()["sites"]
    adapted = gk.attach(model, gk.plan(model, r=2, modules_to_save=["lm_head"]))
    after = gk.survey(adapted).to_dict()["sites"]
    assert after == before
    assert adapted.base_model.model.model.layers[0].self_attn.q_proj.base_layer is not None


def test_a_plain_module_with_adapters_is_looked_through() -> None:
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"]))
    assert [s.path for s in gk.survey(adapted)] == ["0", "1"]


def test_one_module_in_two_places_is_tied_to_itself() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    assert gk.survey(model)["a"].tied_to == ("b",)
