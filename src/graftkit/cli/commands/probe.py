"""``graft probe``: is the adapter applied by the server that is running?"""

from __future__ import annotations

from typing import Annotated

import typer

from graftkit.cli import options, reporting
from graftkit.cli.output import Format, only_data_on_stdout
from graftkit.cli.progress import progress_bar


def probe(
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="The server's address: http://localhost:8000.", show_default=False),
    ],
    adapter: Annotated[
        str,
        typer.Option(
            "--adapter", "-a", help="The adapter's folder, or that of a merged model.", show_default=False
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="The server's name of the adapter. Default: its only one.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="The server's name of the base. Default: what the server says.")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for one request.")] = 60.0,
    fail_level: options.FailLevelOption = "error",
    verbose: reporting.Verbose = False,
    output_format: options.ReportFormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Ask a live OpenAI-compatible server whether it applies the adapter. A key comes from GRAFT_API_KEY."""
    with only_data_on_stdout(output_format, json=json) as output:
        from graftkit.serving.probe import probe as run_probe
        from graftkit.serving.probe import report_of

        with progress_bar() as on_progress:
            found = run_probe(url, adapter, model=model, base=base, timeout=timeout, on_progress=on_progress)
        reporting.conclude(output, report_of(found), "graft probe", fail_level, verbose=verbose)
