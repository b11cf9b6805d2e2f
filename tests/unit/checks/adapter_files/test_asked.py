"""What an adapter asks of an engine, told apart as engines tell it apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.checks.observed import by_code
from torch import nn

import graftkit as gk
from graftkit.checks.check import check
from graftkit.surveying.checkpoint.comparison import Checkpoint

ERROR, OK, UNKNOWN = gk.Severity.ERROR, gk.Severity.OK, gk.Severity.UNKNOWN
_FP8 = Checkpoint(tensors=2, bytes=2, dtypes=(("F8_E4M3", 1), ("BF16", 1)), unknown=())


def saved(base: nn.Module, folder: Path, *targets: str, **options: object) -> Path:
    model = gk.attach(base, gk.plan(base, targets=list(targets), scope=["language"], r=2, **options))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize(
    ("initializer", "target", "stances"),
    [
        pytest.param("pissa", "vllm", ["refuses"], id="one that it refuses"),
        pytest.param("lora_ga", "vllm", ["ignores"], id="one that it takes for a plain LoRA"),
        pytest.param("pissa", "vllm==0.31.0", ["ignores"], id="an older one reads no initializer"),
        pytest.param("pissa", "llama_cpp", ["ignores"], id="nor does llama.cpp"),
    ],
)
def test_initializers_that_move_the_base(
    twin_of: Callable[[str], nn.Module], tmp_path: Path, initializer: str, target: str, stances: list[str]
) -> None:
    folder = saved(twin_of("llama"), tmp_path, "attention")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": initializer}))
    found = by_code(check(folder, target=target, data=False))["GK701"]
    assert found.severity is ERROR
    assert found.evidence["stances"] == stances
    assert found.evidence["remedies"] == ["convert"]


@pytest.mark.parametrize(
    ("targets", "target", "feature", "severity"),
    [
        pytest.param("experts", "vllm==0.22.0", "fp8 experts", ERROR, id="experts, computed without scales"),
        pytest.param("experts", "vllm==0.24.0", None, UNKNOWN, id="experts, since they are right"),
        pytest.param("experts", "vllm", None, OK, id="experts in the newest"),
        pytest.param("attention", "vllm", None, OK, id="linears"),
        pytest.param("attention", "sglang", "fp8 base", UNKNOWN, id="nobody looked"),
    ],
)
def test_a_base_in_fp8(
    twin_of: Callable[[str], nn.Module],
    tmp_path: Path,
    targets: str,
    target: str,
    feature: str | None,
    severity: gk.Severity,
) -> None:
    base = twin_of("gpt_oss")
    map_ = replace(gk.survey(base), checkpoint=_FP8)
    found = by_code(check(saved(base, tmp_path, targets), map_, target=target, data=False))["GK701"]
    assert found.severity is severity
    assert feature is None or feature in found.evidence["features"]
    assert feature is not None or not {"fp8 base", "fp8 experts"} & set(found.evidence.get("features", ()))


def test_what_lies_outside_numbered_layers(e2b: nn.Module, tmp_path: Path) -> None:
    map_ = gk.survey(e2b)
    folder = saved(e2b, tmp_path, "per_layer_model_projection")
    found = by_code(check(folder, map_, target="sglang", data=False))["GK702"]
    assert found.severity is ERROR
    assert found.evidence["features"] == ["no layer"]


@pytest.mark.parametrize(("targets", "feature"), [("router", "router"), ("experts", "stacked experts")])
def test_a_router_is_no_expert(
    twin_of: Callable[[str], nn.Module], tmp_path: Path, targets: str, feature: str
) -> None:
    base = twin_of("mixtral")
    map_ = gk.survey(base)
    found = by_code(check(saved(base, tmp_path, targets), map_, target="vllm", data=False))["GK702"]
    assert found.evidence["features"] == [feature]


def test_a_class_that_does_not_take_lora_yet(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    base = twin_of("gpt2")
    folder = saved(base, tmp_path, "attention")
    found = by_code(check(folder, base, target="vllm", data=False))["GK701"]
    assert found.severity is ERROR
    assert found.evidence["features"] == ["model class"]
    assert found.evidence["remedies"] == ["merge"]
