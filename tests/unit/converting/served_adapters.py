"""Adapters on disk, and their updates by two independent ways: stock PEFT's merge, and the files' own products."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import graftkit as gk

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Bench:
    """A base and adapters in a folder."""

    folder: Path
    cls: type

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.cls.from_pretrained(self.base, dtype=dtype).eval()

    def adapter(self, *, spread: float = 0.5, dtype: torch.dtype | None = None, **fields: Any) -> Path:
        """Save a stock PEFT adapter whose trained values are moved at random."""
        out = self.folder / "adapter"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(self.model(), LoraConfig(**fields))
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.data.add_(torch.randn_like(parameter) * spread)
                    if dtype is not None:
                        parameter.data = parameter.data.to(dtype)
            adapted.save_pretrained(str(out))
        return out

    def planned(self, targets: list[str], r: int = 3, **options: Any) -> Path:
        """Save an adapter on what ``gk.plan`` finds for these targets."""
        config = gk.plan(self.model(), targets=targets, r=r, **options).peft_config
        fields = {name: value for name, value in vars(config).items() if value and name in _FIELDS}
        return self.adapter(**fields)

    def updates(self, adapter: Path, dtype: torch.dtype = torch.float64) -> Tensors:
        """Return each changed parameter's update by stock PEFT's merge, in double precision.

        Args:
            dtype: that the base is loaded in; some initializers take no doubles.
        """
        base = self.model(dtype)
        before = {name: value.clone() for name, value in base.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted: Any = PeftModel.from_pretrained(base, str(adapter), autocast_adapter_dtype=False)
            for module in adapted.modules():
                if hasattr(module, "lora_A"):
                    module.double()
            after = adapted.merge_and_unload().state_dict()
        moved = {name: after[name] - before[name] for name in before}
        return {name: value for name, value in moved.items() if bool(value.any())}


_FIELDS = ("r", "lora_alpha", "target_modules", "target_parameters", "use_rslora", "rank_pattern", "alpha_pattern")


def products(folder: Path) -> Tensors:
    """Return each pair's update by its module's name: ``lora_alpha / r * B @ A``, in double precision."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    assert not config.get("use_rslora")
    scale = config["lora_alpha"] / config["r"]
    found: Tensors = {}
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[module] = b.double() @ a.double() * scale
        elif name.endswith(".lora_embedding_A"):
            b = tensors[name.replace("_embedding_A", "_embedding_B")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_embedding_A")
            found[module] = (b.double() @ a.double()).T * scale
    return found
