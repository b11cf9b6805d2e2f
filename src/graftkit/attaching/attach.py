"""``attach()``: stock ``get_peft_model`` on the planned sites, and a check that it did what was planned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from graftkit.attaching.same_model import check_same_model
from graftkit.errors import AttachError
from graftkit.modeling.stock_peft import adapt
from graftkit.modeling.unwrapping import base_model_of
from graftkit.planning.cost import is_upper_bound
from graftkit.planning.plan import Plan
from graftkit.text import some

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

# Characters of a message of PEFT: it prints whole modules in its errors.
_LONGEST_REASON = 400


def attach(model: nn.Module, plan: Plan, *, adapter_name: str = "default", **options: Any) -> PeftModel:
    """Attach the planned adapter with stock PEFT and check the result.

    Afterwards every planned site carries the adapter, no other module does, and only adapter tensors are
    trainable, as many elements as the plan said. Where that does not hold the adapter is taken off again.
    EVA and LoRA-GA begin as plain LoRA until they are given data: see ``graftkit.initialize``.

    Args:
        model: the model the plan was made for. Like ``get_peft_model``, this changes it in place.
        adapter_name: PEFT's name for the adapter.
        options: passed to ``get_peft_model``.

    Raises:
        AttachError: before anything is touched: ``attach-already-adapted`` for a ``PeftModel`` or its base,
            ``attach-other-model`` when the model lacks planned sites, or they have other shapes;
            ``attach-refused`` when PEFT raises; ``attach-postcondition`` when PEFT attached something else than
            was planned.
    """
    _check_plain(model)
    check_same_model(model, plan)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # PEFT edits the configuration it is given (sets become lists, targets are narrowed): the plan keeps its own.
    try:
        peft_model = adapt(model, deepcopy(plan.peft_config), adapter_name=adapter_name, **options)
    except Exception as error:
        raise _refused(error, model) from error
    try:
        check_against_plan(peft_model, plan, adapter_name)
    except AttachError:
        peft_model.unload()
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise
    return peft_model


def check_against_plan(model: PeftModel, plan: Plan, adapter_name: str = "default") -> None:
    """Check that an attached adapter is the planned one, whatever attached it.

    Raises:
        AttachError: ``attach-postcondition``, for the first postcondition that does not hold.
    """
    planned = {a.path for a in plan.attached}
    found = adapted_as_planned(model, plan, adapter_name)
    for problem, paths in (
        ("planned sites were not adapted", planned - found),
        ("sites were adapted that the plan leaves alone", found - planned),
        ("parameters outside the adapter are trainable", _strays(model, plan)),
    ):
        if paths:
            raise _not_as_planned(f"{len(paths)} {problem}", sorted(paths))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Beside its sites, a plan made from a map alone cannot count norms that are saved whole, or their biases.
    missing = trainable < plan.trainable_params and not is_upper_bound(plan.peft_config)
    if missing or (trainable > plan.trainable_params and not _has_extras(plan)):
        raise _not_as_planned(f"{trainable} parameters are trainable, {plan.trainable_params} were planned", [])


def attach_stock(model: nn.Module, fields: Mapping[str, Any]) -> PeftModel:
    """Attach what a stock PEFT configuration says, without a plan to check the result against.

    Args:
        model: changed in place, as by ``get_peft_model``.
        fields: of the configuration, as ``adapter_config.json`` has them.

    Raises:
        AttachError: ``attach-already-adapted``, or ``attach-refused`` when PEFT raises.
    """
    from peft import PeftConfig

    _check_plain(model)
    try:
        return adapt(model, PeftConfig.from_peft_type(**fields))
    except Exception as error:
        raise _refused(error, model) from error


def adapted_sites(model: nn.Module, adapter_name: str = "default") -> set[str]:
    """Return the paths that carry an adapter: a module's path, or a parameter's where PEFT wraps a parameter.

    Paths are those of the base model, as ``Site.path`` has them.
    """
    return {path for path, layer in _tuner_layers(base_model_of(model), "") if _carries(layer, adapter_name)}


def adapted_as_planned(model: nn.Module, plan: Plan, adapter_name: str = "default") -> set[str]:
    """Return what ``adapted_sites`` does, with the path of a planned site where PEFT adapts its weight.

    PEFT wraps a linear that is targeted by its weight as a parameter, or, where it is quantized, as a module: both
    compute and save the same.
    """
    sites = {attached.target_path: attached.path for attached in plan.attached}
    return {sites.get(path, path) for path in adapted_sites(model, adapter_name)}


def _tuner_layers(module: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (path, layer) of PEFT's layers; within a layer only its base layer is searched."""
    from peft.tuners.lora import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, child in module.named_children():
        if isinstance(child, AuxiliaryTrainingWrapper):
            continue  # modules to save and trainable tokens: asked for besides the sites
        if not isinstance(child, BaseTunerLayer):
            yield from _tuner_layers(child, f"{path}{name}.")
            continue
        layer: Any = child
        # Wrappers of parameters nest: each holds one parameter of the module at the bottom.
        while isinstance(layer, ParamWrapper):
            yield f"{path}{name}.{layer.parameter_name}", layer
            layer = layer.base_layer
        if isinstance(layer, BaseTunerLayer):
            yield f"{path}{name}", layer


def _carries(layer: Any, adapter_name: str) -> bool:
    return adapter_name in _adapters_of(layer)


def _adapters_of(layer: Any) -> set[str]:
    containers = (getattr(layer, name, None) for name in layer.adapter_layer_names)
    return {name for container in containers if container is not None for name in container}


def _refused(error: Exception, model: nn.Module) -> AttachError:
    return AttachError(
        f"PEFT refuses to attach this adapter to {type(model).__name__}",
        why=f"{type(error).__name__}: {shorten(str(error), _LONGEST_REASON, placeholder=' …')}",
        help="build or load the model again before you retry: PEFT may have replaced some modules already",
        code="attach-refused",
    )


def _check_plain(model: nn.Module) -> None:
    """Check that no layer carries an adapter, also where the model is the base of a PeftModel, or has its own."""
    from peft import PeftModel

    base = base_model_of(model)
    carried = {name for _, layer in _tuner_layers(base, "") for name in _adapters_of(layer)}
    if not carried and not isinstance(model, PeftModel):
        return
    named = f"it has {some(sorted(carried))} in its layers" if carried else "it is a PeftModel"
    raise AttachError(
        "this model carries an adapter already",
        why=f"{named}: attaching once more would replace an adapter, or wrap one PeftModel in another",
        help="peft_model.add_adapter(name, plan.peft_config) attaches a second one; peft_model.unload() gives the "
        "plain model",
        code="attach-already-adapted",
    )


def _has_extras(plan: Plan) -> bool:
    config = plan.peft_config
    extras = ("modules_to_save", "trainable_token_indices")
    return getattr(config, "bias", "none") != "none" or any(getattr(config, name, None) for name in extras)


def _strays(peft_model: PeftModel, plan: Plan) -> set[str]:
    """Return the trainable parameters that are not adapters', and were not asked for (bias, modules to save)."""
    biases = getattr(plan.peft_config, "bias", "none") != "none"
    allowed = (peft_model.base_model.prefix, "modules_to_save", "trainable_tokens")
    trainable = (name for name, p in peft_model.named_parameters() if p.requires_grad)
    strays = {name for name in trainable if not any(part.startswith(allowed) for part in name.split("."))}
    return {name for name in strays if not (biases and name.endswith("bias"))}


def _not_as_planned(what: str, paths: list[str]) -> AttachError:
    return AttachError(
        f"PEFT did not attach what was planned: {what}",
        where=some(paths, 5) or None,
        why="PEFT changed the targets while attaching (graft env shows the versions)",
        help="report it with the output of `graft env`",
        code="attach-postcondition",
    )
