"""Tables, numbers, lists, suggestions and quotations as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized

_WIDTH = 118


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table without colour codes; a title that starts with ``>`` aligns its column to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        grid.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    console = Console(width=_WIDTH, color_system=None, force_terminal=False, markup=False, highlight=False)
    with console.capture() as capture:
        console.print(grid)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join(lines).strip("\n")


def count(number: int) -> str:
    """Return 1234567 as "1.23 M"."""
    return _scaled(number, "TBMk", "")


def size(number: int) -> str:
    """Return a number of bytes in decimal units: 62500000000 as "62.5 GB"."""
    return _scaled(number, "TGMk", "B")


def _scaled(number: int, prefixes: str, unit: str) -> str:
    for prefix, scale in zip(prefixes, (10**12, 10**9, 10**6, 10**3), strict=True):
        if number >= scale:
            return f"{number / scale:.3g} {prefix}{unit}"
    return f"{number} {unit}".rstrip()


def percent(share: float) -> str:
    """Return 0.931 as "93.1 %"."""
    return f"{100 * share:.3g} %"


def some(items: Iterable[object], limit: int = 3) -> str:
    """Return the first few items, safe to print, and how many more there are."""
    every = [quoted(item) for item in items]
    return ", ".join(every[:limit]) + and_more(every, limit)


def and_more(items: Sized, shown: int) -> str:
    """Return " and 2 more" where only ``shown`` of the items are listed, "" where all are."""
    return f" and {len(items) - shown} more" if len(items) > shown else ""


def suggest(word: str, known: Iterable[str], limit: int = 1) -> str | None:
    """Return "did you mean a or b?" with the known words nearest to ``word``, or None if none is near."""
    near = closest(word, known, limit)
    return f"did you mean {' or '.join(near)}?" if near else None


def closest(word: str, known: Iterable[str], limit: int = 1) -> list[str]:
    """Return the known words that ``word`` may be a misspelling of, the nearest first."""
    import difflib

    return difflib.get_close_matches(word, list(known), n=limit)


def printable(text: str, longest: int = 1000) -> str:
    """Return text with control characters written out, cut to a length that a report can show."""
    plain = "".join(mark if mark.isprintable() or mark == "\n" else f"\\x{ord(mark):02x}" for mark in text)
    return plain if len(plain) <= longest else f"{plain[: longest - 3]}..."


def quoted(item: object) -> str:
    """Return one thing from a file, safe to print and short: a printable string as it is, else its repr."""
    text = item if isinstance(item, str) and item.isprintable() and item else repr(item)
    return text if len(text) <= 120 else f"{text[:117]}..."


def first_line(error: BaseException | None) -> str:
    """Return the first line of an error's message; other programs add advice and traces after it."""
    return str(error).strip().partition("\n")[0].rstrip()


def describe(error: BaseException) -> str:
    """Return an error's class and first line, "ValueError: no such thing", or its class alone."""
    message = first_line(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
