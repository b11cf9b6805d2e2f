"""``graft demo``: the whole path on an embedded example."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftkit.cli.options import FormatOption, JsonOption
from graftkit.cli.output import Format, only_data_on_stdout


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the report, adapter and model go.")] = Path(
        "graft-demo"
    ),
    output_format: FormatOption = Format.HUMAN,
    json: JsonOption = False,
) -> None:
    """Show the crash, the cure and the proof on real handwritten digits, in under three minutes."""
    with only_data_on_stdout(output_format, json=json) as output:
        from graftkit.demo.run import run_demo

        result = run_demo(out, show=output.step)
        done = f"Done in {result.seconds:.0f} s. Open {result.report} in a browser."
        output.result(result, human=lambda: done)
    if not result.checks.proven:
        raise typer.Exit(1)
