"""What stock PEFT would do with a configuration on a base, read from the map alone: no model is built."""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from graftkit.checks.rule import Observation, unknown
from graftkit.checks.saved import config_problems, some
from graftkit.errors import PlanError
from graftkit.planning.extras import saved_modules
from graftkit.planning.intent import fed_towers
from graftkit.planning.matching import rewritten_names, suffix_finder, target_matcher
from graftkit.planning.methods import Method, method_named, not_on_parameters, refusal_of
from graftkit.surveying.sites import ModelMap, Site

if TYPE_CHECKING:
    from graftkit.checks.facts import Facts

ALL_LINEAR = "all-linear"
# Methods that take modules of any kind, norms above all: the map does not say which of those there are.
_OF_ANY_MODULE = frozenset({"LN_TUNING"})
# Quantizers whose layers are still an nn.Linear, which is what PEFT looks for under "all-linear".
_STILL_LINEAR = ("bitsandbytes", "torchao")
# As surveying.adaptable says it.
_IN_GROUPS = re.compile(r"a convolution in (\d+) groups")


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing that makes ``get_peft_model`` raise.

    Attributes:
        kind: "config" (the class refuses its fields), "fused" (half of what is stacked together), "no-default"
            (no targets, and PEFT knows none for the model type), "wrapper", "module", "parameter" (a target of
            a kind that PEFT does not adapt), "option" (one that a bare parameter cannot take) or "nothing".
        where: the module, parameter or field.
        why: PEFT's reason.
    """

    kind: str
    where: str
    why: str


@dataclass(frozen=True)
class Reach:
    """A stock PEFT configuration held against a base.

    Attributes:
        config: the fields as ``adapter_config.json`` or ``PeftConfig.to_dict`` has them; what is missing has
            PEFT's default.
        base: the map of the base.
    """

    config: Mapping[str, Any]
    base: ModelMap

    # ---- the configuration ----

    @cached_property
    def given(self) -> Mapping[str, Any]:
        """The fields as JSON would have them: sets sorted, enumerations by value."""
        return {name: _plain(value) for name, value in self.config.items()}

    @property
    def peft_type(self) -> str:
        """The method, as PEFT spells it; LoRA where the configuration does not say."""
        return str(self.given.get("peft_type") or "LORA")

    @property
    def is_lora(self) -> bool:
        return self.peft_type == "LORA"

    @cached_property
    def _method(self) -> Method | None:
        try:
            return method_named(self.peft_type.lower())
        except PlanError:
            return None

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """Why nothing can be said of this configuration; empty where it can be read."""
        if self.faults:
            return self.faults
        if self.peft_type in _OF_ANY_MODULE:
            return (f"{some([self.peft_type])} adapts no layers that are known here",)
        if self.given.get("layer_replication"):
            return ("layer_replication makes a model with other layers than the base",)
        return ()

    @cached_property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with the fields themselves, whatever the base; empty where they can be used."""
        if self._method is None:
            return (f"{some([self.peft_type])} is no method of PEFT that adapts layers",)
        # Where PEFT rewrites experts' names it runs patterns over the parameters, too.
        paths = (*self.base.module_paths, *self.base.parameter_paths)
        return config_problems(self.given, self.peft_type, paths, modules=len(self.base.module_paths))

    @cached_property
    def targets(self) -> str | tuple[str, ...] | None:
        """``target_modules`` as it is written: a regular expression or "all-linear", names, or None."""
        written = self.given.get("target_modules")
        return tuple(written) if isinstance(written, list) else written

    @cached_property
    def _read(self) -> tuple[Mapping[str, Any], Refusal | None]:
        """The fields when PEFT comes to match them, and why it does not get there, if it does not."""
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
        """Field that PEFT drops because its class has none of that name -> what may have been meant.

        Source: ``peft.config.PeftConfigMixin.check_kwargs`` and ``from_peft_type``, which only warn.
        """
        assert self._method is not None
        known = [f.name for f in fields(self._method.config_class)]
        near = {name: difflib.get_close_matches(name, known, n=1) for name in self.given if name not in known}
        return {name: found[0] if found else None for name, found in near.items()}

    def _construct(self) -> Refusal | None:
        """Make the configuration class check its own fields."""
        assert self._method is not None
        known = {f.name for f in fields(self._method.config_class) if f.init}
        given = {name: copy.copy(value) for name, value in self.given.items() if name in known}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._method.config_class(**given)
            except Exception as error:
                # The classes refuse with ValueError, TypeError and ImportError, and trip over odd values.
                return Refusal("config", type(error).__name__, _said(error))
        return None

    def _rewrite(self, state: SimpleNamespace) -> Refusal | None:
        """On some model types PEFT turns names of experts into parameters: done by PEFT itself, on names alone."""
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        names = rewritten_names(self.base.model.model_type)
        if not self.is_lora or not names:
            return None
        if _is_all_linear(state.target_modules):
            state.target_modules = sorted({p.rpartition(".")[2] for p in self.all_linear} | names)
        try:
            convert_peft_config_for_transformers(state, self._names_only, conversions=None)
        except ValueError as error:
            return Refusal("fused", _shown(self.targets), _said(error))
        return None

    @property
    def _names_only(self) -> Any:
        """As much of a model as PEFT's rewriting looks at."""
        base = self.base
        return SimpleNamespace(
            config=SimpleNamespace(model_type=base.model.model_type),
            named_modules=lambda: ((path, None) for path in base.module_paths),
            named_parameters=lambda: ((path, None) for path in base.parameter_paths),
        )

    def _fill_in(self, state: SimpleNamespace) -> Refusal | None:
        """PEFT's default targets for the model type, where none are given.

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
            return Refusal("no-default", "target_modules", why)
        return None

    def _expand(self, state: SimpleNamespace) -> None:
        from peft.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION

        if _is_all_linear(state.target_modules):
            state.target_modules = list(self.all_linear)
        targets = state.target_modules
        layers = getattr(state, "layers_to_transform", None) is not None
        # Full paths are not filtered by layer, and the shorter names that PEFT makes of many of them are.
        if layers and isinstance(targets, list) and len(targets) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION:
            state.target_modules = _condensed(targets, self.base.module_paths)

    @cached_property
    def all_linear(self) -> tuple[str, ...]:
        """What "all-linear" stands for: every linear but the output embeddings, or a classifier's head.

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
        """The fields when PEFT comes to match them: experts rewritten, "all-linear" and defaults spelled out."""
        return self._read[0]

    # ---- modules ----

    @property
    def is_all_linear(self) -> bool:
        """Whether the targets are the word "all-linear"."""
        return _is_all_linear(self.targets)

    @cached_property
    def _sites(self) -> Mapping[str, Site]:
        return {site.path: site for site in self.base}

    @cached_property
    def inner(self) -> Mapping[str, Site]:
        """Wrapper's path -> the site of the linear inside it."""
        return {name: site for site in self.base if site.wrapper for name in site.names[1:]}

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The modules that PEFT takes for targets, in the model's order, whatever they are."""
        matches = target_matcher(self.fields)
        named = [path for path in self.base.module_paths if matches(path)]
        tied = self._tied_along(named)
        return tuple(path for path in self.base.module_paths if path in tied) if tied else tuple(named)

    def _tied_along(self, named: Iterable[str]) -> frozenset[str]:
        """With ``ensure_weight_tying``: the named modules, the input embeddings and what is tied to them.

        Source: ``peft.tuners.lora.model.LoraModel._add_targets_to_tie``.
        """
        from peft.utils.constants import EMBEDDING_LAYER_NAMES

        fields = self.fields
        if not (self.is_lora and fields.get("ensure_weight_tying")) or fields.get("modules_to_save"):
            return frozenset()
        targets = fields["target_modules"]
        by_list = isinstance(targets, list) and any(t.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for t in targets)
        by_regex = isinstance(targets, str) and any(re.fullmatch(targets, name) for name in EMBEDDING_LAYER_NAMES)
        shared = next((s for s in self.base if s.kind == "embedding" and s.tied_to), None)
        if shared is None or not (by_list or by_regex):
            return frozenset()
        return frozenset((*named, shared.path, *shared.tied_to))

    @cached_property
    def named(self) -> Mapping[str, tuple[str, ...]]:
        """Entry of ``target_modules``, as written -> the modules it names before anything is filtered out."""
        if self.targets is None:
            return {}
        if isinstance(self.targets, str):
            return {self.targets: tuple(filter(self._without_filters, self.base.module_paths))}
        return _by_entry(self.targets, self.base.module_paths)

    @cached_property
    def _without_filters(self) -> Callable[[str], bool]:
        targets = self.all_linear if _is_all_linear(self.targets) else self.targets
        return target_matcher({"target_modules": targets})

    @cached_property
    def meant(self) -> tuple[str, ...]:
        """The modules that the targets name as they are written, filters applied: before PEFT rewrites experts."""
        targets = self.all_linear if _is_all_linear(self.targets) else self.targets
        if targets is None or not rewritten_names(self.base.model.model_type):
            return self.modules
        return tuple(filter(target_matcher({**self.fields, "target_modules": targets}), self.base.module_paths))

    @cached_property
    def before_exclusion(self) -> tuple[str, ...]:
        """The modules that would be targets without ``exclude_modules``."""
        if not self.fields.get("exclude_modules"):
            return self.modules
        matches = target_matcher({**self.fields, "exclude_modules": None})
        return tuple(path for path in self.base.module_paths if matches(path))

    @cached_property
    def wrappers(self) -> tuple[str, ...]:
        """The targeted modules that are wrappers around a linear."""
        return tuple(path for path in self.modules if path in self.inner)

    @cached_property
    def saved_whole(self) -> Mapping[str, tuple[str, ...]]:
        """Entry of ``modules_to_save`` -> the modules that are trained whole because of it."""
        return {name: tuple(saved_modules(self.base, name)) for name in self.given.get("modules_to_save") or ()}

    # ---- parameters ----

    @cached_property
    def rewritten(self) -> Mapping[str, str]:
        """Written target -> the expert parameter that PEFT takes it for.

        Source: ``peft.utils.transformers_weight_conversion._convert_peft_config_moe``.
        """
        from peft.utils import transformers_weight_conversion as conversion

        if not self.is_lora or not isinstance(self.targets, tuple):
            return {}
        if not rewritten_names(self.base.model.model_type):
            return {}
        pattern = conversion._MODEL_TO_CONVERSION_PATTERN[self.base.model.model_type]
        mapping = conversion._MOE_TARGET_MODULE_MAPPING[pattern]
        leaves = {target: target.rpartition(".")[2] for target in self.targets}
        return {target: mapping[leaf] for target, leaf in leaves.items() if leaf in mapping}

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The parameters that PEFT takes for targets, those it made of experts' names included."""
        wanted = self.fields.get("target_parameters") if self.is_lora else None
        near = suffix_finder(wanted or ())
        return tuple(path for path in self.base.parameter_paths if near(path)) if wanted else ()

    @cached_property
    def named_parameters(self) -> Mapping[str, tuple[str, ...]]:
        """Entry of ``target_parameters``, as written -> the parameters it names."""
        return _by_entry(self.given.get("target_parameters") or (), self.base.parameter_paths)

    # ---- what comes of it ----

    @cached_property
    def refusals(self) -> tuple[Refusal, ...]:
        """What makes PEFT raise, in the order in which it would; empty where it attaches."""
        found = [self._read[1]] if self._read[1] is not None else []
        found += self._refused.values()
        found += filter(None, map(self._parameter_refusal, self.parameters))
        if not found and not self.modules and not self.parameters:
            found.append(Refusal("nothing", _shown(self.targets), "the targets match nothing in the base"))
        return tuple(found)

    @cached_property
    def _refused(self) -> Mapping[str, Refusal]:
        found = ((path, self._mixer_refusal(path) or self._module_refusal(path)) for path in self.modules)
        return {path: refusal for path, refusal in found if refusal is not None}

    def _mixer_refusal(self, path: str) -> Refusal | None:
        why = self._barred.get(path.rpartition(".")[2])
        return Refusal("mixer", path, why) if why else None

    @cached_property
    def _barred(self) -> Mapping[str, str]:
        """Leaf names that PEFT does not adapt on this model type, and its reason."""
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

        found = {}
        config, model = SimpleNamespace(peft_type=self.peft_type), self._names_only
        for leaf in {path.rpartition(".")[2] for path in self.modules}:
            try:
                _check_lora_target_modules_mamba(config, model, leaf)
            except ValueError as error:
                found[leaf] = _said(error)
        return found

    def _module_refusal(self, path: str) -> Refusal | None:
        if path in self.inner:
            wrapper = self.inner[path].wrapper
            return Refusal("wrapper", path, f"a {wrapper.cls if wrapper else 'wrapper'} is no layer PEFT adapts")
        site = self._sites.get(path)
        if site is None:
            inside = self._sites.get(path.rpartition(".")[0])
            if inside is not None and inside.kind == "multihead_attention":
                return None
            return Refusal("module", path, "it is no layer that PEFT adapts")
        why = self._site_refusal(site)
        return Refusal("module", path, why) if why else None

    def _site_refusal(self, site: Site) -> str | None:
        assert self._method is not None
        if site.quantized and not site.adaptable:
            return site.reason
        groups = _groups(site) if self.is_lora else 1
        if groups > 1 and self.rank(site.path) % groups:
            return f"a convolution in {groups} groups takes no rank of {self.rank(site.path)}"
        return refusal_of(self._method, site.kind, len(site.shape))

    def _parameter_refusal(self, path: str) -> Refusal | None:
        holder = path.rpartition(".")[0]
        if not holder:
            return Refusal("parameter", path, "a parameter of the model itself cannot be targeted")
        if holder in self.targeted:
            return Refusal("parameter", path, f"target_modules names {holder} as well")
        site = self.site_of(path)
        dimensions = len(site.shape) if site is not None else 1
        if dimensions not in {2, 3}:
            return Refusal("parameter", path, f"it has {dimensions} dimensions, and only 2 and 3 are supported")
        options = not_on_parameters(self.given)
        if options:
            return Refusal("option", path, f"a bare parameter takes no {', '.join(options.values())}")
        return None

    @cached_property
    def targeted(self) -> frozenset[str]:
        """``modules`` as a set."""
        return frozenset(self.modules)

    def site_of(self, parameter: str) -> Site | None:
        """The site whose weight a parameter is, or None."""
        own = self._sites.get(parameter)
        holder, _, name = parameter.rpartition(".")
        return own if own is not None or name != "weight" else self._sites.get(holder)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites that PEFT would adapt, in the map's order; what it refuses is not among them."""
        paths = {path for path in self.modules if path not in self._refused}
        by_parameter = (self.site_of(path) for path in self.parameters)
        paths |= {site.path for site in by_parameter if site is not None}
        return tuple(site for site in self.base if site.path in paths)

    @cached_property
    def adapted(self) -> frozenset[str]:
        """The paths of ``sites``."""
        return frozenset(site.path for site in self.sites)

    @cached_property
    def by_tower(self) -> Mapping[str, tuple[Site, ...]]:
        """Tower -> the sites that PEFT would adapt in it, in the map's order; towers without any are left out."""
        found: dict[str, list[Site]] = defaultdict(list)
        for site in self.sites:
            found[site.tower].append(site)
        return {tower: tuple(sites) for tower, sites in found.items()}

    @cached_property
    def mentioned(self) -> frozenset[str]:
        """The towers that the targets mention, by the name of a module that holds nothing of another tower."""
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets or ()
        named = (*targets, *(self.given.get("target_parameters") or ()))
        words = set(re.findall(r"\w+", " ".join(named)))
        return frozenset(tower for tower, names in _own_names(self.base).items() if names & words)

    # ---- patterns ----

    def matched_by(self, pattern: str) -> Mapping[str, tuple[str, ...]]:
        """Key of ``rank_pattern`` or ``alpha_pattern``, as written -> the adapted paths that it matches.

        Source: ``peft.utils.other.get_pattern_key``.
        """
        paths = (*self.modules, *self.parameters)
        found = {}
        for key in self.given.get(pattern) or {}:
            matches = re.compile(rf"(.*\.)?({key})$").match
            found[key] = tuple(path for path in paths if matches(path))
        return found

    def rank(self, path: str) -> int:
        """The rank PEFT would use at a targeted path."""
        from peft.utils.other import get_pattern_key

        pattern = self.fields.get("rank_pattern") or {}
        return int(pattern.get(get_pattern_key(pattern.keys(), path), self.fields.get("r") or 0))


def _own_names(base: ModelMap) -> dict[str, set[str]]:
    """Tower -> the names above its layers that no other tower has."""
    names: dict[str, set[str]] = {}
    for site in base:
        parts = site.names[-1].split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        names.setdefault(site.tower, set()).update(parts[:at])
    return {
        tower: found.difference(*(other for name, other in names.items() if name != tower))
        for tower, found in names.items()
    }


# Tower -> what a batch has to hold for the tower to work. A projector works for any of them.
_FED_BY = {"vision": frozenset({"image", "video"}), "audio": frozenset({"audio"})}
_NOT_TEXT = frozenset({"image", "video", "audio"})


def always_fed(base: ModelMap) -> frozenset[str]:
    """The towers that every batch feeds, and the head."""
    return frozenset((*fed_towers(base, tuple(tower.name for tower in base.towers)), "head"))


def is_fed(base: ModelMap, tower: str, modalities: Iterable[str]) -> bool:
    """Whether batches that hold these modalities feed a tower."""
    return tower in always_fed(base) or not _FED_BY.get(tower, _NOT_TEXT).isdisjoint(modalities)


def with_reach(check: Callable[[Facts, Reach], Observation]) -> Callable[[Facts], Observation]:
    """A check of ``facts`` and their reach, made to say "unknown" where the configuration cannot be read."""

    def checked(facts: Facts) -> Observation:
        reach = facts.reach
        if reach.problems:
            return unknown(f"the configuration cannot be used: {some(reach.problems)}")
        return check(facts, reach)

    return checked


def _groups(site: Site) -> int:
    """How many groups a convolution has. One with an objection that sees a single channel is depthwise."""
    said = _IN_GROUPS.match(site.reason or "")
    if site.kind != "conv" or site.adaptable:
        return 1
    return int(said[1]) if said else site.shape[0] if site.shape[1] == 1 else 1


def _by_entry(entries: Iterable[str], paths: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """Entry -> the paths that are it, or end with it after a dot."""
    found: dict[str, list[str]] = {entry: [] for entry in entries}
    near = suffix_finder(found)
    for path in paths:
        for entry in near(path):
            found[entry].append(path)
    return {entry: tuple(named) for entry, named in found.items()}


def _condensed(targets: list[str], paths: Iterable[str]) -> list[str]:
    """What PEFT makes of a long list before it matches. Source: ``BaseTuner.inject_adapter``."""
    from peft.tuners.tuners_utils import _find_minimal_target_modules

    near = suffix_finder(targets)
    others = [path for path in paths if not near(path)]
    shorter = _find_minimal_target_modules(targets, others)
    return sorted(shorter) if len(shorter) < len(targets) else targets


def _is_all_linear(targets: Any) -> bool:
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset | tuple):
        return sorted(value, key=str)
    return getattr(value, "value", value)


def _shown(targets: str | tuple[str, ...] | None) -> str:
    return some([targets] if isinstance(targets, str) else targets or ())


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
