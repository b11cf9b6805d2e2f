"""PEFT's methods, read from PEFT: their configuration classes, what each calls its sizes, and what each takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError
from graftkit.planning.initializers import initializer_of
from graftkit.planning.trials.skeleton import Slot, ask
from graftkit.text import suggest

if TYPE_CHECKING:
    from peft import PeftConfig

# LoRA's usual rank today; every other method starts from the size that its own authors gave it in PEFT.
_LORA_RANK = 16

# Options the plan itself decides; passing them would contradict it.
_DECIDED = frozenset(
    {
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "feedforward_modules",
        "task_type",
        "peft_type",
        "r",
    }
)

# What some classes refuse to be made without; for asking what a method takes, any valid value does.
ANY_VALID = {"total_step": 1000, "feedforward_modules": []}

# A layer of these widths divides by every method's default block, and is wider than every default rank.
_ROOMY = 1024


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
        return MappingProxyType({f.name: _default(f) for f in dataclasses.fields(self.config_class)})

    @property
    def rank_field(self) -> str | None:
        """What the method calls its rank. AdaLoRA keeps ``r`` from LoRA and ignores it for ``target_r``."""
        return next((name for name in ("target_r", "r") if name in self.defaults), None)

    @property
    def alpha_field(self) -> str | None:
        """What the method calls the numerator of its scale."""
        return next((n for n in ("lora_alpha", "alpha", f"{self.name}_alpha") if n in self.defaults), None)

    @property
    def dropout_field(self) -> str | None:
        """What the method calls dropout on the adapter's input: dropping whole modules or ranks is another."""
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


# ---- which methods there are ----


# What each variant of LoRA stands for; the methods themselves are PEFT's.
_VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"dora": MappingProxyType({"use_dora": True}), "rslora": MappingProxyType({"use_rslora": True})}
)


@functools.cache
def method_names() -> tuple[str, ...]:
    """Every method of the installed PEFT that adapts linear layers, LoRA and its variants first."""
    found = (name for name in _candidates() if name != "lora" and takes(_method(name), "linear", 2))
    return ("lora", *_VARIANTS, *found)


def method_named(name: str) -> Method:
    """The method by name.

    Raises:
        PlanError: ``method-unknown``, or ``method-not-for-layers`` for one that adapts no layers (prompts,
            token rows, whole models).
    """
    if name in _VARIANTS or name in _candidates():
        method = _method(name)
        if takes(method, "linear", 2):
            return method
    if any(name == kind.value.lower() for kind in _config_classes()):
        raise PlanError(
            f"{name} does not adapt layers",
            why="PEFT puts it on prompts, single tokens or whole models, so there is nothing to plan",
            help="use it with PEFT directly, or choose one of " + ", ".join(method_names()),
            code="method-not-for-layers",
        )
    raise PlanError(
        f"unknown method {name!r}",
        why=f"methods are {', '.join(method_names())}",
        help=suggest(name, method_names()) or "method='lora'",
        code="method-unknown",
    )


def _config_classes() -> Mapping[Any, type[PeftConfig]]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING  # type: ignore[no-any-return]


@functools.cache
def _candidates() -> tuple[str, ...]:
    """Methods with targets whose tuner replaces modules, as PEFT registers them."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    tuners = ((kind, PEFT_TYPE_TO_TUNER_MAPPING.get(kind), cls) for kind, cls in _config_classes().items())
    return tuple(
        kind.value.lower()
        for kind, tuner, cls in tuners
        if isinstance(tuner, type)
        and issubclass(tuner, BaseTuner)
        and any(f.name == "target_modules" for f in dataclasses.fields(cls))
    )


def _method(name: str) -> Method:
    own = "lora" if name in _VARIANTS else name
    config_class = next(cls for kind, cls in _config_classes().items() if kind.value.lower() == own)
    return Method(name, config_class, _VARIANTS.get(name, {}))


def _default(spec: dataclasses.Field[Any]) -> Any:
    if spec.default is not dataclasses.MISSING:
        return spec.default
    return spec.default_factory() if spec.default_factory is not dataclasses.MISSING else None


# ---- what a method takes ----


@functools.cache
def _refusal(method_name: str, kind: str, dimensions: int) -> str | None:
    method = _method(method_name)
    shape = (_ROOMY, _ROOMY) if dimensions == 2 else (_ROOMY, _ROOMY, *(3,) * (dimensions - 2))
    slot = Slot("layers.0.site", kind, (4, _ROOMY, _ROOMY) if kind == "parameter" and dimensions == 3 else shape)
    required = {name: value for name, value in ANY_VALID.items() if name in method.defaults}
    targets: dict[str, Any] = {"target_modules": ["site"]}
    if kind == "parameter":
        if "target_parameters" not in method.defaults:
            return "it adapts modules, not bare parameters"
        targets = {"target_modules": [], "target_parameters": ["site"]}
    answer = ask(method.config_class(**targets, **required), [slot])
    if answer.refusal is not None:
        return answer.refusal
    return None if answer.trainable is None or answer.trainable else "PEFT finds nothing in it to train"


def refusal_of(method: Method, kind: str, dimensions: int) -> str | None:
    """Why ``method`` cannot adapt a site of this kind at all, in PEFT's words, or None."""
    # DoRA and the like differ from LoRA in what bare parameters take, which ``build_config`` says by option.
    return _refusal("lora" if method.name in _VARIANTS else method.name, kind, dimensions)


def takes(method: Method, kind: str, dimensions: int) -> bool:
    """Whether ``method`` adapts sites of this kind, of weights with that many dimensions."""
    return refusal_of(method, kind, dimensions) is None


# ---- numbers ----


def check_numbers(r: Any, alpha: Any, dropout: Any) -> None:
    """Refuse a rank, alpha or dropout that PEFT would accept late, or silently. None is "not given".

    Raises:
        PlanError: ``rank-invalid``, ``alpha-invalid`` or ``dropout-invalid``.
    """
    if r is not None and (not isinstance(r, int) or isinstance(r, bool) or r <= 0):
        raise PlanError(
            f"the rank must be a positive whole number, not {r!r}",
            why="a rank of 0 or less adapts nothing",
            help="r=16 is a usual choice",
            code="rank-invalid",
        )
    if alpha is not None and (not isinstance(alpha, int | float) or alpha <= 0):
        raise PlanError(f"alpha must be positive, not {alpha!r}", help="alpha=r scales by 1", code="alpha-invalid")
    if dropout is not None and (not isinstance(dropout, int | float) or not 0 <= dropout < 1):
        raise PlanError(f"dropout must lie in [0, 1), not {dropout!r}", help="dropout=0.0", code="dropout-invalid")


def numbers_of(method: Method, r: int | None, alpha: float | None, dropout: float | None) -> dict[str, Any]:
    """The rank, alpha and dropout under the method's own names.

    What was not given keeps PEFT's default, but for LoRA's rank, which is 16. Alpha that was not given keeps
    PEFT's own ratio to the rank, so that a larger rank is not scaled down: 1 for LoRA, 2 for GraLoRA.

    Raises:
        PlanError: ``rank-unknown``, ``alpha-unknown`` or ``dropout-unknown``: given, and the method has none.
    """
    if method.config_class.__name__ == "LoraConfig" and r is None:
        r = _LORA_RANK
    chosen: dict[str, Any] = {}
    for given, name, word in (
        (r, method.rank_field, "rank"),
        (None if alpha is None else _whole(alpha), method.alpha_field, "alpha"),
        (dropout or None, method.dropout_field, "dropout"),
    ):
        if given is None:
            continue
        if name is None:
            raise _has_no(method, word)
        chosen[name] = given
    return {**chosen, **_following_rank(method, r, alpha)}


def _following_rank(method: Method, r: int | None, alpha: float | None) -> dict[str, Any]:
    """What a given rank moves with it, by PEFT's own ratios."""
    rank, scale = method.rank_field, method.alpha_field
    usual = method.defaults.get(rank or "")
    if r is None or not usual:
        # OFT's rank and block size are two names of one choice: PEFT takes exactly one that is not 0.
        return {method.dividing_field: 0} if r is not None and method.dividing_field else {}
    follows = {}
    if alpha is None and scale is not None and method.defaults[scale]:
        follows[scale] = _whole(method.defaults[scale] * r / usual)
    if "init_r" in method.defaults:
        follows["init_r"] = max(1, round(method.defaults["init_r"] * r / usual))
    return follows


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def numbers_text(method: Method, config: PeftConfig) -> str:
    """What sets the size and scale of the adapters in ``config``, under PEFT's names: "r=16 lora_alpha=16"."""
    rank, divides = method.rank_field, method.dividing_field
    names = [name for name in (rank, method.alpha_field) if name is not None]
    shown = (
        names if rank is not None and getattr(config, rank, None) else [divides] if divides else method.sizes[:1]
    )
    values = ((name, getattr(config, name, None)) for name in shown)
    return " ".join(f"{name}={value:g}" for name, value in values if isinstance(value, int | float))


def _has_no(method: Method, word: str) -> PlanError:
    argument = {"rank": "r"}.get(word, word)
    has = [n for n in method.defaults if n.endswith("dropout")] if word == "dropout" else method.sizes
    own = ", ".join(f"{name}={method.defaults[name]}" for name in has)
    return PlanError(
        f"{method.name} has no {word}",
        where=method.config_class.__name__,
        why=f"it has {own} instead" if own else "its size does not depend on one",
        help=f"leave {argument} out" + (f", or pass {has[0]}=…" if has else ""),
        code=f"{word}-unknown",
    )


# ---- the configuration ----


def build_config(
    method: Method,
    *,
    target_modules: str | list[str],
    target_parameters: list[str],
    task_type: str | None,
    numbers: Mapping[str, Any],
    options: Mapping[str, Any],
    derived: Mapping[str, Any] = MappingProxyType({}),
) -> PeftConfig:
    """The stock configuration for one plan.

    Args:
        numbers: from ``numbers_of``.
        options: as the user gave them.
        derived: fields that follow from the sites; what the user gave wins.

    Raises:
        PlanError: ``option-unknown``, ``option-decided``, ``expert-option`` (an option that PEFT cannot
            apply to a bare parameter), or ``option-invalid`` with PEFT's own message.
    """
    _check_options(method, options)
    chosen = {**derived, **numbers, **method.options, **options}
    if target_parameters:
        _check_parameter_options(chosen, target_parameters[0])
        chosen["target_parameters"] = target_parameters
    try:
        return method.config_class(task_type=task_type, target_modules=target_modules, **chosen)
    except (ValueError, TypeError, ImportError) as error:
        raise PlanError(
            "PEFT refuses this combination of options",
            where=method.config_class.__name__,
            why=str(error),
            help="change the option that the message names",
            code="option-invalid",
        ) from error


def _check_options(method: Method, options: Mapping[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(method.config_class) if f.init]
    for name in options:
        if name in _DECIDED or name in {method.alpha_field, method.dropout_field}:
            raise PlanError(
                f"{name} is decided by the plan",
                help="use targets, scope, r, alpha and dropout",
                code="option-decided",
            )
        if name == "layer_replication":
            raise PlanError(
                "layer_replication makes a model with other layers than the one that was planned for",
                help="replicate the layers first, then plan for the result",
                code="option-decided",
            )
        if name not in known:
            raise PlanError(
                f"unknown option {name!r}",
                where=method.config_class.__name__,
                help=suggest(name, known) or "see the options of this class in PEFT",
                code="option-unknown",
            )


# What PEFT's ParamWrapper refuses, and what it would do wrongly: initializers that read the module's own weight.
_NOT_ON_PARAMETERS = (
    ("use_dora", "DoRA"),
    ("lora_bias", "lora_bias"),
    ("fan_in_fan_out", "fan_in_fan_out"),
    ("lora_dropout", "dropout"),
    ("velora_config", "velora_config"),
    ("kasa_config", "kasa_config"),
    ("monteclora_config", "monteclora_config"),
    ("use_bdlora", "use_bdlora"),
    ("use_qalora", "use_qalora"),
    ("alora_invocation_tokens", "alora_invocation_tokens"),
)


def not_on_parameters(options: Mapping[str, Any]) -> dict[str, str]:
    """Fields among ``options`` that PEFT cannot apply to a bare parameter, each with what to call it.

    Source: ``peft.tuners.lora.layer.ParamWrapper``.
    """
    named = {key: label for key, label in _NOT_ON_PARAMETERS if options.get(key)}
    init = options.get("init_lora_weights")
    row = initializer_of(init)
    if isinstance(init, str) and not (row and row.any_kind):
        named["init_lora_weights"] = f"init_lora_weights={init!r}"
    return named


def _check_parameter_options(chosen: Mapping[str, Any], parameter: str) -> None:
    """What PEFT's ParamWrapper refuses, said before a model is touched."""
    named = not_on_parameters(chosen).values()
    if named:
        raise PlanError(
            f"{' and '.join(named)} cannot be used on a bare parameter",
            where=parameter,
            why="PEFT adapts a parameter by adding to it, not by running an input through the adapter",
            help=f"drop {', '.join(named)}, or leave the experts out of the targets",
            code="expert-option",
        )


def dividing_sizes(method: Method, slots: Sequence[Slot]) -> list[int]:
    """Values for the method's dividing field that divide the layers, PEFT's default first, best guess next.

    Some methods divide a layer's input only, others its output as well: the wider claim comes last.
    """
    name = method.dividing_field
    if name is None:
        return []
    default = method.defaults[name]
    inputs = gcd(*(slot.inputs for slot in slots))
    both = gcd(inputs, *(slot.outputs for slot in slots))
    return list(dict.fromkeys([default, _divisor(inputs, default), _divisor(both, default)]))


def _divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` that is at most ``most``."""
    return next((n for n in range(min(number, most), 0, -1) if number % n == 0), 1)
