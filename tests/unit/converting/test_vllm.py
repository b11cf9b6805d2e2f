"""To vLLM: each of the engine's matrices gets the update that stock PEFT computes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.converting.served_adapters import Bench, Tensors, products

import graftkit as gk
from graftkit.converting.errors import ConvertError
from graftkit.errors import MergeError


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def assert_experts(found: Tensors, wanted: Tensors, experts: str, leaves: tuple[str, str, str]) -> int:
    """Compare each expert's gate, up and down with the stacked parameters; returns how many there are."""
    seen = 0
    for name, update in wanted.items():
        if not name.endswith("gate_up_proj"):
            continue
        layer = re.sub(r"\.[^.]+\.experts\.gate_up_proj$|\.experts\.gate_up_proj$", "", name)
        for expert, matrix in enumerate(update):
            gate, up = matrix.chunk(2)
            down = wanted[name.replace("gate_up_proj", "down_proj")][expert]
            for leaf, part in zip(leaves, (gate, up, down), strict=True):
                assert_close(found[f"{layer}.{experts}.{expert}.{leaf}"], part)
                seen += 1
    return seen


def test_mixtral_gets_the_names_of_its_checkpoint(bench: Callable[[str], Bench]) -> None:
    place = bench("mixtral")
    adapter = place.planned(["expert", "router", "attention.q"])
    done = gk.convert(adapter, place.folder / "out", to="vllm", base=place.base)
    found, wanted = products(place.folder / "out"), place.updates(adapter)
    assert assert_experts(found, wanted, "block_sparse_moe.experts", ("w1", "w3", "w2")) == 2 * 4 * 3
    for layer in (0, 1):
        router = f"model.layers.{layer}.block_sparse_moe.gate"
        assert_close(found[router], wanted[f"model.layers.{layer}.mlp.gate.weight"])
        query = f"model.layers.{layer}.self_attn.q_proj"
        assert_close(found[query], wanted[f"{query}.weight"])
    assert len(found) == 2 * (4 * 3 + 1 + 1)
    assert done.proof.exact == done.proof.slices


def test_qwen3_moe_gets_one_pair_an_expert(bench: Callable[[str], Bench]) -> None:
    place = bench("qwen3_moe")
    adapter = place.planned(["expert"])
    gk.convert(adapter, place.folder / "out", to="vllm", base=place.base)
    found, wanted = products(place.folder / "out"), place.updates(adapter)
    leaves = ("gate_proj", "up_proj", "down_proj")
    assert assert_experts(found, wanted, "mlp.experts", leaves) == len(found) > 0


def test_keys_that_are_values_are_written_twice(bench: Callable[[str], Bench]) -> None:
    place = bench("google/gemma-4-31B-it")
    adapter = place.adapter(target_modules=r".*language_model.*\.(q|k|v)_proj", r=2)
    gk.convert(adapter, place.folder / "out", to="vllm", base=place.base)
    found, wanted = products(place.folder / "out"), place.updates(adapter)
    copies = {name for name in found if f"{name}.weight" not in wanted}
    assert copies
    for name, update in wanted.items():
        assert_close(found[name.removesuffix(".weight")], update)
    for name in copies:
        assert name.endswith("v_proj")
        assert torch.equal(found[name], found[name.replace("v_proj", "k_proj")])


def test_gpt_oss_keeps_its_experts_as_peft_stacks_them(bench: Callable[[str], Bench]) -> None:
    place = bench("gpt_oss")
    adapter = place.adapter(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"], r=2)
    done = gk.convert(adapter, place.folder / "out", to="vllm", base=place.base)
    names = set(load_file(place.folder / "out" / "adapter_model.safetensors"))
    experts = {name.partition(".experts.")[2] for name in names if ".experts." in name}
    # vLLM asserts that both projections are there: down_proj gets zeros.
    assert experts == {f"{part}lora_{side}.weight" for part in ("", "base_layer.") for side in "AB"}
    gk.convert(place.folder / "out", place.folder / "back", to="peft", base=place.base)
    wanted, found = place.updates(adapter), place.updates(place.folder / "back")
    assert set(wanted) == set(found)
    for name, update in wanted.items():
        assert_close(found[name], update)
    assert done.proof.padding > 0


@pytest.mark.parametrize(
    ("model", "target"),
    [
        pytest.param("qwen3_moe", "router", id="router"),
        pytest.param("gpt_oss", "lm_head", id="output layer"),
        pytest.param("google/gemma-4-E2B-it", "embed_tokens_per_layer", id="embeddings per layer"),
    ],
)
def test_what_vllm_takes_in_no_form_is_refused(bench: Callable[[str], Bench], model: str, target: str) -> None:
    place = bench(model)
    adapter = place.planned([target])
    with pytest.raises(ConvertError) as caught:
        gk.convert(adapter, place.folder / "out", to="vllm", base=place.base)
    assert caught.value.code == "convert-unsupported"
    assert str(caught.value.help).endswith(f"graft merge {place.base} {adapter} MERGED")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        pytest.param({"use_dora": True}, "q_proj", id="dora"),
        pytest.param({"modules_to_save": ["lm_head"]}, "lm_head", id="whole modules"),
        pytest.param({"lora_bias": True}, "q_proj", id="biases"),
    ],
)
def test_what_is_no_product_is_refused(bench: Callable[[str], Bench], fields: dict[str, Any], named: str) -> None:
    place = bench("qwen2")
    adapter = place.adapter(target_modules=["q_proj"], r=2, **fields)
    with pytest.raises(ConvertError) as caught:
        gk.convert(adapter, place.folder / "out", to="vllm", base=place.base)
    assert caught.value.code == "convert-unsupported"
    assert named in str(caught.value.where)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, id="alora"),
        pytest.param({"init_lora_weights": "pissa_niter_2"}, id="a base that is lost"),
    ],
)
def test_what_merging_refuses_too_is_not_sent_there(bench: Callable[[str], Bench], fields: dict[str, Any]) -> None:
    place = bench("llama")
    adapter = place.adapter(target_modules=["q_proj"], r=2, **fields)
    with pytest.raises(ConvertError) as caught:
        gk.convert(adapter, place.folder / "out", to="vllm", base=place.base)
    assert caught.value.code == "convert-unsupported"
    assert "graft merge" not in str(caught.value.help)


def test_values_that_are_not_finite_are_refused(bench: Callable[[str], Bench]) -> None:
    place = bench("llama")
    adapter = place.adapter(target_modules=["q_proj"], r=2)
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError) as caught:
        gk.convert(adapter, place.folder / "out", to="vllm", base=place.base)
    assert caught.value.code == "merge-not-finite"
    assert {path.name for path in place.folder.iterdir()} == {"base", "adapter"}


def test_a_bias_that_was_not_trained_is_left_out(bench: Callable[[str], Bench]) -> None:
    place = bench("llama")
    adapter = place.adapter(target_modules=["q_proj"], r=2, bias="lora_only")
    gk.convert(adapter, place.folder / "out", to="vllm", base=place.base)
    assert json.loads((place.folder / "out" / "adapter_config.json").read_text())["bias"] == "none"


@pytest.mark.parametrize(
    ("model", "target", "noted"),
    [
        pytest.param("llama", "attention", 0, id="nothing to note"),
        pytest.param("flex_olmo", "expert", 1, id="a class that nobody has looked at"),
        pytest.param("google/gemma-4-31B-it", "vision", 1, id="an option of the server"),
    ],
)
def test_what_it_still_depends_on_is_noted(
    bench: Callable[[str], Bench], model: str, target: str, noted: int
) -> None:
    place = bench(model)
    adapter = place.planned(["attention.q"], scope="vision") if target == "vision" else place.planned([target])
    done = gk.convert(adapter, place.folder / "out", to="vllm", base=place.base)
    assert len(done.notes) == noted
    assert done.to_dict()["notes"] == list(done.notes)
