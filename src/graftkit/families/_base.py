"""What a family file can say: data plus a little code. Nothing model-specific lives elsewhere.

To add a family, add ``families/<name>.py`` with a ``FAMILY``; nothing else names it, and the tests run on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# The label of a token that is not learned: the default ``ignore_index`` of torch's cross entropy.
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Bypassed:
    """A weight that the model reads without calling its module, so that an adapter on it is (partly) ignored.

    Attributes:
        pattern: an ``fnmatch`` pattern on the module path, e.g. ``"*.mixer.out_proj"``.
        reason: what reads the weight, in one sentence.
    """

    pattern: str
    reason: str


@dataclass(frozen=True)
class Requirement:
    """Versions of a package that a family needs to compute what it should.

    Attributes:
        package: its distribution name.
        versions: a PEP 440 specifier of the versions that do.
        reason: what goes wrong with the others, in one sentence.
        source: the thread or source file that says so.
    """

    package: str
    versions: str
    reason: str
    source: str


@dataclass(frozen=True)
class ServedTwin:
    """What inference engines read in a checkpoint of a family, beyond what transformers needs to build a twin.

    Attributes:
        overrides: configuration values of a twin that engines load; nested mappings address sub-configurations.
        tokens: texts of special tokens that a processor or a converter looks up, by the configuration's field that
            holds the id, or by themselves where there is none.
        files: JSON files that belong beside the weights, by name: of image processors and the like.
        released: ``(fields) -> fields``: from what transformers writes into ``config.json``, the fields that
            released configurations have instead; nested mappings address sub-configurations.
        weights: engine -> ``(name, tensor) -> (name, tensor) …``: a weight as a checkpoint has it that the engine
            wrote itself, where it reads those of transformers only in part.
        tokenizer_class: what ``tokenizer_config.json`` calls the tokenizer, where a converter decides by it.
        starts_with_bos: whether the tokenizer, and the chat template, put the ``bos`` token before a prompt.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    released: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    weights: Mapping[str, Callable[..., Iterable[tuple[str, Any]]]] = field(default_factory=dict)
    tokenizer_class: str | None = None
    starts_with_bos: bool = False


@dataclass(frozen=True)
class Family:
    """Facts about one family of models that their structure does not show.

    Attributes:
        model_types: the transformers model types it covers, sub-configurations included.
        geometries: public hub id -> configuration, as ``config.json`` would have it.
        bypassed: weights that an adapter cannot reach through their module.
        twin_overrides: configuration values of the twin that replace those of the generic shrinking rules;
            nested mappings address sub-configurations.
        example_inputs: ``(model, batch_size, generator, modalities) -> dict`` of model inputs, for models
            whose inputs cannot be derived from the configuration alone; ``modalities`` is a frozenset of
            "text", "image", "audio". None where the generic batch is right.
        requires: versions of packages that these models need.
        reach_unknown: why a twin does not show which weights get a gradient; None where it does.
        served_twin: what a twin needs so that inference engines load it.
    """

    name: str
    model_types: tuple[str, ...]
    geometries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    bypassed: tuple[Bypassed, ...] = ()
    twin_overrides: Mapping[str, Any] = field(default_factory=dict)
    example_inputs: Callable[..., dict[str, Any]] | None = None
    requires: tuple[Requirement, ...] = ()
    reach_unknown: str | None = None
    served_twin: ServedTwin = field(default_factory=ServedTwin)
