"""``initialize()``: the planned adapter, attached with first values that are computed from batches."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from graftkit.attaching.attach import attach
from graftkit.errors import AttachError, MissingDependencyError
from graftkit.modeling.device import on_device_of
from graftkit.modeling.module_mode import evaluating, keep_modes
from graftkit.planning.initializers import initializer_of
from graftkit.planning.matching import value_at
from graftkit.planning.plan import Plan
from graftkit.planning.trials.skeleton import slots_of
from graftkit.text import some

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

# EVA repeats the batches until its components converge, which with few batches can take long, and with a threshold
# that they never reach would not end.
_MOST_EVA_PASSES = 200


def initialize(
    model: nn.Module, plan: Plan, batches: Iterable[Mapping[str, Any]], *, adapter_name: str = "default"
) -> PeftModel:
    """Attach the planned adapter, its first values computed from ``batches`` where its initializer asks for it.

    EVA reads the inputs of each layer after the adapter is attached, and may move ranks between layers, down to
    none. CorDA and LoRA-GA read inputs and gradients before, and change the base weights so that the model's
    output stays the same. For every other plan this attaches, and the batches are not looked at.

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
            than components; ``initialize-loss`` when LoRA-GA gets no loss; ``initialize-unsettled`` when EVA
            does not converge; and what ``attach`` raises.
    """
    init = initializer_of(getattr(plan.peft_config, "init_lora_weights", None))
    if init is None or not init.needs_data:
        return attach(model, plan, adapter_name=adapter_name)
    data = _listed(batches)
    with keep_modes(model), _removing_new_hooks(model):
        return _BY_INITIALIZER[init.name](model, plan, data, adapter_name)


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


# ---- EVA: attach, then principal components of the inputs ----


def _eva(model: nn.Module, plan: Plan, data: list[Mapping[str, Any]], adapter_name: str) -> PeftModel:
    from peft import initialize_lora_eva_weights

    _check_examples(plan, _examples(model, plan, data))
    # Empty until EVA fills them: PEFT keeps the memory for the components then.
    adapted = attach(model, plan, adapter_name=adapter_name, low_cpu_mem_usage=True)
    try:
        initialize_lora_eva_weights(
            adapted,
            [on_device_of(model, batch) for batch in data],
            forward_fn=_counted_forward(len(data)),
            prepare_model_inputs_fn=_token_mask,
            prepare_layer_inputs_fn=_layer_rows,
            adapter_name=adapter_name,
            show_progress_bar=False,
        )
    except Exception:
        adapted.unload()
        raise
    return adapted


def _counted_forward(batches: int) -> Callable[[Any, Mapping[str, Any]], Any]:
    left = iter(range(_MOST_EVA_PASSES * batches))

    def forward(model: Any, inputs: Mapping[str, Any]) -> Any:
        if next(left, None) is None:
            raise AttachError(
                f"EVA's components did not converge in {_MOST_EVA_PASSES} passes over the batches",
                why="their directions still turn more from batch to batch than eva_config.tau allows",
                help="pass more or larger batches, a lower rank, or a lower tau",
                code="initialize-unsettled",
            )
        return model(**inputs)

    return forward


def _token_mask(inputs: Mapping[str, Any], config: Any) -> Tensor | None:
    """Return (B, T) bool, the tokens that count, or None for inputs that are not tokens."""
    tokens = inputs.get("input_ids")
    if tokens is None:
        return None
    mask = inputs.get("attention_mask")
    counted = tokens.new_ones(tokens.shape).bool() if mask is None or mask.shape != tokens.shape else mask.bool()
    labels = inputs.get("labels")
    if config.eva_config.use_label_mask and labels is not None and labels.shape == counted.shape:
        counted = counted & (labels != config.eva_config.label_mask_value)
    return counted  # type: ignore[no-any-return]


def _layer_rows(layer_input: Any, mask: Tensor | None, _layer_name: str) -> Tensor:
    """Return (examples, features): the tokens that count, or every row of a layer that does not run on tokens."""
    rows = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    if mask is not None and rows.dim() == 3 and rows.shape[:2] == mask.shape:
        return rows[mask.to(rows.device)]  # type: ignore[no-any-return]
    return rows.reshape(-1, rows.shape[-1])  # type: ignore[no-any-return]


def _examples(model: nn.Module, plan: Plan, data: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Count the examples of each site in the batch that gives it most; the first must reach them all."""
    most = dict.fromkeys(_linear_paths(plan), 0)
    for number, batch in enumerate(data):
        mask = _token_mask(on_device_of(model, batch), plan.peft_config)
        for path, inputs in _inputs_of(model, most, batch).items():
            most[path] = max(most[path], len(_layer_rows(inputs, mask, path)))
        if number == 0:
            _check_reached(most)
    return most


def _check_examples(plan: Plan, examples: Mapping[str, int]) -> None:
    config: Any = plan.peft_config
    for slot in slots_of(plan.model, (a.site for a in plan.attached if a.path in examples)):
        rank = value_at(config.rank_pattern, slot.path, config.r)
        needed, found = round(rank * config.eva_config.rho), examples[slot.path]
        if min(found, slot.inputs) < needed:
            raise AttachError(
                f"EVA looks for {needed} components and gets {found} examples of {slot.inputs} features",
                where=slot.path,
                why=f"it looks for rank {rank} times rho {config.eva_config.rho:g} in each batch",
                help="pass larger batches, a lower rank, or eva_config with rho=1.0",
                code="initialize-few",
            )


def _inputs_of(model: nn.Module, paths: Iterable[str], batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of the modules at ``paths`` in one forward pass without gradients."""
    import torch

    seen: dict[str, Any] = {}
    with ExitStack() as hooks, torch.no_grad():
        for path in paths:

            def keep(_module: nn.Module, inputs: Any, _output: Any, path: str = path) -> None:
                seen[path] = inputs

            hooks.callback(model.get_submodule(path).register_forward_hook(keep).remove)
        hooks.enter_context(evaluating(model))
        model(**on_device_of(model, batch))
    return seen


# ---- CorDA: covariance of the inputs, then attach ----


def _corda(model: nn.Module, plan: Plan, data: list[Mapping[str, Any]], adapter_name: str) -> PeftModel:
    preprocess_corda = _corda_preprocessing()
    config = copy.deepcopy(plan.peft_config)
    paths = _linear_paths(plan)

    def run() -> None:
        with _inputs_flat(model, paths) as reached:
            for batch in data:
                model(**on_device_of(model, batch))
        _check_reached(reached)

    with _without_leftovers(model, paths, ("sample_count", "covariance_matrix", "corda_method", "rank", "eigens")):
        preprocess_corda(model, config, run_model=run)
        return attach(model, dataclasses.replace(plan, peft_config=config), adapter_name=adapter_name)


def _corda_preprocessing() -> Any:
    try:
        from peft.tuners.lora.corda import preprocess_corda
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"CorDA needs the module {error.name}",
            why="PEFT's CorDA imports it, and PEFT does not require it",
            help="pip install attrs" if error.name == "attr" else f"install {error.name}",
        ) from error
    return preprocess_corda


@contextmanager
def _inputs_flat(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, int]]:
    """Give the modules their inputs as (examples, features), which is all that PEFT's hook can square.

    Yields how many examples each has seen. Outputs keep the shape the model expects.
    """
    seen = dict.fromkeys(paths, 0)
    with ExitStack() as hooks:
        for path in seen:
            module, shapes = model.get_submodule(path), list[Any]()

            def flatten(_module: nn.Module, inputs: Any, path: str = path, shapes: list[Any] = shapes) -> Any:
                shapes.append(inputs[0].shape[:-1])
                rows = inputs[0].reshape(-1, inputs[0].shape[-1])
                seen[path] += len(rows)
                return (rows, *inputs[1:])

            def restore(_module: nn.Module, _inputs: Any, output: Any, shapes: list[Any] = shapes) -> Any:
                return output.reshape(*shapes.pop(), output.shape[-1])

            hooks.callback(module.register_forward_pre_hook(flatten).remove)
            hooks.callback(module.register_forward_hook(restore).remove)
        yield seen


# ---- LoRA-GA: gradients of the weights, then attach ----


def _lora_ga(model: nn.Module, plan: Plan, data: list[Mapping[str, Any]], adapter_name: str) -> PeftModel:
    from peft.tuners.lora.loraga import preprocess_loraga

    config = copy.deepcopy(plan.peft_config)
    paths = _linear_paths(plan)

    def step() -> None:
        with warnings.catch_warnings():
            # The first layer of a tower has inputs without a gradient; the hook only counts, and counts it too.
            warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
            for batch in data:
                _loss(model, batch).backward()  # type: ignore[no-untyped-call]

    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        with _without_leftovers(model, paths, ("_peft_loraga_grad", "_peft_loraga_grad_count")):
            preprocess_loraga(model, config, step)
            # PEFT falls back to plain LoRA, with B = 0, on a layer that has no gradient.
            _check_reached({path: hasattr(model.get_submodule(path), "_peft_loraga_grad") for path in paths})
            return attach(model, dataclasses.replace(plan, peft_config=config), adapter_name=adapter_name)
    except Exception:
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad = trained.get(name, parameter.requires_grad)
        raise


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    loss = getattr(model(**on_device_of(model, batch)), "loss", None)
    if loss is None:
        raise AttachError(
            "LoRA-GA follows the gradient of the loss, and the model computes none",
            where=type(model).__name__,
            why="the batch has no labels, or the class computes no loss",
            help="add labels to the batches",
            code="initialize-loss",
        )
    return loss  # type: ignore[no-any-return]


_BY_INITIALIZER: Mapping[str, Callable[[nn.Module, Plan, list[Mapping[str, Any]], str], PeftModel]] = {
    "eva": _eva,
    "corda": _corda,
    "lora_ga": _lora_ga,
}


# ---- shared ----


def _linear_paths(plan: Plan) -> list[str]:
    return [a.path for a in plan.attached if a.via == "target_modules"]


def _check_reached(reached: Mapping[str, int | bool]) -> None:
    missed = [path for path, count in reached.items() if not count]
    if missed:
        raise AttachError(
            f"the batches do not run {len(missed)} of {len(reached)} planned sites",
            where=some(missed, 1),
            why="an adapter there would have nothing to start from",
            help="feed every tower in the scope in every batch, or leave the tower out of the scope",
            code="initialize-unreached",
        )


@contextmanager
def _removing_new_hooks(model: nn.Module) -> Iterator[None]:
    """Remove the hooks that an interrupted preprocessing leaves on the model's modules."""
    tables = [t for m in model.modules() for t in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
    before = [set(table) for table in tables]
    try:
        yield
    finally:
        for table, known in zip(tables, before, strict=True):
            for handle in [handle for handle in table if handle not in known]:
                del table[handle]


@contextmanager
def _without_leftovers(model: nn.Module, paths: Iterable[str], names: Sequence[str]) -> Iterator[None]:
    """Remove what the preprocessing stores on the layers, also where it is interrupted."""
    modules = [model.get_submodule(path) for path in paths]
    try:
        yield
    finally:
        for module in modules:
            for name in names:
                if name in vars(module):
                    delattr(module, name)
