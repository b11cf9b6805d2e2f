"""The initial values that were taken out of the base: kept beside every checkpoint, subtracted in the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from graftkit.adapters.file import CONFIG_NAME, read_config
from graftkit.files import write_text

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

# Not an adapter's name in a folder of its own: the trainer would load it as a second adapter.
INITIAL_NAME = "initial_adapter.safetensors"
_WEIGHTS = "adapter_model.safetensors"
_PATTERNS = ("rank_pattern", "alpha_pattern")
# Configurations of initializers, which PEFT warns of beside another initializer.
_OF_INITIALIZERS = ("corda_config", "lora_ga_config")


class InitialValues(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """The adapter's tensors before its first step; writes them into every checkpoint.

    Attributes:
        tensors: with PEFT's names in files, on the CPU.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    @classmethod
    def of(cls, model: PeftModel) -> InitialValues:
        """Copy those of the adapter in memory."""
        from peft import get_peft_model_state_dict

        factors = {n: t for n, t in get_peft_model_state_dict(model).items() if _factor(n) is not None}
        return cls({name: tensor.detach().cpu().clone() for name, tensor in factors.items()})

    def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        from safetensors.torch import save_file

        if state.is_world_process_zero:
            save_file(dict(self.tensors), Path(args.output_dir) / f"checkpoint-{state.global_step}" / INITIAL_NAME)


def convert_to_plain_lora(folder: Path, initial: InitialValues) -> None:
    """Rewrite a saved adapter as plain LoRA on the original base.

    W + s(BA - B0 A0) is what was trained, so that rank and alpha double, and the second half subtracts the initial
    values. ``peft.PeftModel.save_pretrained(path_initial_model_for_weight_conversion=…)`` computes the same, and
    drops every tensor but the factors, as those of ``modules_to_save``.
    """
    import torch
    from safetensors.torch import load_file, save_file

    trained = load_file(folder / _WEIGHTS)
    joined = {}
    for name, tensor in trained.items():
        start, factor = initial.tensors.get(name), _factor(name)
        if start is not None:
            tensor = torch.cat([tensor, start] if factor == 0 else [tensor, -start], dim=factor or 0)
        joined[name] = tensor.contiguous()
    beside = folder / f".{_WEIGHTS}"
    save_file(joined, beside, metadata={"format": "pt"})
    config = _doubled(read_config(folder / CONFIG_NAME))
    beside.replace(folder / _WEIGHTS)
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True))


def _factor(name: str) -> int | None:
    """Return the dimension of the rank in a factor, 0 in A and 1 in B; None for any other tensor."""
    return next((at for at, part in enumerate(("lora_A", "lora_B")) if f".{part}." in name), None)


def _doubled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration for twice the rank, at the same scale."""
    # rsLoRA divides alpha by the root of the rank.
    grown = {"rank_pattern": 2, "alpha_pattern": 2**0.5 if config.get("use_rslora") else 2}
    patterns = {
        name: {key: value * grown[name] for key, value in (config.get(name) or {}).items()} for name in _PATTERNS
    }
    return {
        **config,
        "r": 2 * config["r"],
        "lora_alpha": config["lora_alpha"] * grown["alpha_pattern"],
        **patterns,
        **{name: None for name in _OF_INITIALIZERS if name in config},
        "init_lora_weights": True,
    }
