"""A small live model quantized by bitsandbytes, as loading it from a folder would."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

from graftkit.planning.quantization import plan_quantization
from graftkit.surveying.sources.quiet import quiet_transformers
from graftkit.surveying.survey import survey

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Source: bitsandbytes.nn.Linear4bit.forward.
_REPACKING = "support_avx512bf16_for_cpu"


def quantized(model: PreTrainedModel, bits: str) -> PreTrainedModel:
    """Return the model as bitsandbytes loads it, without quantizing the modules that a plan leaves in 16 bit.

    Args:
        model: saved to a temporary folder and loaded again; it is not changed.
        bits: "4bit" or "8bit".
    """
    config = plan_quantization(survey(model), bits).config
    with tempfile.TemporaryDirectory(prefix="graftkit-") as folder, quiet_transformers():
        model.save_pretrained(folder)
        loaded: PreTrainedModel = type(model).from_pretrained(folder, quantization_config=config)
    for module in loaded.modules():
        if hasattr(module, _REPACKING):
            # A faster CPU kernel repacks the weights permanently, and refuses the widths below 32 of twins.
            setattr(module, _REPACKING, False)
    return loaded
