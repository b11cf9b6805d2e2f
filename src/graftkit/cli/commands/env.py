"""``graft env``: versions to paste into a bug report."""

from __future__ import annotations

from graftkit.cli.options import FormatOption, JsonOption
from graftkit.cli.output import Format, only_data_on_stdout


def env(output_format: FormatOption = Format.HUMAN, json: JsonOption = False) -> None:
    """Show the versions of everything graftkit works with."""
    from graftkit.env import environment

    found = environment()
    lines = [f"{name}: {value or '-'}" for group in found.values() for name, value in group.items()]
    with only_data_on_stdout(output_format, json=json) as output:
        output.result(found, human=lambda: "\n".join(lines))
