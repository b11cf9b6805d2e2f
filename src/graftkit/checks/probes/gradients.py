"""The adapter's gradients on one batch, under each mode of activation checkpointing, and how they compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from graftkit.checks.probes.checkpointing import Mode, checkpointing
from graftkit.checks.probes.live_adapter import (
    adapted_layers,
    adapter_parameters,
    perturbing,
    restoring_gradients,
)
from graftkit.modeling.module_mode import evaluating, in_training_mode
from graftkit.modeling.outputs import loss_of
from graftkit.modeling.random_state import seeding
from graftkit.text import first_line

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn


@dataclass(frozen=True)
class Backward:
    """The result of one backward pass.

    Attributes:
        loss: NaN where the forward pass failed.
        gradients: by name of each trainable adapter tensor; None where no gradient reached it.
        reached: paths of the adapted layers that the forward pass called.
        inputs_require_grad: whether the embedded inputs are in the graph; None where no embedding was called.
        refusal: torch's error, where there was no backward pass.
    """

    loss: float
    gradients: Mapping[str, Tensor | None]
    reached: frozenset[str] = frozenset()
    inputs_require_grad: bool | None = None
    refusal: str | None = None

    @property
    def zero_gradient(self) -> tuple[str, ...]:
        """The tensors whose gradient is missing or all zeros."""
        return tuple(name for name, grad in self.gradients.items() if grad is None or not grad.any())

    def completed_by(self, other: Backward) -> Backward:
        """Return this pass with the gradients of another for the tensors that get none here, where it has some."""
        gained = set(self.zero_gradient).difference(other.zero_gradient, other.nonfinite)
        gradients = {name: (other if name in gained else self).gradients[name] for name in self.gradients}
        return replace(self, gradients=gradients, reached=self.reached | other.reached)

    @property
    def usable(self) -> bool:
        """Whether other passes can be compared with it: all gradients finite, and at least one not zero."""
        return self.refusal is None and not self.nonfinite and len(self.zero_gradient) < len(self.gradients)

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """The tensors whose gradient is not finite."""
        return tuple(n for n, grad in self.gradients.items() if grad is not None and not grad.isfinite().all())


# How often a backward pass may recompute a layer: once is usual, more where checkpointed blocks contain others.
_RECOMPUTED = 8


@dataclass(frozen=True)
class Gradients:
    """The adapter's gradients on one batch. Each mode's backward pass is run once, when first asked for.

    All passes but ``in_training`` run in evaluation mode, from the same random state and with the same perturbed
    adapter, so that only the checkpointing mode differs.
    """

    model: PeftModel
    batch: Mapping[str, Any]
    _known: dict[Mode | None, Backward] = field(default_factory=dict, repr=False)

    def under(self, mode: Mode | None) -> Backward:
        """Return the backward pass in this mode; None for the one that the model is in."""
        if mode not in self._known:
            try:
                self._known[mode] = self._pass(mode)
            except (AttributeError, TypeError, ValueError) as error:
                if mode in {None, Mode.OFF}:
                    raise
                # A mode that is not in use may be one that the model's code does not support.
                self._known[mode] = Backward(float("nan"), {}, refusal=first_line(error))
        return self._known[mode]

    def in_training(self, mode: Mode | None) -> Backward | None:
        """Return the pass in training mode, in which some classes run more layers; None where it fails."""
        with (
            seeding(self.model, 0),
            in_training_mode(self.model),
            checkpointing(self.model, mode),
            perturbing(self.model),
        ):
            try:
                found = backward(self.model, lambda: loss_of(self.model, self.batch))
            except Exception:  # of the model's own code, which may want other inputs then
                return None
        return found if found.refusal is None else None

    def _pass(self, mode: Mode | None) -> Backward:
        with checkpointing_in_eval(self.model, mode), perturbing(self.model):
            return backward(self.model, lambda: loss_of(self.model, self.batch))


@contextmanager
def checkpointing_in_eval(model: nn.Module, mode: Mode | None) -> Iterator[None]:
    """Run the block in evaluation mode, with layers recomputed in ``mode`` and from a fixed random state."""
    with seeding(model, 0), evaluating(model), checkpointing(model, mode):
        yield


def backward(model: PeftModel, compute_loss: Callable[[], Tensor]) -> Backward:
    """Run one backward pass of ``compute_loss()``, and restore the gradients that the model had."""
    import torch

    watched = adapter_parameters(model)
    with ExitStack() as stack:
        reached, embedded = _watch(stack, model)
        calls = _Calls.of(stack, model)
        stack.enter_context(restoring_gradients(model))
        stack.enter_context(torch.enable_grad())
        loss = float("nan")
        try:
            value = compute_loss()
            loss = value.item()
            calls.bound()
            value.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise
            refusal: str | None = first_line(error)
        else:
            refusal = None
        gradients = {n: p.grad for n, p in watched.items() if p.requires_grad}
    inputs = embedded[0] if embedded else None
    return Backward(loss, gradients, frozenset(reached), inputs, refusal)


class _Calls:
    """How often adapted layers are called: in a backward pass, as often as they are recomputed.

    Re-entrant checkpointing starts a backward pass inside of another. Where a layer hands a tensor to the next one
    by name (WavLM's position bias), the inner pass reaches the layers before it, whose own inner passes reach them
    again: it has no end.
    """

    def __init__(self) -> None:
        self.number = 0
        self.most: int | None = None

    @classmethod
    def of(cls, stack: ExitStack, model: PeftModel) -> _Calls:
        """Count the calls as long as the stack is open."""
        calls = cls()
        for layer in adapted_layers(model).values():
            stack.callback(layer.register_forward_pre_hook(calls.count).remove)
        return calls

    def bound(self) -> None:
        """Stop from now on after several times as many calls as there were."""
        self.most = self.number * (1 + _RECOMPUTED)

    def count(self, *_: object) -> None:
        """Count one call.

        Raises:
            RuntimeError: there were too many.
        """
        self.number += 1
        if self.most is not None and self.number > self.most:
            raise RuntimeError("its layers are recomputed again and again, without end")


def _watch(stack: ExitStack, model: PeftModel) -> tuple[set[str], list[bool]]:
    """Record the adapted layers that are called, and whether the embedded text requires gradients."""
    reached: set[str] = set()
    embedded: list[bool] = []

    def after_embedding(_module: nn.Module, _args: Any, output: Any) -> None:
        embedded.append(bool(getattr(output, "requires_grad", False)))

    for path, layer in adapted_layers(model).items():
        stack.callback(layer.register_forward_hook(lambda *_, path=path: reached.add(path)).remove)
    embedding = _input_embedding(model)
    if embedding is not None:
        stack.callback(embedding.register_forward_hook(after_embedding).remove)
    return reached, embedded


def _input_embedding(model: PeftModel) -> nn.Module | None:
    base: Any = model.get_base_model()
    try:
        embedding: nn.Module | None = base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return embedding if hasattr(embedding, "register_forward_hook") else None


@dataclass(frozen=True)
class Comparison:
    """How the gradients of one pass differ from those of another, tensor by tensor.

    Attributes:
        differences: by tensor, the norm of the difference relative to the norm of the first gradient.
        cosines: by tensor, the cosine of the two gradients.
    """

    differences: Mapping[str, float]
    cosines: Mapping[str, float]

    def wrong(self, allowed: float) -> tuple[str, ...]:
        """Return the tensors that differ by more than ``allowed``, the worst first."""
        over = [name for name, value in self.differences.items() if not value <= allowed]
        return tuple(sorted(over, key=lambda name: self.cosines[name]))


# A gradient this much smaller than the largest is rounding: its direction means nothing.
_NOISE = 1e-6


def compare(first: Backward, second: Backward) -> Comparison:
    """Compare the second pass with the first, over the tensors that get a gradient in the first."""
    given = {name: grad for name, grad in first.gradients.items() if grad is not None}
    norms = {name: float(grad.float().norm()) for name, grad in given.items()}
    floor = _NOISE * max(norms.values(), default=0.0)
    pairs = {n: _compare_pair(grad, second.gradients[n]) for n, grad in given.items() if norms[n] > floor}
    return Comparison({n: pair[0] for n, pair in pairs.items()}, {n: pair[1] for n, pair in pairs.items()})


def _compare_pair(a: Tensor, b: Tensor | None) -> tuple[float, float]:
    """Return the relative difference and the cosine; a missing gradient counts as zeros."""
    if b is None or not b.any():
        return 1.0, 0.0
    x, y = a.float().flatten(), b.float().flatten()
    cosine = x.dot(y) / (x.norm() * y.norm())
    return float((x - y).norm() / x.norm()), float(cosine)
