"""``enable()``: stock PEFT accepts the plain names of wrapped linears.

PEFT refuses a target that is a wrapper around a linear, or a module composed of several. While enabled, such a
target means the linears inside. The configuration is rewritten where every tuner takes it in, before PEFT matches
anything; from there on stock PEFT does all the work, and what it saves names inner linears, so that it loads where
graftkit is not installed.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from graftkit.errors import AdapterError
from graftkit.text import some

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn


def enable() -> ExitStack:
    """Let stock PEFT take the plain names of wrapped linears, in the whole process, until :func:`disable`.

    Every way in is covered: ``get_peft_model`` with any tuner, ``PeftModel.from_pretrained``, ``add_adapter`` of
    PEFT and of transformers, mixed models, and trainers that call these. What changes:

    - A target (list entry, suffix, full path or regular expression) that matches a wrapper means the linear
      inside. ``rank_pattern`` and the like, and ``layers_to_transform`` follow.
    - A target that matches a module composed of linears (a norm and a linear, a gate and a value, a whole MLP)
      means each linear inside, which is logged as a warning. One that matches a block of such modules stays PEFT's
      error, with a pointer to :func:`graftkit.plan`.
    - An entry of ``exclude_modules`` that names a module excludes everything inside it, such as a tower's layers.
      It becomes a regular expression, which stock PEFT reads in the same way. That of a saved adapter is read as
      when it was trained.
    - A saved adapter loads whole, or loading it is an error (``adapter-partly-loaded``): tensors that name
      wrappers have no place in the model, and PEFT alone would drop them with a warning.
    - The rewritten configuration is a copy: yours stays as you wrote it, and ``model.peft_config`` holds the copy.
    - Everything else is as without it: "all-linear", targets that match inner linears.

    Calls are counted: each ``enable()`` needs its own ``disable()``, or the end of its ``with`` block::

        with gk.enable():
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))

    It is a switch for the process, safe to use from several threads: nothing is remembered about any model.

    Returns:
        A context manager that calls :func:`disable` once, at its end. Leave it unused to call that yourself.
    """
    _SWITCH.on()
    until_disabled = ExitStack()
    until_disabled.callback(disable)
    return until_disabled


def disable() -> None:
    """Undo one :func:`enable`. After the last one PEFT's own functions are back. Without one, it does nothing."""
    _SWITCH.off()


def is_enabled() -> bool:
    """Check whether plain names of wrapped linears are accepted now."""
    return _SWITCH.count > 0


class _Switch:
    """The patch of PEFT, with the number of calls that still need it, under a lock.

    Two methods of ``BaseTuner`` are what every tuner passes through: the constructor, where some tuners match
    targets to size what they share before they inject (VeRA, VB-LoRA), and ``inject_adapter``, which alone is
    called for an adapter added later. Saved adapters come in through ``from_pretrained`` and ``load_adapter``.
    """

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()
        self._patched: list[_Patched] = []

    def on(self) -> None:
        with self._lock:
            self.count += 1
            if not self._patched:
                self._patched = [_patch(owner, name, patch) for owner, name, patch in _patches()]

    def off(self) -> None:
        with self._lock:
            self.count = max(0, self.count - 1)
            # Where something else patched on top, ours stays underneath and passes everything through.
            if not self.count and all(vars(p.owner)[p.name] is p.ours for p in self._patched):
                for patched in self._patched:
                    setattr(patched.owner, patched.name, patched.original)
                self._patched = []


class _Patched(NamedTuple):
    """One function of a class, and what stands in its place."""

    owner: type
    name: str
    original: Any
    ours: Any


def _patches() -> tuple[tuple[type, str, Callable[[Any], Any]], ...]:
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner
    from transformers.integrations.peft import PeftAdapterMixin

    return (
        (BaseTuner, "__init__", _at_construction),
        (BaseTuner, "inject_adapter", _at_injection),
        (PeftModel, "from_pretrained", _at_reading),
        (PeftMixedModel, "from_pretrained", _at_reading),
        (PeftModel, "load_adapter", _at_loading),
        (PeftAdapterMixin, "load_adapter", _at_loading),
    )


def _patch(owner: type, name: str, patch: Callable[[Any], Any]) -> _Patched:
    original = vars(owner)[name]
    patched = _Patched(owner, name, original, patch(original))
    setattr(owner, name, patched.ours)
    return patched


_SWITCH = _Switch()

# Whether a saved adapter is being loaded: its layers are then those of its tensors.
_LOADING = ContextVar("loading", default=False)


@contextmanager
def _loading() -> Iterator[None]:
    before = _LOADING.set(True)
    try:
        yield
    finally:
        _LOADING.reset(before)


def _at_construction(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(  # noqa: N807 - it takes the place of one
        self: Any, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        if is_enabled():
            peft_config = _with_inner_names(type(self), model, peft_config, adapter_name)
        original(self, model, peft_config, adapter_name, *args, **kwargs)

    return __init__


def _at_injection(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not is_enabled():
            return original(self, model, adapter_name, *args, **kwargs)
        self.peft_config.update(_with_inner_names(type(self), model, self.peft_config, adapter_name))
        try:
            return original(self, model, adapter_name, *args, **kwargs)
        except ValueError as error:
            _point_to_a_plan(error, type(self), model, self.peft_config.get(adapter_name))
            raise

    return inject_adapter


def _at_reading(original: classmethod[Any, Any, Any]) -> classmethod[Any, Any, Any]:
    @functools.wraps(original.__func__)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        with _loading():
            return original.__func__(cls, *args, **kwargs)

    return classmethod(from_pretrained)


def _at_loading(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_enabled():
            return original(self, *args, **kwargs)
        from graftkit.attaching.loaded_whole import check_loaded_whole

        given = signature.bind(self, *args, **kwargs).arguments
        name = given.get("adapter_name") or "default"
        source = given.get("model_id", given.get("peft_model_id"))
        before = set(getattr(self, "peft_config", None) or ())
        with _loading():
            result = original(self, *args, **kwargs)
        try:
            sizes_may_differ = bool(given.get("kwargs", {}).get("ignore_mismatched_sizes"))
            check_loaded_whole(self, name, result, str(source), sizes_may_differ=sizes_may_differ)
        except AdapterError:
            if name not in before:
                self.delete_adapter(name)
            raise
        return result

    return load_adapter


def _point_to_a_plan(error: ValueError, tuner: Any, model: nn.Module, config: Any) -> None:
    """Add to PEFT's error what helps where the targets name a block of modules."""
    from graftkit.attaching.redirect import ModelPaths, holding_others

    if not getattr(config, "target_modules", None):
        return
    blocks = holding_others(config, ModelPaths.of(model), tuner._check_target_module_exists)
    if blocks:
        error.add_note(
            f"{some(blocks)}: a block of modules. gk.plan(model, targets=…) names the linears you mean in it."
        )


def _with_inner_names(tuner: Any, model: nn.Module, configs: Any, adapter_name: str) -> Any:
    """Return the configuration, or the mapping with one, that names inner linears."""
    if not isinstance(configs, dict):
        return _redirected(tuner, model, configs)
    if adapter_name not in configs:
        return configs
    return {**configs, adapter_name: _redirected(tuner, model, configs[adapter_name])}


def _redirected(tuner: Any, model: nn.Module, config: PeftConfig) -> PeftConfig:
    from graftkit.attaching.redirect import ModelPaths, excluding_whole, redirected

    model_paths = ModelPaths.of(model)
    meant = config if _LOADING.get() else excluding_whole(config, model_paths)
    return redirected(meant, model_paths, tuner._check_target_module_exists)
