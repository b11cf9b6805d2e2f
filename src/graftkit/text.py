"""Tables, numbers, lists, suggestions and quotations as plain text."""

from __future__ import annotations

import itertools
import shutil
import textwrap
from collections.abc import Iterable, Sequence, Sized

# What a table may take where no terminal says how wide it is, and at most.
_NARROW, _WIDE = 80, 120
_GAP = "  "
# A column of text stays at least this wide, however many there are.
_LEAST = 10


def terminal_width() -> int:
    """Return how many columns text may take: the terminal's, within reason, or 80 where there is none."""
    return min(max(shutil.get_terminal_size((_NARROW, 24)).columns, _NARROW), _WIDE)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], width: int | None = None) -> str:
    """Return a table without colour codes, no wider than ``width`` as far as its numbers and titles allow.

    Sentences are wrapped at their spaces. A word that is too long for its column, such as a path, is shortened in
    its middle and never broken.

    Args:
        columns: the titles; one that starts with ``>`` aligns its column to the right, and it is not narrowed.
        width: None for the terminal's.
    """
    titles = [column.removeprefix(">") for column in columns]
    cells = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    fixed = [column.startswith(">") for column in columns]
    widths = _fitted(titles, cells, fixed, terminal_width() if width is None else width)
    lines = [_row(titles, widths, fixed), "─" * (sum(widths) + len(_GAP) * (len(widths) - 1))]
    return "\n".join([*lines, *(_row(row, widths, fixed) for row in cells)])


def _fitted(titles: Sequence[str], rows: Sequence[Sequence[str]], fixed: Sequence[bool], width: int) -> list[int]:
    """Return the columns' widths: those of their longest cells, the widest narrowed until all fit."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    least = [
        wide if is_fixed else min(wide, max(len(title), _LEAST))
        for wide, title, is_fixed in zip(widths, titles, fixed, strict=True)
    ]
    room = width - len(_GAP) * (len(widths) - 1)
    while sum(widths) > room and widths != least:
        widest = max((wide, at) for at, wide in enumerate(widths) if wide > least[at])[1]
        widths[widest] -= 1
    return widths


def _row(cells: Sequence[str], widths: Sequence[int], fixed: Sequence[bool]) -> str:
    wrapped = [
        textwrap.wrap(" ".join(shortened(word, wide) for word in cell.split()), wide, break_on_hyphens=False)
        for cell, wide in zip(cells, widths, strict=True)
    ]
    lines = [
        _GAP.join(
            part.rjust(wide) if right else part.ljust(wide)
            for part, wide, right in zip(parts, widths, fixed, strict=True)
        ).rstrip()
        for parts in itertools.zip_longest(*wrapped, fillvalue="")
    ]
    return "\n".join(lines)


def shortened(word: str, longest: int) -> str:
    """Return a word with its middle left out where it is too long: "model.lay…q_proj" keeps both of its ends."""
    if len(word) <= longest:
        return word
    end = longest // 2
    return f"{word[: longest - 1 - end]}…{word[len(word) - end :]}"


def count(number: int) -> str:
    """Return 1234567 as "1.23 M"."""
    return _scaled(number, "TBMk", "")


def size(number: int) -> str:
    """Return a number of bytes in decimal units: 62500000000 as "62.5 GB"."""
    return _scaled(number, "TGMk", "B")


def _scaled(number: int, prefixes: str, unit: str) -> str:
    rounded = float(f"{number:.3g}")  # first, since 999,999 is 1 M and not 1e+03 k
    for prefix, scale in zip(prefixes, (10**12, 10**9, 10**6, 10**3), strict=True):
        if rounded >= scale:
            return f"{rounded / scale:.3g} {prefix}{unit}"
    return f"{number} {unit}".rstrip()


def percent(share: float) -> str:
    """Return 0.931 as "93.1 %"."""
    rounded = float(f"{100 * share:.3g}")
    return f"{rounded:.3g} %" if rounded < 1000 else f"{rounded:,.0f} %"


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
