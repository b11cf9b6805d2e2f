"""What a survey returns: a ModelMap of towers and sites, and what stands against adapting a site."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from graftkit._version import SCHEMA_VERSION
from graftkit.surveying.checkpoint.comparison import Checkpoint
from graftkit.surveying.faults import FoundFault
from graftkit.surveying.text import survey_text

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# The tower of modules of which neither the model's structure nor names tell what feeds them.
UNKNOWN_TOWER = "unknown"


class Obstacle(Enum):
    """What stands against LoRA on a site. The value is the reason that people read, with blanks for the facts."""

    BYPASSED = "{reader}"
    QUANTIZER_MISSING = "unknown: quantized by {quantizer}, and PEFT needs {package}, which is not installed"
    OWN_FORWARD = "{cls} overrides {base}.forward, which an adapter made for {base} would not follow"
    GROUPED_CONV = "a convolution in {groups} groups: the rank would have to be a multiple of {groups}"
    NOT_FLOATING = "its weight is {dtype}, and it is not known how it is quantized"
    LOOSE_PARAMETER = "unknown: a bare parameter outside experts and routers"

    def because(self, **facts: object) -> Objection:
        """Return the objection that this obstacle makes, with the facts in its reason."""
        return Objection(self, self.value.format(**facts))


@dataclass(frozen=True, slots=True)
class Objection:
    """An obstacle on one site, and the reason as a person reads it."""

    obstacle: Obstacle
    reason: str


class Note(StrEnum):
    """What else an adapter on a site would reach. The value is the note that people read."""

    KEY_IS_VALUE = "also makes the values: this layer has no value projection"
    SHARED_KV = "reads keys and values of another layer: this layer has no projections for them"


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A module whose only weights are one linear's, and whose forward calls that linear.

    Attributes:
        cls: its class name.
        path: its module path; of nested wrappers the outermost one's.
        bounded: whether it stores bounds for what its linear takes and gives. False where all are known to be
            infinite; without weights they are not known.
    """

    cls: str
    path: str
    bounded: bool = False

    def levels(self, linear: str) -> tuple[str, ...]:
        """Return the paths of every wrapper around the linear at that path, the innermost first."""
        parts = linear.split(".")
        return tuple(".".join(parts[:n]) for n in range(len(parts) - 1, self.path.count("."), -1))

    def to_dict(self) -> dict[str, str]:
        return {"class": self.cls, "path": self.path}


@dataclass(frozen=True, slots=True)
class Composite:
    """A module that is composed of linears, with weights beside them or not: its name means all of them.

    Attributes:
        cls: its class name.
        path: its module path.
    """

    cls: str
    path: str

    def to_dict(self) -> dict[str, str]:
        return {"class": self.cls, "path": self.path}


@dataclass(frozen=True, slots=True)
class Site:
    """One weight that an adapter can, or cannot, attach to.

    Attributes:
        path: what PEFT matches targets against: the module's, or for ``kind == "parameter"`` the parameter's.
        tower: "language", "vision", "audio", "projector", "head", "other", or "unknown" where nothing shows it.
        role: "attention.q", "mlp.gate", "expert", "router", "embedding", "lm_head", "conv", "ssm", …
        kind: "linear", "conv1d_transposed" (transformers' Conv1D), "conv", "embedding",
            "multihead_attention" or "parameter".
        shape: the weight's shape as stored, e.g. ``(out_features, in_features)`` for a linear.
        objection: why stock PEFT does not attach LoRA here, or the model would not use it; None where it does.
        wrapper: the wrapper around it, or None.
        tied_to: the other sites that share this weight's storage.
        checkpoint_keys: the weight's names on disk.
        quantized: the quantizer that packed the weight, or None. ``shape`` is then the unpacked one.
        note: what else an adapter here would reach, or None.
        groups: of a convolution.
        composites: the modules composed of this linear and others (a gate and a value, an MLP), the innermost
            first.
    """

    path: str
    tower: str
    role: str
    kind: str
    shape: tuple[int, ...]
    objection: Objection | None = None
    wrapper: Wrapper | None = None
    tied_to: tuple[str, ...] = ()
    checkpoint_keys: tuple[str, ...] = ()
    quantized: str | None = None
    note: Note | None = None
    groups: int = 1
    composites: tuple[Composite, ...] = ()

    @property
    def adaptable(self) -> bool:
        """Whether stock PEFT attaches LoRA here and the model then uses it."""
        return self.objection is None

    @property
    def obstacle(self) -> Obstacle | None:
        """What stands against an adapter here, or None."""
        return self.objection.obstacle if self.objection else None

    @property
    def reason(self) -> str | None:
        """Why no adapter can go here, for people to read; None where one can."""
        return self.objection.reason if self.objection else None

    @property
    def params(self) -> int:
        """Elements of the weight (a bias is not counted: adapters act on the weight)."""
        return prod(self.shape)

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear, transposed or not."""
        return self.kind in {"linear", "conv1d_transposed"}

    @property
    def is_own_linear(self) -> bool:
        """Whether it is the weight of a linear whose class is not torch's: adapters reach it as a parameter."""
        return self.kind == "parameter" and self.objection is None and self.role not in {"expert", "router"}

    @property
    def names(self) -> tuple[str, ...]:
        """The paths that name this site: its own, and those of the wrappers around it."""
        return (self.path, *(self.wrapper.levels(self.path) if self.wrapper else ()))

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "tower": self.tower,
            "role": self.role,
            "kind": self.kind,
            "shape": list(self.shape),
            "params": self.params,
            "adaptable": self.adaptable,
            "reason": self.reason,
            "wrapper": self.wrapper.to_dict() if self.wrapper else None,
            "composites": [composite.to_dict() for composite in self.composites],
            "tied_to": list(self.tied_to),
            "checkpoint_keys": list(self.checkpoint_keys),
            "quantized": self.quantized,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True)
class Tower:
    """One part of the model that serves one modality.

    Attributes:
        name: as ``Site.tower``.
        sites: how many sites it has.
        params: all parameters in it, in elements, norms and biases included; a tied weight counts once.
    """

    name: str
    sites: int
    params: int

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "sites": self.sites, "params": self.params}


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that was surveyed.

    Attributes:
        name: as the user named it, or the model's class.
        cls: the model's class name.
        model_type: transformers' model type, or None for a plain module.
        origin: where the description came from: "live model", "hub", "cache", "directory", "file",
            "config", "model type" or "family data".
        params: all parameters, in elements; tied weights once.
        task_type: the PEFT task type that fits this class, or None.
        modalities: what it takes as input: "text", "image", "audio", …
        fed_towers: the towers that every batch feeds, because they take the model's main input.
    """

    name: str
    cls: str
    model_type: str | None
    origin: str
    params: int
    task_type: str | None = None
    modalities: tuple[str, ...] = ()
    fed_towers: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "class": self.cls,
            "model_type": self.model_type,
            "origin": self.origin,
            "params": self.params,
            "task_type": self.task_type,
            "modalities": list(self.modalities),
            "fed_towers": list(self.fed_towers),
        }


@dataclass(frozen=True)
class Architecture:
    """What a transformers model is built from, weights apart."""

    model_class: type[PreTrainedModel]
    config: PretrainedConfig


@dataclass(frozen=True)
class ModelMap:
    """Every place an adapter can go in one model. Iterates over its sites, in definition order.

    Attributes:
        towers: the towers that have parameters.
        module_paths: every module's path but the root's: what PEFT matches targets against.
        parameter_paths: every parameter's path: what PEFT matches target parameters against.
        checkpoint: what the weight files store; None where their headers were not read.
        architecture: None for a module that is not a transformers model.
        faults: of PEFT and transformers, that adapters on some of its sites would meet.
    """

    model: ModelInfo
    towers: tuple[Tower, ...]
    sites: tuple[Site, ...]
    module_paths: tuple[str, ...] = field(repr=False)
    parameter_paths: tuple[str, ...] = field(repr=False)
    checkpoint: Checkpoint | None = None
    architecture: Architecture | None = field(default=None, repr=False, compare=False)
    faults: tuple[FoundFault, ...] = ()

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @cached_property
    def by_path(self) -> dict[str, Site]:
        return {site.path: site for site in self.sites}

    @cached_property
    def inner(self) -> dict[str, Site]:
        """Wrapper's path -> the site of the linear inside it."""
        return {name: site for site in self if site.wrapper for name in site.names[1:]}

    @cached_property
    def composites(self) -> dict[str, tuple[Site, ...]]:
        """Composite's path -> the sites of the linears inside it."""
        found: dict[str, list[Site]] = {}
        for site in self.sites:
            for composite in site.composites:
                found.setdefault(composite.path, []).append(site)
        return {path: tuple(sites) for path, sites in found.items()}

    def __getitem__(self, path: str) -> Site:
        """Return the site at ``path``, its own or its wrapper's; KeyError where there is none."""
        if path in self.by_path:
            return self.by_path[path]
        return next((s for s in self.sites if path in s.names), None) or self.by_path[path]

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model.to_dict(),
            "towers": [tower.to_dict() for tower in self.towers],
            "sites": [site.to_dict() for site in self.sites],
            "faults": [found.to_dict() for found in self.faults],
            "checkpoint": self.checkpoint.to_dict() if self.checkpoint else None,
        }

    def __str__(self) -> str:
        return survey_text(self.to_dict())
