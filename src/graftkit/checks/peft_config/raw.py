"""A stock PEFT configuration as PEFT reads it: fields checked, defaults, "all-linear" and experts expanded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from graftkit.checks.peft_config.validate import config_problems
from graftkit.errors import PlanError
from graftkit.planning.config.methods import Method, method_named
from graftkit.planning.matching import is_all_linear, rewritten_names, suffix_finder
from graftkit.surveying.sites import ModelMap
from graftkit.text import closest, some

# Methods that adapt modules of any kind, norms above all, which the map does not list.
_OF_ANY_MODULE = frozenset({"LN_TUNING"})
# Quantizers whose layers are still an nn.Linear, which is what PEFT looks for under "all-linear".
_STILL_LINEAR = ("bitsandbytes", "torchao")


class RefusalKind(Enum):
    """What ``get_peft_model`` raises over."""

    CONFIG = "the configuration class refuses its fields"
    FUSED = "only some of the names that PEFT fuses into one parameter"
    NO_DEFAULT = "no targets, and PEFT has no default ones for the model type"
    WRAPPER = "a wrapper around a linear, or a module composed of several"
    MODULE = "a module that PEFT does not adapt"
    MIXER = "a module whose weight a fused kernel reads"
    PARAMETER = "a parameter that PEFT does not adapt"
    OPTION = "an option that parameters cannot take"
    NOTHING = "targets that match nothing"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason for ``get_peft_model`` to raise.

    Attributes:
        where: the module, parameter or field.
        why: PEFT's reason.
    """

    kind: RefusalKind
    where: str
    why: str


@dataclass(frozen=True)
class RawPeftConfig:
    """A stock PEFT configuration as PEFT reads it on a base, before it matches targets.

    Attributes:
        config: the fields of ``adapter_config.json`` or ``PeftConfig.to_dict``; PEFT's defaults fill the rest.
        base: the map of the base.
    """

    config: Mapping[str, Any]
    base: ModelMap

    @cached_property
    def given(self) -> Mapping[str, Any]:
        """The fields as in JSON: sets sorted, enumerations by value."""
        return {name: _plain(value) for name, value in self.config.items()}

    @property
    def peft_type(self) -> str:
        """The method, in PEFT's capitals; LoRA where the configuration names none."""
        return str(self.given.get("peft_type") or "LORA")

    @property
    def is_lora(self) -> bool:
        return self.peft_type == "LORA"

    @cached_property
    def expert_names(self) -> Mapping[str, str]:
        """Leaf name -> the stacked experts' parameter that PEFT takes it for on this model type; of LoRA alone."""
        return rewritten_names(self.base.model.model_type) if self.is_lora else {}

    @cached_property
    def _method(self) -> Method | None:
        try:
            return method_named(self.peft_type.lower())
        except PlanError:
            return None

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """Why the configuration cannot be resolved; empty where it can."""
        if self.faults:
            return self.faults
        if self._method is None or self.peft_type in _OF_ANY_MODULE:
            return (f"{some([self.peft_type])} adapts no layers that are known here",)
        if self.given.get("layer_replication"):
            return ("layer_replication makes a model with other layers than the base",)
        return ()

    @cached_property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with the fields on any base; empty where they can be used."""
        from peft import PeftType

        if self._method is None:
            known = self.peft_type in PeftType.__members__
            return () if known else (f"PEFT has no method {some([self.peft_type])}",)
        # Where PEFT rewrites experts' names it runs patterns over the parameters as well.
        paths = (*self.base.module_paths, *self.base.parameter_paths)
        return config_problems(self.given, self.peft_type, paths, modules=len(self.base.module_paths))

    @cached_property
    def targets(self) -> str | tuple[str, ...] | None:
        """``target_modules`` as written: a regular expression or "all-linear", names, or None."""
        written = self.given.get("target_modules")
        return tuple(written) if isinstance(written, list) else written

    @cached_property
    def _read(self) -> tuple[Mapping[str, Any], Refusal | None]:
        """The fields as PEFT matches them, and the refusal that keeps it from matching, if any."""
        from peft import PeftType

        assert self._method is not None
        fields = {
            **self._method.defaults,
            **copy.deepcopy(dict(self.given)),
            "peft_type": PeftType(self.peft_type),
        }
        state = SimpleNamespace(**fields)
        refusal = self._construct() or self._rewrite(state) or self._fill_in(state)
        if isinstance(state.target_modules, set):
            state.target_modules = sorted(state.target_modules)
        self._expand(state)
        return vars(state), refusal

    @cached_property
    def ignored(self) -> Mapping[str, str | None]:
        """Field that PEFT drops because its class has none of that name -> the nearest name, or None.

        Source: ``peft.config.PeftConfigMixin.check_kwargs`` and ``from_peft_type``, which only warn.
        """
        assert self._method is not None
        known = [f.name for f in fields(self._method.config_class)]
        return {name: next(iter(closest(name, known)), None) for name in self.given if name not in known}

    def _construct(self) -> Refusal | None:
        """Let the configuration class check its own fields."""
        assert self._method is not None
        known = {f.name for f in fields(self._method.config_class) if f.init}
        given = {name: copy.copy(value) for name, value in self.given.items() if name in known}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._method.config_class(**given)
            except Exception as error:
                # The classes raise ValueError, TypeError and ImportError, and others over unexpected values.
                return Refusal(RefusalKind.CONFIG, type(error).__name__, one_line(error))
        return None

    def _rewrite(self, state: SimpleNamespace) -> Refusal | None:
        """Let PEFT turn names of experts into parameters, as it does on some model types; it needs names alone."""
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        names = self.expert_names
        if not names:
            return None
        if is_all_linear(state.target_modules):
            state.target_modules = sorted({p.rpartition(".")[2] for p in self.all_linear}.union(names))
        try:
            convert_peft_config_for_transformers(state, self._names_only, conversions=None)
        except ValueError as error:
            return Refusal(RefusalKind.FUSED, self.shown_targets, one_line(error))
        return None

    @property
    def _names_only(self) -> Any:
        """The parts of a model that PEFT's rewriting reads."""
        base = self.base
        return SimpleNamespace(
            config=SimpleNamespace(model_type=base.model.model_type),
            named_modules=lambda: ((path, None) for path in base.module_paths),
            named_parameters=lambda: ((path, None) for path in base.parameter_paths),
        )

    def _fill_in(self, state: SimpleNamespace) -> Refusal | None:
        """Fill in PEFT's default targets for the model type, where none are given.

        Source: ``peft.tuners.lora.model.LoraModel._prepare_adapter_config``, and those of the other tuners.
        """
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        if state.target_modules is not None:
            return None
        defaults = getattr(PEFT_TYPE_TO_TUNER_MAPPING[state.peft_type], "target_module_mapping", {})
        known = defaults.get(self.base.model.model_type)
        if known is not None:
            state.target_modules = known if isinstance(known, str) else set(known)
        elif not getattr(state, "target_parameters", None):
            why = f"PEFT has no default targets for the model type {self.base.model.model_type}"
            return Refusal(RefusalKind.NO_DEFAULT, "target_modules", why)
        return None

    def _expand(self, state: SimpleNamespace) -> None:
        from peft.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION

        if is_all_linear(state.target_modules):
            state.target_modules = list(self.all_linear)
        targets = state.target_modules
        layers = getattr(state, "layers_to_transform", None) is not None
        # PEFT filters by layer not full paths, but the shorter names that it makes of many of them.
        if layers and isinstance(targets, list) and len(targets) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION:
            state.target_modules = _condensed(targets, self.base.module_paths)

    @cached_property
    def all_linear(self) -> tuple[str, ...]:
        """The modules that "all-linear" stands for: all linears but the output embeddings or a classifier's head.

        Source: ``peft.tuners.tuners_utils._maybe_include_all_linear_layers``.
        """
        linears = [
            s for s in self.base if s.is_linear and (s.quantized or "bitsandbytes").startswith(_STILL_LINEAR)
        ]
        heads = {s.path for s in self.base if s.role == "lm_head"} or self._classifier()
        inside = [f"{s.path}.out_proj" for s in self.base if s.kind == "multihead_attention"]
        found = {s.path for s in linears if s.path not in heads} | set(inside)
        return tuple(path for path in self.base.module_paths if path in found)

    def _classifier(self) -> set[str]:
        from peft.utils.constants import SEQ_CLS_HEAD_NAMES

        if self.given.get("task_type") != "SEQ_CLS" or self.base.model.model_type is None:
            return set()
        return set([name for name in SEQ_CLS_HEAD_NAMES if name in self.base.module_paths][:1])

    @property
    def fields(self) -> Mapping[str, Any]:
        """The fields as PEFT matches them: experts rewritten, "all-linear" and defaults expanded."""
        return self._read[0]

    @property
    def is_all_linear(self) -> bool:
        """Whether the targets are "all-linear"."""
        return is_all_linear(self.targets)

    @property
    def shown_targets(self) -> str:
        """The targets as written, for a message."""
        return some([self.targets] if isinstance(self.targets, str) else self.targets or ())

    @cached_property
    def expanded_targets(self) -> str | tuple[str, ...] | None:
        """The targets as written, with "all-linear" expanded."""
        return self.all_linear if self.is_all_linear else self.targets

    @cached_property
    def rewritten(self) -> Mapping[str, str]:
        """Target, as written -> the expert parameter that PEFT takes it for."""
        listed = self.targets if isinstance(self.targets, tuple) else ()
        leaves = {target: target.rpartition(".")[2] for target in listed}
        return {target: self.expert_names[leaf] for target, leaf in leaves.items() if leaf in self.expert_names}


def one_line(error: Exception) -> str:
    """Return the text of PEFT's error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _condensed(targets: list[str], paths: Iterable[str]) -> list[str]:
    """Return what PEFT makes of a long list before it matches. Source: ``BaseTuner.inject_adapter``."""
    from peft.tuners.tuners_utils import _find_minimal_target_modules

    near = suffix_finder(targets)
    others = [path for path in paths if not near(path)]
    shorter = _find_minimal_target_modules(targets, others)
    return sorted(shorter) if len(shorter) < len(targets) else targets


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset | tuple):
        return sorted(value, key=str)
    return getattr(value, "value", value)
