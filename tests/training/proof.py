"""What every run has to show in the end: its files work in stock PEFT, in a process without graftkit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from graftkit.demo.training import train_adapter
from graftkit.recipes.recipe import read_recipe
from graftkit.training.result import TrainingResult

_STOCK = """
import json, sys
import torch, transformers
from peft import PeftModel
from safetensors.torch import load_file
base, adapter, given, packed = sys.argv[1:]
config = transformers.AutoConfig.from_pretrained(base)
def load(**options):
    return getattr(transformers, config.architectures[0]).from_pretrained(base, **options).eval()
def adapted(model, **options):
    return PeftModel.from_pretrained(model, adapter, **options).eval()
batch = load_file(given)
expected = batch.pop("logits")
options = {"quantization_config": transformers.BitsAndBytesConfig(**json.loads(packed))} if packed else {}
# TRL trains in bfloat16 on a packed base; PEFT would compute in float32, which rounds otherwise.
again = {"autocast_adapter_dtype": False} if packed else {}
with torch.no_grad():
    plain = load(**options)(**batch).logits
    again = adapted(load(**options), **again)(**batch).logits
    whole = adapted(load(dtype=torch.float32))
    before = whole(**batch).logits
    merged = whole.merge_and_unload()(**batch).logits
assert "graftkit" not in sys.modules
print(json.dumps({
    "effect": float((expected - plain).abs().max()),
    "off": float((again - expected).abs().max()),
    "off_merged": float((merged - before).abs().max()),
}))
"""


@dataclass(frozen=True)
class Stock:
    """Largest differences of logits.

    Attributes:
        effect: of the trained model from the base.
        off: of the reloaded model from the one that was trained.
        off_merged: of the merged model from the unmerged one, on the base in float32: packed weights round.
    """

    effect: float
    off: float
    off_merged: float

    @property
    def faithful(self) -> bool:
        """Whether reloading and merging change a ten thousandth of what training did, or less."""
        return self.effect > 0 and max(self.off, self.off_merged) < 1e-4 * self.effect


def run(recipe: Path, *changes: str) -> tuple[TrainingResult, Any]:
    """Train as the recipe says; return what was done and the trained model, in eval mode."""
    return train_adapter(read_recipe(recipe, changes))


def reloaded(model: Any, base: Path, adapter: Path, batch: Mapping[str, torch.Tensor]) -> Stock:
    """The saved adapter on the saved base, against the model in memory."""
    inputs = {name: tensor.contiguous() for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs).logits
    given = adapter / "batch.safetensors"
    save_file({**inputs, "logits": logits.float().contiguous()}, given)
    packed = getattr(model.config, "quantization_config", None)
    quantization = json.dumps(packed.to_dict()) if packed is not None else ""
    command = [sys.executable, "-c", _STOCK, str(base), str(adapter), str(given), quantization]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return Stock(**json.loads(done.stdout.splitlines()[-1]))


def on_fresh_base(model: Any, base: Path) -> Any:
    """The adapter in memory on the base as it is loaded, packed in the same way.

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
    """The texts as tokens, padded on the right."""
    made = tokenizer(texts, padding=True, return_tensors="pt")
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
