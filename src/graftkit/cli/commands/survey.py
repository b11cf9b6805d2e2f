"""``graft survey``: the model map."""

from __future__ import annotations

from typing import Annotated

import typer

from graftkit.cli.options import JsonOption, Model, PageFormatOption, Revision, TrustRemoteCode
from graftkit.cli.output import Format, only_data_on_stdout
from graftkit.cli.progress import working


def survey(
    model: Model,
    headers: Annotated[
        bool, typer.Option("--headers", help="Also compare with the weight files' headers (never the weights).")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    output_format: PageFormatOption = Format.HUMAN,
    json: JsonOption = False,
) -> None:
    """Show every place an adapter can go, per tower, without the model's weights."""
    with only_data_on_stdout(output_format, json=json) as output:
        with working(f"surveying {model}"):
            from graftkit.report.html import render_report
            from graftkit.report.model_pages import survey_page
            from graftkit.surveying.survey import survey as make_map

            found = make_map(model, trust_remote_code=trust_remote_code, revision=revision, headers=headers)
        output.result(found, html=lambda: render_report(survey_page(found, output.command)))
