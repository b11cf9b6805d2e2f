"""``graft convert``: an adapter in the form that an engine reads, proven equal."""

from __future__ import annotations

from typing import Annotated

import typer

from graftkit.cli import options
from graftkit.cli.output import Format, only_data_on_stdout
from graftkit.cli.progress import progress_bar


def convert(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's folder.", show_default=False)],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    to: Annotated[
        str,
        typer.Option("--to", help="The form to write: vllm, sglang, llama.cpp, mlx or peft.", show_default=False),
    ],
    base: Annotated[
        str | None,
        typer.Option("--base", help="The base model, as MODEL of the other commands. Default: the adapter's."),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    revision: options.Revision = None,
    output_format: options.FormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Write an adapter in an engine's form, or back in PEFT's; the result is read back and proven equal."""
    with only_data_on_stdout(output_format, json=json) as output:
        from graftkit.converting.convert import convert as run_convert

        with progress_bar() as on_progress:
            done = run_convert(
                adapter,
                out,
                to=to,
                base=base,
                trust_remote_code=trust_remote_code,
                revision=revision,
                on_progress=on_progress,
            )
        output.result(done)
