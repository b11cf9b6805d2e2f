"""What engines make of adapters that stock PEFT saved: each rule finds its fault, and passes without it."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tests.unit.checks.live_adapters import with_effect
from tests.unit.checks.observed import by_code, seen
from torch import nn

import graftkit as gk
from graftkit.adapters.file import read_adapter
from graftkit.checks.adapter_files import asked, engine_support
from graftkit.checks.check import check
from graftkit.engines import all_engines
from graftkit.engines.outcome import Outcome, Served
from graftkit.merging.adapter.effects import read_effects

E2B, K_EQ_V = "google/gemma-4-E2B-it", "google/gemma-4-31B-it"
WEIGHTS = "adapter_model.safetensors"
OK, UNKNOWN = gk.Severity.OK, gk.Severity.UNKNOWN
ERROR, WARNING = gk.Severity.ERROR, gk.Severity.WARNING
CODES = ("GK701", "GK702", "GK703", "GK704", "GK705")
ENGINES = ("vllm", "sglang", "llama_cpp")
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": QKVO, **options})


def saved(base: nn.Module, folder: Path, config: PeftConfig) -> Path:
    model = get_peft_model(copy.deepcopy(base), config)
    with_effect(model).save_pretrained(folder, save_embedding_layers=False)
    return folder


def served(folder: Path, target: str, base: Any = None) -> dict[str, gk.Finding]:
    report = by_code(check(folder, base, target=target, data=False))
    return {code: found for code, found in report.items() if code in CODES}


@pytest.fixture
def llama(twin_of: Callable[[str], nn.Module]) -> nn.Module:
    return twin_of("llama")


# ---- what is served as it was trained ----


@pytest.mark.rule_passes("GK701", "GK702", "GK703", "GK704", "GK705")
@pytest.mark.parametrize("target", ENGINES)
def test_gk701_to_gk705_passes_on_a_plain_adapter(llama: nn.Module, tmp_path: Path, target: str) -> None:
    found = served(saved(llama, tmp_path, lora()), target, llama)
    # Nobody has looked how SGLang and llama.cpp take keys that are values; no adapter here asks it.
    assert {code: f.severity for code, f in found.items()} == dict.fromkeys(CODES, OK), found


@pytest.mark.parametrize("target", ENGINES)
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(VeraConfig(r=4, target_modules=["q_proj"]), id="vera"),
        pytest.param(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), id="no tensors in layers"),
    ],
)
def test_of_what_is_no_lora_nothing_more_is_said(
    llama: nn.Module, tmp_path: Path, target: str, config: PeftConfig
) -> None:
    found = served(saved(llama, tmp_path, config), target, llama)
    assert found["GK701"].severity is ERROR
    assert {found[code].severity for code in CODES if code != "GK701"} == {UNKNOWN}


def test_without_an_engine_the_rules_are_left_out(llama: nn.Module, tmp_path: Path) -> None:
    report = check(saved(llama, tmp_path, lora()), llama)
    assert not {f.code for f in report} & set(CODES)


def test_without_a_base_names_are_unknown(llama: nn.Module, tmp_path: Path) -> None:
    found = served(saved(llama, tmp_path, lora()), "vllm")
    assert {code: f.severity for code, f in found.items()} == {
        "GK701": OK,
        "GK702": UNKNOWN,
        "GK703": UNKNOWN,
        "GK704": OK,
        "GK705": UNKNOWN,
    }


def test_a_version_that_nobody_read_is_unknown(llama: nn.Module, tmp_path: Path) -> None:
    found = served(saved(llama, tmp_path, lora(use_dora=True, use_rslora=True)), "vllm==9.0", llama)
    assert found["GK701"].severity is UNKNOWN
    assert found["GK704"].severity is UNKNOWN


# ---- GK701 ----


@pytest.mark.parametrize(
    ("options", "target", "severity", "feature"),
    [
        pytest.param({"use_dora": True}, "vllm", ERROR, "dora", id="dora in vllm"),
        pytest.param({"use_dora": True}, "sglang", ERROR, "dora", id="dora in sglang"),
        pytest.param({"use_dora": True}, "llama_cpp", ERROR, "dora", id="dora in llama.cpp"),
        pytest.param(
            {"modules_to_save": ["lm_head"]}, "vllm", ERROR, "modules_to_save", id="a module saved whole"
        ),
        pytest.param({"modules_to_save": ["lm_head"]}, "sglang", ERROR, "modules_to_save", id="a head skipped"),
        pytest.param({"modules_to_save": ["mlp"]}, "sglang", UNKNOWN, "modules_to_save", id="not known"),
        pytest.param({"modules_to_save": ["norm"]}, "llama_cpp", ERROR, "trained norms", id="norms that vanish"),
        pytest.param({"modules_to_save": ["norm"]}, "vllm", ERROR, "trained norms", id="norms refused"),
        pytest.param({"bias": "lora_only"}, "vllm", ERROR, "empty bias", id="biases, and none there"),
        pytest.param({"bias": "lora_only"}, "vllm==0.11.0", WARNING, "empty bias", id="biases behind an option"),
        pytest.param({"bias": "lora_only"}, "vllm==0.11.1", ERROR, "empty bias", id="no option any more"),
        pytest.param({"bias": "all"}, "llama_cpp", OK, None, id="the option alone converts"),
        pytest.param({"bias": "all"}, "sglang", OK, None, id="the option alone is not read"),
        pytest.param(
            {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "vllm", ERROR, "alora", id="alora"
        ),
        pytest.param(
            {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
            "llama_cpp",
            OK,
            None,
            id="alora taken",
        ),
        pytest.param({"init_lora_weights": "pissa"}, "vllm", ERROR, "moved base", id="pissa"),
        pytest.param({"init_lora_weights": "olora"}, "llama_cpp", ERROR, "moved base", id="olora"),
        pytest.param({"init_lora_weights": "gaussian"}, "vllm", OK, None, id="one that moves nothing"),
        pytest.param({"trainable_token_indices": [1, 2]}, "vllm", ERROR, "trainable tokens", id="trained tokens"),
        pytest.param(
            {"target_modules": ["embed_tokens", "q_proj"]}, "vllm", OK, None, id="embeddings of this class"
        ),
        pytest.param({"target_modules": ["embed_tokens", "q_proj"]}, "llama_cpp", OK, None, id="taken"),
        pytest.param(
            {"layer_replication": [(0, 1), (0, 1)]}, "vllm", ERROR, "layer replication", id="repeated layers"
        ),
        pytest.param(
            {"target_modules": r".*\.[qv]_proj"}, "sglang", ERROR, "regex targets", id="a regular expression"
        ),
        pytest.param({"target_modules": r".*\.[qv]_proj"}, "vllm", OK, None, id="one that nobody reads"),
        pytest.param({}, "mlx", ERROR, "peft files", id="an engine with files of its own"),
        pytest.param({}, "ollama", ERROR, "peft files", id="an engine without adapters"),
        pytest.param({}, "vllm==0.22.0", UNKNOWN, "model class", id="a release whose source was not read"),
        pytest.param({"r": 24}, "vllm", WARNING, None, id="a rank behind an option"),
        pytest.param({"r": 16}, "vllm", OK, None, id="a rank that is taken"),
    ],
)
def test_gk701_what_an_engine_does_not_take(
    llama: nn.Module,
    tmp_path: Path,
    options: dict[str, Any],
    target: str,
    severity: gk.Severity,
    feature: str | None,
) -> None:
    found = served(saved(llama, tmp_path, lora(**options)), target, llama)["GK701"]
    assert found.severity is severity, found.message
    assert found.evidence.get("features") == (feature and [feature])
    assert found.help or severity in {OK, UNKNOWN}


@pytest.mark.parametrize(
    ("options", "target", "remedies"),
    [
        pytest.param({}, "mlx", ["convert"], id="converted"),
        pytest.param({}, "ollama", ["merge"], id="merged"),
        pytest.param({"use_dora": True}, "mlx", ["merge"], id="what is merged is not converted as well"),
        pytest.param({"init_lora_weights": "pissa"}, "vllm", ["convert"], id="doubled in rank"),
        pytest.param(
            {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "mlx", [], id="neither, activated"
        ),
        pytest.param({"layer_replication": [[0, 1], [0, 2]]}, "vllm", [], id="neither, replicated"),
    ],
)
def test_gk701_says_whether_to_convert_or_to_merge(
    llama: nn.Module, tmp_path: Path, options: dict[str, Any], target: str, remedies: list[str]
) -> None:
    found = served(saved(llama, tmp_path, lora(**options)), target, llama)["GK701"]
    assert found.evidence["remedies"] == remedies


@pytest.mark.parametrize("engine", [engine.name for engine in all_engines()])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(lora(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"), id="activated"),
        pytest.param(lora(layer_replication=[[0, 1], [0, 2]]), id="replicated"),
        pytest.param(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), id="prompt"),
    ],
)
def test_no_merge_is_advised_where_it_is_refused(
    llama: nn.Module, tmp_path: Path, config: PeftConfig, engine: str
) -> None:
    adapter = saved(llama, tmp_path, config)
    with pytest.raises(gk.GraftError) as caught:
        read_effects(read_adapter(adapter), llama)
    assert caught.value.code.startswith("merge-")
    assert "merge" not in served(adapter, engine, llama)["GK701"].evidence.get("remedies", ())


def test_gk701_every_field_of_the_installed_peft_was_looked_at() -> None:
    """A new PEFT brings new fields: each is read by a rule, is a variant, or changes nothing that is served."""
    read = (Path(file.__file__).read_text(encoding="utf-8") for file in (asked, engine_support))
    named = {name for text in read for name in re.findall(r'"(\w+)"', text)}
    of_training = {"lora_dropout", "inference_mode", "ensure_weight_tying", "runtime_config", "qalora_group_size"}
    of_targets = {
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "target_parameters",
    }
    of_initializers = {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
    of_files = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    of_shapes = {"r", "lora_alpha", "fan_in_fan_out", "megatron_config", "megatron_core"}
    known = named | of_training | of_targets | of_initializers | of_files | of_shapes
    assert {field.name for field in dataclasses.fields(LoraConfig)} - known == set()


@pytest.mark.rule_fails("GK701")
def test_gk701_names_the_flag_for_the_rank(llama: nn.Module, tmp_path: Path) -> None:
    found = served(saved(llama, tmp_path, lora(rank_pattern={"q_proj": 33})), "vllm", llama)["GK701"]
    assert found.help == "start the server with --max-lora-rank 64"


@pytest.mark.rule_fails("GK701")
def test_gk701_a_rank_beyond_any_option(llama: nn.Module, tmp_path: Path) -> None:
    found = served(saved(llama, tmp_path, lora(r=600)), "vllm", llama)["GK701"]
    assert found.severity is ERROR
    assert "512" in found.message


@pytest.mark.rule_fails("GK701")
def test_gk701_a_method_other_than_lora(llama: nn.Module, tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    found = served(saved(llama, tmp_path, config), "vllm", llama)
    assert found["GK701"].severity is ERROR
    assert found["GK701"].evidence["features"] == ["other method"]


@pytest.mark.rule_fails("GK701")
def test_gk701_an_output_layer_that_is_tied(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    base = twin_of(E2B)
    with pytest.warns(UserWarning, match="tie"):
        folder = saved(base, tmp_path, LoraConfig(r=2, target_modules=["lm_head"]))
    found = served(folder, "llama_cpp", base)["GK701"]
    assert found.severity is ERROR
    assert found.evidence["features"] == ["tied lm_head"]


# ---- GK702 ----


def tower_adapter(base: nn.Module, folder: Path, scope: str = "vision") -> Path:
    model = gk.attach(base, gk.plan(base, scope=[scope], r=2))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.rule_fails("GK702")
def test_gk702_a_tower_behind_an_option(e2b: nn.Module, tmp_path: Path) -> None:
    found = served(tower_adapter(e2b, tmp_path), "vllm", e2b)
    assert found["GK702"].severity is WARNING
    assert "--enable-tower-connector-lora" in str(found["GK702"].help)
    assert found["GK705"].severity is OK


def test_gk702_a_tower_where_no_option_was_seen(e2b: nn.Module, tmp_path: Path) -> None:
    assert served(tower_adapter(e2b, tmp_path), "vllm==0.12.0", e2b)["GK702"].severity is UNKNOWN


@pytest.mark.rule_fails("GK702")
def test_gk702_a_tower_that_is_dropped(e2b: nn.Module, tmp_path: Path) -> None:
    found = served(tower_adapter(e2b, tmp_path), "sglang", e2b)["GK702"]
    assert found.severity is ERROR
    assert found.evidence["features"] == ["towers"]


@pytest.mark.rule_fails("GK702")
def test_gk702_keys_without_the_inner_name(e2b: nn.Module, tmp_path: Path) -> None:
    folder = tower_adapter(e2b, tmp_path)
    tensors = {n.replace(".linear.lora_", ".lora_"): t for n, t in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    found = served(folder, "vllm", e2b)["GK702"]
    assert found.severity is ERROR
    assert "inner names" in found.evidence["features"]
    assert "gk.migrate" in str(found.help)


@pytest.mark.rule_fails("GK702")
def test_gk702_names_of_the_text_only_class(e2b: nn.Module, tmp_path: Path) -> None:
    model = gk.attach(e2b, gk.plan(e2b, scope=["language"], r=2))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    tensors = {n.replace("model.language_model.", "model."): t for n, t in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    assert served(tmp_path, "vllm", e2b)["GK702"].severity is ERROR


def test_gk702_stacked_experts_that_nobody_served_are_unknown(
    twin_of: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    base = twin_of("flex_olmo")
    model = gk.attach(base, gk.plan(base, targets=["experts"], r=2))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    found = served(tmp_path, "vllm", twin_of("flex_olmo"))["GK702"]
    assert found.severity is UNKNOWN
    assert found.evidence["features"] == ["stacked experts"]


# ---- GK703 ----


@pytest.fixture
def keyed(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> tuple[nn.Module, Path]:
    """An adapter on every language projection of a model some of whose layers have no value projection."""
    base = twin_of(K_EQ_V)
    model = gk.attach(base, gk.plan(base, scope=["language"], r=2))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    return base, tmp_path


@pytest.mark.parametrize(
    ("target", "severity"),
    [
        pytest.param("vllm", ERROR, id="vllm", marks=pytest.mark.rule_fails("GK703")),
        pytest.param("vllm==0.18.0", UNKNOWN, id="before the model was known"),
        pytest.param("sglang", ERROR, id="sglang", marks=pytest.mark.rule_fails("GK703")),
        pytest.param("llama_cpp", OK, id="keys that reach the values"),
    ],
)
def test_gk703_keys_that_make_the_values(
    keyed: tuple[nn.Module, Path], target: str, severity: gk.Severity
) -> None:
    base, folder = keyed
    found = served(folder, target, base)["GK703"]
    assert found.severity is severity
    assert severity is OK or "k_proj" in found.message


@pytest.mark.rule_passes("GK703")
def test_gk703_passes_where_the_pair_is_written_twice(keyed: tuple[nn.Module, Path]) -> None:
    base, folder = keyed
    lone = served(folder, "vllm", base)["GK703"].where
    tensors = load_file(folder / WEIGHTS)
    twice = {n.replace("k_proj", "v_proj"): t.clone() for n, t in tensors.items() if f".{lone}." in n}
    assert len(twice) == 2
    save_file({**tensors, **twice}, folder / WEIGHTS, {"format": "pt"})
    assert served(folder, "vllm", base)["GK703"].severity is OK


@pytest.mark.rule_passes("GK703")
def test_gk703_passes_where_keys_are_not_adapted(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    base = twin_of(K_EQ_V)
    folder = saved(base, tmp_path, LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"))
    assert served(folder, "vllm", base)["GK703"].severity is OK


# ---- GK704 ----


def peft_scale(base: nn.Module, folder: Path, module: str) -> float:
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    return float(model.get_base_model().get_submodule(module).scaling["default"])


@pytest.mark.rule_fails("GK704")
@pytest.mark.parametrize(
    ("options", "target", "served_scale"),
    [
        pytest.param({"r": 16, "use_rslora": True}, "sglang", 4 / 16, id="rslora in sglang"),
        pytest.param({"r": 16, "use_rslora": True}, "llama_cpp", 4 / 16, id="rslora in llama.cpp"),
        pytest.param({"rank_pattern": {"q_proj": 8}}, "vllm==0.31.0", 4 / 2, id="rank pattern in an older vllm"),
        pytest.param({"alpha_pattern": {"q_proj": 8}}, "vllm==0.31", 4 / 2, id="alpha pattern in an older vllm"),
        pytest.param({"alpha_pattern": {"q_proj": 1}}, "llama_cpp", 4 / 2, id="alpha pattern in llama.cpp"),
    ],
)
def test_gk704_another_scale(
    llama: nn.Module, tmp_path: Path, options: dict[str, Any], target: str, served_scale: float
) -> None:
    folder = saved(llama, tmp_path, lora(**options))
    found = served(folder, target, llama)["GK704"]
    assert found.severity is ERROR, found.message
    assert found.evidence["served"] == pytest.approx(served_scale)
    assert found.evidence["trained"] == pytest.approx(peft_scale(llama, folder, str(found.where)))


@pytest.mark.rule_passes("GK704")
@pytest.mark.parametrize(
    ("options", "target"),
    [
        pytest.param({"r": 16, "use_rslora": True}, "vllm", id="rslora in vllm"),
        pytest.param({"rank_pattern": {"q_proj": 8}}, "vllm", id="rank pattern in vllm"),
        pytest.param({"alpha_pattern": {"q_proj": 8}}, "vllm==0.32.0", id="alpha pattern in vllm"),
        pytest.param({"rank_pattern": {"q_proj": 8}}, "llama_cpp", id="rank pattern in llama.cpp"),
        pytest.param({"r": 1, "use_rslora": True}, "sglang", id="rslora of rank 1 is no other scale"),
        pytest.param({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}}, "vllm", id="both, in step"),
    ],
)
def test_gk704_passes_where_the_scale_is_the_same(
    llama: nn.Module, tmp_path: Path, options: dict[str, Any], target: str
) -> None:
    assert served(saved(llama, tmp_path, lora(**options)), target, llama)["GK704"].severity is OK


@pytest.mark.rule_passes("GK704")
def test_gk704_folding_the_scale_fixes_it(llama: nn.Module, tmp_path: Path) -> None:
    folder = saved(llama, tmp_path, lora(r=16, use_rslora=True, alpha_pattern={"q_proj": 8}))
    batch = gk.example_batch(llama)
    before = PeftModel.from_pretrained(copy.deepcopy(llama), folder).eval()(**batch).logits
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.mul_((8 if "q_proj" in name else 4) / 16**0.5)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config.update(lora_alpha=16, use_rslora=False, alpha_pattern={})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    after = PeftModel.from_pretrained(copy.deepcopy(llama), folder).eval()(**batch).logits
    assert torch.allclose(before, after, atol=1e-5)
    assert all(served(folder, target, llama)["GK704"].severity is OK for target in ENGINES)


# ---- GK705 ----


@pytest.mark.rule_fails("GK705")
def test_gk705_layers_that_share_keys_and_values(e2b: nn.Module, tmp_path: Path) -> None:
    model = gk.attach(e2b, gk.plan(e2b, scope=["language"], r=2))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    found = served(tmp_path, "sglang", e2b)["GK705"]
    assert found.severity is ERROR
    shared = [s.path for s in gk.survey(e2b) if s.note and s.role == "attention.q"]
    assert found.where in shared
    assert found.evidence["features"] == ["no value"]
    assert served(tmp_path, "vllm", e2b)["GK705"].severity is OK


@pytest.mark.rule_fails("GK702")
def test_gk702_towers_that_vanish(e2b: nn.Module, tmp_path: Path) -> None:
    found = served(tower_adapter(e2b, tmp_path), "llama_cpp", e2b)
    assert found["GK702"].severity is ERROR
    assert found["GK705"].severity is OK
    assert found["GK702"].evidence["features"] == ["towers"]


def test_gk705_no_error_once_zeros_are_written(e2b: nn.Module, tmp_path: Path) -> None:
    model = gk.attach(e2b, gk.plan(e2b, scope=["language"], r=2))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    tensors = load_file(tmp_path / WEIGHTS)
    lone = [s.path for s in gk.survey(e2b) if s.note and s.role == "attention.q"]
    for path in lone:
        for part in ("lora_A", "lora_B"):
            name = f"base_model.model.{path}.{part}.weight"
            tensors[name.replace("q_proj", "v_proj")] = torch.zeros_like(tensors[name])
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    assert served(tmp_path, "sglang", e2b)["GK705"].severity is not ERROR


# ---- GK706 ----


def when_served(outcome: Outcome, **figures: Any) -> gk.Finding:
    return seen("GK706", served=Served(outcome=outcome, engine="vllm 0.32.0", **figures))


@pytest.mark.rule_fails("GK706")
@pytest.mark.parametrize("outcome", [o for o in Outcome if o not in {Outcome.APPLIED, Outcome.UNKNOWN}], ids=str)
def test_an_engine_that_does_not_apply_the_adapter_is_an_error(outcome: Outcome) -> None:
    found = when_served(outcome, effect=2.0, error=1.5, base_error=1e-5, factor=0.2, site="model.norm")
    assert found.severity is ERROR
    assert found.where == "model.norm"
    assert found.evidence["error"] == 1.5


@pytest.mark.rule_passes("GK706")
def test_an_engine_that_applies_the_adapter_passes() -> None:
    assert when_served(Outcome.APPLIED, effect=2.0, error=1e-5, base_error=1e-5).severity is OK


def test_what_cannot_be_told_of_an_engine_is_unknown() -> None:
    assert when_served(Outcome.UNKNOWN, effect=1e-6).severity is UNKNOWN
