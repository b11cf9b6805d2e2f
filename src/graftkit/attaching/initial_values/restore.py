"""The first values of an attached LoRA, restored from what a run has saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from graftkit.attaching.initial_values.layers import PlainLora, check_unquantized, name_targets
from graftkit.modeling.unwrapping import PEFT_PREFIX

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor


def restore_moved_base(model: PeftModel, config: LoraConfig, initial: Mapping[str, Tensor]) -> None:
    """Give an attached plain LoRA its initial values again, and take them out of the base weights.

    Args:
        config: names the initializer.
        initial: the adapter's tensors before its first step, with PEFT's names in files.
    """
    from peft import set_peft_model_state_dict

    lora = PlainLora.of(model, config, "default")
    check_unquantized(lora)
    set_peft_model_state_dict(model, dict(initial))
    lora.move_base()
    lora.set_initializer()


def restore_ranks(model: PeftModel, config: LoraConfig, saved: Mapping[str, Tensor]) -> None:
    """Give each layer of an attached plain LoRA the rank that EVA gave it.

    Args:
        saved: the adapter's tensors, with PEFT's names in files; a layer without any had no rank.
    """
    from peft import initialize_lora_eva_weights

    lora = PlainLora.of(model, config, "default")
    values = {}
    dtypes = {path: layer.lora_A["default"].weight.dtype for path, layer in lora.layers.items()}
    for path, layer in lora.layers.items():
        none = layer.lora_A["default"].weight.detach()[:0]
        values[f"{PEFT_PREFIX}{path}"] = saved.get(f"{PEFT_PREFIX}{path}.lora_A.weight", none)
    lora.set_initializer()
    initialize_lora_eva_weights(model, eva_state_dict=values)
    for path, layer in lora.layers.items():
        lora.keep_state(layer, dtypes[path])
    name_targets(lora)
