"""One cell of the matrix: what a check came to for one family of models and one method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from graftkit._version import SCHEMA_VERSION


class Check(StrEnum):
    """What is tried, in order: a check needs those before it up to ``ATTACH``.

    Attributes:
        TWIN: a tiny model of the architecture can be built, and a batch runs on it.
        PLAN: the targets make a configuration of PEFT.
        ATTACH: PEFT attaches exactly what was planned, and the fresh adapter changes nothing.
        GRADIENTS: every tensor of the adapter gets a gradient.
        MERGE: merged equals adapted, and unmerging restores the base.
        RELOAD: the saved adapter loads in stock PEFT and computes the same.
        CHECKPOINTING: recomputing activations leaves the gradients as they are.
        CACHE: with the adapter, the next token's logits from the cache are those of a full pass.
        PACKING: samples packed in one row do not see each other.
        FOUR_BIT: attach, gradients and reload on a base that bitsandbytes quantized to 4 bits.
    """

    TWIN = "twin"
    PLAN = "plan"
    ATTACH = "attach"
    GRADIENTS = "gradients"
    MERGE = "merge"
    RELOAD = "reload"
    CHECKPOINTING = "checkpointing"
    CACHE = "cache"
    PACKING = "packing"
    FOUR_BIT = "4-bit"


# The checks that a proven family passes.
PROOF = (Check.TWIN, Check.PLAN, Check.ATTACH, Check.GRADIENTS, Check.MERGE, Check.RELOAD)


class Verdict(StrEnum):
    """What a check came to, worst first.

    Attributes:
        FAILED: something that should hold does not.
        UNKNOWN: it could not be decided.
        REFUSED: graftkit or PEFT refuses clearly, since the method cannot do that to this family.
        NOT_APPLICABLE: the family has nothing that the check is about.
        PROVEN: the check ran and holds.
    """

    FAILED = "failed"
    UNKNOWN = "unknown"
    REFUSED = "refused"
    NOT_APPLICABLE = "not-applicable"
    PROVEN = "proven"


@dataclass(frozen=True)
class Outcome:
    """What a check came to, whatever it was tried on.

    Attributes:
        codes: of the error, or of the rules that did not hold.
        message: in a sentence or two.
        evidence: the figures behind it, JSON-ready.
        seconds: how long the check took.
    """

    verdict: Verdict
    message: str
    codes: tuple[str, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def after(self, seconds: float) -> Outcome:
        """Return the same outcome with the time it took."""
        return replace(self, seconds=round(seconds, 3))


@dataclass(frozen=True)
class Cell:
    """One family, one method and one check.

    Attributes:
        model_type: transformers' name of the family.
        model_class: the class that was tried; None where none was found.
        modalities: what the class takes in: "text", "image", "audio", "video".
        method: as ``matrix_methods()`` names it.
        codes, message, evidence, seconds: as of an `Outcome`.
        versions: package -> version, of what the outcome depends on.
        made_from: a hash of the code and the data that the outcome depends on.
        seed: of the twin, its adapter and its batch.
    """

    model_type: str
    model_class: str | None
    modalities: tuple[str, ...]
    method: str
    check: Check
    verdict: Verdict
    message: str
    codes: tuple[str, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    made_from: str = ""
    seed: int = 0

    @property
    def key(self) -> tuple[str, str, Check]:
        """What the cell is about: of two cells with the same key the later one counts."""
        return self.model_type, self.method, self.check

    @property
    def command(self) -> str:
        """The command that repeats it."""
        return f"graft matrix --families {self.model_type} --methods {self.method} --checks {self.check}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "model_type": self.model_type,
            "model_class": self.model_class,
            "modalities": list(self.modalities),
            "method": self.method,
            "check": str(self.check),
            "verdict": str(self.verdict),
            "codes": list(self.codes),
            "message": self.message,
            "evidence": dict(self.evidence),
            "seconds": self.seconds,
            "versions": dict(self.versions),
            "made_from": self.made_from,
            "seed": self.seed,
            "command": self.command,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Cell:
        """Read what ``to_dict`` wrote.

        Raises:
            KeyError, TypeError, ValueError: a field is missing, or has a value that it cannot have.
        """
        if fields["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version {fields['schema_version']!r}, and {SCHEMA_VERSION} is known")
        return cls(
            model_type=str(fields["model_type"]),
            model_class=None if fields["model_class"] is None else str(fields["model_class"]),
            modalities=tuple(map(str, fields["modalities"])),
            method=str(fields["method"]),
            check=Check(fields["check"]),
            verdict=Verdict(fields["verdict"]),
            message=str(fields["message"]),
            codes=tuple(map(str, fields["codes"])),
            evidence=dict(fields["evidence"]),
            seconds=float(fields["seconds"]),
            versions=dict(fields["versions"]),
            made_from=str(fields.get("made_from", "")),
            seed=int(fields["seed"]),
        )
