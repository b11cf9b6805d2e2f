"""Every method of PEFT that adapts layers, on a plain, a wrapped and a wrapped 4-bit linear."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig

import graftkit as gk
from graftkit.attaching.attach import adapted_sites
from graftkit.checks.probes.forward import difference, logits_of
from graftkit.modeling.outputs import loss_of
from graftkit.planning.config.methods import method_named, method_names

E2B = "google/gemma-4-E2B-it"
METHODS = method_names()

# What a method cannot do without, or should not print.
NEEDS: dict[str, dict[str, Any]] = {"adalora": {"total_step": 10}, "frod": {"progressbar": False}}

# method -> (the step that fails, PEFT's own words, why), in every setting and in 4 bits. A row that no longer
# holds fails the test.
NOWHERE = {
    "beft": ("merge", "has no bias, cannot merge", "it trains a bias, and these layers have none to merge into"),
    "lily": ("merge", "not supported for Lily", "its update depends on the input"),
    "poly": ("gradients", "task_ids should not be None", "it routes by task, which the batch has to name"),
}
READS_THE_WEIGHT = "it computes with the base weight, and does not unpack it"
ADDS_TO_PACKED = "it has no 4-bit layer of its own: it trains, and its merge adds to the packed weight"
NOT_IN_4_BIT = {
    "adalora": ("merge", "", "its 4-bit layer has no merge of its own"),
    "adamss": ("plan", "Only Tensors of floating point", READS_THE_WEIGHT),
    "deft": ("plan", "cannot be multiplied", READS_THE_WEIGHT),
    "delora": ("plan", "Expected a floating point", READS_THE_WEIGHT),
    "frod": ("plan", "Only Tensors of floating point", READS_THE_WEIGHT),
    "glora": ("plan", "does not support this layer type", "it says so"),
    "hra": ("plan", "cannot be multiplied", READS_THE_WEIGHT),
    "ln_tuning": ("plan", "can require gradients", "it trains the weight itself, which is packed"),
    "loha": ("plan", "cannot be multiplied", READS_THE_WEIGHT),
    "lokr": ("plan", "is invalid for input of size", READS_THE_WEIGHT),
    "osf": ("plan", "`effective_rank` should be a positive", READS_THE_WEIGHT),
    "peanut": ("plan", "cannot be multiplied", READS_THE_WEIGHT),
    "psoft": ("plan", "requires float32/float16/bfloat16", "it says so"),
    "supertuning": ("plan", "cannot be multiplied", READS_THE_WEIGHT),
    "tinylora": ("plan", "Only Tensors of floating point", READS_THE_WEIGHT),
    # Its scales take the packed weight's integer type, and become 0.
    "unilora": ("plan", "no gradient reaches the adapter", READS_THE_WEIGHT),
    "c3a": ("merge", "must match the size", ADDS_TO_PACKED),
    "fourierft": ("merge", "must match the size", ADDS_TO_PACKED),
    "gralora": ("merge", "must match the size", ADDS_TO_PACKED),
    "ia3": ("merge", "Cannot merge ia3 layers when the model is loaded in 4-bit", "it says so"),
    "pvera": ("merge", "is invalid for input of size", ADDS_TO_PACKED),
    "randlora": ("merge", "is invalid for input of size", ADDS_TO_PACKED),
    "vblora": ("merge", "must match the size", ADDS_TO_PACKED),
    "waveft": ("merge", "must match the size", ADDS_TO_PACKED),
}
CANNOT = {
    **{("plain", method): row for method, row in NOWHERE.items()},
    **{("wrapped", method): row for method, row in NOWHERE.items()},
    **{("4-bit", method): row for method, row in {**NOWHERE, **NOT_IN_4_BIT}.items()},
}

SETTINGS = ("plain", "wrapped", "4-bit")


def test_the_methods_come_from_peft() -> None:
    assert {"lora", "dora", "rslora", "loha", "lokr", "oft", "boft", "ia3", "vera"} <= set(METHODS)
    assert not {"prompt_tuning", "prefix_tuning", "p_tuning", "xlora", "shadow", "trainable_tokens"} & set(METHODS)
    assert {method for _, method in CANNOT} <= set(METHODS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], nn.Module]:
    made: dict[str, nn.Module] = {}

    def fresh(setting: str) -> nn.Module:
        if setting not in made:
            made[setting] = {"plain": lambda: gk.twin("llama"), "wrapped": lambda: gk.twin(E2B)}.get(
                setting, lambda: in_4_bit(fresh("wrapped"), tmp_path_factory.mktemp("base"))
            )()
        return copy.deepcopy(made[setting])

    return fresh


def in_4_bit(model: Any, folder: Path) -> nn.Module:
    model.save_pretrained(folder)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    loaded = type(model).from_pretrained(folder, quantization_config=quantized, dtype=torch.float32).eval()
    for module in loaded.modules():
        # On some processors bitsandbytes repacks the weights in eval mode, which wants widths in steps of 32.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return loaded  # type: ignore[no-any-return]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_does_all_that_peft_can(
    setting: str, method: str, bases: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    step, said, _ = CANNOT.get((setting, method), ("", "", ""))
    for name, run in steps(setting, method, bases, tmp_path):
        with quiet():
            if name != step:
                run()
                continue
            with pytest.raises(Exception, match=re.escape(said)):
                run()
                pytest.fail(f"{method} now passes {step!r} on {setting}: take its row out", pytrace=False)
            return


def steps(
    setting: str, method: str, bases: Callable[[str], nn.Module], folder: Path
) -> Iterator[tuple[str, Callable[[], None]]]:
    torch.manual_seed(0)
    model = bases(setting)
    batch = gk.example_batch(model, batch_size=1)
    scope = ["language"] if setting == "plain" else ["vision"]
    kept: dict[str, Any] = {}

    def plan() -> None:
        usual = method_named(method).defaults.get(method_named(method).rank_field)
        options = {**({"r": 2} if usual else {}), **NEEDS.get(method, {})}
        kept["plan"] = gk.plan(model, targets=["attention"], scope=scope, method=method, **options)

    def attach() -> None:
        kept["before"] = logits_of(model, batch)
        adapted = kept["adapted"] = gk.attach(model, kept["plan"])
        assert adapted_sites(adapted) == {a.path for a in kept["plan"].attached}
        trainable = [p for p in adapted.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trainable) == kept["plan"].trainable_params

    def gradients() -> None:
        adapted = kept["adapted"]
        trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in trained.values():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        loss_of(adapted, batch).backward()
        dead = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
        assert not dead, f"no gradient: {dead[0]}"
        kept["logits"] = logits_of(adapted, batch)
        assert difference(kept["before"], kept["logits"]) > 1e-4, "the adapter does nothing"

    def reload() -> None:
        kept["adapted"].save_pretrained(folder)
        again = PeftModel.from_pretrained(bases(setting), folder)
        assert difference(kept["logits"], logits_of(again, batch)) < 1e-4, "reloaded logits differ"

    def merge() -> None:
        site = kept["plan"].attached[0].path
        probe = torch.randn(8, kept["plan"].attached[0].site.shape[1])
        kept["adapted"].eval()
        with torch.no_grad():
            expected = kept["adapted"].get_base_model().get_submodule(site)(probe)
            merged = kept["adapted"].merge_and_unload()
            found = merged.get_submodule(site)(probe)
        # Merging into 4 bits rounds the sum to 4 bits again, and the model amplifies that.
        assert (expected - found).norm() < (0.2 if setting == "4-bit" else 1e-4) * expected.norm()
        if setting != "4-bit":
            assert difference(kept["logits"], logits_of(merged, batch)) < 1e-3, "merged logits differ"

    yield from (("plan", plan), ("attach", attach), ("gradients", gradients), ("reload", reload), ("merge", merge))


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT's own remarks on merging, missing compilers and the like are not what is tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
