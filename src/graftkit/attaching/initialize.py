"""``initialize()``: the planned adapter, attached with first values that are computed from batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from graftkit.attaching.attach import attach
from graftkit.attaching.initial_values.compute import as_plain, compute_initial_values
from graftkit.errors import AttachError
from graftkit.planning.initializers import initializer_of
from graftkit.planning.plan import Plan

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


def initialize(
    model: nn.Module, plan: Plan, batches: Iterable[Mapping[str, Any]], *, adapter_name: str = "default"
) -> PeftModel:
    """Attach the planned adapter, its first values computed from ``batches`` where its initializer asks for it.

    EVA takes the principal components of each layer's inputs, and may move ranks between layers, down to none.
    CorDA and LoRA-GA read inputs and gradients, and change the base weights so that the model's output stays the
    same. For every other plan this attaches, and the batches are not looked at.

    Args:
        model: the model the plan was made for. It is changed in place, and keeps its training mode.
        plan: from ``graftkit.plan``, with ``init_lora_weights`` "eva", "corda" or "lora_ga".
        batches: model inputs as mappings, of any number of rows and modalities. All are used; every planned
            site must be run by them. LoRA-GA needs labels.
        adapter_name: PEFT's name for the adapter.

    Returns:
        The ``PeftModel``.

    Raises:
        AttachError: ``initialize-empty`` without batches; ``initialize-unreached`` when the batches do not run
            some planned site, as a tower that they do not feed; ``initialize-few`` when EVA has fewer examples
            than components; ``initialize-rank`` when a layer is too small for CorDA's or LoRA-GA's rank;
            ``initialize-loss`` when LoRA-GA gets no loss; ``initialize-unsettled`` when EVA does not converge;
            ``initialize-refused`` when PEFT raises; and what ``attach`` raises.
    """
    init = initializer_of(getattr(plan.peft_config, "init_lora_weights", None))
    if init is None or not init.needs_data:
        return attach(model, plan, adapter_name=adapter_name)
    data = _listed(batches)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain = dataclasses.replace(plan, peft_config=as_plain(plan.peft_config))
    adapted = attach(model, plain, adapter_name=adapter_name)
    config: Any = plan.peft_config
    try:
        compute_initial_values(adapted, config, data, adapter_name=adapter_name)
    except BaseException:
        adapted.unload()
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    return adapted


def _listed(batches: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    data = [batches] if isinstance(batches, Mapping) else list(batches)
    if not data:
        raise AttachError(
            "there are no batches to initialize from",
            why="the iterable is empty, as an iterator that was already used",
            help="pass a list of batches, or a data loader",
            code="initialize-empty",
        )
    return data
