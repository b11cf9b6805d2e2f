"""``unwrap()``: the inner linears in their wrappers' places while training runs, the wrappers back for every save.

A wrapper that is taken out for good changes the checkpoint's keys and loses its buffers, and an adapter trained
meanwhile names modules that the real model does not have. Here the wrappers come back by themselves whenever
parameters are named: for ``state_dict``, and so for every way to save, and for ``load_state_dict``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftkit.attaching.placed_wrappers import PlacedWrapper, name_inner_linears, placed_wrappers
from graftkit.errors import AttachError
from graftkit.modeling.module_mode import evaluating
from graftkit.modeling.unwrapping import base_layer_of, base_model_of
from graftkit.text import some

if TYPE_CHECKING:
    import torch
    from torch import nn

# Large enough to show a forward that changes large values.
_PROBE_SCALE = 10.0


def unwrap(model: nn.Module, *, paths: Iterable[str] | None = None, allow_change: bool = False) -> Unwrapped:
    """Put each wrapper's inner linear in the wrapper's place while training runs.

    The result is a handle, and a context manager that puts the wrappers back at the end::

        with gk.unwrap(model):
            peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
            trainer.train()
        peft_model.save_pretrained("out/adapter")

    The wrappers, the very same modules with whatever is then inside, also come back whenever a state dict is taken
    or loaded; the next forward pass of the model takes them out again. So a checkpoint that a trainer saves
    meanwhile has the base model's keys and the wrappers' buffers, and an adapter's tensors and configuration name
    inner linears, as stock PEFT wants them.

    A model without wrappers is left as it is, and so is a block that holds a norm or an activation beside its one
    linear: PEFT reaches that linear by its own name. Parameters sharded by FSDP are not supported: it keeps other
    names.

    Args:
        model: changed in place. Adapters it already carries stay where they are.
        paths: of the wrappers to take out; None takes out all.
        allow_change: unwrap although outputs change. That is how to use an adapter that was trained without the
            clamps. One that is trained so computes something else once the wrappers are back:
            ``gk.migrate(…, trained_without_clamp=True)`` notes that in its file.

    Raises:
        AttachError: ``unwrap-no-wrapper`` when there is none at one of the paths; ``unwrap-changes-outputs`` when
            a wrapper has finite bounds (or any other finite buffer), or its output on random input differs from
            its linear's; ``unwrap-other-arguments`` when its callers may pass it more than a linear takes. Nothing
            has been changed then.
    """
    base = base_model_of(model)
    wrappers = tuple(placed_wrappers(base) if paths is None else _at(placed_wrappers(base), paths))
    for placed in wrappers:
        _refuse_other_arguments(placed)
        if not allow_change:
            _refuse_if_outputs_change(placed)
    handle = Unwrapped(base, wrappers)
    handle._open()
    return handle


@dataclass(eq=False)
class Unwrapped:
    """A base model with its wrappers taken out."""

    model: nn.Module
    _placed: tuple[PlacedWrapper, ...] = field(repr=False)
    _out: bool = field(default=False, init=False)
    _hooks: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list, init=False, repr=False)

    @property
    def wrappers(self) -> tuple[str, ...]:
        """The paths of the wrappers that are swapped."""
        return tuple(placed.path for placed in self._placed)

    def rewrap(self) -> None:
        """Put the same wrappers back, with the modules now in their places inside. A second call does nothing.

        Raises:
            AttachError: ``unwrap-place-gone`` when a linear's place in the model no longer exists.
        """
        self._swap_in()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> Unwrapped:
        return self

    def __exit__(self, *_: object) -> None:
        self.rewrap()

    def _open(self) -> None:
        # On the modules that hold the wrappers, so that a part of the model is saved correctly, too.
        holders: set[Any] = {holder for placed in self._placed for holder, _ in placed.holders}
        for holder in holders:
            self._hooks.append(holder.register_state_dict_pre_hook(self._swap_in))
            self._hooks.append(holder.register_load_state_dict_pre_hook(self._swap_in))
        if holders:
            self._hooks.append(self.model.register_forward_pre_hook(self._swap_out))
        self._swap_out()

    def _swap_out(self, *_: Any) -> None:
        if not self._out:
            for placed in self._placed:
                placed.take_out()
            self._out = True

    def _swap_in(self, *_: Any) -> None:
        if self._out:
            for placed in self._placed:
                placed.put_back()
            self._out = False
            name_inner_linears(self.model, self._placed)


def _at(wrappers: Iterable[PlacedWrapper], paths: Iterable[str]) -> list[PlacedWrapper]:
    by_path = {placed.path: placed for placed in wrappers}
    wanted = list(dict.fromkeys(paths))
    absent = [path for path in wanted if path not in by_path]
    if absent:
        raise AttachError(
            f"{len(absent)} of {len(wanted)} paths are not those of wrappers",
            where=some(absent),
            why=f"the model has {len(by_path)} wrappers: {some(by_path)}",
            help="a wrapper's path ends where its linear's name begins; leave paths out for all of them",
            code="unwrap-no-wrapper",
        )
    return [by_path[path] for path in wanted]


def _refuse_other_arguments(placed: PlacedWrapper) -> None:
    """Refuse a wrapper that takes a second argument: it may be called with one, and its linear cannot be."""
    further = list(inspect.signature(placed.wrapper.forward).parameters)[1:]
    if further:
        raise AttachError(
            "a wrapper cannot be left out: its linear cannot be called as it is",
            where=placed.path,
            why=f"{type(placed.wrapper).__name__} takes {', '.join(further)} besides its input",
            help="adapt the linear inside instead (gk.plan, or gk.enable)",
            code="unwrap-other-arguments",
        )


def _refuse_if_outputs_change(placed: PlacedWrapper) -> None:
    reason = _finite_buffer(placed.wrapper, placed.inner) or _differs(placed.wrapper, placed.inner)
    if reason is not None:
        raise AttachError(
            "unwrapping would change the model's outputs",
            where=placed.path,
            why=f"{type(placed.wrapper).__name__} changes what its linear computes: {reason}",
            help="adapt the linear inside instead (gk.plan, or gk.enable), or pass allow_change=True",
            code="unwrap-changes-outputs",
        )


def _finite_buffer(wrapper: nn.Module, inner: nn.Module) -> str | None:
    import torch

    owned = {id(buffer) for buffer in inner.buffers()}
    for name, buffer in wrapper.named_buffers():
        if id(buffer) not in owned and (buffer.is_meta or bool(torch.isfinite(buffer).any())):
            return f"{name} is {'unknown' if buffer.is_meta else 'finite'}"
    return None


def _differs(wrapper: nn.Module, inner: nn.Module) -> str | None:
    """Compare both on random input, in eval mode: the outputs must be equal bit for bit."""
    import torch

    layer = base_layer_of(inner)
    weight = layer.weight
    if weight.is_meta:
        return "its weights are not loaded, so it cannot be tried"
    generator = torch.Generator().manual_seed(0)
    size = layer.in_features if hasattr(layer, "in_features") else layer.weight.shape[0]
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    values = (torch.randn(2, 3, size, generator=generator) * _PROBE_SCALE).to(weight.device, dtype)
    try:
        with evaluating(wrapper), torch.no_grad():
            same = torch.equal(wrapper(values), inner(values))
    except Exception as error:
        return f"it cannot be tried on random input ({type(error).__name__}: {error})"
    return None if same else "on random input its output is not its linear's"
