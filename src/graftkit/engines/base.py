"""What an engine file says: facts about what serves adapters, each with its versions and its source.

To add an engine, add ``engines/facts/<name>.py`` with an ``ENGINE``; nothing else names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from graftkit.engines.releases.table import ClassSupport, read_table

# Towers that serve other modalities than text. Engines treat them apart from the language model.
OTHER_MODALITIES = frozenset({"vision", "audio", "projector"})


class Feature(StrEnum):
    """Something an adapter may have that engines differ about: its name in JSON, and in a sentence."""

    words: str

    def __new__(cls, value: str, words: str) -> Feature:
        feature = str.__new__(cls, value)
        feature._value_, feature.words = value, words
        return feature

    # What the files and their configuration say.
    PEFT_FILES = "peft files", "an adapter in PEFT's files"
    OTHER_METHOD = "other method", "methods other than LoRA"
    NO_WEIGHTS = "no weights", "methods that change no weights"
    DORA = "dora", "DoRA"
    BIAS = "bias", "trained biases"
    EMPTY_BIAS = "empty bias", "the option for biases, without trained ones"
    ALORA = "alora", "an activated LoRA"
    MOVED_BASE = "moved base", "an initializer that moves the base"
    MODULES_TO_SAVE = "modules_to_save", "modules saved whole"
    TRAINED_NORMS = "trained norms", "norms saved whole"
    TRAINABLE_TOKENS = "trainable tokens", "trained tokens"
    REPLICATION = "layer replication", "replicated layers"
    BLOCK_DIAGONAL = "bd-lora", "block-diagonal LoRA"
    QALORA = "qalora", "QALoRA"
    VARIANT = "variant of LoRA", "this variant of LoRA"
    REGEX_TARGETS = "regex targets", "targets as one regular expression"
    RSLORA = "rslora", "rsLoRA's scale"
    RANK_PATTERN = "rank pattern", "per-layer ranks"
    ALPHA_PATTERN = "alpha pattern", "per-layer scales"
    # What the base is.
    MODEL_CLASS = "model class", "LoRA on this class of models"
    FP8_BASE = "fp8 base", "LoRA on a base in FP8"
    FP8_EXPERTS = "fp8 experts", "LoRA on the experts of a base in FP8"
    # What is adapted.
    LINEAR = "linear", "LoRA on linears"
    STACKED_EXPERTS = "stacked experts", "LoRA on stacked experts"
    ROUTER = "router", "LoRA on routers"
    EMBEDDING = "embedding", "LoRA on embeddings"
    TIED_EMBEDDING = "tied embedding", "LoRA on embeddings that the output layer shares"
    LM_HEAD = "lm_head", "LoRA on the output layer"
    TIED_HEAD = "tied lm_head", "LoRA on an output layer that is tied to the embeddings"
    TOWERS = "towers", "LoRA on a tower of another modality"
    NO_LAYER = "no layer", "LoRA on modules outside “layers.N”"
    INNER_NAMES = "inner names", "the names of linears inside wrappers"
    OTHER_PREFIX = "other prefix", "names of another class"
    KEY_IS_VALUE = "key is value", "LoRA on keys that are the values too"
    NO_VALUE = "no value", "a query without a value projection beside it"


class Stance(StrEnum):
    """What an engine does with a feature. ``IGNORES``: it loads the adapter, and silently computes otherwise."""

    TAKES = "takes"
    REFUSES = "refuses"
    IGNORES = "ignores"
    UNKNOWN = "unknown"


class Remedy(StrEnum):
    """What makes an engine serve a feature after all: ``graft convert`` for that engine, or ``graft merge``."""

    CONVERT = "convert"
    MERGE = "merge"


@dataclass(frozen=True)
class Model:
    """What facts by architecture are looked up by.

    Attributes:
        cls: the name of transformers' class, as ``architectures`` in the configuration.
        model_type: transformers' model type.
    """

    cls: str | None = None
    model_type: str | None = None


@dataclass(frozen=True)
class Fact:
    """One fact about one feature.

    Attributes:
        says: what happens, as the end of a sentence that begins with the engine's name.
        source: the thread or the source file that says so.
        versions: the engine's versions that the source covers.
        help: the next step, where it is neither converting nor merging, or says more than that.
        flag: the engine's option with which it takes the feature, or None.
        remedy: what makes it serve the feature, or None where nothing does, or nothing is needed.
        models: the model types that it is about; empty: all.
        names: the last parts of the module names that it is about; empty: all.
    """

    feature: Feature
    stance: Stance
    says: str
    source: str
    versions: SpecifierSet = field(default_factory=SpecifierSet)
    help: str | None = None
    flag: str | None = None
    remedy: Remedy | None = None
    models: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()

    @property
    def specific(self) -> bool:
        """Whether it is about some architectures or some modules alone."""
        return bool(self.models or self.names)

    def about(self, model: Model, name: str | None) -> bool:
        """Check whether it is about a model, and about a module with that last part of its name."""
        return (not self.models or model.model_type in self.models) and (not self.names or name in self.names)


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
        facts: see ``fact`` for which counts.
        ranks: its limits on the rank; the first that covers a version counts.
        dialect: what ``graft convert --to`` calls the files that it reads; None: it reads no adapter.
        table: the release whose table is read, where the engine's versions are not told apart.
        by_class: the facts that follow from what a release's source says of a class; None: it does not know it.
    """

    name: str
    title: str = ""
    version: Version | None = None
    known: SpecifierSet = field(default_factory=SpecifierSet)
    facts: tuple[Fact, ...] = field(default=(), repr=False)
    ranks: tuple[RankLimit, ...] = field(default=(), repr=False)
    dialect: str | None = "peft"
    table: Version | None = None
    by_class: Callable[[Feature, ClassSupport | None, str | None], Iterator[Fact]] | None = field(
        default=None, repr=False
    )

    def fact(self, feature: Feature, model: Model | None = None, name: str | None = None) -> Fact:
        """Return what this version does with a feature; ``UNKNOWN`` where no source says.

        Facts on some architectures or modules alone come first, then what the source of this release says of the
        model's class (`graftkit.engines.releases`), then facts on everything; in each, the first that fits.

        Args:
            model: the base; None where it is not known, and facts by architecture do not apply.
            name: the last part of the name of the module in question.
        """
        return next(self._facts(feature, model or Model(), name))

    def _facts(self, feature: Feature, model: Model, name: str | None) -> Iterator[Fact]:
        known = self.facts if self._covers(self.known) else ()
        fitting = [f for f in known if f.feature is feature and f.about(model, name) and self._covers(f.versions)]
        yield from (fact for fact in fitting if fact.specific)
        if known:
            yield from self._of_release(feature, model, name)
        yield from (fact for fact in fitting if not fact.specific)
        yield Fact(feature, Stance.UNKNOWN, f"is not known to take {feature.words}, nor to refuse it", "")

    def _of_release(self, feature: Feature, model: Model, name: str | None) -> Iterator[Fact]:
        version = self.table or self.version
        if self.by_class is None or version is None or model.cls is None:
            return
        table = read_table(self.name, version)
        if table is not None:
            support = table.classes.get(model.cls) or table.classes.get(model.model_type or "")
            yield from self.by_class(feature, support, name)

    @property
    def conversion(self) -> str:
        """The command that writes an adapter as this engine reads it."""
        return f"graft convert ADAPTER OUT --to {self.dialect or 'ENGINE'}"

    def advice(self, fact: Fact) -> str | None:
        """Return the next step after a fact, or None where there is none."""
        steps = [fact.help]
        if fact.flag is not None:
            steps.insert(0, f"start the server with {fact.flag}")
        elif fact.remedy is Remedy.CONVERT:
            steps.insert(0, self.conversion)
        elif fact.remedy is Remedy.MERGE:
            steps.insert(0, "merge the adapter: graft merge BASE ADAPTER OUT")
        return "; ".join(filter(None, steps)) or None

    @property
    def rank_limit(self) -> RankLimit | None:
        """The limit on the rank, None where it is not known."""
        known = self.ranks if self._covers(self.known) else ()
        return next((limit for limit in known if self._covers(limit.versions)), None)

    def _covers(self, versions: SpecifierSet) -> bool:
        return self.version is None or versions.contains(self.version, prereleases=True)

    def __str__(self) -> str:
        return self.title if self.version is None else f"{self.title} {self.version}"
