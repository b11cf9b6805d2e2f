"""What saving loses: wrappers, keys of the base, the share an initializer took, and precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model, preprocess_loraga
from safetensors.torch import load_file, save_file
from tests.unit.checks.live_adapters import with_effect
from tests.unit.checks.observed import by_code, finding, seen
from torch import nn
from transformers import AutoModelForImageTextToText

import graftkit as gk
from graftkit.checks.check import check
from graftkit.recipes.settings import CheckSettings
from graftkit.recipes.training import Training

E2B = "google/gemma-4-E2B-it"
OK, UNKNOWN, INFO = gk.Severity.OK, gk.Severity.UNKNOWN, gk.Severity.INFO
ERROR, WARNING = gk.Severity.ERROR, gk.Severity.WARNING


def unwrap_for_good(model: nn.Module) -> nn.Module:
    """What circulates as a way past PEFT's refusal."""
    for site in gk.survey(model):
        if site.wrapper is not None:
            parent, _, name = site.wrapper.path.rpartition(".")
            setattr(model.get_submodule(parent), name, model.get_submodule(site.path))
    return model


@pytest.fixture
def saved_e2b(e2b: nn.Module, tmp_path: Path) -> Path:
    e2b.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# ---- GK602 ----


@pytest.mark.rule_fails("GK602")
def test_gk602_a_checkpoint_without_wrappers(e2b: nn.Module, saved_e2b: Path, tmp_path: Path) -> None:
    base = gk.survey(saved_e2b)
    unwrap_for_good(e2b).save_pretrained(tmp_path / "out")
    found = seen("GK602", base=base, checkpoint=tmp_path / "out")
    assert found.severity is ERROR
    wrapped = [site for site in base if site.wrapper]
    assert found.evidence["unwrapped"] == len(wrapped) > 0
    _, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {f"{site.path}.weight" for site in wrapped} <= set(loading["missing_keys"])
    assert {f"{site.wrapper.path}.weight" for site in wrapped if site.wrapper} == set(loading["unexpected_keys"])


@pytest.mark.rule_fails("GK602")
def test_gk602_a_live_model_without_wrappers(e2b: nn.Module) -> None:
    base = gk.survey(e2b)
    model = get_peft_model(unwrap_for_good(e2b), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    found = seen("GK602", base=base, model=model)
    assert found.severity is ERROR


@pytest.mark.rule_passes("GK602")
def test_gk602_passes_on_a_model_that_keeps_them(e2b: nn.Module, saved_e2b: Path) -> None:
    base = gk.survey(saved_e2b)
    model = gk.attach(e2b, gk.plan(base, scope="all"))
    assert seen("GK602", base=base, model=model, checkpoint=saved_e2b).severity is OK


@pytest.mark.rule_passes("GK602")
def test_gk602_passes_without_wrappers(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    assert seen("GK602", base=gk.survey("llama"), checkpoint=tmp_path).severity is OK


@pytest.mark.parametrize(
    "empty", [pytest.param(True, id="no weights"), pytest.param(False, id="of another model")]
)
def test_gk602_unknown_where_it_cannot_tell(saved_e2b: Path, tmp_path: Path, empty: bool) -> None:
    (tmp_path / "out").mkdir()
    if not empty:
        save_file({"a": torch.zeros(1)}, tmp_path / "out" / "model.safetensors")
    base = gk.survey(saved_e2b)
    assert seen("GK602", base=base, checkpoint=tmp_path / "out").severity is UNKNOWN
    assert seen("GK602", base=base).severity is UNKNOWN


# ---- GK603 ----


@pytest.fixture
def shipped(saved_e2b: Path) -> Path:
    """The base as its makers ship it: with keys of layers that share those of others."""
    tensors = load_file(saved_e2b / "model.safetensors")
    shared = [site.path for site in gk.survey(saved_e2b) if site.note and site.role == "attention.q"]
    for path in shared:
        tensors[path.replace("q_proj", "k_proj") + ".weight"] = torch.zeros(4, 4)
    assert shared
    save_file(tensors, saved_e2b / "model.safetensors", {"format": "pt"})
    return saved_e2b


@pytest.mark.rule_fails("GK603")
def test_gk603_keys_that_the_class_does_not_load(shipped: Path, tmp_path: Path) -> None:
    base = gk.survey(shipped, headers=True)
    AutoModelForImageTextToText.from_pretrained(shipped).save_pretrained(tmp_path / "out")
    found = seen("GK603", base=base, checkpoint=tmp_path / "out")
    assert found.severity is WARNING
    assert base.checkpoint is not None
    assert found.evidence["dropped"] == len(base.checkpoint.unknown) > 0
    assert "k_proj" in found.message


@pytest.mark.rule_passes("GK603")
def test_gk603_passes_where_they_are_copied(shipped: Path) -> None:
    assert seen("GK603", base=gk.survey(shipped, headers=True), checkpoint=shipped).severity is OK


def test_gk603_unknown_without_the_base_files(shipped: Path, tmp_path: Path) -> None:
    assert seen("GK603", base=gk.survey(shipped / "config.json"), checkpoint=shipped).severity is UNKNOWN
    assert seen("GK603", base=gk.survey(shipped, headers=True), checkpoint=tmp_path).severity is UNKNOWN


# ---- GK604 ----


@pytest.fixture
def llama(twin_of: Callable[[str], nn.Module]) -> nn.Module:
    return twin_of("llama").eval()


def lora(init: Any, **options: Any) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=init, **options)


def update_alone(base: nn.Module, folder: Path, batch: dict[str, Any]) -> torch.Tensor:
    """What anyone computes who adds B·A to the original base."""
    plain = get_peft_model(copy.deepcopy(base), lora(True)).eval()
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    assert not plain.load_state_dict(named, strict=False).unexpected_keys
    return plain(**batch).logits


@pytest.mark.rule_fails("GK604")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_gk604_an_update_that_needs_its_initializer(llama: nn.Module, tmp_path: Path, init: str) -> None:
    batch = gk.example_batch(llama)
    model = with_effect(get_peft_model(copy.deepcopy(llama), lora(init)))
    model.save_pretrained(tmp_path)
    found = finding(check(tmp_path), "GK604")
    assert found.severity is WARNING
    want = model(**batch).logits
    assert torch.allclose(PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()(**batch).logits, want)
    assert (update_alone(llama, tmp_path, batch) - want).abs().max() > 0.1


@pytest.mark.rule_fails("GK604")
def test_gk604_an_initializer_that_draws(llama: nn.Module, tmp_path: Path) -> None:
    batch = gk.example_batch(llama)
    model = with_effect(get_peft_model(copy.deepcopy(llama), lora("pissa_niter_2")))
    model.save_pretrained(tmp_path)
    assert finding(check(tmp_path), "GK604").severity is ERROR
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    assert (loaded(**batch).logits - model(**batch).logits).abs().max() > 0.1


@pytest.mark.rule_fails("GK604")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_gk604_an_initializer_that_needs_data(llama: nn.Module, tmp_path: Path) -> None:
    batch = gk.example_batch(llama)
    base = copy.deepcopy(llama)
    config = lora("lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(base, config, lambda: base(**batch).loss.backward())
    model = with_effect(get_peft_model(base, config))
    model.save_pretrained(tmp_path)
    found = finding(check(tmp_path), "GK604")
    assert found.severity is ERROR
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    assert (loaded(**batch).logits - model(**batch).logits).abs().max() > 0.1


@pytest.mark.rule_passes("GK604")
@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_gk604_passes_once_converted(llama: nn.Module, tmp_path: Path) -> None:
    batch = gk.example_batch(llama)
    model = get_peft_model(copy.deepcopy(llama), lora("pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with_effect(model).save_pretrained(
        tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    llama.save_pretrained(tmp_path / "base")
    report = check(tmp_path / "out", tmp_path / "base")
    assert {found.severity for found in by_code(report).values()} == {OK}, str(report)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "out").eval()
    assert torch.allclose(loaded(**batch).logits, model(**batch).logits, atol=1e-4)


@pytest.mark.rule_passes("GK604")
@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_gk604_passes_where_the_base_stays(llama: nn.Module, tmp_path: Path, init: Any) -> None:
    with_effect(get_peft_model(copy.deepcopy(llama), lora(init))).save_pretrained(tmp_path)
    assert finding(check(tmp_path), "GK604").severity is OK


# ---- GK605 ----


def as_quantized(base: gk.ModelMap, quantizer: str) -> gk.ModelMap:
    return replace(base, sites=tuple(replace(s, quantized=quantizer) if s.is_linear else s for s in base))


@pytest.mark.parametrize(
    ("quantization", "quantizer", "severity"),
    [
        pytest.param("4bit", None, INFO, id="4 bit onto 16 bit"),
        pytest.param("8bit", "bitsandbytes 4-bit", WARNING, id="8 bit onto 4 bit"),
        pytest.param(None, "bitsandbytes 4-bit", WARNING, id="16 bit onto 4 bit"),
    ],
)
def test_gk605_another_precision(quantization: str | None, quantizer: str | None, severity: gk.Severity) -> None:
    base = gk.survey("llama")
    if quantizer is not None:
        base = as_quantized(base, quantizer)
    found = seen("GK605", base=base, training=Training(quantization=quantization))
    assert found.severity is severity, found.message


@pytest.mark.rule_passes("GK605")
def test_gk605_passes_on_the_same_precision() -> None:
    plain = gk.survey("llama")
    assert seen("GK605", base=plain, training=Training()).severity is OK
    quantized = as_quantized(plain, "bitsandbytes 4-bit")
    assert seen("GK605", base=quantized, training=Training(quantization="4bit")).severity is OK


@pytest.mark.rule_fails("GK605")
def test_gk605_a_real_quantized_base(llama: nn.Module, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    llama.model.layers[0].self_attn.q_proj = bitsandbytes.nn.Linear4bit(64, 64, bias=False).to("cpu")
    found = seen("GK605", base=gk.survey(llama), training=Training(quantization=None))
    assert found.severity is WARNING
    assert found.evidence["base"] == "4bit"


# ---- GK608 ----


def _keep_statistics(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "running_mean"):
            module.momentum = 0.0


@pytest.mark.parametrize(
    ("saved", "prepare", "severity"),
    [
        pytest.param(None, lambda _: None, WARNING, id="as it is", marks=pytest.mark.rule_fails("GK608")),
        pytest.param(None, _keep_statistics, OK, id="momentum 0", marks=pytest.mark.rule_passes("GK608")),
        pytest.param(["batch_norm"], lambda _: None, OK, id="saved"),
    ],
)
def test_gk608_statistics_that_training_moves_are_lost_with_the_adapter(
    tmp_path: Path, saved: list[str] | None, prepare: Callable[[Any], None], severity: gk.Severity
) -> None:
    """The rule says what stock PEFT shows: whether the trained model is the one that loads again."""
    base: Any = gk.twin("granite_speech")
    batch = gk.example_batch(base, batch_size=4)
    config = gk.plan(base, targets="attention", scope="language", r=2).peft_config
    config.modules_to_save = saved
    model = get_peft_model(copy.deepcopy(base), config)
    prepare(model)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    report = gk.verify(model, batch, settings=CheckSettings(select=("GK608",)))
    assert finding(report, "GK608").severity is severity
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for seed in range(3):
        model.train()(**gk.example_batch(base, batch_size=4, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        apart = (model.eval()(**batch).logits - again.eval()(**batch).logits).abs().max()
    assert (apart > 1e-3) == (severity is WARNING)
