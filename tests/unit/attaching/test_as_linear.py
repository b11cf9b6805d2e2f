"""A wrapper that has become a linear keeps its bounds: alone, adapted, merged, and quantized before or after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import graftkit as gk
from graftkit.adapters.migrate import migrate
from graftkit.attaching.as_linear import as_linear
from graftkit.attaching.attach import adapted_sites
from graftkit.checks.probes.forward import logits_of
from graftkit.errors import AttachError

E2B = "google/gemma-4-E2B-it"
TARGETS = ["q_proj", "down_proj"]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=TARGETS, **options)


def stir(adapted: nn.Module, scale: float = 0.3) -> None:
    """Give an adapter an effect that drives activations into the bounds."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter) * scale)


def in_tower(model: Any) -> Any:
    return model.model.vision_tower.encoder.layers[0].self_attn


def test_every_place_holds_a_linear_and_nothing_else_changes(e2b: Any) -> None:
    batch = gk.example_batch(e2b)
    before, keys = logits_of(e2b, batch), list(e2b.state_dict())
    modules = {path: id(module) for path, module in e2b.named_modules()}
    parameters = sum(p.numel() for p in e2b.parameters())
    with as_linear(e2b) as handle:
        assert handle.paths
        assert all(type(e2b.get_submodule(path)) is nn.Linear for path in handle.paths)
        assert torch.equal(logits_of(e2b, batch), before)
        assert sorted(e2b.state_dict()) == sorted(keys)
        assert sum(p.numel() for p in e2b.parameters()) == parameters
    assert {path: id(module) for path, module in e2b.named_modules()} == modules
    assert list(e2b.state_dict()) == keys
    assert torch.equal(logits_of(e2b, batch), before)


def test_the_bases_checkpoint_loads_strictly_and_saves_back(e2b: Any, tmp_path: Path) -> None:
    batch = gk.example_batch(e2b)
    expected = logits_of(e2b, batch)
    e2b.save_pretrained(tmp_path / "base")
    state = {name: tensor.clone() for name, tensor in e2b.state_dict().items()}
    as_linear(e2b)
    with torch.no_grad():
        for tensor in e2b.state_dict().values():
            if tensor.is_floating_point():
                tensor.zero_()
    e2b.load_state_dict(state, strict=True)
    assert torch.equal(logits_of(e2b, batch), expected)
    e2b.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    missing = {name: tensor for name, tensor in state.items() if not name.endswith("self_attn.q_proj.input_min")}
    with pytest.raises(RuntimeError, match="Missing key"):
        e2b.load_state_dict(missing, strict=True)


def test_the_contract_holds_with_finite_bounds(e2b: Any) -> None:
    """Merged equals adapted, above all: the adapter is inside the bounds."""
    as_linear(e2b)
    adapted = get_peft_model(e2b, lora())
    sites = adapted_sites(adapted)
    assert any("vision_tower" in site and site.endswith("q_proj") for site in sites)
    report = gk.verify(adapted)
    assert not [f for f in report if f.severity.name == "ERROR"], str(report)
    stir(adapted, 0.1)
    report = gk.verify(adapted)
    assert not [f for f in report if f.severity.name == "ERROR"], str(report)


TUNERS = [
    pytest.param(lambda: lora(), id="lora"),
    pytest.param(lambda: lora(use_dora=True), id="dora"),
    pytest.param(lambda: peft.LoHaConfig(r=2, target_modules=TARGETS), id="loha"),
    pytest.param(lambda: peft.OFTConfig(oft_block_size=4, target_modules=TARGETS), id="oft"),
    pytest.param(lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]), id="ia3"),
]


@pytest.mark.parametrize("config", TUNERS)
def test_an_adapter_computes_what_one_inside_the_wrapper_does(
    twin_of: Callable[[str], nn.Module], config: Callable[[], Any], tmp_path: Path
) -> None:
    model: Any = twin_of(E2B)
    batch = gk.example_batch(model)
    base = logits_of(model, batch)
    handle = as_linear(model)
    adapted = get_peft_model(model, config())
    stir(adapted)
    expected = logits_of(adapted, batch)
    assert not torch.equal(expected, base)
    adapted.save_pretrained(tmp_path / "as linear")
    migrate(tmp_path / "as linear", twin_of(E2B), tmp_path / "migrated", trained_without_clamp=False)
    handle.restore()
    assert torch.equal(logits_of(adapted, batch), expected)
    adapted.save_pretrained(tmp_path / "restored")
    for name in ("migrated", "restored"):
        stock = PeftModel.from_pretrained(twin_of(E2B), tmp_path / name)
        assert torch.equal(logits_of(stock, batch), expected), name


def test_merging_keeps_the_bounds(e2b: Any) -> None:
    """Layer by layer in double precision, where rounding is far below what a clamp does."""
    handle = as_linear(e2b)
    adapted = get_peft_model(e2b, lora())
    stir(adapted, 1.0)
    e2b.double()
    handle.settle()
    places = [path for path in adapted_sites(adapted) if path in handle.paths]
    inputs = {path: torch.randn(2, 5, e2b.get_submodule(path).in_features).double() * 3 for path in places}
    expected = {path: e2b.get_submodule(path)(inputs[path]) for path in places}
    bounds = {path: e2b.get_submodule(path).get_base_layer().graft_wrapper for path in places}
    assert all((expected[path] == bounds[path].output_max).any() for path in places), "no bound was reached"
    merged: Any = adapted.merge_and_unload()
    handle.settle()
    assert type(in_tower(merged).q_proj) is nn.Linear
    for path in places:
        torch.testing.assert_close(e2b.get_submodule(path)(inputs[path]), expected[path], rtol=1e-12, atol=1e-12)
    assert any(name.endswith("q_proj.input_min") for name in merged.state_dict())


def test_a_bound_holds_for_the_adapters_output(e2b: Any) -> None:
    as_linear(e2b)
    adapted = get_peft_model(e2b, lora())
    stir(adapted)
    attention = in_tower(adapted.get_base_model())
    seen: list[Tensor] = []
    # Settled first, so that the hook is on what stands in the place.
    logits_of(adapted, gk.example_batch(e2b))
    attention.q_proj.register_forward_hook(lambda _m, _a, out: seen.append(out))
    logits_of(adapted, gk.example_batch(e2b))
    wrapper = attention.q_proj.get_base_layer().graft_wrapper
    assert seen
    assert all(out.max() <= wrapper.output_max and out.min() >= wrapper.output_min for out in seen)
    assert any((out == wrapper.output_max).any() for out in seen), "nothing was driven into the bound"


def test_a_call_past_the_holder_raises_rather_than_computing_without_bounds(e2b: Any) -> None:
    handle = as_linear(e2b)
    adapted = get_peft_model(e2b, lora())
    layer = in_tower(adapted.get_base_model()).q_proj
    x = torch.randn(1, 3, layer.in_features)
    with pytest.raises(AttachError) as caught:
        layer(x)
    assert caught.value.code == "as-linear-unsettled"
    handle.settle()
    layer(x)


def test_a_copy_is_a_model_of_its_own(e2b: Any) -> None:
    batch = gk.example_batch(e2b)
    as_linear(e2b)
    adapted = get_peft_model(e2b, lora())
    stir(adapted)
    expected = logits_of(adapted, batch)
    twin = copy.deepcopy(adapted)
    with torch.no_grad():
        for tensor in [*adapted.parameters(), *adapted.buffers()]:
            if tensor.is_floating_point():
                tensor.zero_()
    assert torch.equal(logits_of(twin, batch), expected)


def test_moshis_second_argument_still_arrives(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("moshi")
    batch = gk.example_batch(model)
    before = logits_of(model, batch)
    with as_linear(model) as handle:
        assert handle.paths
        assert torch.equal(logits_of(model, batch), before)
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        assert torch.equal(logits_of(model, batch), before)


def test_a_cast_reaches_the_bounds(e2b: Any) -> None:
    as_linear(e2b)
    e2b.to(torch.bfloat16)
    assert in_tower(e2b).q_proj.graft_wrapper.input_min.dtype == torch.bfloat16


# ---- quantized ----


def four_bit(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32)
    packed.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
    return packed.to("cpu")


@pytest.mark.filterwarnings("ignore")
def test_quantized_before_or_after_keeps_the_bounds(twin_of: Callable[[str], nn.Module]) -> None:
    reference: Any = twin_of(E2B)
    batch = gk.example_batch(reference)
    plain = logits_of(reference, batch)
    in_tower(reference).q_proj.linear = four_bit(in_tower(reference).q_proj.linear)
    expected = logits_of(reference, batch)
    assert not torch.equal(expected, plain)

    before = copy.deepcopy(reference)
    as_linear(before)
    after: Any = twin_of(E2B)
    as_linear(after)
    # As a quantizer does: whatever linear it finds, it replaces.
    in_tower(after).q_proj = four_bit(in_tower(after).q_proj)
    with_adapter: list[Tensor] = []
    for model in (before, after):
        assert type(in_tower(model).q_proj).__name__ == "Linear4bit"
        assert torch.equal(logits_of(model, batch), expected)
        assert any(name.endswith("q_proj.input_min") for name in model.state_dict())
        # What transformers sets on a model that it quantizes, and PEFT asks for.
        model.is_loaded_in_4bit = True
        torch.manual_seed(0)
        adapted = get_peft_model(model, lora())
        assert type(in_tower(model).q_proj).__module__.endswith("lora.bnb")
        sites = adapted_sites(adapted)
        stir(adapted)
        with_adapter.append(logits_of(adapted, batch))
    reference.is_loaded_in_4bit = True
    inner = [f"{site}.linear" if "tower" in site else site for site in sites]
    torch.manual_seed(0)
    inside = get_peft_model(reference, LoraConfig(r=2, target_modules=inner))
    stir(inside)
    for logits in with_adapter:
        assert torch.equal(logits, logits_of(inside, batch))
