"""``as_linear()``: the plain linear where a wrapper was, and the wrapper's forward around whatever stands there.

transformers once proposed to make Gemma 4's wrapper a subclass of ``nn.Linear`` (pull request 45388), so that
tools which look for linears find one. It was closed because a quantizer replaces such a module, and the clamp with
it; and an adapter on it would escape the clamp too: PEFT adds its update to the module's output.

Here the forward belongs to the place, not to the module in it. The module is an ordinary linear (``nn.Linear``, or
a quantized one), and the wrapper's forward runs around what stands in its place at the time: the linear, the one
that a quantizer put there, or PEFT's adapter layer. So the bounds hold for the sum of linear and adapter, and
merging changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from graftkit.attaching.unwrap import name_inner_linears, wrapped_places
from graftkit.errors import AttachError
from graftkit.modeling.unwrapping import base_model_of

if TYPE_CHECKING:
    from torch import nn

# The wrapper lives on below its linear under this name, so that its buffers move, and are cast, with the model.
_SHELL = "graft_wrapper"


def as_linear(model: nn.Module) -> AsLinear:
    """Put each wrapper's inner linear in the wrapper's place, and run the wrapper's forward around that place.

    Afterwards each place holds a real ``nn.Linear`` under the wrapper's name, outputs are bit for bit the same,
    and stock PEFT takes the plain names. Without an adapter, state dicts keep the wrappers' names
    ("q_proj.linear.weight", "q_proj.input_min") and load with ``strict=True``.

    **An adapter on such a linear sits inside the bounds**, as one on the inner linear of the original model does.
    For that, the forward moves out to the adapter layer on the next call of the module that holds it. Called past
    that module before then, the linear raises instead of computing without its bounds. Saved now, such an adapter
    names the wrapper's place; ``restore()`` before saving, or ``gk.migrate`` after, gives it the names that load
    on the original model.

    Use it for tools that insist on linears. To train with PEFT, ``gk.plan`` and ``gk.enable`` need no surgery.

    Args:
        model: changed in place. Adapters it already carries stay where they are.

    Returns:
        A handle; ``restore()``, or the end of a ``with`` block, puts the wrappers back.
    """
    base = base_model_of(model)
    spots = []
    for place in wrapped_places(base):
        for holder, name in place.holders[:1]:
            spots.append(_Spot(place.path, holder, name, place.wrapper, place.inside))
    handle = AsLinear(base, tuple(spots))
    handle._open()
    return handle


@dataclass(eq=False)
class AsLinear:
    """A model whose wrappers have become linears.

    Attributes:
        model: the base model.
    """

    model: nn.Module
    _spots: tuple[_Spot, ...] = field(repr=False)
    _hooks: list[Any] = field(default_factory=list, init=False, repr=False)

    @property
    def paths(self) -> tuple[str, ...]:
        """Where the linears stand: the wrappers' paths."""
        return tuple(spot.path for spot in self._spots)

    def settle(self) -> None:
        """Move each forward to what stands in its place now. Calls of the model do this by themselves."""
        _settle(self._spots)

    def restore(self) -> None:
        """Put the same wrappers back, with the modules now in their places inside. Again: no effect.

        Configurations of adapters name the inner linears afterwards.
        """
        if not self._hooks:
            return
        for spot in self._spots:
            spot.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        name_inner_linears(self.model, {f"{spot.path}.{spot.inside}": spot.path for spot in self._spots})

    def __enter__(self) -> AsLinear:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _open(self) -> None:
        for spot in self._spots:
            spot.open()
        by_holder: dict[int, list[_Spot]] = {}
        for spot in self._spots:
            by_holder.setdefault(id(spot.holder), []).append(spot)
        for spots in by_holder.values():
            self._hooks.append(spots[0].holder.register_forward_pre_hook(functools.partial(_settle, tuple(spots))))


def _settle(spots: tuple[_Spot, ...], *_: Any) -> None:
    for spot in spots:
        spot.settle()


@dataclass(eq=False)
class _Spot:
    """One place, and the wrapper's forward that belongs to it.

    Attributes:
        path: of the wrapper.
        holder: the module that held the wrapper.
        name: under this name.
        wrapper: the module itself.
        inside: where its linear stood within it, e.g. "linear".
        base: the linear, under any adapter layers.
        outer: what stands in the place: the linear, or an adapter layer around it.
    """

    path: str
    holder: nn.Module
    name: str
    wrapper: nn.Module
    inside: str
    base: Any = None
    outer: Any = None
    hooks: list[Any] = field(default_factory=list)

    def open(self) -> None:
        parent, leaf = self._socket()
        inner = parent._modules.pop(leaf)
        # No module: it has no parameters of its own, and nothing to be found by.
        parent.__dict__[leaf] = _StandIn(self)
        setattr(self.holder, self.name, inner)
        self.settle()

    def close(self) -> None:
        self.settle()
        current = self.outer
        self._undress(current)
        self._leave_base()
        parent, leaf = self._socket()
        del parent.__dict__[leaf]
        setattr(parent, leaf, current)
        setattr(self.holder, self.name, self.wrapper)

    def settle(self) -> None:
        """Follow what has been put in the place since: an adapter layer, another linear, or the linear again."""
        current = self.holder._modules[self.name]
        if current is self.outer:
            return
        base = _base_layer(current)
        if self.outer is not self.base:
            self._undress(self.outer)
        if base is not self.base:
            self._leave_base()
            self._enter_base(base)
        if current is not base:
            self._dress(current)
        self.outer = current

    def _socket(self) -> tuple[nn.Module, str]:
        """The wrapper's own place for its linear."""
        parent, _, leaf = self.inside.rpartition(".")
        return self.wrapper.get_submodule(parent), leaf

    # ---- the forward ----

    def _dress(self, module: Any) -> None:
        module.forward = functools.partial(self._around, module)

    def _undress(self, module: Any) -> None:
        if module is not None:
            module.__dict__.pop("forward", None)

    def _around(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The wrapper's forward where ``module`` is what stands in the place; within an adapter layer, its own."""
        current = self.holder._modules[self.name]
        if module is current:
            return self.wrapper(*args, **kwargs)
        if current is not self.outer:
            raise _unsettled(self.path)
        return type(module).forward(module, *args, **kwargs)

    def inner_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapper's forward calls for its linear."""
        return type(self.outer).forward(self.outer, *args, **kwargs)

    # ---- the linear that carries the wrapper's buffers and speaks its names ----

    def _enter_base(self, base: Any) -> None:
        self.base = base
        base._modules[_SHELL] = self.wrapper
        self._dress(base)
        # A partial, because torch marks the hook with an attribute, which a method cannot have.
        self.hooks.append(base.register_state_dict_post_hook(functools.partial(self._say_wrapper_names)))
        self.hooks.append(base.register_load_state_dict_pre_hook(self._hear_wrapper_names))

    def _leave_base(self) -> None:
        if self.base is not None:
            self._undress(self.base)
            self.base._modules.pop(_SHELL, None)
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def _say_wrapper_names(self, module: Any, state: Any, prefix: str, *_: Any) -> None:
        # Under an adapter layer PEFT picks its tensors by the modules' names, which must stay as they are.
        if self.holder._modules[self.name] is module:
            _rename_keys(state, prefix, self._wrapper_name)

    def _hear_wrapper_names(self, module: Any, state: Any, prefix: str, *_: Any) -> None:
        if self.holder._modules[self.name] is module:
            _rename_keys(state, prefix, self._own_name)

    def _wrapper_name(self, key: str) -> str:
        shell = f"{_SHELL}."
        return key.removeprefix(shell) if key.startswith(shell) else f"{self.inside}.{key}"

    def _own_name(self, key: str) -> str:
        inside = f"{self.inside}."
        return key.removeprefix(inside) if key.startswith(inside) else f"{_SHELL}.{key}"


class _StandIn:
    """Where the wrapper expects its linear: computes what stands in the place, with the linear's attributes."""

    def __init__(self, spot: _Spot) -> None:
        self._spot = spot

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._spot.inner_forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Not while it is being copied, when it has nothing yet.
        if name.startswith("__") or "_spot" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._spot.base, name)


def _base_layer(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _rename_keys(state: Any, prefix: str, rename: Callable[[str], str]) -> None:
    """Rename the keys under ``prefix`` in place, in their order."""
    for key in [key for key in state if key.startswith(prefix)]:
        value = state.pop(key)
        state[prefix + rename(key.removeprefix(prefix))] = value


def _unsettled(path: str) -> AttachError:
    return AttachError(
        "a linear was about to compute without its bounds",
        where=path,
        why="what stands in its place was exchanged, and it was called past the module that holds it",
        help="call settle() on what as_linear() returned",
        code="as-linear-unsettled",
    )
