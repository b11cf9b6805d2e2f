"""Run a model on a batch, and report how far it came: which weights it reached, or where and why it failed."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftkit.modeling.device import cast_inputs
from graftkit.modeling.module_mode import evaluating
from graftkit.twins.batches.guards import guards_of
from graftkit.twins.budget import let_go, unmetered, within

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


_FRAMES = 12


@dataclass(frozen=True)
class Failure:
    """Why a forward did not run.

    Attributes:
        error: what it raised.
        message: its type and text.
        frames: file and source line of its last calls, the innermost last.
        module: path of the last module that was entered; "" before any.
        given: shape of that module's first input.
        guards: names in the conditions under which the error was raised, the innermost condition first.
    """

    error: Exception
    message: str
    frames: tuple[tuple[str, str], ...] = ()
    module: str = ""
    given: tuple[int, ...] = ()
    guards: tuple[str, ...] = ()

    @property
    def place(self) -> tuple[object, ...]:
        """Return what failures that do not depend on the candidate have in common."""
        return self.module, self.given, self.message


@dataclass(frozen=True)
class Trial:
    """One forward pass.

    Attributes:
        linears: paths of the linears that it called.
        weights: paths of all modules with matrices of their own that it called, linears included.
        unrouted: paths of modules with stacked experts -> the experts that no token was routed to.
        has_loss: the output has a finite loss.
        failure: None where it ran.
    """

    linears: frozenset[str]
    weights: frozenset[str]
    unrouted: Mapping[str, frozenset[int]] = field(default_factory=dict)
    has_loss: bool = False
    failure: Failure | None = None

    @property
    def reach(self) -> tuple[int, int]:
        """Return what to compare trials by: linears first."""
        return len(self.linears), len(self.weights)


@contextmanager
def trials(model: PreTrainedModel) -> Iterator[Trials]:
    """Watch a model's modules for the time of the block."""
    with ExitStack() as hooks:
        watched = Trials(model)
        for path, module in model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                hooks.callback(module.register_forward_pre_hook(watched.entered(path), with_kwargs=True).remove)
        yield watched


class Trials:
    """Forward passes of one model whose modules are watched."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.called: dict[str, nn.Module] = {}
        self.last: tuple[str, tuple[int, ...]] = ("", ())
        self.routed: dict[str, set[int]] = {}

    def entered(self, path: str) -> Any:
        """Return the hook of the module at a path."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self.called[path] = module
            given = [*args, *kwargs.values()]
            self.last = (path, next((tuple(v.shape) for v in given if hasattr(v, "shape")), ()))
            experts = _stacked_experts(module)
            if experts:
                self.routed.setdefault(path, set()).update(_choices(given, experts))

        return hook

    def run(self, make: Callable[[], Mapping[str, Any]], seconds: float) -> Trial:
        """Run the model on the batch that ``make`` returns, in evaluation mode and without gradients.

        Making the batch may run parts of the model too. Torch's random state is kept.

        Args:
            make: returns the model's inputs.
            seconds: of computing that all of it may take; more is a failure, as is too much memory.
        """
        import torch

        self.called.clear()
        self.routed.clear()
        self.last = ("", ())
        try:
            with within(seconds), torch.no_grad(), evaluating(self.model), torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                output = self.model(**cast_inputs(self.model, self._made(make)))
            problem = _unusable(output)
        except Exception as error:
            return Trial(*self._reached(), failure=_failure(error, *self.last))
        failure = Failure(problem, str(problem)) if problem else None
        return Trial(*self._reached(), self._unrouted(), _has_loss(output), failure)

    def _made(self, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        batch = make()
        self.called.clear()
        self.routed.clear()
        return batch

    def _reached(self) -> tuple[frozenset[str], frozenset[str]]:
        linears = frozenset(path for path, module in self.called.items() if is_linear(module))
        weights = (p for p, m in self.called.items() if any(w.ndim > 1 for w in m.parameters(recurse=False)))
        return linears, frozenset(weights)

    def _unrouted(self) -> dict[str, frozenset[int]]:
        every = {path: range(_stacked_experts(self.called[path])) for path in self.routed}
        missing = {path: frozenset(every[path]) - chosen for path, chosen in self.routed.items() if chosen}
        return {path: experts for path, experts in missing.items() if experts}


def is_linear(module: nn.Module) -> bool:
    """Check whether a module is a linear layer, also in GPT-2's transposed form."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _failure(error: Exception, module: str, given: tuple[int, ...]) -> Failure:
    calls = unmetered((f.filename, f.line or "") for f in traceback.extract_tb(error.__traceback__))
    guards = guards_of(error)
    let_go(error)  # many failures are kept
    return Failure(error, f"{type(error).__name__}: {error}", tuple(calls[-_FRAMES:]), module, given, guards)


def _stacked_experts(module: nn.Module) -> int:
    """Return the length of the first axis that a module's own three-dimensional weights share; 0 without any."""
    lengths = {weight.shape[0] for weight in module.parameters(recurse=False) if weight.ndim == 3}
    return lengths.pop() if len(lengths) == 1 else 0


def _choices(given: list[Any], experts: int) -> set[int]:
    """Return the experts that a module's inputs name: whole numbers, all of them below the number of experts."""
    import torch

    for value in given:
        whole = isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.dtype == torch.bool)
        if whole and value.numel() and int(value.min()) >= 0 and int(value.max()) < experts:
            return set(value.unique().tolist())
    return set()


def _unusable(output: Any) -> ValueError | None:
    tensors = list(floating_outputs(output))
    if not tensors:
        return ValueError("the forward returns no floating-point output")
    return None if any(t.isfinite().any() for t in tensors) else ValueError("the outputs are not finite")


def floating_outputs(output: Any) -> Iterator[Any]:
    """Yield the non-empty floating-point tensors of an output, also inside sequences and mappings."""
    import torch

    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from floating_outputs(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from floating_outputs(value)


def _has_loss(output: Any) -> bool:
    import torch

    loss = getattr(output, "loss", None)
    return isinstance(loss, torch.Tensor) and bool(loss.isfinite().all())
