"""What an engine file says: facts about what serves adapters, each with its versions and its source.

To add an engine, add ``engines/facts/<name>.py`` with an ``ENGINE``; nothing else names it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from packaging.specifiers import SpecifierSet
from packaging.version import Version

# Next steps that several engines' facts name.
MERGE = "merge the adapter"
FOLD_SCALE = "write the scale into lora_B, and set lora_alpha to r"


class Feature(StrEnum):
    """Something an adapter may have that engines differ about: its name in JSON, and in a sentence."""

    words: str

    def __new__(cls, value: str, words: str) -> Feature:
        feature = str.__new__(cls, value)
        feature._value_, feature.words = value, words
        return feature

    DORA = "dora", "DoRA"
    BIAS = "bias", "trained biases"
    ALORA = "alora", "an activated LoRA"
    MOVED_BASE = "moved base", "an initializer that moves the base"
    MODULES_TO_SAVE = "modules_to_save", "modules saved whole"
    TRAINABLE_TOKENS = "trainable tokens", "trained tokens"
    EMBEDDING = "embedding", "LoRA on embeddings"
    LM_HEAD = "lm_head", "LoRA on the output layer"
    TIED_HEAD = "tied lm_head", "LoRA on an output layer that is tied to the embeddings"
    OTHER_METHOD = "other method", "methods other than LoRA"
    VARIANT = "variant of LoRA", "this variant of LoRA"
    TOWERS = "towers", "LoRA on a tower of another modality"
    INNER_NAMES = "inner names", "the names of linears inside wrappers"
    STACKED_EXPERTS = "stacked experts", "LoRA on stacked experts"
    OTHER_PREFIX = "other prefix", "names of another class"
    KEY_IS_VALUE = "key is value", "LoRA on keys that are the values too"
    NO_VALUE = "no value", "a query without a value projection beside it"
    RSLORA = "rslora", "rsLoRA's scale"
    RANK_PATTERN = "rank pattern", "per-layer ranks"
    ALPHA_PATTERN = "alpha pattern", "per-layer scales"


class Stance(StrEnum):
    """What an engine does with a feature. ``IGNORES``: it loads the adapter, and silently computes otherwise."""

    TAKES = "takes"
    REFUSES = "refuses"
    IGNORES = "ignores"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Fact:
    """One fact about one feature.

    Attributes:
        says: what happens, as the end of a sentence that begins with the engine's name.
        source: the thread or the source file that says so.
        versions: the engine's versions that the source covers.
        help: the next step, or None where there is none or none is needed; with a flag, where that works.
        flag: the engine's option with which it takes the feature, or None.
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
        default: the largest rank without the option.
        largest: the largest rank with it.
        flag: the option, with ``{}`` for the rank.
        steps: the values the option takes, ascending.
        source: the page or source file that says so.
        versions: the engine's versions that the source covers.
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
        title: as its project writes it.
        version: the one that is served with, or the newest known; None where the facts name no versions.
        known: the versions that the facts cover; everything is unknown of others.
        facts: the first that covers a feature and a version counts.
        ranks: its limits on the rank; the first that covers a version counts.
    """

    name: str
    title: str = ""
    version: Version | None = None
    known: SpecifierSet = field(default_factory=SpecifierSet)
    facts: tuple[Fact, ...] = field(default=(), repr=False)
    ranks: tuple[RankLimit, ...] = field(default=(), repr=False)

    def fact(self, feature: Feature) -> Fact:
        """Return what this version does with a feature; ``UNKNOWN`` where no source says."""
        if self._covers(self.known):
            found = next((f for f in self.facts if f.feature is feature and self._covers(f.versions)), None)
            if found is not None:
                return found
        return Fact(feature, Stance.UNKNOWN, f"is not known to take {feature.words}, nor to refuse it", "")

    @property
    def rank_limit(self) -> RankLimit | None:
        """The limit on the rank, None where it is not known."""
        known = self.ranks if self._covers(self.known) else ()
        return next((limit for limit in known if self._covers(limit.versions)), None)

    def _covers(self, versions: SpecifierSet) -> bool:
        return self.version is None or versions.contains(self.version, prereleases=True)

    def __str__(self) -> str:
        return self.title if self.version is None else f"{self.title} {self.version}"


def ignores_moved_base(source: str) -> Fact:
    """Return the fact that an engine adds a LoRA to the original base, whatever its initializer did to it."""
    says = "adds B·A to the original base, which is not the one it was trained on"
    help = "convert it to a plain LoRA (GK604), or merge it"
    return Fact(Feature.MOVED_BASE, Stance.IGNORES, says, source, help=help)


def ignores_invocation_tokens(source: str) -> Fact:
    """Return the fact that an engine runs an activated LoRA as if it were a plain one."""
    says = "ignores invocation tokens, so that the adapter acts on the whole prompt"
    help = "serve it with an engine that knows activated LoRA (llama.cpp); it cannot be merged"
    return Fact(Feature.ALORA, Stance.IGNORES, says, source, help=help)


def ignores_patterns(rank_source: str, alpha_source: str) -> tuple[Fact, Fact]:
    """Return the facts that an engine scales every layer by the configuration's own alpha and rank."""
    says = "scales every layer by lora_alpha / r"
    return (
        Fact(Feature.RANK_PATTERN, Stance.IGNORES, says, rank_source, help=FOLD_SCALE),
        Fact(Feature.ALPHA_PATTERN, Stance.IGNORES, says, alpha_source, help=FOLD_SCALE),
    )
