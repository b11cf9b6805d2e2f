"""What an engine file says: facts about what serves adapters, each with its versions and its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from packaging.specifiers import SpecifierSet
from packaging.version import Version


class Feature(StrEnum):
    """One thing an adapter may have that engines differ about."""

    DORA = "dora"
    BIAS = "bias"
    ALORA = "alora"
    MOVED_BASE = "moved base"
    MODULES_TO_SAVE = "modules_to_save"
    TRAINABLE_TOKENS = "trainable tokens"
    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    TIED_HEAD = "tied lm_head"
    OTHER_METHOD = "other method"
    VARIANT = "variant of LoRA"
    TOWERS = "towers"
    INNER_NAMES = "inner names"
    STACKED_EXPERTS = "stacked experts"
    OTHER_PREFIX = "other prefix"
    KEY_IS_VALUE = "key is value"
    NO_VALUE = "no value"
    RSLORA = "rslora"
    RANK_PATTERN = "rank pattern"
    ALPHA_PATTERN = "alpha pattern"


class Stance(StrEnum):
    """What an engine makes of a feature. ``IGNORES``: it loads, and computes something else without a word."""

    TAKES = "takes"
    REFUSES = "refuses"
    IGNORES = "ignores"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Fact:
    """One fact about one feature.

    Attributes:
        feature: what it is about.
        stance: what the engine makes of it.
        says: what happens, as the end of a sentence that begins with the engine's name.
        source: the thread or the source file that says so.
        versions: of the engine, for which the source says so.
        help: the way out, or None where there is none or none is needed; with a flag, where that works.
        flag: an option of the engine with which it takes the feature, or None.
    """

    feature: Feature
    stance: Stance
    says: str
    source: str
    versions: SpecifierSet = field(default_factory=SpecifierSet)
    help: str | None = None
    flag: str | None = None


@dataclass(frozen=True)
class RankLimit:
    """How large a rank an engine takes.

    Attributes:
        default: without an option.
        largest: with it.
        flag: the option, with ``{}`` for the rank.
        steps: the values the option takes, ascending.
        source: the source file that says so.
        versions: of the engine.
    """

    default: int
    largest: int
    flag: str
    steps: tuple[int, ...]
    source: str
    versions: SpecifierSet


@dataclass(frozen=True)
class Engine:
    """One engine that serves adapters, in one version.

    Attributes:
        name: as ``--target`` takes it.
        title: as its makers write it.
        version: the one that is served with, or the newest known; None where the versions carry no order here.
        known: the versions that the facts were read for. Of others nothing is known.
        facts: what it makes of each feature; the first that fits a version counts.
        ranks: its limits on the rank, likewise.
    """

    name: str
    title: str = ""
    version: Version | None = None
    known: SpecifierSet = field(default_factory=SpecifierSet)
    facts: tuple[Fact, ...] = field(default=(), repr=False)
    ranks: tuple[RankLimit, ...] = field(default=(), repr=False)

    def fact(self, feature: Feature) -> Fact:
        """What this version makes of a feature; ``UNKNOWN`` where no source says."""
        if self._covers(self.known):
            found = next((f for f in self.facts if f.feature is feature and self._covers(f.versions)), None)
            if found is not None:
                return found
        return Fact(feature, Stance.UNKNOWN, f"is not known to take {_WORDS[feature]}, nor to refuse it", "")

    @property
    def rank_limit(self) -> RankLimit | None:
        """The limit on the rank, where it is known."""
        known = self.ranks if self._covers(self.known) else ()
        return next((limit for limit in known if self._covers(limit.versions)), None)

    def _covers(self, versions: SpecifierSet) -> bool:
        return self.version is None or versions.contains(self.version, prereleases=True)

    def __str__(self) -> str:
        return self.title if self.version is None else f"{self.title} {self.version}"


_WORDS: Mapping[Feature, str] = {
    Feature.DORA: "DoRA",
    Feature.BIAS: "trained biases",
    Feature.ALORA: "an activated LoRA",
    Feature.MOVED_BASE: "an initializer that moves the base",
    Feature.MODULES_TO_SAVE: "modules saved whole",
    Feature.TRAINABLE_TOKENS: "trained tokens",
    Feature.EMBEDDING: "LoRA on embeddings",
    Feature.LM_HEAD: "LoRA on the output layer",
    Feature.TIED_HEAD: "LoRA on an output layer that is tied to the embeddings",
    Feature.OTHER_METHOD: "methods other than LoRA",
    Feature.VARIANT: "this variant of LoRA",
    Feature.TOWERS: "LoRA on a tower of another modality",
    Feature.INNER_NAMES: "the names of linears inside wrappers",
    Feature.STACKED_EXPERTS: "LoRA on stacked experts",
    Feature.OTHER_PREFIX: "names of another class",
    Feature.KEY_IS_VALUE: "LoRA on keys that are the values too",
    Feature.NO_VALUE: "a query without a value projection beside it",
    Feature.RSLORA: "rsLoRA's scale",
    Feature.RANK_PATTERN: "ranks of their own",
    Feature.ALPHA_PATTERN: "scales of their own",
}
