"""What stock PEFT would do with a configuration on a base, worked out from the map: no model is built."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

from graftkit.checks.peft_config.raw import RawPeftConfig, Refusal, RefusalKind, one_line
from graftkit.planning.config.extras import saved_modules
from graftkit.planning.config.methods import refusal_of
from graftkit.planning.config.options import not_on_parameters
from graftkit.planning.matching import inside_of, key_matches, suffix_finder, target_matcher, value_at
from graftkit.surveying.sites import ModelMap, Obstacle, Site


@dataclass(frozen=True)
class ResolvedTargets(RawPeftConfig):
    """A stock PEFT configuration matched with a base."""

    # ---- modules ----

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The modules that PEFT targets, in the model's order, of any kind."""
        matches = target_matcher(self.fields)
        named = tuple(filter(matches, self.base.module_paths))
        tied = self._tied_along(named)
        return tuple(path for path in self.base.module_paths if path in tied) if tied else named

    def _tied_along(self, named: Iterable[str]) -> frozenset[str]:
        """Return, for ``ensure_weight_tying``, the named modules, the input embeddings and what is tied to them.

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
        """Entry of ``target_modules``, as written -> the modules it names, before filters."""
        if self.targets is None:
            return {}
        if isinstance(self.targets, str):
            return {self.targets: tuple(filter(self._without_filters, self.base.module_paths))}
        return _by_entry(self.targets, self.base.module_paths)

    @cached_property
    def _without_filters(self) -> Callable[[str], bool]:
        return target_matcher({"target_modules": self.expanded_targets})

    @cached_property
    def meant(self) -> tuple[str, ...]:
        """The modules that the targets name after filters, before PEFT rewrites the names of experts."""
        if self.expanded_targets is None or not self.expert_names:
            return self.modules
        matches = target_matcher({**self.fields, "target_modules": self.expanded_targets})
        return tuple(filter(matches, self.base.module_paths))

    @cached_property
    def before_exclusion(self) -> tuple[str, ...]:
        """The modules that would be targets without ``exclude_modules``."""
        if not self.fields.get("exclude_modules"):
            return self.modules
        matches = target_matcher({**self.fields, "exclude_modules": None})
        return tuple(filter(matches, self.base.module_paths))

    @cached_property
    def not_excluded(self) -> Mapping[str, tuple[str, ...]]:
        """Entry of a list ``exclude_modules`` -> the targets inside the modules it names, which PEFT adapts."""
        entries = self.given.get("exclude_modules") or ()
        listed = () if isinstance(entries, str) else entries
        inside = {entry: tuple(inside_of(entry, self.modules)) for entry in listed}
        return {entry: paths for entry, paths in inside.items() if paths}

    @cached_property
    def wrappers(self) -> tuple[str, ...]:
        """The targeted modules that are wrappers around a linear."""
        return tuple(path for path in self.modules if path in self.base.inner)

    @cached_property
    def composites(self) -> tuple[str, ...]:
        """The targeted modules that are composed of linears."""
        return tuple(path for path in self.modules if path in self.base.composites)

    def linears_meant(self, path: str) -> tuple[str, ...]:
        """Return the linears that a targeted module stands for: itself, or those inside it.

        Of a composite none where the targets name linears inside it too: they say which.
        """
        if path in self.base.inner:
            return (self.base.inner[path].path,)
        if path not in self.base.composites:
            return (path,)
        inside = self.base.composites[path]
        named = any(not self.targeted.isdisjoint(site.names) for site in inside)
        return () if named else tuple(site.path for site in inside)

    @cached_property
    def saved_whole(self) -> Mapping[str, tuple[str, ...]]:
        """Entry of ``modules_to_save`` -> the modules that it trains whole."""
        return {name: tuple(saved_modules(self.base, name)) for name in self.given.get("modules_to_save") or ()}

    # ---- parameters ----

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The parameters that PEFT targets, including those that it made of experts' names."""
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
        """What makes PEFT raise, in the order in which it would; empty where PEFT attaches."""
        found = [self._read[1]] if self._read[1] is not None else []
        found += self._refused.values()
        found += filter(None, map(self._parameter_refusal, self.parameters))
        if not found and not self.modules and not self.parameters:
            found.append(Refusal(RefusalKind.NOTHING, self.shown_targets, "the targets match nothing in the base"))
        return tuple(found)

    def refusal(self, *kinds: RefusalKind) -> Refusal | None:
        """Return the first refusal of these kinds, or None."""
        return next((refusal for refusal in self.refusals if refusal.kind in kinds), None)

    @cached_property
    def _refused(self) -> Mapping[str, Refusal]:
        found = ((path, self._mixer_refusal(path) or self._module_refusal(path)) for path in self.modules)
        return {path: refusal for path, refusal in found if refusal is not None}

    def _mixer_refusal(self, path: str) -> Refusal | None:
        why = self._barred.get(path.rpartition(".")[2])
        return Refusal(RefusalKind.MIXER, path, why) if why else None

    @cached_property
    def _barred(self) -> Mapping[str, str]:
        """Leaf name that PEFT does not adapt on this model type -> its reason."""
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

        found = {}
        config, model = SimpleNamespace(peft_type=self.peft_type), self._names_only
        for leaf in {path.rpartition(".")[2] for path in self.modules}:
            try:
                _check_lora_target_modules_mamba(config, model, leaf)
            except ValueError as error:
                found[leaf] = one_line(error)
        return found

    def _module_refusal(self, path: str) -> Refusal | None:
        if path in self.base.inner:
            wrapper = self.base.inner[path].wrapper
            why = f"PEFT does not adapt a {wrapper.cls if wrapper else 'wrapper'}"
            return Refusal(RefusalKind.WRAPPER, path, why)
        if path in self.base.composites:
            cls = next(c.cls for c in self.base.composites[path][0].composites if c.path == path)
            return Refusal(RefusalKind.WRAPPER, path, f"PEFT does not adapt a {cls}")
        site = self.base.by_path.get(path)
        if site is None:
            inside = self.base.by_path.get(path.rpartition(".")[0])
            if inside is not None and inside.kind == "multihead_attention":
                return None
            return Refusal(RefusalKind.MODULE, path, "it is not a layer that PEFT adapts")
        reason = self._site_refusal(site)
        return Refusal(RefusalKind.MODULE, path, reason) if reason else None

    def _site_refusal(self, site: Site) -> str | None:
        assert self._method is not None
        if site.obstacle is Obstacle.QUANTIZER_MISSING:
            return site.reason
        groups = site.groups if self.is_lora else 1
        if groups > 1 and self.rank(site.path) % groups:
            return f"a convolution in {groups} groups takes no rank of {self.rank(site.path)}"
        return refusal_of(self._method, site.kind, len(site.shape))

    def _parameter_refusal(self, path: str) -> Refusal | None:
        holder = path.rpartition(".")[0]
        if not holder:
            return Refusal(RefusalKind.PARAMETER, path, "a parameter of the model itself cannot be targeted")
        if holder in self.targeted:
            return Refusal(RefusalKind.PARAMETER, path, f"target_modules names {holder} as well")
        site = self.site_of(path)
        dimensions = len(site.shape) if site is not None else 1
        if dimensions not in {2, 3}:
            why = f"it has {dimensions} dimensions, and only 2 and 3 are supported"
            return Refusal(RefusalKind.PARAMETER, path, why)
        options = not_on_parameters(self.given)
        if options:
            return Refusal(RefusalKind.OPTION, path, f"a bare parameter takes no {', '.join(options.values())}")
        return None

    @cached_property
    def targeted(self) -> frozenset[str]:
        """``modules`` as a set."""
        return frozenset(self.modules)

    def site_of(self, parameter: str) -> Site | None:
        """Return the site whose weight a parameter is, or None."""
        own = self.base.by_path.get(parameter)
        holder, _, name = parameter.rpartition(".")
        return own if own is not None or name != "weight" else self.base.by_path.get(holder)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites that PEFT would adapt, in the map's order, without those it refuses."""
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
        """Tower -> the sites that PEFT would adapt in it, in the map's order; towers without one are missing."""
        found: dict[str, list[Site]] = defaultdict(list)
        for site in self.sites:
            found[site.tower].append(site)
        return {tower: tuple(sites) for tower, sites in found.items()}

    @cached_property
    def mentioned(self) -> frozenset[str]:
        """The towers that the targets mention, by the name of a module that only this tower has."""
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets or ()
        named = (*targets, *(self.given.get("target_parameters") or ()))
        words = set(re.findall(r"\w+", " ".join(named)))
        return frozenset(tower for tower, names in _own_names(self.base).items() if names & words)

    # ---- patterns ----

    def matched_by(self, pattern: str) -> Mapping[str, tuple[str, ...]]:
        """Return key of ``rank_pattern`` or ``alpha_pattern``, as written -> the adapted paths that it matches."""
        paths = (*self.modules, *self.parameters)
        keys = self.given.get(pattern) or {}
        return {key: tuple(path for path in paths if key_matches(key, path)) for key in keys}

    def rank(self, path: str) -> int:
        """Return the rank that PEFT would use at a targeted path."""
        return int(value_at(self.fields.get("rank_pattern"), path, self.fields.get("r") or 0))


def _by_entry(entries: Iterable[str], paths: Iterable[str]) -> Mapping[str, tuple[str, ...]]:
    """Return entry -> the paths that equal it, or end with it after a dot."""
    found: dict[str, list[str]] = {entry: [] for entry in entries}
    near = suffix_finder(found)
    for path in paths:
        for entry in near(path):
            found[entry].append(path)
    return {entry: tuple(named) for entry, named in found.items()}


def _own_names(base: ModelMap) -> dict[str, set[str]]:
    """Return, by tower, the module names above its layers that no other tower has."""
    names: dict[str, set[str]] = {}
    for site in base:
        parts = site.names[-1].split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        names.setdefault(site.tower, set()).update(parts[:at])
    return {
        tower: found.difference(*(other for name, other in names.items() if name != tower))
        for tower, found in names.items()
    }
