"""LoRA-GA: the directions of each weight's gradient."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftkit.attaching.initial_values.layers import (
    PlainLora,
    check_ranks,
    check_reached,
    check_unquantized,
    without_leftovers,
)
from graftkit.errors import AttachError
from graftkit.modeling.entry import run
from graftkit.modeling.module_mode import in_training_mode

if TYPE_CHECKING:
    from torch import Tensor, nn

# What peft.tuners.lora.loraga stores on the layers.
_GRADIENT, _COUNT = "_peft_loraga_grad", "_peft_loraga_grad_count"


def lora_ga(lora: PlainLora, batches: Sequence[Mapping[str, Any]]) -> None:
    """Fill both factors, and take their product out of the base weights."""
    from peft.tuners.lora.loraga import preprocess_loraga

    check_unquantized(lora)
    check_ranks(lora)
    linears = lora.linears
    config = copy.deepcopy(lora.config)
    # PEFT's preprocessing looks for linears, which are under its own layers by now.
    config.target_modules = {f"{path}.base_layer" for path in linears}
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None

    def step() -> None:
        with warnings.catch_warnings():
            # The first layer of a tower has inputs without a gradient; the hook only counts, and counts it too.
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            for batch in batches:
                _loss(lora.base, batch).backward()  # type: ignore[no-untyped-call]

    with without_leftovers(linears.values(), (_GRADIENT, _COUNT)):
        # PEFT takes the gradients in training mode, where norms over a batch would move their statistics.
        with in_training_mode(lora.base):
            preprocess_loraga(lora.base, config, step)
        # PEFT falls back to plain LoRA, with B = 0, on a layer that has no gradient.
        check_reached({path: hasattr(linear, _GRADIENT) for path, linear in linears.items()})
        lora.redraw()


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    loss = getattr(run(model, batch), "loss", None)
    if loss is None:
        raise AttachError(
            "LoRA-GA follows the gradient of the loss, and the model computes none",
            where=type(model).__name__,
            why="the batch has no labels, or the class computes no loss",
            help="add labels to the batches",
            code="initialize-loss",
        )
    return loss  # type: ignore[no-any-return]
