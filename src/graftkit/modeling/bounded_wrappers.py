"""Wrappers that clamp what goes into a linear and what comes out of it: where they are, and what they clamp."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.surveying.wrappers import bounds_of

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class BoundedWrapper:
    """A module around one linear, with bounds on the linear's input or output.

    Attributes:
        path: the module's path in the model.
        module: the wrapper. It has buffers that are single numbers, and no parameter but the linear's.
        layer: the linear, or PEFT's layer in its place.
    """

    path: str
    module: nn.Module
    layer: nn.Module

    @property
    def bounds(self) -> dict[str, Tensor]:
        """The bounds that a checkpoint stores, by name: 0-dim floating-point buffers."""
        transient = self.module._non_persistent_buffers_set
        return {name: bound for name, bound in bounds_of(self.module).items() if name not in transient}


def bounded_wrappers(model: nn.Module) -> list[BoundedWrapper]:
    """Return every bounded wrapper of the model, in definition order."""
    found = ((path, module, _only_linear(module)) for path, module in model.named_modules())
    return [BoundedWrapper(path, module, layer) for path, module, layer in found if layer is not None]


def _only_linear(module: nn.Module) -> nn.Module | None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    children = list(module.children())
    if len(children) != 1 or not isinstance(children[0], nn.Linear | BaseTunerLayer):
        return None
    if isinstance(module, BaseTunerLayer) or not bounds_of(module):
        return None
    return children[0] if not any(True for _ in module.parameters(recurse=False)) else None


@contextmanager
def watch_bounds(
    wrappers: Iterable[BoundedWrapper],
    on_values: Callable[[BoundedWrapper, Tensor, Tensor], None],
    sample: Callable[[Tensor], Tensor] = lambda tensor: tensor.detach(),
) -> Iterator[None]:
    """Report what every wrapper does to its linear's input and output, for each forward pass of the block.

    Args:
        wrappers: those to watch.
        on_values: called with the wrapper and with the values before and after its bounds, once for the input
            and once for the output.
        sample: applied to each tensor before it is kept.
    """
    with ExitStack() as hooks:
        for wrapper in wrappers:
            _hook(hooks, wrapper, on_values, sample)
        yield


def _hook(hooks: ExitStack, wrapper: BoundedWrapper, on_values: Callable[..., None], sample: Any) -> None:
    inner: list[tuple[Tensor, Tensor]] = []  # the linear's input and output, until its wrapper returns

    def after_layer(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        inner[:] = [(sample(args[0]), sample(output))]

    def after_wrapper(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        while inner:
            taken, made = inner.pop()
            for before, after in ((sample(args[0]), taken), (made, sample(output))):
                if before.shape == after.shape and after.numel():
                    on_values(wrapper, before, after)

    for module, hook in ((wrapper.layer, after_layer), (wrapper.module, after_wrapper)):
        hooks.callback(module.register_forward_hook(hook).remove)


def count_clamped(before: Tensor, after: Tensor) -> Tensor:
    """Return how many elements became the smallest or the largest value, as a 0-dim tensor on their device."""
    low, high = after.aminmax()
    return ((after != before) & ((after == low) | (after == high))).sum()
