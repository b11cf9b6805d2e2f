"""One adapter on everything that can be adapted, merged in files, on every kind of architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graftkit as gk
from graftkit.checks.probes.forward import difference, logits_of

if TYPE_CHECKING:
    from tests.unit.merging.conftest import Bench

FAMILIES = (
    "google/gemma-4-E2B-it",
    "google/gemma-4-26B-A4B-it",
    "llama",
    "mixtral",  # experts one by one on disk, renamed and stacked in memory
    "qwen3_moe",  # the same, gate and up side by side in one parameter
    "gpt_oss",  # experts stacked on disk too, stored as (in, out)
    "llama4",
    "deepseek_v3",
    "granitemoe",
    "jamba",
    "nemotron_h",
    "qwen3_next",
    "falcon_h1",
    "t5",
    "bert",
    "whisper",
    "llava",
    "qwen3_vl",
    "gemma3",
    "phi3",
    "vit",
    "wav2vec2",
    "gte",  # query, key and value in one tensor on disk
    "kimi_linear",
    "kimi_k25",  # rows in another order on disk
    "gpt2",  # weights stored as (in, out)
    "bloom",
)


def on_everything(model: nn.Module, **options: Any) -> Any:
    """A LoRA configuration on every linear and every expert."""
    found = gk.survey(model)
    experts = ["expert"] if any(s.role == "expert" and s.adaptable for s in found) else []
    plan = gk.plan(found, targets=["all-linear", *experts], scope=["all"], r=4, init_lora_weights=False, **options)
    return plan.peft_config


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_merges_exactly(name: str, bench: Callable[..., Bench]) -> None:
    made = bench(name, shard="200KB")
    adapter = made.adapter(on_everything(made.model))
    report = made.merge(adapter)
    made.assert_same_files()
    changed = made.assert_exact(made.exact(adapter))
    assert len(changed) == report.to_dict()["changed"]
    assert report.evidence.elements > 500
    made.assert_verifies(adapter)


def test_the_result_loads_as_the_base_does(bench: Callable[..., Bench]) -> None:
    """Names that the class does not know are copied, and nothing else is missing or unexpected."""
    made = bench("google/gemma-4-E2B-it", shard="200KB")
    file = next(iter(sorted(made.base.glob("*.safetensors"))))
    unknown = {"mtp.layers.0.weight": torch.randn(3, 5), "mtp.scale": torch.tensor(2.0)}
    save_file({**load_file(file), **unknown}, file, {"format": "pt"})
    _index(made, file.name, unknown)
    adapter = made.adapter(on_everything(made.model))
    report = made.merge(adapter)
    assert report.plan.base.groups.unknown == ("mtp.layers.0.weight", "mtp.scale")
    made.assert_same_files()
    with made.quiet():
        _, before = type(made.model).from_pretrained(made.base, output_loading_info=True)
        _, after = type(made.model).from_pretrained(made.out, output_loading_info=True)
    assert before == after
    assert set(after["unexpected_keys"]) == set(unknown)


def _index(made: Bench, file: str, added: dict[str, Any]) -> None:
    import json

    path = made.base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(dict.fromkeys(added, file))
    path.write_text(json.dumps(index))


def without_clamps(model: nn.Module) -> nn.Module:
    for name, buffer in model.named_buffers():
        if name.endswith(("_min", "_max")):
            buffer.fill_(-torch.inf if name.endswith("_min") else torch.inf)
    return model


@pytest.mark.parametrize("name", ["google/gemma-4-E2B-it", "google/gemma-4-E4B-it"])
def test_adapter_and_merged_logits_agree_on_images_and_audio(name: str, bench: Callable[..., Bench]) -> None:
    """The twin's clamps are active: an update on the wrong side of one would show."""
    from peft import PeftModel

    made = bench(name, dtype=torch.float32)
    batch = gk.example_batch(made.model)
    assert {"pixel_values", "input_features"} <= set(batch)
    adapter = made.adapter(on_everything(made.model), spread=0.02)
    made.merge(adapter)
    with made.quiet():
        plain = logits_of(made.loaded(dtype=torch.float32), batch)
        adapted = logits_of(
            PeftModel.from_pretrained(made.loaded(dtype=torch.float32), str(adapter)).eval(), batch
        )
        merged = logits_of(made.loaded(made.out, dtype=torch.float32), batch)
        unclamped = logits_of(without_clamps(made.loaded(dtype=torch.float32)), batch)
    assert difference(plain, unclamped) > 0.01, "the clamps do too little to prove anything"
    assert difference(plain, adapted) > 0.05, "the adapter does too little to prove anything"
    assert difference(adapted, merged) < 1e-3


def test_the_index_has_the_actual_size(bench: Callable[..., Bench]) -> None:
    import json

    made = bench("llama", shard="100KB")
    path = made.base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "metadata": {**index["metadata"], "total_size": 1}}))
    made.merge(made.adapter(on_everything(made.model)))
    after = json.loads((made.out / "model.safetensors.index.json").read_text())
    assert after["weight_map"] == index["weight_map"]
    assert after["metadata"]["total_size"] == index["metadata"]["total_size"]
