"""A small base with a tokenizer, an adapter with an effect, and its record, as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import graftkit as gk
from graftkit.adapters.record import AdapterRecord, read_record
from graftkit.serving.engine_twin import write_engine_twin


@dataclass(frozen=True)
class Signed:
    """Folders of a base and of an adapter that was signed on it."""

    base: Path
    adapter: Path

    @property
    def record(self) -> AdapterRecord:
        record = read_record(self.adapter)
        assert record is not None
        return record


def write_signed(folder: Path, source: str = "qwen3", *, seed: int = 0, **options: Any) -> Signed:
    """Write a twin, and an adapter on it that changes log-probabilities by about one nat."""
    signed = Signed(folder / "base", folder / "adapter")
    write_engine_twin(source, signed.base, seed=seed)
    model = adapted(signed.base, **options)
    model.save_pretrained(signed.adapter)
    gk.sign(model, AutoTokenizer.from_pretrained(signed.base), signed.adapter)
    return signed


def adapted(base: Path, *, std: float = 0.06, **options: Any) -> PeftModel:
    """Return the base with an adapter whose factors are drawn at random."""
    model = AutoModelForCausalLM.from_pretrained(base)
    peft_model = gk.attach(model, gk.plan(model, **{"r": 4, "alpha": 8, "dropout": 0.2, **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return peft_model
