"""To vLLM: each of the engine's matrices gets the update that stock PEFT computes."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from tests.unit.converting.served_adapters import Bench, Tensors, products

import graftkit as gk


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
