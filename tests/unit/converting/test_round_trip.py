"""PEFT -> an engine -> PEFT: stock PEFT loads the result, and computes the same update."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.converting.served_adapters import Bench

import graftkit as gk
from graftkit.converting.dialects import all_dialects

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TARGETS = {
    "vllm": (*_LINEARS, "embed_tokens", "lm_head"),
    "sglang": (*_LINEARS, "embed_tokens", "lm_head"),
    "llama.cpp": _LINEARS,
    "mlx": _LINEARS,
}


def test_every_form_is_gone_through() -> None:
    assert {dialect.name for dialect in all_dialects() if dialect.writes} - {"peft"} == set(_TARGETS)


def assert_same_updates(place: Bench, one: Any, other: Any) -> None:
    wanted, found = place.updates(one), place.updates(other)
    assert set(found) == set(wanted)
    for name, update in wanted.items():
        # Where products cancel, the rounding is that of the products.
        largest = float(update.abs().max())
        torch.testing.assert_close(found[name], update, rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("to", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("model", "targets"),
    [
        pytest.param("qwen3_moe", ["expert", "attention.q", "attention.v"], id="qwen3_moe"),
        pytest.param("mixtral", ["expert", "attention"], id="mixtral"),
        pytest.param("google/gemma-4-31B-it", ["attention.k"], id="keys as values"),
    ],
)
def test_models(bench: Callable[[str], Bench], to: str, model: str, targets: list[str]) -> None:
    place = bench(model)
    adapter = place.planned(targets, scope="language") if "gemma" in model else place.planned(targets)
    gk.convert(adapter, place.folder / "there", to=to, base=place.base)
    gk.convert(place.folder / "there", place.folder / "back", to="peft", base=place.base)
    assert_same_updates(place, adapter, place.folder / "back")


def test_weights_that_are_stored_as_in_by_out(bench: Callable[[str], Bench]) -> None:
    place = bench("gpt2")
    adapter = place.adapter(target_modules=["c_attn", "c_proj", "wte"], r=3, fan_in_fan_out=True, use_rslora=True)
    gk.convert(adapter, place.folder / "plain", to="peft", base=place.base)
    assert_same_updates(place, adapter, place.folder / "plain")


@pytest.mark.parametrize(
    ("model", "targets"),
    [
        pytest.param("vit", ["projection", "q_proj"], id="a convolution"),
        pytest.param("whisper", ["conv1", "conv2"], id="convolutions over time"),
        pytest.param("gemma2", ["lm_head", "q_proj"], id="a head that is on disk as the embedding"),
    ],
)
def test_stock_peft_loads_what_is_written(bench: Callable[[str], Bench], model: str, targets: list[str]) -> None:
    place = bench(model)
    adapter = place.adapter(target_modules=targets, r=3, lora_alpha=5)
    gk.convert(adapter, place.folder / "plain", to="peft", base=place.base)
    assert_same_updates(place, adapter, place.folder / "plain")


def test_the_router_comes_back_as_a_parameter(bench: Callable[[str], Bench]) -> None:
    place = bench("mixtral")
    adapter = place.planned(["expert", "router"])
    gk.convert(adapter, place.folder / "there", to="vllm", base=place.base)
    gk.convert(place.folder / "there", place.folder / "back", to="peft", base=place.base)
    assert_same_updates(place, adapter, place.folder / "back")


@st.composite
def adapters(draw: Any) -> tuple[str, dict[str, Any]]:
    """Draw a form, and targets, ranks and scales of a LoRA on a llama."""
    to = draw(st.sampled_from(sorted(_TARGETS)))
    targets = draw(st.lists(st.sampled_from(_TARGETS[to]), min_size=1, max_size=4, unique=True))
    keyed = st.dictionaries(st.sampled_from(targets), st.integers(1, 6), max_size=2)
    return to, {
        "target_modules": targets,
        "r": draw(st.integers(1, 5)),
        "lora_alpha": draw(st.integers(1, 40)),
        "use_rslora": draw(st.booleans()),
        "rank_pattern": draw(keyed),
        "alpha_pattern": draw(keyed),
    }


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=adapters(), kind=st.sampled_from(["float32", "bfloat16"]))
def test_any_scale_and_rank(bench: Callable[[str], Bench], drawn: tuple[str, dict[str, Any]], kind: str) -> None:
    pytest.importorskip("gguf")
    place, (to, fields) = bench("llama"), drawn
    adapter = place.adapter(dtype=getattr(torch, kind), **fields)
    for name in ("there", "back"):
        shutil.rmtree(place.folder / name, ignore_errors=True)
    gk.convert(adapter, place.folder / "there", to=to, base=place.base)
    gk.convert(place.folder / "there", place.folder / "back", to="peft", base=place.base)
    assert_same_updates(place, adapter, place.folder / "back")
