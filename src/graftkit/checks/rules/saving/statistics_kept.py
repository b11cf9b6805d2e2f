"""Check that training moves nothing in the base that the saved adapter does not carry.

## Why it matters

A norm over the batch keeps running statistics: in training mode it moves them with every batch, trained or not. A
saved adapter has none of them, so on the base as it was published it computes something else than the model that
was trained and evaluated, and nothing says so.

## Example

The speech encoder of Granite Speech has a `BatchNorm1d` in each of its convolutions. LoRA on the language model
alone moves their statistics, because the trainer puts the whole model into training mode.

## How safe that is

With a momentum of 0 the norm still normalizes by the batch while it trains, and keeps the statistics that it was
published with. Modules in `modules_to_save` are trained, too, and saved with their statistics.

## Sources

- https://pytorch.org/docs/stable/generated/torch.nn.BatchNorm1d.html
- peft: get_peft_model_state_dict saves an adapter's own tensors and `modules_to_save`
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.findings import Severity
from graftkit.modeling.entry import run
from graftkit.modeling.module_mode import in_training_mode
from graftkit.modeling.random_state import seeding
from graftkit.text import some

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

_SAVED = "modules_to_save"


def _check(context: CheckContext) -> Observation:
    import torch

    model = context.model
    with in_training_mode(model), seeding(model, 0), torch.no_grad():
        before = {name: buffer.clone() for name, buffer in _kept(model).items()}
        run(model, context.batch)
        after = _kept(model)
        moved = [name for name, buffer in before.items() if not torch.equal(buffer, after[name])]
    if not moved:
        return passed(f"a batch in training mode leaves the base's {len(before)} buffers as they are")
    return failed(
        f"a batch in training mode moves {len(moved)} buffers of the base that the adapter does not carry",
        where=some(moved, 1),
        moved=len(moved),
        buffers=len(before),
    )


def _kept(model: PeftModel) -> dict[str, Tensor]:
    """Return the base's floating-point buffers that a checkpoint has and the adapter does not, by name."""
    saved = model.state_dict().keys()
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in saved and buffer.is_floating_point() and _SAVED not in name.split(".")
    }


RULE = Rule(
    code="GK608",
    title="training moves nothing in the base that the adapter does not carry",
    severity=Severity.WARNING,
    needs=("model", "batch"),
    check=_check,
    help="set momentum = 0.0 on those norms before training, or name them in modules_to_save",
    since="0.1.0",
)
