"""Updates that depend on the base: initializers that moved it, and trained tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.unit.converting.served_adapters import Bench, products

import graftkit as gk
from graftkit.converting.errors import ConvertError


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(("base", "to"), [("llama", "vllm"), ("llama", "sglang"), ("qwen2", "vllm")])
def test_a_moved_base_becomes_twice_the_rank(bench: Callable[[str], Bench], init: str, base: str, to: str) -> None:
    place = bench(base)  # the layers of the last one have biases
    adapter = place.adapter(target_modules=["q_proj", "k_proj", "v_proj"], r=3, init_lora_weights=init, spread=0.1)
    gk.convert(adapter, place.folder / "out", to=to, base=place.base)
    found, wanted = products(place.folder / "out"), place.updates(adapter, torch.float32)
    assert wanted
    for name, update in wanted.items():
        # PEFT rounds the moved base to single precision.
        torch.testing.assert_close(found[name.removesuffix(".weight")], update, rtol=1e-5, atol=1e-5)


def test_a_moved_base_equals_pefts_own_conversion(bench: Callable[[str], Bench], tmp_path: Path) -> None:
    place = bench("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(target_modules=["q_proj"], r=3, init_lora_weights="pissa")
        adapted = get_peft_model(place.model(), config)
        adapted.save_pretrained(str(tmp_path / "initial"))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(str(tmp_path / "adapter"))
        initial = str(tmp_path / "initial")
        adapted.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=initial)
    gk.convert(tmp_path / "adapter", tmp_path / "out", to="peft", base=place.base)
    ours, theirs = products(tmp_path / "out"), products(tmp_path / "plain")
    assert set(ours) == set(theirs)
    for name, update in theirs.items():
        torch.testing.assert_close(ours[name], update, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_trained_tokens_become_a_lora(bench: Callable[[str], Bench], module: str) -> None:
    place = bench("llama")
    tokens = {module.rpartition(".")[2]: [3, 500, 7]}
    adapter = place.adapter(target_modules=["q_proj"], r=2, trainable_token_indices=tokens)
    gk.convert(adapter, place.folder / "out", to="vllm", base=place.base)
    found = products(place.folder / "out")[module]
    torch.testing.assert_close(found, place.updates(adapter)[f"{module}.weight"], rtol=1e-6, atol=1e-6)
    assert sorted(set(found.nonzero()[:, 0].tolist())) == [3, 7, 500]


def test_tied_tokens_are_refused(bench: Callable[[str], Bench]) -> None:
    place = bench("google/gemma-4-E2B-it")
    tokens = {"embed_tokens": [3]}
    adapter = place.adapter(target_modules=r".*language_model.*\.q_proj", r=2, trainable_token_indices=tokens)
    with pytest.raises(ConvertError) as caught:
        gk.convert(adapter, place.folder / "out", to="vllm", base=place.base)
    assert caught.value.code == "convert-unsupported"
    assert "embed_tokens" in str(caught.value.where)
