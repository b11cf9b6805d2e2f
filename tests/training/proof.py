"""What every run has to show in the end: its files work in stock PEFT, in a process without graftkit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from graftkit.demo.training import train_adapter
from graftkit.recipes.recipe import read_recipe
from graftkit.training.result import TrainingResult

# What somebody does who has the files and not graftkit: load, compare with the file, merge.
_STOCK = """
import json, sys
sys.modules["graftkit"] = None
import torch, transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
base, adapter, given, packed, out = sys.argv[1:]
config = transformers.AutoConfig.from_pretrained(base)
def load(**options):
    return getattr(transformers, config.architectures[0]).from_pretrained(base, **options).eval()
def adapted(model, **options):
    return PeftModel.from_pretrained(model, adapter, **options).eval()
batch = load_file(given) if given else {"input_ids": torch.arange(3, 19).view(2, 8)}
expected = batch.pop("logits", None)
saved = load_file(f"{adapter}/adapter_model.safetensors")
options = {"quantization_config": transformers.BitsAndBytesConfig(**json.loads(packed))} if packed else {}
# TRL trains in bfloat16 on a packed base; PEFT would compute in float32, which rounds otherwise.
again = {"autocast_adapter_dtype": False} if packed else {}
with torch.no_grad():
    plain = load(**options)(**batch).logits
    model = adapted(load(**options), **again)
    loaded = get_peft_model_state_dict(model)
    logits = model(**batch).logits
    expected = logits if expected is None else expected
    whole = adapted(load(dtype=torch.float32))
    before = whole(**batch).logits
    merged = whole.merge_and_unload()
    after = merged(**batch).logits
if out:
    merged.save_pretrained(out)
print(json.dumps({
    "tensors": {name: list(tensor.shape) for name, tensor in saved.items()},
    "adapters": list(model.peft_config),
    "same": saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved),
    "effect": float((expected - plain).abs().max()),
    "off": float((logits - expected).abs().max()),
    "off_merged": float((after - before).abs().max()),
}))
"""


@dataclass(frozen=True)
class Stock:
    """What stock PEFT makes of a saved adapter, in a process that cannot import graftkit.

    Attributes:
        tensors: name -> shape, as saved.
        adapters: the names that it loaded.
        same: whether what was loaded is what is in the file, tensor for tensor.
        effect: the largest change of a logit by the adapter.
        off: the largest difference of a logit from the model that was trained, 0 where that was not given.
        off_merged: the largest difference of a logit that merging makes, on the base in float32: packed weights
            round.
    """

    tensors: Mapping[str, Sequence[int]]
    adapters: Sequence[str]
    same: bool
    effect: float
    off: float
    off_merged: float

    @property
    def faithful(self) -> bool:
        """Whether what was saved is loaded, and neither loading nor merging changes 1e-4 of its effect."""
        return self.same and self.effect > 0 and max(self.off, self.off_merged) < 1e-4 * self.effect


def run(recipe: Path, *changes: str) -> tuple[TrainingResult, Any]:
    """Train as the recipe says; return what was done and the trained model, in eval mode."""
    return train_adapter(read_recipe(recipe, changes))


def loads_in_stock_peft(base: Path, adapter: Path, *, merged: Path | None = None) -> Stock:
    """Load the saved adapter on the saved base, and merge it; keep the merged model if asked."""
    return _stock(base, adapter, merged=str(merged or ""))


def reloaded(model: Any, base: Path, adapter: Path, batch: Mapping[str, torch.Tensor]) -> Stock:
    """Load the saved adapter on the saved base, and compare it with the model in memory."""
    inputs = {name: tensor.contiguous() for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs).logits
    given = adapter / "batch.safetensors"
    save_file({**inputs, "logits": logits.float().contiguous()}, given)
    packed = getattr(model.config, "quantization_config", None)
    return _stock(
        base, adapter, given=str(given), packed=json.dumps(packed.to_dict()) if packed is not None else ""
    )


def _stock(base: Path, adapter: Path, *, given: str = "", packed: str = "", merged: str = "") -> Stock:
    command = [sys.executable, "-c", _STOCK, str(base), str(adapter), given, packed, merged]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return Stock(**json.loads(done.stdout.splitlines()[-1]))


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
