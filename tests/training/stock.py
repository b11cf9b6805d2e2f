"""What somebody does who has the files and not graftkit: load an adapter, compare it with its file, merge it.

Nothing here, and nothing that it imports, is of graftkit: :mod:`tests.training.proof` calls it in another process.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file


@dataclass(frozen=True)
class Stock:
    """What stock PEFT makes of a saved adapter.

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


@torch.no_grad()
def load_and_merge(
    base: Path, adapter: Path, given: Path | None, packed: Mapping[str, Any] | None, merged_to: Path | None
) -> Stock:
    """Load a saved adapter on a saved base, and merge it.

    Args:
        base, adapter: their folders.
        given: a safetensors file with the inputs of a batch, and the logits that the trained model had for it.
        packed: how the base was quantized for training.
        merged_to: where to save the merged model.
    """
    sys.modules["graftkit"] = None  # type: ignore[assignment]  # importing it fails from here on
    batch = {"input_ids": torch.arange(3, 19).view(2, 8)} if given is None else load_file(given)
    expected = batch.pop("logits", None)
    saved = load_file(adapter / "adapter_model.safetensors")
    quantized = {} if packed is None else {"quantization_config": transformers.BitsAndBytesConfig(**packed)}
    # TRL trains in bfloat16 on a packed base; PEFT would compute in float32, which rounds otherwise.
    again = {} if packed is None else {"autocast_adapter_dtype": False}
    plain = _base(base, **quantized)(**batch).logits
    model = PeftModel.from_pretrained(_base(base, **quantized), adapter, **again).eval()
    loaded = get_peft_model_state_dict(model)
    logits = model(**batch).logits
    expected = logits if expected is None else expected
    whole = PeftModel.from_pretrained(_base(base, dtype=torch.float32), adapter).eval()
    before = whole(**batch).logits
    merged = whole.merge_and_unload()
    after = merged(**batch).logits
    if merged_to is not None:
        merged.save_pretrained(merged_to)
    return Stock(
        tensors={name: tuple(tensor.shape) for name, tensor in saved.items()},
        adapters=list(model.peft_config),
        same=saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved),
        effect=float((expected - plain).abs().max()),
        off=float((logits - expected).abs().max()),
        off_merged=float((after - before).abs().max()),
    )


def _base(folder: Path, **options: Any) -> Any:
    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    return getattr(transformers, name).from_pretrained(folder, **options).eval()
