"""Results as the table that is printed, and as the page that is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .contest import Figure
from .ratios import Spread, Verdict, misses
from .results import Origin, Result

WIDTH = 80

_HEAD = """# Benchmarks

Made by `make bench`; [the harness](harness/__init__.py) says how. A ratio is graftkit's figure divided by its
peer's in the same turn: the median of the turns, with the least and the greatest. Less is better, but for steps
per second.
"""


def print_table(console: Console, results: Sequence[Result]) -> None:
    """Print one line for each row, no wider than 80 columns."""
    table = Table(width=WIDTH, box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for title in ("what", "peer"):
        table.add_column(title, ratio=1, overflow="fold")
    for title in ("graftkit", "peer", "ratio", "min", "max", "aim"):
        table.add_column(title, justify="right", no_wrap=title not in ("graftkit", "peer"))
    for result in results:
        table.add_row(*_printed(result))
    console.print(table)


def _printed(result: Result) -> Iterator[str | Text]:
    row, ratio = result.row, result.ratio
    yield f"{row.what}, {result.size}"
    yield row.peer
    if ratio is None or result.ours is None or result.theirs is None:
        yield from ("-", "-", Text("not", "yellow"), Text("measured", "yellow"), "-")
    else:
        yield row.figure.text(result.ours)
        yield row.figure.text(result.theirs)
        yield Text(f"{ratio.median:.3g}", "bold red" if misses(ratio, row.aim, row.figure) else "bold")
        yield from (f"{ratio.min:.3g}", f"{ratio.max:.3g}")
    yield _aim(result)


def _aim(result: Result) -> str:
    aim = result.row.aim
    return "" if aim is None else f"{'≥' if result.row.figure.more_is_better else '≤'} {aim:g}"


def as_page(results: Sequence[Result]) -> str:
    """Return results as Markdown: one table, and where its figures come from."""
    lines = [
        _HEAD,
        "| benchmark | what | peer | graftkit | peer's | ratio | min–max | aim | turns |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
        *(_line(result) for result in results),
        "",
        *_origins(results),
    ]
    return "\n".join(lines) + "\n"


def _line(result: Result) -> str:
    row, ratio = result.row, result.ratio
    cells = [result.benchmark, f"{row.what}, {result.size}", row.peer]
    if ratio is None or result.ours is None or result.theirs is None:
        cells += ["", "", f"not measured: {result.why}", "", _aim(result), ""]
    else:
        missed = " (missed)" if misses(ratio, row.aim, row.figure) else ""
        cells += [row.figure.text(result.ours), row.figure.text(result.theirs), f"{ratio.median:.3g}{missed}"]
        cells += [f"{ratio.min:.3g}–{ratio.max:.3g}", _aim(result), str(result.turns)]
    return f"| {' | '.join(cells)} |"


def _origins(results: Iterable[Result]) -> Iterator[str]:
    measured = sorted((r for r in results if r.ratio is not None), key=lambda r: (_order(r.origin), r.benchmark))
    for origin, group in groupby(measured, key=lambda result: result.origin):
        names = ", ".join(sorted({result.benchmark for result in group}))
        versions = ", ".join(f"{name} {version}" for name, version in origin.versions)
        yield f"- {origin.date}, {origin.machine}; {versions}: {names}."


def _order(origin: Origin) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    return origin.date, origin.machine, origin.versions


def change_text(result: Result, kept: Mapping[tuple[str, ...], Result], verdict: Verdict) -> str:
    """Return one line on a ratio that changed by more than its spread."""
    before, now = kept[result.identity].ratio, result.ratio
    row = result.row
    return (
        f"{verdict.value}: {row.what} against {row.peer}, {_kind(row.figure)}: {_span(now)}; was {_span(before)}"
    )


def _kind(figure: Figure) -> str:
    return figure.key.replace("_", " ")


def _span(ratio: Spread | None) -> str:
    return "not measured" if ratio is None else f"{ratio.median:.3g} ({ratio.min:.3g}–{ratio.max:.3g})"
