"""What a comparison of an engine's outputs with the adapter's own came to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """What an engine, or a live server, did with an adapter.

    ``APPLIED``: its outputs are the adapter's, within the engine's own error on the base. ``IGNORED``: they are
    the base's. ``SCALED``: they lie on the line from the base through the adapter, at another place than 1.
    ``DIFFERENT``: they are neither. ``REFUSED``: it did not load the adapter. ``OTHER_BASE``: already its base is
    not the adapter's. ``OTHER_TEMPLATE``: it was asked another prompt than the adapter was trained on.
    ``UNKNOWN``: it is not known, which is never "applied".
    """

    APPLIED = "applied"
    IGNORED = "ignored"
    SCALED = "scaled"
    DIFFERENT = "different"
    REFUSED = "refused"
    OTHER_BASE = "other base"
    OTHER_TEMPLATE = "other template"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Served:
    """One adapter in one engine, compared with the same adapter in PEFT; figures that are not known are None.

    Attributes:
        outcome: what the comparison came to.
        engine: the engine and its version, or the server's name of the model.
        effect: the largest change of a log-probability that the adapter makes, in nats.
        error: the largest distance of the served log-probabilities from the adapter's, in nats.
        base_error: the same of the base without the adapter, which is the engine's own noise.
        factor: what the update is multiplied by: 0 ignored, 1 applied.
        compared: how many log-probabilities were compared.
        says: the engine's words where it refused, else why it is not known.
        replaced: parts of the engine that were replaced for the run, as a kernel that needs a GPU: what they
            compute is not proven.
        site: the first site whose part of the adapter is served otherwise, where it was looked for.
    """

    outcome: Outcome
    engine: str
    effect: float | None = None
    error: float | None = None
    base_error: float | None = None
    factor: float | None = None
    compared: int = 0
    says: str | None = None
    replaced: tuple[str, ...] = ()
    site: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "outcome": str(self.outcome), "replaced": list(self.replaced)}
