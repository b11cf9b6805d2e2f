"""A report as one self-contained HTML page: no scripts, no fonts, no requests.

The page is rendered from a plain mapping (:class:`~graftkit.report.data.ReportData`). The other files of this
package compute the geometry; the template only places it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from graftkit.files import refuse_read_only, write_text
from graftkit.report.chart import draw_curves
from graftkit.report.data import Check, ReportData, Verdict
from graftkit.report.histogram import draw_histogram
from graftkit.report.sample_image import draw_sample
from graftkit.report.tower_grid import STATE_TEXT, draw_towers
from graftkit.text import size

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    import jinja2


def render_report(data: ReportData) -> str:
    """Render a report as a self-contained HTML page.

    All text is escaped, and the page's content policy forbids it to load anything.

    Raises:
        KeyError: an item lacks a required field.
        ValueError: a state or verdict is not one of those listed, a curve has no finite point, or a
            histogram no bin.
    """
    template = _environment().get_template("report.html.j2")
    return template.render(
        data=data,
        states=STATE_TEXT,
        rows=draw_towers(data.get("towers", ())),
        charts=[(chart, draw_curves(chart["curves"])) for chart in data.get("charts", ())],
        histograms=[(given, draw_histogram(given)) for given in data.get("histograms", ())],
        samples=[draw_sample(sample) for sample in data.get("samples", ())],
        tally=_tally(data.get("checks", ())),
    )


def write_report(path: str | os.PathLike[str], data: ReportData) -> Path:
    """Render the report into ``path`` atomically and return the path; missing folders are created.

    Raises:
        OutputError: ``output-not-writable``: the file or its folder is read-only or cannot be reached.
        KeyError, ValueError: see :func:`render_report`.
    """
    target = Path(path)
    page = render_report(data)
    refuse_read_only(target)
    return write_text(target, page)


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("graftkit.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"grouped": "{:,}".format, "size": size, "width": _width}
    return environment


def _width(share: float) -> str:
    """Return a share, cut to 0 to 1, as a CSS length relative to the width."""
    return f"{round(100 * min(max(share, 0.0), 1.0), 2)}%"


def _tally(checks: Sequence[Check]) -> dict[str, int]:
    tally: dict[str, int] = dict.fromkeys(get_args(Verdict), 0)
    for check in checks:
        if check["verdict"] not in tally:
            raise ValueError(f"{check['code']}: verdict {check['verdict']!r} is not one of {', '.join(tally)}")
        tally[check["verdict"]] += 1
    return tally
