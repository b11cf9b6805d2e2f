"""PEFT's methods, read from PEFT: their configuration classes, what each calls its sizes, and what each takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftkit.env import require_working_peft
from graftkit.errors import PlanError
from graftkit.planning.trials.skeleton import Slot, ask
from graftkit.text import suggest

if TYPE_CHECKING:
    from peft import PeftConfig

# Fields that some classes require: to try what a method takes, any valid value will do.
_ANY_VALID = {"total_step": 1000, "feedforward_modules": [], "progressbar": False}

# A layer of these widths divides by every method's default block, and is wider than every default rank.
_WIDTH = 1024


@dataclass(frozen=True)
class Method:
    """A way to adapt a site.

    Attributes:
        name: what the user writes: PEFT's own name in lower case, or LoRA's with an option.
        config_class: PEFT's configuration class.
        options: the options that the name stands for.
    """

    name: str
    config_class: type[PeftConfig]
    options: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def defaults(self) -> Mapping[str, Any]:
        """Every field of the configuration class with its default."""
        return {f.name: _default(f) for f in dataclasses.fields(self.config_class)}

    @property
    def rank_field(self) -> str | None:
        """The method's name for its rank. AdaLoRA keeps ``r`` from LoRA and ignores it for ``target_r``."""
        return next((name for name in ("target_r", "r") if name in self.defaults), None)

    @property
    def alpha_field(self) -> str | None:
        """The method's name for the numerator of its scale."""
        return next((n for n in ("lora_alpha", "alpha", f"{self.name}_alpha") if n in self.defaults), None)

    @property
    def dropout_field(self) -> str | None:
        """The method's name for dropout on the adapter's input, not of whole modules or ranks."""
        own = (n for n in self.defaults if n.endswith("_dropout") and n not in {"module_dropout", "rank_dropout"})
        return next(own, None)

    @property
    def sizes(self) -> list[str]:
        """The fields that set how large the adapter is, where it is not called a rank."""
        words = ("block", "frequency", "length", "rank", "group_size", "vectors", "lambda", "scaling", "u")
        return [
            name
            for name, value in self.defaults.items()
            if any(word in name.split("_") or name.endswith(word) for word in words)
            and not name.endswith(("_pattern", "_dropout"))
            and (value is None or isinstance(value, int | float))
            and not isinstance(value, bool)
        ]

    @property
    def dividing_field(self) -> str | None:
        """The field whose value has to divide the width of every layer, if the method has one."""
        ends = ("block_size", "vector_length")
        return next((name for name in self.defaults if name.endswith(ends) and self.defaults[name]), None)

    def trial_config(self, **fields: Any) -> PeftConfig:
        """Return a configuration with these fields, and any valid value for those that the class requires."""
        required = {name: value for name, value in _ANY_VALID.items() if name in self.defaults}
        return self.config_class(**required, **fields)


# ---- which methods there are ----


# What each variant of LoRA stands for; the methods themselves are PEFT's.
_VARIANTS: Mapping[str, Mapping[str, Any]] = {"dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


@functools.cache
def method_names() -> tuple[str, ...]:
    """Return every method of the installed PEFT that adapts linear layers, LoRA and its variants first."""
    found = (name for name in _candidates() if name != "lora" and takes(_method(name), "linear", 2))
    return ("lora", *_VARIANTS, *found)


def method_named(name: str) -> Method:
    """Return the method by name.

    Raises:
        PlanError: ``method-unknown``, or ``method-not-for-layers`` for one that adapts no layers (prompts,
            token rows, whole models).
    """
    if name in _VARIANTS or name in _candidates():
        method = _method(name)
        if takes(method, "linear", 2):
            return method
    if name in _config_classes():
        raise PlanError(
            f"{name} does not adapt layers",
            where="method",
            why="PEFT puts it on prompts, single tokens or whole models, so there is nothing to plan",
            help="use it with PEFT directly, or choose a method that adapts layers, such as lora or ia3",
            code="method-not-for-layers",
        )
    raise unknown_method(name)


def unknown_method(name: str, others: Iterable[str] = ()) -> PlanError:
    """Return the error for a name that is neither a method nor one of the ``others`` that would do."""
    known = (*_VARIANTS, *_candidates(), *others)
    return PlanError(
        f"unknown method {name!r}",
        where="method",
        why="neither PEFT nor graftkit has a method of that name",
        help=suggest(name, known) or f"one of {', '.join(known)}",
        code="method-unknown",
    )


def is_method_name(name: str) -> bool:
    """Check whether PEFT calls something a method by this name, or graftkit a variant; it may adapt no layers."""
    return name in _VARIANTS or name in _config_classes()


def _config_classes() -> Mapping[str, type[PeftConfig]]:
    """Return PEFT's configuration classes by method, in lower case. Raises as `require_working_peft`."""
    require_working_peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value.lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


@functools.cache
def _candidates() -> tuple[str, ...]:
    """Return the methods with targets whose tuner replaces modules, as PEFT registers them.

    Raises as `require_working_peft`.
    """
    require_working_peft()
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    tuners = {kind.value.lower(): tuner for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    return tuple(
        name
        for name, cls in _config_classes().items()
        if issubclass(tuners.get(name, object), BaseTuner) and "target_modules" in cls.__dataclass_fields__
    )


def _method(name: str) -> Method:
    return Method(name, _config_classes()["lora" if name in _VARIANTS else name], _VARIANTS.get(name, {}))


def _default(spec: dataclasses.Field[Any]) -> Any:
    if spec.default is not dataclasses.MISSING:
        return spec.default
    return spec.default_factory() if spec.default_factory is not dataclasses.MISSING else None


# ---- what a method takes ----


@functools.cache
def _refusal(method_name: str, kind: str, dimensions: int) -> str | None:
    method = _method(method_name)
    stacked = kind == "parameter" and dimensions == 3
    shape = (4, _WIDTH, _WIDTH) if stacked else (_WIDTH, _WIDTH, *(3,) * (dimensions - 2))
    slot = Slot("layers.0.site", kind, shape)
    targets: dict[str, Any] = {"target_modules": ["site"]}
    if kind == "parameter":
        if "target_parameters" not in method.defaults:
            return "it adapts modules, not bare parameters"
        targets = {"target_modules": [], "target_parameters": ["site"]}
    answer = ask(method.trial_config(**targets), [slot])
    return "PEFT finds nothing in it to train" if answer.trainable == 0 else answer.refusal


def refusal_of(method: Method, kind: str, dimensions: int) -> str | None:
    """Return why ``method`` cannot adapt a site of this kind at all, in PEFT's words, or None."""
    # DoRA and the like differ from LoRA in what bare parameters take, which ``build_config`` says by option.
    return _refusal("lora" if method.name in _VARIANTS else method.name, kind, dimensions)


def takes(method: Method, kind: str, dimensions: int) -> bool:
    """Check whether ``method`` adapts sites of this kind, of weights with that many dimensions."""
    return refusal_of(method, kind, dimensions) is None
