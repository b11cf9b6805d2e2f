"""What every run has to show in the end: its files work in stock PEFT, in a process without graftkit."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from tests.training.stock import Stock, load_and_merge

from graftkit.demo.training import train_adapter
from graftkit.recipes.recipe import read_recipe
from graftkit.training.result import TrainingResult


def run(recipe: Path, *changes: str) -> tuple[TrainingResult, Any]:
    """Train as the recipe says; return what was done and the trained model, in eval mode."""
    return train_adapter(read_recipe(recipe, changes))


def loads_in_stock_peft(base: Path, adapter: Path, *, merged: Path | None = None) -> Stock:
    """Load the saved adapter on the saved base, and merge it; keep the merged model if asked."""
    return _stock(base, adapter, None, None, merged)


def reloaded(model: Any, base: Path, adapter: Path, batch: Mapping[str, torch.Tensor]) -> Stock:
    """Load the saved adapter on the saved base, and compare it with the model in memory."""
    inputs = {name: tensor.contiguous() for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs).logits
    given = adapter / "batch.safetensors"
    save_file({**inputs, "logits": logits.float().contiguous()}, given)
    packed = getattr(model.config, "quantization_config", None)
    return _stock(base, adapter, given, None if packed is None else packed.to_dict(), None)


def _stock(*arguments: Any) -> Stock:
    """Call ``load_and_merge`` in a fork of a process that has imported PEFT, and nothing of graftkit."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([load_and_merge.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(load_and_merge, *arguments).result(timeout=300)


def on_fresh_base(model: Any, base: Path) -> Any:
    """Return the adapter in memory on the base as it is loaded, quantized in the same way.

    On a processor with AVX512-BF16, bitsandbytes 0.50 packs weights for every forward pass without gradients and
    unpacks them for the next one with: their scales are rounded each time, and the base in memory drifts.
    Source: ``bitsandbytes.functional._convert_weight_packed_for_cpu_inverse``, "best-effort inverse".
    """
    inner = model.get_base_model()
    fresh = type(inner).from_pretrained(base, quantization_config=inner.config.quantization_config)
    made = get_peft_model(fresh, model.peft_config["default"], autocast_adapter_dtype=False)
    set_peft_model_state_dict(made, get_peft_model_state_dict(model))
    return made.eval()


def text_batch(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    """Return the texts as tokens, padded on the right."""
    made = tokenizer(texts, padding=True, return_tensors="pt")
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
