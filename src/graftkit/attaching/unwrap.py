"""``unwrap()``: the inner linears in their wrappers' places while training runs, the wrappers back for every save.

A wrapper that is taken out for good changes the checkpoint's keys and loses its buffers, and an adapter trained
meanwhile names modules that the real model does not have. Here the wrappers come back by themselves whenever
parameters are named: for ``state_dict``, and so for every way to save, and for ``load_state_dict``.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from graftkit.attaching.attach import adapted_sites
from graftkit.attaching.redirect import ModelPaths, renamed, retargeted
from graftkit.errors import AttachError
from graftkit.modeling.module_mode import evaluating
from graftkit.modeling.unwrapping import base_model_of

if TYPE_CHECKING:
    import torch
    from torch import nn

# Large enough that a forward that bends large values shows.
_PROBE_SCALE = 10.0


def unwrap(model: nn.Module, *, allow_change: bool = False) -> Unwrapped:
    """Put each wrapper's inner linear in the wrapper's place, for the time of training.

    The result is a handle, and a context manager that puts the wrappers back at the end::

        with gk.unwrap(model):
            peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
            trainer.train()
        peft_model.save_pretrained("out/adapter")

    The wrappers, the very same modules with whatever is then inside, also come back whenever a state dict is taken
    or loaded; the next forward pass of the model takes them out again. So a checkpoint that a trainer saves on its
    way has the base model's keys and the wrappers' buffers, and an adapter's tensors and configuration name inner
    linears, as stock PEFT wants them.

    A model without wrappers is left as it is, and so is a block that holds a norm or an activation beside its one
    linear: PEFT reaches that linear by its own name. Parameters sharded by FSDP are not supported: it keeps names
    of its own.

    Args:
        model: changed in place. Adapters it already carries stay where they are.
        allow_change: unwrap although outputs change. The adapter is then trained on another model than the one it
            will be used with.

    Raises:
        AttachError: ``unwrap-changes-outputs`` when a wrapper has finite bounds (or any other finite buffer), or
            its output on random input differs from its linear's; ``unwrap-other-arguments`` when its callers may
            pass it more than a linear takes. Nothing has been changed then.
    """
    base = base_model_of(model)
    places = tuple(wrapped_places(base))
    for place in places:
        _refuse_other_arguments(place)
        if not allow_change:
            _refuse_if_it_acts(place)
    handle = Unwrapped(base, places)
    handle._open()
    return handle


@dataclass(eq=False)
class Unwrapped:
    """A model whose wrappers are out.

    Attributes:
        model: the base model.
    """

    model: nn.Module
    _places: tuple[_Place, ...] = field(repr=False)
    _out: bool = field(default=False, init=False)
    _hooks: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list, init=False, repr=False)

    @property
    def wrappers(self) -> tuple[str, ...]:
        """The paths of the wrappers that are swapped."""
        return tuple(place.path for place in self._places)

    def rewrap(self) -> None:
        """Put the same wrappers back for good, with the modules now in their places inside. Again: no effect.

        Raises:
            AttachError: ``unwrap-place-gone`` when a linear's place in the model no longer exists.
        """
        self._swap_in()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> Unwrapped:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rewrap()

    def _open(self) -> None:
        # On the modules that hold the wrappers, so that a part of the model is saved right as well.
        holders: dict[int, Any] = {id(holder): holder for place in self._places for holder, _ in place.holders}
        for holder in holders.values():
            self._hooks.append(holder.register_state_dict_pre_hook(self._before_names))
            self._hooks.append(holder.register_load_state_dict_pre_hook(self._before_names))
        if holders:
            self._hooks.append(self.model.register_forward_pre_hook(self._before_forward))
        self._swap_out()

    def _before_names(self, *_: Any) -> None:
        self._swap_in()

    def _before_forward(self, *_: Any) -> None:
        self._swap_out()

    def _swap_out(self) -> None:
        if not self._out:
            for place in self._places:
                place.take_out()
            self._out = True

    def _swap_in(self) -> None:
        if self._out:
            for place in self._places:
                place.put_back()
            self._out = False
            name_inner_linears(self.model, {place.inner_path: place.path for place in self._places})


@dataclass(frozen=True, eq=False)
class _Place:
    """One wrapper, and where it belongs.

    Attributes:
        path: of the wrapper.
        wrapper: the module.
        inside: where its linear stands within it, e.g. "linear".
        holders: the modules that hold the wrapper, and under which name.
        dtype: of the linear's weight when the place was found.
    """

    path: str
    wrapper: nn.Module
    inside: str
    holders: tuple[tuple[nn.Module, str], ...]
    dtype: torch.dtype

    @property
    def inner_path(self) -> str:
        return f"{self.path}.{self.inside}"

    @property
    def inner(self) -> Any:
        return self.wrapper.get_submodule(self.inside)

    def take_out(self) -> None:
        inner = self.inner
        for holder, name in self.holders:
            setattr(holder, name, inner)

    def put_back(self) -> None:
        holder, name = self.holders[0]
        inner = holder._modules.get(name)
        if inner is None:
            raise AttachError(
                "a wrapper cannot go back: its place is gone",
                where=self.path,
                why=f"{type(holder).__name__} has no {name} any more",
                help="rewrap before the model is taken apart",
                code="unwrap-place-gone",
            )
        self._follow(inner)
        parent, _, leaf = self.inside.rpartition(".")
        setattr(self.wrapper.get_submodule(parent), leaf, inner)
        for holder, name in self.holders:
            setattr(holder, name, self.wrapper)

    def _follow(self, inner: nn.Module) -> None:
        """Do to the wrapper what was done to the model without it: moved to a device, cast, set to a mode."""
        weight = _weight(inner)
        cast = weight.is_floating_point() and weight.dtype != self.dtype
        self.wrapper.training = inner.training
        for module in self.wrapper.modules():
            for name, buffer in module.named_buffers(recurse=False):
                dtype = weight.dtype if cast and buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = buffer.to(weight.device, dtype)


def _weight(module: Any) -> torch.Tensor:
    layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return layer.weight  # type: ignore[no-any-return]


def wrapped_places(model: nn.Module) -> list[_Place]:
    """Every wrapper that holds nothing but its linear, outermost where they nest, in the model's order."""
    model_paths = ModelPaths.of(model)
    outermost: dict[str, str] = {}
    modules = dict(model.named_modules())
    for path, inner in model_paths.inner.items():
        if _holds_only(modules[path], modules[inner]):
            outermost[inner] = min(outermost.get(inner, path), path, key=len)
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for holder in modules.values():
        for name, child in holder._modules.items():
            if child is not None:
                holders.setdefault(id(child), []).append((holder, name))
    return [
        _Place(
            path=path,
            wrapper=modules[path],
            inside=inner.removeprefix(f"{path}."),
            holders=tuple(holders[id(modules[path])]),
            dtype=_weight(modules[inner]).dtype,
        )
        for inner, path in outermost.items()
    ]


def _holds_only(wrapper: nn.Module, inner: nn.Module) -> bool:
    """Whether nothing but the linear is in it. A block with a norm or an activation beside it is no wrapper."""
    own = set(inner.modules())
    beside = (module for module in wrapper.modules() if module not in own)
    return all(len(module._modules) == 1 for module in beside)


def _refuse_other_arguments(place: _Place) -> None:
    """A wrapper that takes a second argument may be called with one, and its linear cannot be."""
    parameters = list(inspect.signature(place.wrapper.forward).parameters.values())
    several = [p.name for p in parameters[1:]]
    if several:
        raise AttachError(
            "a wrapper cannot be left out: its linear cannot be called as it is",
            where=place.path,
            why=f"{type(place.wrapper).__name__} takes {', '.join(several)} besides its input",
            help="adapt the linear inside instead (gk.plan, or gk.enable)",
            code="unwrap-other-arguments",
        )


def _refuse_if_it_acts(place: _Place) -> None:
    reason = _finite_buffer(place.wrapper, place.inner) or _differs(place.wrapper, place.inner)
    if reason is not None:
        raise AttachError(
            "unwrapping would change the model's outputs",
            where=place.path,
            why=f"{type(place.wrapper).__name__} does something of its own: {reason}",
            help="adapt the linear inside instead (gk.plan, or gk.enable), or say allow_change=True",
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

    weight = _weight(inner)
    if weight.is_meta:
        return "its weights are not loaded, so that it cannot be tried"
    generator = torch.Generator().manual_seed(0)
    size = _in_features(inner)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    values = (torch.randn(2, 3, size, generator=generator) * _PROBE_SCALE).to(weight.device, dtype)
    try:
        with evaluating(wrapper), torch.no_grad():
            same = torch.equal(wrapper(values), inner(values))
    except Exception as error:
        return f"it cannot be tried on random input ({type(error).__name__}: {error})"
    return None if same else "on random input its output is not its linear's"


def _in_features(module: Any) -> int:
    layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return int(layer.in_features if hasattr(layer, "in_features") else layer.weight.shape[0])


def name_inner_linears(model: Any, spelled: dict[str, str]) -> None:
    """Let every adapter's configuration target what carries the adapter, by its name with the wrappers back.

    The configurations are changed in place, as PEFT does while it attaches: a save under way already holds them.

    Args:
        model: the base model, wrapped again.
        spelled: inner path -> the name it had while the wrapper was out.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return
    model_paths = ModelPaths.of(model)
    for adapter_name, config in configs.items():
        _retarget(config, model_paths, adapted_sites(model, adapter_name), spelled)


def _retarget(config: Any, model_paths: ModelPaths, adapted: set[str], spelled: dict[str, str]) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    planned = [path for path in model_paths.paths if path in adapted]
    if not planned or getattr(config, "target_modules", None) is None:
        return
    matches = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]._check_target_module_exists
    exact = [path for path in model_paths.paths if matches(config, path)] == planned
    aimed = config if exact else retargeted(config, planned, model_paths, matches)
    changed = renamed(aimed, {path: spelled.get(path, path) for path in planned})
    for name, value in vars(changed).items():
        setattr(config, name, value)
