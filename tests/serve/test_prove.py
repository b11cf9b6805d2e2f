"""``gk.prove`` in the real engines: what they apply, drop, scale and refuse, and which site it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import graftkit as gk
from graftkit.cli.main import main
from graftkit.engines.outcome import Outcome
from graftkit.errors import EngineError
from graftkit.serving.engine_twin import write_engine_twin
from graftkit.serving.prove import Proof

pytestmark = [pytest.mark.serve, pytest.mark.filterwarnings("ignore::UserWarning")]
ENGINES = ("llama.cpp", "mlx", "vllm")


def prove(model: str, target: str, **options: Any) -> Proof:
    try:
        return gk.prove(model, target=target, **options)
    except EngineError as error:
        if error.code != "engine-missing":
            raise
        pytest.skip(f"{target} is not installed: {error.help}")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_lora_on_all_linears_is_applied(engine: str) -> None:
    found = prove("llama", engine).served
    assert found.outcome is Outcome.APPLIED
    assert found.error is not None
    assert found.error < 1e-4
    assert found.effect is not None
    assert found.effect > 0.5
    assert found.replaced == ()


def test_vllm_takes_the_values_of_k_eq_v_from_the_key_without_its_adapter() -> None:
    found = prove("google/gemma-4-31B-it", "vllm", targets="attention", as_is=True)
    assert found.served.outcome is Outcome.DIFFERENT
    wrong = [site for site, part in found.sites.items() if part.outcome is Outcome.DIFFERENT]
    assert wrong == [found.served.site]
    assert found.served.site is not None
    assert found.served.site.endswith("layers.1.self_attn.k_proj")


def test_vllm_takes_k_eq_v_once_it_is_converted() -> None:
    assert prove("google/gemma-4-31B-it", "vllm", targets="attention").served.outcome is Outcome.APPLIED


def test_vllm_drops_mixtrals_experts_and_takes_them_converted() -> None:
    as_is = prove("mixtral", "vllm", targets="experts", as_is=True).served
    assert as_is.outcome is Outcome.IGNORED
    converted = prove("mixtral", "vllm", targets="experts").served
    assert converted.outcome is Outcome.APPLIED
    assert converted.replaced != ()  # the layout is proven, the kernel is not


def test_vllm_refuses_dora_in_its_own_words() -> None:
    found = prove("llama", "vllm", method="dora", as_is=True).served
    assert found.outcome is Outcome.REFUSED
    assert "DoRA" in (found.says or "")


def test_llama_cpp_scales_rslora_by_another_factor() -> None:
    found = prove("llama", "llama.cpp", method="rslora", r=9, as_is=True).served
    assert found.outcome is Outcome.SCALED
    assert found.factor == pytest.approx(1 / 3)
    assert prove("llama", "llama.cpp", method="rslora", r=9).served.outcome is Outcome.APPLIED


@pytest.mark.parametrize("engine", ENGINES)
def test_a_users_own_files_are_served(engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_engine_twin("qwen3", tmp_path / "base")
    adapted = gk.attach(model, gk.plan(str(tmp_path / "base"), targets="attention", r=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    found = prove(str(tmp_path / "base"), engine, adapter=tmp_path / "adapter")
    assert not found.on_twin
    assert found.served.outcome is Outcome.APPLIED
    capsys.readouterr()  # libraries say things as they are imported
    arguments = ["prove", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--target", engine]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["served"]["outcome"] == "applied"


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm"])
def test_a_merged_dora_is_served_as_it_was_merged(engine: str, tmp_path: Path) -> None:
    model = write_engine_twin("llama", tmp_path / "base")
    adapted = gk.attach(model, gk.plan(str(tmp_path / "base"), method="dora", r=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    gk.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    try:
        found = gk.prove_merged(
            tmp_path / "merged", target=engine, base=tmp_path / "base", adapter=tmp_path / "adapter"
        )
    except EngineError as error:
        if error.code != "engine-missing":
            raise
        pytest.skip(f"{engine} is not installed: {error.help}")
    assert found.served.outcome is Outcome.APPLIED
