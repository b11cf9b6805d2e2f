"""What was measured, as it is kept: ``benchmarks/results.json``, from which ``benchmarks/results.md`` is made."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .contest import Contest, Figure, Gap, Row, Turn
from .ratios import Spread, middle, ratios

FOLDER = Path(__file__).resolve().parents[1]
STORE = FOLDER / "results.json"
PAGE = FOLDER / "results.md"


@dataclass(frozen=True)
class Origin:
    """Where and when figures were taken."""

    date: str
    machine: str
    versions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Result:
    """A row of a benchmark, with its figures.

    Args:
        benchmark: the file it comes from.
        size: what was worked on.
        row: what was compared.
        turns: how many turns were counted.
        ratio: None where it was not measured.
        ours: the median of graftkit's figure.
        theirs: the median of the peer's.
        why: why it was not measured.
        origin: where and when.
    """

    benchmark: str
    size: str
    row: Row
    origin: Origin
    turns: int = 0
    ratio: Spread | None = None
    ours: float | None = None
    theirs: float | None = None
    why: str = ""

    @property
    def identity(self) -> tuple[str, ...]:
        """Return what makes two results comparable."""
        row = self.row
        return self.benchmark, self.size, row.what, row.ours, row.peer, row.figure.key


def results_of(benchmark: str, asked: Contest | Gap, turns: Sequence[Turn], origin: Origin) -> Iterable[Result]:
    """Yield a result for each row of a contest that was held, or of a gap."""
    for row in asked.rows:
        if isinstance(asked, Gap):
            yield Result(benchmark, asked.size, row, origin, why=asked.why)
        else:
            ours, theirs = (middle(turns, side, row.figure) for side in (row.ours, row.peer))
            yield Result(benchmark, asked.size, row, origin, len(turns), ratios(turns, row), ours, theirs)


def merged(kept: Sequence[Result], now: Sequence[Result]) -> tuple[Result, ...]:
    """Return all results, in the order of their benchmarks; a benchmark that was run again is replaced whole.

    Where the new run could not measure a row that was measured before, on another machine, that result stays.
    """
    measured = {result.identity: result for result in kept if result.ratio is not None}
    fresh = [measured.get(result.identity, result) if result.ratio is None else result for result in now]
    again = {result.benchmark for result in now}
    return tuple(sorted((*(r for r in kept if r.benchmark not in again), *fresh), key=lambda r: r.benchmark))


def as_json(results: Sequence[Result]) -> str:
    """Return results as the text of the file that keeps them."""
    origins = sorted({result.origin for result in results}, key=lambda origin: (origin.date, origin.machine))
    document = {
        "origins": [{**asdict(origin), "versions": dict(origin.versions)} for origin in origins],
        "results": [_written(result, origins.index(result.origin)) for result in results],
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _written(result: Result, origin: int) -> dict[str, Any]:
    fields = asdict(result)
    fields["row"] = {**fields["row"], "figure": result.row.figure.key}
    return {**fields, "origin": origin}


def from_json(text: str) -> tuple[Result, ...]:
    """Read what :func:`as_json` wrote."""
    document = json.loads(text)
    origins = [
        Origin(each["date"], each["machine"], tuple(each["versions"].items())) for each in document["origins"]
    ]
    return tuple(_read(fields, origins) for fields in document["results"])


def _read(fields: dict[str, Any], origins: Sequence[Origin]) -> Result:
    row = fields["row"]
    figure = next(figure for figure in Figure if figure.key == row["figure"])
    ratio = Spread(**fields["ratio"]) if fields["ratio"] else None
    return Result(
        **{**fields, "row": Row(**{**row, "figure": figure}), "ratio": ratio, "origin": origins[fields["origin"]]}
    )


def kept_results(store: Path = STORE) -> tuple[Result, ...]:
    """Return what the file holds; nothing where there is none."""
    return from_json(store.read_text(encoding="utf-8")) if store.exists() else ()


def checked_in_results(store: Path = STORE) -> tuple[Result, ...]:
    """Return what the last commit holds, so that a second run does not compare with the first one's figures.

    Outside a repository that is the file itself.
    """
    command = ["git", "-C", str(store.parent), "show", f"HEAD:./{store.name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return from_json(done.stdout) if done.returncode == 0 else kept_results(store)
