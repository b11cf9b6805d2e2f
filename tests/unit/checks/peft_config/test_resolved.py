"""The resolved targets are those that stock PEFT adapts, and the refusals those it raises over."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

import graftkit as gk
from graftkit.attaching.attach import adapted_sites
from graftkit.checks.peft_config.resolved import ResolvedTargets
from graftkit.planning.matching import target_matcher

E2B = "google/gemma-4-E2B-it"
MOE = "google/gemma-4-26B-A4B-it"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]
INNER = ["self_attn.q_proj.linear", "self_attn.v_proj.linear"]

CASES: list[Any] = [
    (E2B, "the usual seven", {"target_modules": SEVEN}),
    (E2B, "one name", {"target_modules": ["q_proj"]}),
    (E2B, "inner linears", {"target_modules": INNER}),
    (E2B, "a name none has", {"target_modules": ["q_proj.linear", "query"]}),
    (E2B, "nothing", {"target_modules": ["query"]}),
    (E2B, "all-linear", {"target_modules": "all-linear"}),
    (E2B, "ALL-Linear", {"target_modules": "ALL-Linear"}),
    (E2B, "no targets", {}),
    (E2B, "a regular expression", {"target_modules": r".*language_model.*\.(q|v)_proj"}),
    (E2B, "wrapper and inner", {"target_modules": r".*vision_tower.*(q_proj|v_proj)(\.linear)?"}),
    (E2B, "a list of excluded towers", {"target_modules": QV, "exclude_modules": ["vision_tower", "audio_tower"]}),
    (
        E2B,
        "a regular expression that excludes",
        {"target_modules": QV, "exclude_modules": r".*(vision|audio)_tower.*"},
    ),
    (E2B, "everything excluded", {"target_modules": QV, "exclude_modules": ["q_proj", "v_proj"]}),
    (E2B, "saved whole", {"target_modules": ["up_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
    (E2B, "a tied embedding", {"target_modules": ["embed_tokens"]}),
    (E2B, "a tied head", {"target_modules": ["lm_head"]}),
    (
        E2B,
        "both, tied",
        {"target_modules": ["lm_head", "language_model.layers.0.mlp.up_proj"], "ensure_weight_tying": True},
    ),
    (
        E2B,
        "layers",
        {"target_modules": ["mlp.up_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    ),
    (E2B, "the first layer", {"target_modules": ["mlp.up_proj"], "layers_to_transform": 0}),
    (E2B, "layers with a regular expression", {"target_modules": ".*up_proj", "layers_to_transform": [0]}),
    (E2B, "a container", {"target_modules": ["mlp"]}),
    (E2B, "a norm", {"target_modules": ["input_layernorm"]}),
    (E2B, "convolutions and linears", {"target_modules": ["conv", "mlp.up_proj"]}),
    (E2B, "a parameter", {"target_modules": [], "target_parameters": ["embed_tokens_per_layer.weight"]}),
    (
        E2B,
        "a parameter and its module",
        {"target_modules": ["mlp.up_proj"], "target_parameters": ["mlp.up_proj.weight"]},
    ),
    (E2B, "a norm's parameter", {"target_modules": [], "target_parameters": ["input_layernorm.weight"]}),
    (E2B, "IA3", {"peft_type": "IA3", "target_modules": ["mlp.up_proj"], "feedforward_modules": []}),
    (E2B, "OFT", {"peft_type": "OFT", "target_modules": ["mlp.up_proj"], "oft_block_size": 4}),
    (E2B, "LoHa with embeddings", {"peft_type": "LOHA", "target_modules": ["mlp.up_proj", "embed_tokens"]}),
    (MOE, "the usual seven", {"target_modules": SEVEN}),
    (MOE, "all-linear", {"target_modules": "all-linear"}),
    (MOE, "experts", {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    (
        MOE,
        "experts with dropout",
        {"target_parameters": ["experts.down_proj"], "target_modules": QV, "lora_dropout": 0.1},
    ),
    (
        MOE,
        "experts with PiSSA",
        {"target_parameters": ["experts.down_proj"], "target_modules": [], "init_lora_weights": "pissa"},
    ),
    ("gpt2", "no targets", {}),
    ("gpt2", "attention and MLP", {"target_modules": ["c_attn", "mlp.c_proj"]}),
    ("gpt2", "all-linear", {"target_modules": "all-linear"}),
    ("gpt2", "names of another family", {"target_modules": SEVEN}),
    *[
        (name, title, fields)
        for name in ("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "glm4_moe")
        for title, fields in (
            ("no targets", {}),
            ("attention", {"target_modules": QV}),
            ("the usual seven", {"target_modules": SEVEN}),
            ("all-linear", {"target_modules": "all-linear"}),
            ("half of what is fused", {"target_modules": ["gate_proj", "q_proj"]}),
            ("Mixtral's names", {"target_modules": ["w1", "w2", "w3"]}),
            ("the router", {"target_modules": ["q_proj", "gate"]}),
            ("a regular expression", {"target_modules": r".*\.(q_proj|gate_proj|up_proj)"}),
            ("with dropout", {"target_modules": SEVEN, "lora_dropout": 0.05}),
            ("experts by parameter", {"target_modules": QV, "target_parameters": ["experts.down_proj"]}),
            ("LoHa", {"peft_type": "LOHA", "target_modules": SEVEN}),
        )
    ],
    ("mamba2", "a mixer's projections", {"target_modules": ["in_proj", "out_proj"]}),
    ("mamba2", "all-linear", {"target_modules": "all-linear"}),
    ("mamba2", "the input alone", {"target_modules": ["in_proj"]}),
    ("jamba", "a grouped convolution", {"target_modules": ["q_proj", "conv1d"], "r": 3}),
    ("wav2vec2", "groups of channels", {"target_modules": ["conv_embed.conv", "q_proj"]}),
    ("llama4", "routers that are linears", {"target_modules": ["router"]}),
    ("t5", "no targets", {}),
    ("moshi", "all-linear", {"target_modules": "all-linear"}),
    ("clip", "all-linear", {"target_modules": "all-linear"}),
]


def config_of(fields: Mapping[str, Any]) -> Any:
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[fields.get("peft_type", "LORA")]
    return cls(**{name: value for name, value in fields.items() if name != "peft_type"})


def what_peft_does(model: nn.Module, fields: Mapping[str, Any]) -> set[str] | Exception:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return adapted_sites(get_peft_model(model, config_of(fields)))
        except Exception as error:
            return error


@pytest.mark.parametrize(
    ("name", "fields"),
    [pytest.param(name, fields, id=f"{name.split('/')[-1]}: {title}") for name, title, fields in CASES],
)
def test_resolved_targets_are_what_peft_adapts(
    twin_of: Callable[[str], nn.Module], name: str, fields: dict[str, Any]
) -> None:
    model = twin_of(name)
    resolved = ResolvedTargets(fields, gk.survey(model))
    done = what_peft_does(model, fields)
    assert resolved.problems == ()
    if isinstance(done, Exception):
        assert resolved.refusals, f"PEFT raises {type(done).__name__}: {done}"
        return
    assert resolved.refusals == ()
    assert set(resolved.modules) | set(resolved.parameters) == done
    by_weight = {
        path.removesuffix(".weight") if path.endswith(".weight") and path not in resolved.adapted else path
        for path in done
    }
    assert resolved.adapted == by_weight & {site.path for site in resolved.base}


# ---- matching, for any names ----

_parts = st.sampled_from(["layers", "0", "1", "12", "attn", "q", "k", "linear", "mlp", "a_b"])
_paths = st.lists(st.lists(_parts, min_size=1, max_size=6).map(".".join), min_size=1, max_size=20, unique=True)


@given(paths=_paths, data=st.data())
@settings(max_examples=300, deadline=None)
def test_the_matcher_agrees_with_peft(paths: list[str], data: st.DataObject) -> None:
    some_paths = st.lists(st.sampled_from(paths), unique=True)
    fields = {
        "target_modules": data.draw(
            st.one_of(some_paths, st.sampled_from([r".*\.q", r".*(q|k)", r"layers\.\d+\..*"]))
        ),
        "exclude_modules": data.draw(st.one_of(some_paths, st.just(r".*\.linear"), st.none())),
        "modules_to_save": data.draw(st.one_of(st.lists(_parts, max_size=2), st.none())),
    }
    if isinstance(fields["target_modules"], list):
        layers = st.lists(st.integers(0, 12), max_size=2)
        fields["layers_to_transform"] = data.draw(st.one_of(layers, st.integers(0, 1), st.none()))
    matches, config = target_matcher(fields), LoraConfig(**fields)
    assert [p for p in paths if matches(p)] == [p for p in paths if check_target_module_exists(config, p)]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_list_resolves_to_what_peft_adapts(
    twin_of: Callable[[str], nn.Module], name: str, data: st.DataObject
) -> None:
    model = twin_of(name)
    base = gk.survey(model)
    tails = sorted({".".join(site.path.split(".")[-n:]) for site in base if site.is_linear for n in (1, 2, 3)})
    named = st.lists(st.sampled_from(tails), unique=True, max_size=4)
    fields = {"target_modules": data.draw(named), "exclude_modules": data.draw(named)}
    resolved, done = ResolvedTargets(fields, base), what_peft_does(model, fields)
    assert isinstance(done, Exception) == bool(resolved.refusals)
    if isinstance(done, set):
        assert {*resolved.modules, *resolved.parameters} == done


def test_keys_decide_ranks_as_in_peft(twin_of: Callable[[str], nn.Module]) -> None:
    pattern = {r"layers\.0\..*q_proj": 2, "q_proj": 3, "^model.layers.1.self_attn.v_proj": 4, "none": 5}
    resolved = ResolvedTargets(
        {"target_modules": QV, "rank_pattern": pattern, "r": 6}, gk.survey(twin_of("llama"))
    )
    for path in resolved.modules:
        assert resolved.rank(path) == pattern.get(get_pattern_key(pattern, path), 6)
    matched = resolved.matched_by("rank_pattern")
    assert {key for key, paths in matched.items() if not paths} == {"none"}
    assert set(matched["q_proj"]) == {path for path in resolved.modules if path.endswith("q_proj")}


# ---- what a configuration may not do ----


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"target_modules": {"q_proj": 1}}, id="a mapping for a list"),
        pytest.param({"target_modules": ["q_proj"], "r": "8"}, id="a rank that is text"),
        pytest.param({"target_modules": r"(.*.*.*.*.*)*x"}, id="a pattern that does not end"),
        pytest.param({"target_modules": ["q_proj"], "exclude_modules": ["x"] * 10**5}, id="an endless list"),
        pytest.param({"target_modules": ["q_proj"], "peft_type": []}, id="an invalid method"),
        pytest.param({"target_modules": ["q_proj"], "peft_type": "LN_TUNING"}, id="a method for norms"),
    ],
)
def test_a_configuration_that_cannot_be_used_has_problems(
    twin_of: Callable[[str], nn.Module], fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftkit.checks.peft_config.validate._TIMEOUT", 1)
    assert ResolvedTargets(fields, gk.survey(twin_of("llama"))).problems


def test_of_several_patterns_the_one_that_does_not_end_is_named(
    twin_of: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftkit.checks.peft_config.validate._TIMEOUT", 1)
    fields = {"target_modules": ".*layers.*q_proj", "exclude_modules": r"(.*.*.*.*.*)*x"}
    (problem,) = ResolvedTargets(fields, gk.survey(twin_of("llama"))).problems
    assert problem.startswith("exclude_modules")


def test_very_many_names_are_looked_up(twin_of: Callable[[str], nn.Module]) -> None:
    names = [f"layers.{n}.{'x.' * (n % 50)}q_proj" for n in range(10**5)]
    resolved = ResolvedTargets({"target_modules": [*names, "v_proj"]}, gk.survey(twin_of("llama")))
    assert resolved.problems == ()
    assert {path.rpartition(".")[2] for path in resolved.adapted} == {"v_proj"}
    assert len(resolved.named) == 10**5 + 1
