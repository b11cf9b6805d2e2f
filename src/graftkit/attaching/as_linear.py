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
from typing import TYPE_CHECKING, Any

from graftkit.attaching.placed_wrappers import PlacedWrapper, name_inner_linears, placed_wrappers
from graftkit.errors import AttachError
from graftkit.modeling.unwrapping import base_layer_of, base_model_of

if TYPE_CHECKING:
    from torch import nn

# The wrapper becomes a child of its linear under this name, so that its buffers are moved and cast with the model.
_WRAPPER_CHILD = "graft_wrapper"


def as_linear(model: nn.Module) -> AsLinear:
    """Put each wrapper's inner linear in the wrapper's place, and run the wrapper's forward around that place.

    Afterwards each place holds a real ``nn.Linear`` under the wrapper's name, outputs are bit for bit the same,
    and stock PEFT takes the plain names. Without an adapter, state dicts keep the wrappers' names
    ("q_proj.linear.weight", "q_proj.input_min") and load with ``strict=True``.

    **An adapter on such a linear sits inside the bounds**, as one on the inner linear of the original model does.
    For that, the forward moves out to the adapter layer on the next call of the module that holds it. A
    linear that is called directly before then raises instead of computing without its bounds. Saved now, such an
    adapter names the wrapper's place; ``restore()`` before saving, or ``gk.migrate`` after, gives it the names
    that load on the original model.

    Use it for tools that insist on linears. To train with PEFT, ``gk.plan`` and ``gk.enable`` need no surgery.

    Args:
        model: changed in place. Adapters it already carries stay where they are.

    Returns:
        A handle; ``restore()``, or the end of a ``with`` block, puts the wrappers back.
    """
    base = base_model_of(model)
    handle = AsLinear(base, tuple(_Substitution(placed) for placed in placed_wrappers(base)))
    handle._open()
    return handle


@dataclass(eq=False)
class AsLinear:
    """A base model that has linears in its wrappers' places."""

    model: nn.Module
    _substitutions: tuple[_Substitution, ...] = field(repr=False)
    _hooks: list[Any] = field(default_factory=list, init=False, repr=False)

    @property
    def paths(self) -> tuple[str, ...]:
        """Where the linears stand: the wrappers' paths."""
        return tuple(substitution.placed.path for substitution in self._substitutions)

    def settle(self) -> None:
        """Move each forward to what stands in its place now. Calls of the model do this by themselves."""
        for substitution in self._substitutions:
            substitution.settle()

    def restore(self) -> None:
        """Put the same wrappers back, with the modules now in their places inside. A second call does nothing.

        Configurations of adapters name the inner linears afterwards.
        """
        if not self._hooks:
            return
        for substitution in self._substitutions:
            substitution.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        name_inner_linears(self.model, [substitution.placed for substitution in self._substitutions])

    def __enter__(self) -> AsLinear:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _open(self) -> None:
        for substitution in self._substitutions:
            substitution.open()
            self._hooks.append(substitution.holder.register_forward_pre_hook(substitution.settle))


@dataclass(eq=False)
class _Substitution:
    """A linear in its wrapper's place, and the wrapper's forward around what stands there.

    Attributes:
        placed: the wrapper.
        base: the linear, under any adapter layers.
        outer: what stands in the place: the linear, or an adapter layer around it.
    """

    placed: PlacedWrapper
    base: Any = None
    outer: Any = None
    hooks: list[Any] = field(default_factory=list)

    @property
    def holder(self) -> nn.Module:
        return self.placed.holders[0][0]

    @property
    def name(self) -> str:
        return self.placed.holders[0][1]

    @property
    def current(self) -> Any:
        """What stands in the place now."""
        return self.holder._modules[self.name]

    def open(self) -> None:
        parent, leaf = self.placed.socket
        inner = parent._modules.pop(leaf)
        # Not a module, so that it is not listed among the model's modules and parameters.
        parent.__dict__[leaf] = _StandIn(self)
        setattr(self.holder, self.name, inner)
        self.settle()

    def close(self) -> None:
        self.settle()
        current = self.outer
        self._restore_forward(current)
        self._detach_base()
        parent, leaf = self.placed.socket
        del parent.__dict__[leaf]
        setattr(parent, leaf, current)
        setattr(self.holder, self.name, self.placed.wrapper)

    def settle(self, *_: Any) -> None:
        """Follow what has been put in the place since: an adapter layer, another linear, or the linear again."""
        current = self.current
        if current is self.outer:
            return
        base = base_layer_of(current)
        if self.outer is not self.base:
            self._restore_forward(self.outer)
        if base is not self.base:
            self._detach_base()
            self._attach_base(base)
        if current is not base:
            self._wrap_forward(current)
        self.outer = current

    # ---- the forward ----

    def _wrap_forward(self, module: Any) -> None:
        module.forward = functools.partial(self._around, module)

    def _restore_forward(self, module: Any) -> None:
        if module is not None:
            module.__dict__.pop("forward", None)

    def _around(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapper's forward if ``module`` is what stands in the place, or its own in an adapter layer."""
        current = self.current
        if module is current:
            return self.placed.wrapper(*args, **kwargs)
        if current is not self.outer:
            raise AttachError(
                "a linear would have computed without its bounds",
                where=self.placed.path,
                why="it was replaced, and called directly instead of through the module that holds it",
                help="call settle() on what as_linear() returned",
                code="as-linear-unsettled",
            )
        return type(module).forward(module, *args, **kwargs)

    def inner_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the wrapper's forward expects of its linear."""
        return type(self.outer).forward(self.outer, *args, **kwargs)

    # ---- the linear, with the wrapper's buffers and under the wrapper's names in state dicts ----

    def _attach_base(self, base: Any) -> None:
        self.base = base
        base._modules[_WRAPPER_CHILD] = self.placed.wrapper
        self._wrap_forward(base)
        # A partial, because torch marks the hook with an attribute, which a method cannot have.
        self.hooks.append(base.register_state_dict_post_hook(functools.partial(self._use_wrapper_names)))
        self.hooks.append(base.register_load_state_dict_pre_hook(self._use_linear_names))

    def _detach_base(self) -> None:
        if self.base is not None:
            self._restore_forward(self.base)
            self.base._modules.pop(_WRAPPER_CHILD, None)
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def _use_wrapper_names(self, module: Any, state: Any, prefix: str, *_: Any) -> None:
        # Under an adapter layer PEFT picks its tensors by the modules' names, which must stay as they are.
        if self.current is module:
            _rename_keys(state, prefix, self._wrapper_name)

    def _use_linear_names(self, module: Any, state: Any, prefix: str, *_: Any) -> None:
        if self.current is module:
            _rename_keys(state, prefix, self._linear_name)

    def _wrapper_name(self, key: str) -> str:
        prefix = f"{_WRAPPER_CHILD}."
        return key.removeprefix(prefix) if key.startswith(prefix) else f"{self.placed.inside}.{key}"

    def _linear_name(self, key: str) -> str:
        inside = f"{self.placed.inside}."
        return key.removeprefix(inside) if key.startswith(inside) else f"{_WRAPPER_CHILD}.{key}"


class _StandIn:
    """Stand where the wrapper expects its linear: call what is in the place, with the linear's attributes."""

    def __init__(self, substitution: _Substitution) -> None:
        self._substitution = substitution

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._substitution.inner_forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Not while it is being copied, when it has nothing yet.
        if name.startswith("__") or "_substitution" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._substitution.base, name)


def _rename_keys(state: Any, prefix: str, rename: Callable[[str], str]) -> None:
    """Rename the keys under ``prefix`` in place, in their order."""
    for key in [key for key in state if key.startswith(prefix)]:
        value = state.pop(key)
        state[prefix + rename(key.removeprefix(prefix))] = value
