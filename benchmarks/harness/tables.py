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
    """Print a line for each row under what it worked on, within 80 columns; then what was not measured."""
    measured = [result for result in results if result.ratio is not None]
    console.print(_empty_table(show_header=True))
    for (benchmark, size), group in groupby(measured, key=lambda result: (result.benchmark, result.size)):
        table = _empty_table(show_header=False)
        for result in group:
            table.add_row(*_printed(result))
        console.print(Text(f"{benchmark}: {size}", "cyan"), table)
    gaps = (result for result in results if result.ratio is None)
    for (benchmark, size, why), _ in groupby(gaps, key=lambda r: (r.benchmark, r.size, r.why)):
        console.print(f"not measured: {benchmark}: {size}: {why}", style="yellow", highlight=False)


def _empty_table(*, show_header: bool) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=show_header, header_style="bold")
    for title, width in (("what", 22), ("peer", 16)):
        table.add_column(title, width=width, overflow="fold")
    for title, width in (("graftkit", 13), ("ratio", 5), ("min", 5), ("max", 5), ("aim", 6)):
        table.add_column(title, width=width, justify="right", no_wrap=True)
    return table


def _printed(result: Result) -> Iterator[str | Text]:
    row, ratio = result.row, result.ratio
    assert ratio is not None
    assert result.ours is not None
    yield row.what
    yield row.peer
    yield row.figure.text(result.ours)
    yield Text(ratio_text(ratio.median), "bold red" if misses(ratio, row.aim, row.figure) else "bold")
    yield from (ratio_text(ratio.min), ratio_text(ratio.max))
    yield _aim(result)


def ratio_text(ratio: float) -> str:
    """Return a ratio in three digits, so that 0.991 and 0.994 differ."""
    digits = next((digits for least, digits in ((100, 0), (10, 1), (1, 2)) if ratio >= least), 3)
    return f"{ratio:.{digits}f}"


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
        cells += [
            row.figure.text(result.ours),
            row.figure.text(result.theirs),
            f"{ratio_text(ratio.median)}{missed}",
        ]
        cells += [f"{ratio_text(ratio.min)}–{ratio_text(ratio.max)}", _aim(result), str(result.turns)]
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
    return (
        "not measured"
        if ratio is None
        else f"{ratio_text(ratio.median)} ({ratio_text(ratio.min)}–{ratio_text(ratio.max)})"
    )
