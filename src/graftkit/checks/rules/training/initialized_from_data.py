"""Check that an adapter begins as its initializer says: one that needs data has had it, and the reference stays.

## Why it matters

EVA, CorDA and LoRA-GA compute the adapter's first values from data before the first step. A trainer that is only
given the configuration does not: the run trains plain LoRA under another name, without an error, and an adapter
that is loaded as LoRA-GA's is expected on a base that was never moved.

DPO, and GRPO with a `beta`, compare with the base, which to them is the model with its adapter switched off. An
initializer that moves the base (PiSSA, OLoRA, CorDA, LoRA-GA) makes that a broken model.

## Example

`SFTTrainer(model, peft_config=LoraConfig(init_lora_weights="eva"), …)`, without `initialize_lora_eva_weights`; or
DPO from PiSSA, whose first loss is 1.2 where that of a model equal to its reference is ln 2.

## How safe that is

`gk.initialize` and PEFT's own functions compute the same values. `graft train` does it with the recipe's data, and
saves what CorDA and LoRA-GA train as plain LoRA of twice the rank, which any tool loads on the original base; on a
base in 16 bit the two are equal up to one rounding of the base weights.

## Sources

- peft: tuners.lora.layer.LoraLayer.update_layer ("eva": B = 0), lora_ga_init (falls back to plain LoRA)
- peft: tuners.lora.eva.initialize_lora_eva_weights, tuners.lora.loraga.preprocess_loraga
- trl: trainer.dpo_trainer.DPOTrainer (the reference is the base with the adapter switched off)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.attaching.attach import adapted_as_planned
from graftkit.attaching.initial_values.corda import corda_preprocessing
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, info, passed, unknown
from graftkit.errors import MissingDependencyError, RecipeError
from graftkit.findings import Severity
from graftkit.planning.initializers import Initializer, initializer_of
from graftkit.recipes.initializer import check_initializer, initializer_key
from graftkit.text import some

if TYPE_CHECKING:
    from torch import Tensor

_NO_DATA = "its first values need no data"
# What PEFT's own draw may miss its expected mean square by, in standard deviations of that mean.
_DEVIATIONS = 6
# Largest cosine between two orthogonal rows, times the root of their length: what rounding to bfloat16 leaves, and
# a 64th of what random rows have.
_COSINE = 2**-6


def _check(context: CheckContext) -> Observation:
    refusal = _refusal(context)
    if refusal is not None:
        return refusal
    if context.given.model is not None:
        return _of_model(context)
    row = initializer_of(context.peft_config.get("init_lora_weights"))
    if row is None or not row.needs_data:
        return passed(_NO_DATA)
    if context.given.folder is not None:
        return passed("a saved adapter has its values")
    if context.given.recipe is not None:
        return info(
            f"{row.name}: `graft train` computes the first values from the data, before the first step",
            help="with another trainer: model = gk.initialize(model, plan, batches)",
            initializer=row.name,
        )
    message = f"whether {row.name} has had its data cannot be seen: the parameters are sharded over processes"
    return failed(message, where="init_lora_weights", severity=Severity.WARNING, initializer=row.name)


def _refusal(context: CheckContext) -> Observation | None:
    """Return why the recipe's run cannot start from its initializer, or None."""
    if context.given.recipe is None or context.given.folder is not None:
        return None
    key = ".".join(map(str, initializer_key(context.recipe)))
    try:
        check_initializer(context.recipe)
        row = initializer_of(context.peft_config.get("init_lora_weights"))
        if row is not None and row.name == "corda":
            corda_preprocessing()
    except (RecipeError, MissingDependencyError) as error:
        return failed(f"{error.what}: {error.why}", help=error.help, key=key, error=error.code)
    return None


# ---- a live adapter ----


@dataclass(frozen=True)
class _Layer:
    """One adapted layer: what its two factors show of how they began.

    Attributes:
        drawn: A is as PEFT draws it for plain LoRA.
        orthogonal: the rows of A are.
        adds: B is not zero.
    """

    drawn: bool
    orthogonal: bool
    adds: bool


def _of_model(context: CheckContext) -> Observation:
    config = context.model.peft_config
    rows = {
        n: initializer_of(getattr(config[n], "init_lora_weights", None)) for n in context.model.active_adapters
    }
    for name, row in rows.items():
        if row is not None and row.moves_base and _keeps_reference(context):
            return failed(
                f"{row.name} moved the base, and the trainer takes the base without the adapter for its reference",
                where="init_lora_weights",
                help="use an initializer that leaves the base as it is",
                initializer=row.name,
            )
        if row is not None and row.needs_data:
            return _of_adapter(context, name, row)
    return passed(_NO_DATA)


def _keeps_reference(context: CheckContext) -> bool:
    return context.given.training is not None and context.training.keeps_reference


def _of_adapter(context: CheckContext, name: str, row: Initializer) -> Observation:
    layers = _layers(context.model, name)
    plain = [path for path, layer in layers.items() if layer.drawn and not layer.adds]
    figures: dict[str, Any] = {"initializer": row.name, "layers": len(layers), "plain": len(plain)}
    if plain and len(plain) == len(layers):
        if context.given.recipe is not None:
            return unknown(f"this model is too small for {row.name}: it began as plain LoRA", **figures)
        message = f"init_lora_weights is {row.name!r}, and the values are plain LoRA's: no data has been read"
        return failed(message, where="init_lora_weights", **figures)
    if plain:
        message = f"{len(plain)} of {len(layers)} layers began as plain LoRA, not as {row.name}"
        return failed(message, where=plain[0], severity=Severity.WARNING, **figures)
    if not _shows_start(row, layers):
        return unknown(f"it has been trained: whether it began as {row.name} cannot be seen", **figures)
    return _without_rank(context, name, row, figures) or passed(
        f"all {len(layers)} layers have the values of {row.name}", **figures
    )


def _shows_start(row: Initializer, layers: Mapping[str, _Layer]) -> bool:
    """Check whether the tensors show that the initializer gave them their values.

    EVA begins with B = 0. LoRA-GA's A has orthogonal rows until it is trained. PEFT attaches no CorDA without its
    data.
    """
    if row.name == "corda":
        return True
    return all(layer.orthogonal if row.moves_base else not layer.adds for layer in layers.values())


def _without_rank(
    context: CheckContext, name: str, row: Initializer, figures: Mapping[str, Any]
) -> Observation | None:
    if context.given.plan is None:
        return None
    found = adapted_as_planned(context.model.get_base_model(), context.plan, name)
    left = [a.path for a in context.plan.attached if a.path not in found]
    if not left:
        return None
    return info(
        f"{row.name} gave {len(left)} of {len(context.plan.attached)} planned sites no rank: {some(left, 3)}",
        help="eva_config: {rho: 1.0} gives every site the rank that was planned",
        without_rank=left,
        **figures,
    )


def _layers(model: Any, name: str) -> dict[str, _Layer]:
    from peft.tuners.lora import LoraLayer

    found = ((path, m) for path, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer))
    return {path: _layer(m.lora_A[name].weight, m.lora_B[name].weight) for path, m in found if name in m.lora_A}


def _layer(a: Tensor, b: Tensor) -> _Layer:
    rows = a.detach().float().flatten(1)
    return _Layer(_is_drawn(rows), _is_orthogonal(rows), bool(b.detach().any()))


def _is_drawn(rows: Tensor) -> bool:
    """Check for PEFT's draw: uniform between -1/sqrt(features) and 1/sqrt(features), whose mean square is a third.

    EVA's rows have length 1, so that each has an element beyond that; if they are whitened, another mean square.
    Source: ``peft.tuners.lora.layer.LoraLayer.reset_lora_parameters``.
    """
    features, allowed = rows.shape[1], _DEVIATIONS * (4 / 5 / rows.numel()) ** 0.5
    bound = (1 + 2**-7) / features**0.5
    return bool(rows.abs().max() <= bound) and abs(float(rows.square().mean()) * 3 * features - 1) <= allowed


def _is_orthogonal(rows: Tensor) -> bool:
    import torch

    unit = torch.nn.functional.normalize(rows, dim=1)
    return bool((unit @ unit.T).fill_diagonal_(0).abs().max() <= _COSINE / rows.shape[1] ** 0.5 + 1e-5)


RULE = Rule(
    code="GK213",
    title="the adapter begins as its initializer says",
    severity=Severity.ERROR,
    needs=("peft_config",),
    reads=("model",),
    check=_check,
    help="model = gk.initialize(model, plan, batches) instead of gk.attach, and pass that model to the trainer "
    "without peft_config; or graft train; or PEFT's own function for that initializer",
    since="0.1.0",
)
