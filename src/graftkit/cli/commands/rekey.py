"""``graft rekey``: a copy of a base under the names that its class loads."""

from __future__ import annotations

from typing import Annotated

import typer

from graftkit.cli import options
from graftkit.cli.output import Format, only_data_on_stdout
from graftkit.cli.progress import working


def rekey(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model's folder, or a hub id.", show_default=False)
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    trust_remote_code: options.TrustRemoteCode = False,
    revision: options.Revision = None,
    output_format: options.FormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Copy a base whose weights have other names than its class loads; only the names change."""
    with only_data_on_stdout(output_format, json=json) as output:
        from graftkit.merging.rekey import rekey as run_rekey

        with working(f"copying {base} to {out}"):
            done = run_rekey(base, out, trust_remote_code=trust_remote_code, revision=revision)
        output.result(done)
