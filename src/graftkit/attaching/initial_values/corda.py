"""CorDA: a decomposition of each weight, oriented by the covariance of its inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from graftkit.attaching.initial_values.layers import (
    PlainLora,
    check_ranks,
    check_reached,
    check_unquantized,
    without_leftovers,
)
from graftkit.errors import MissingDependencyError
from graftkit.modeling.entry import run as run_model
from graftkit.modeling.module_mode import evaluating

if TYPE_CHECKING:
    from torch import nn

# What peft.tuners.lora.corda stores on the layers.
_STORED = ("sample_count", "covariance_matrix", "corda_method", "rank", "eigens")


def corda(lora: PlainLora, batches: Sequence[Mapping[str, Any]]) -> None:
    """Fill both factors, and take their product out of the base weights."""
    preprocess = corda_preprocessing()
    check_unquantized(lora)
    check_ranks(lora)
    linears = lora.linears
    config = copy.deepcopy(lora.config)
    config.target_modules = set(linears)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None

    def run() -> None:
        with evaluating(lora.base), _inputs_flat(linears) as seen:
            for batch in batches:
                run_model(lora.base, batch)
        check_reached(seen)

    with without_leftovers(linears.values(), _STORED):
        preprocess(_tree(linears), config, run_model=run)
        lora.redraw()


def corda_preprocessing() -> Any:
    """Return PEFT's function.

    Raises:
        MissingDependencyError: PEFT's CorDA imports ``attr``, which PEFT does not require.
    """
    try:
        from peft.tuners.lora.corda import preprocess_corda
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"CorDA needs the module {error.name}",
            why="PEFT's CorDA imports it, and PEFT does not require it",
            help="pip install attrs" if error.name == "attr" else f"install {error.name}",
        ) from error
    return preprocess_corda


def _tree(modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a module that has these at their paths: PEFT reads and writes files of covariances by those names."""
    from torch import nn

    root = nn.Module()
    for path, module in modules.items():
        at = root
        *parents, name = path.split(".")
        for parent in parents:
            if parent not in at._modules:
                at.add_module(parent, nn.Module())
            at = at.get_submodule(parent)
        at.add_module(name, module)
    return root


@contextmanager
def _inputs_flat(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Give the modules their inputs as (examples, features), which is all that PEFT's hook can square.

    Yields how many examples each has seen. Outputs keep the shape the model expects.
    """
    seen = dict.fromkeys(modules, 0)
    with ExitStack() as hooks:
        for path, module in modules.items():
            shapes = list[Any]()

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
