"""``graft card``: what an adapter is, for its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftkit.cli import options
from graftkit.cli.output import Format, only_data_on_stdout
from graftkit.cli.progress import working


def card(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's folder.", show_default=False)],
    base: Annotated[
        str | None, typer.Option("--base", help="The base model, as MODEL of the other commands.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", help="Say how to serve it in this engine: vllm, sglang, llama.cpp or vllm==0.32."
        ),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write it into the adapter's README.md; the rest of that file is kept.")
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    revision: options.Revision = None,
    output_format: options.FormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Describe an adapter for its model card: what was adapted, how it was checked, how to load and serve it."""
    with only_data_on_stdout(output_format, json=json) as output:
        from graftkit.report.card import card as describe
        from graftkit.report.card import write_card
        from graftkit.surveying.survey import survey

        model_map = None
        if base is not None:
            with working(f"surveying {base}"):
                model_map = survey(base, trust_remote_code=trust_remote_code, revision=revision)
        made = describe(Path(adapter).expanduser(), model_map, target=target)
        if write:
            file = write_card(adapter, made)
            output.result(made, human=lambda: f"wrote {file}")
        else:
            output.result(made)
