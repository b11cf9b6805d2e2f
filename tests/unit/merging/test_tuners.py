"""Every method of PEFT that has a merged form, and the initializers that change the base."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel

import graftkit as gk
from graftkit.errors import MergeError
from graftkit.merging.merge import merge
from graftkit.planning.config.methods import method_named, method_names

if TYPE_CHECKING:
    from tests.unit.merging.conftest import Bench

# What a method cannot do without.
NEEDS: dict[str, dict[str, Any]] = {"adalora": {"total_step": 10}, "frod": {"progressbar": False}}
NO_MERGED_FORM = ("lily", "poly")
# These keep a part of the base weight, or fixed factors, in the base's type, so that double precision starts
# elsewhere: they are compared with PEFT itself in single precision. psoft refuses double precision.
KEEPS_THE_BASE = ("frod", "osf", "psoft", "unilora")
INITIALIZERS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "gaussian": {"init_lora_weights": "gaussian"},
}


def config_of(model: Any, method: str) -> Any:
    """A small adapter of that method on the language model's layers."""
    found = method_named(method)
    usual = found.defaults.get(found.rank_field) if found.rank_field else None
    options = {**({"r": 2} if usual else {}), **NEEDS.get(method, {})}
    targets = ["attention", "mlp"]
    return gk.plan(gk.survey(model), targets=targets, scope=["language"], method=method, **options).peft_config


def peft_in_single_precision(made: Bench, adapter: Any) -> dict[str, torch.Tensor]:
    with made.quiet():
        loaded = PeftModel.from_pretrained(made.loaded(dtype=torch.float32), str(adapter))
        merged: Any = loaded.merge_and_unload()
        merged.save_pretrained(made.folder / "peft")
    return made.stored(made.folder / "peft")


def test_the_exceptions_are_methods_and_not_all_of_them() -> None:
    assert {*NO_MERGED_FORM, *KEEPS_THE_BASE} < set(method_names())


@pytest.mark.parametrize("method", [m for m in method_names() if m not in (*NO_MERGED_FORM, *KEEPS_THE_BASE)])
def test_a_method_merges_exactly(method: str, bench: Callable[..., Bench]) -> None:
    # BEFT trains biases, which only some models have.
    made = bench("bert" if method == "beft" else "llama", shard="200KB")
    adapter = made.adapter(config_of(made.model, method), spread=0.05)
    report = made.merge(adapter)
    made.assert_same_files()
    made.assert_exact(made.exact(adapter))
    made.assert_verifies(adapter)
    assert (report.to_dict()["through_peft"] > 0) == (method not in ("lora", "dora", "rslora"))


@pytest.mark.parametrize("method", KEEPS_THE_BASE)
def test_a_method_that_keeps_the_base_agrees_with_peft(method: str, bench: Callable[..., Bench]) -> None:
    made = bench("llama", dtype=torch.float32)
    adapter = made.adapter(config_of(made.model, method), spread=0.05)
    made.merge(adapter)
    _close(made, peft_in_single_precision(made, adapter))


@pytest.mark.parametrize("name", INITIALIZERS)
def test_an_initializer_that_changes_the_base(name: str, bench: Callable[..., Bench]) -> None:
    """PiSSA and its like take their start out of the base weight: W + B @ A would count it twice."""
    made = bench("llama", dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **INITIALIZERS[name])
    adapter = made.adapter(config, spread=0.05)
    report = made.merge(adapter)
    _close(made, peft_in_single_precision(made, adapter))
    assert (report.to_dict()["through_peft"] > 0) == (name in ("pissa", "olora"))


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_an_initializer_on_embeddings_which_peft_saves_as_it_moved_them(
    name: str, bench: Callable[..., Bench]
) -> None:
    made = bench("llama", dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"], init_lora_weights=name)
    adapter = made.adapter(config, spread=0.05)
    made.merge(adapter)
    _close(made, peft_in_single_precision(made, adapter))


def test_the_workaround_where_the_base_was_changed(bench: Callable[..., Bench]) -> None:
    """The help for LoftQ, which needs a GPU; PiSSA changes the base in the same way."""
    made = bench("llama", dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
    adapter = made.adapter(config, spread=0.05)
    right = peft_in_single_precision(made, adapter)
    with made.quiet():
        loaded: Any = PeftModel.from_pretrained(made.loaded(dtype=torch.float32), str(adapter))
        loaded.unload().save_pretrained(made.folder / "changed")
    fields = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**fields, "init_lora_weights": True}))
    report = merge(made.folder / "changed", adapter, made.out)
    assert report.to_dict()["through_peft"] == 0
    _close(made, right)
    made.merge(adapter)
    with pytest.raises(AssertionError):
        _close(made, right)


def _close(made: Bench, expected: dict[str, torch.Tensor]) -> None:
    before, after = made.stored(made.base), made.stored(made.out)
    assert set(after) == set(before)
    moved = 0
    for name, value in expected.items():
        change = (value - before[name]).norm()
        moved += int(change > 0)
        assert (after[name] - value).norm() <= 1e-4 * change + 1e-6 * value.norm(), name
    assert moved > 2


@pytest.mark.parametrize("method", NO_MERGED_FORM)
def test_a_method_whose_update_depends_on_the_input_is_refused(method: str, bench: Callable[..., Bench]) -> None:
    made = bench("llama")
    adapter = made.adapter(config_of(made.model, method))
    with pytest.raises(MergeError) as caught:
        made.merge(adapter)
    assert caught.value.code == "merge-depends-on-input"
    assert caught.value.help


def test_what_peft_cannot_merge_says_where(bench: Callable[..., Bench]) -> None:
    """BEFT on layers without a bias: the error names the layer, and nothing is left behind but what is resumed."""
    made = bench("llama")
    adapter = made.adapter(config_of(made.model, "beft"), spread=0.05)
    with pytest.raises(MergeError) as caught:
        made.merge(adapter)
    assert caught.value.code == "merge-peft"
    assert "no bias" in str(caught.value.why)
    assert not made.out.exists()


def test_other_tuners_save_modules_too(bench: Callable[..., Bench]) -> None:
    made = bench("llama")
    config = config_of(made.model, "loha")
    config.modules_to_save = ["lm_head"]
    adapter = made.adapter(config, spread=0.05)
    made.merge(adapter)
    assert "lm_head.weight" in made.assert_exact(made.exact(adapter))


def test_tuners_of_different_kinds_add_up(bench: Callable[..., Bench]) -> None:
    made = bench("llama")
    one = made.adapter(config_of(made.model, "ia3"), "one", spread=0.1)
    two = made.adapter(config_of(made.model, "lora"), "two", spread=0.1)
    made.merge(one, two, weights=[0.5, 2.0])
    before, first = made.stored(made.base), made.exact(one)
    second = made.exact(two)
    made.assert_exact(
        {n: b.double() + 0.5 * (first[n] - b.double()) + 2 * (second[n] - b.double()) for n, b in before.items()}
    )
