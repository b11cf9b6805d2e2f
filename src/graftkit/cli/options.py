"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import typer

from graftkit.cli.output import Format
from graftkit.errors import GraftError, PlanError

FailLevel = Literal["error", "warning", "info", "unknown"]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A hub id, a local directory, a config.json, or a transformers model type.",
        show_default=False,
    ),
]
RecipesModel = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="As MODEL of the other commands. Default: the recipe's."),
]


def _format(*offered: Format) -> Any:
    """Return the option of the commands whose result can be written in these formats."""

    def check(asked: Format) -> Format:
        if asked in offered:
            return asked
        raise format_unsupported(asked, offered)

    shown = f"[{'|'.join(offered)}]"
    how = "How the result is written."
    return typer.Option("--format", help=how, metavar=shown, callback=check)


def format_unsupported(asked: Format, offered: Iterable[Format]) -> GraftError:
    """Return the error for a format that a result cannot be written in."""
    return GraftError(
        f"this result cannot be written as {asked}",
        where="--format",
        why=f"it can be written as {', '.join(offered)}",
        help=" or ".join(f"--format {name}" for name in offered),
        code="format-unsupported",
    )


FormatOption = Annotated[Format, _format(Format.HUMAN, Format.JSON)]
PageFormatOption = Annotated[Format, _format(Format.HUMAN, Format.JSON, Format.HTML)]
FindingsFormatOption = Annotated[Format, _format(Format.HUMAN, Format.JSON, Format.SARIF, Format.GITHUB)]
ReportFormatOption = Annotated[Format, _format(*Format)]
JsonOption = Annotated[bool, typer.Option("--json", help="Short for --format json.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow code from the model's repository to run.")
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--targets",
        "-t",
        help="all-linear, a role, a module name or a regular expression; repeat it or separate with commas.",
    ),
]
Scope = Annotated[
    list[str] | None,
    typer.Option(
        "--scope",
        "-s",
        help="Towers to adapt (language, vision, audio, …, all), or modules by path. Repeat or use commas.",
    ),
]
MethodOption = Annotated[
    str, typer.Option("--method", "-m", help="lora, dora, rslora, or any method of PEFT by name.")
]
R = Annotated[int | None, typer.Option("--r", "-r", "--rank", help="Rank of the adapter. Default for LoRA: 16.")]
Alpha = Annotated[
    float | None, typer.Option("--alpha", help="Numerator of the scale. Default for LoRA: the rank.")
]
Dropout = Annotated[float | None, typer.Option("--dropout", help="Dropout on the adapter's input.")]
Quantization = Annotated[
    str | None,
    typer.Option("--quantization", "-q", help="Plan for a base quantized by bitsandbytes: 4bit or 8bit."),
]
FailLevelOption = Annotated[
    FailLevel, typer.Option("--fail-level", help="Least severe finding that makes the exit status 1.")
]
PeftOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", help="A further field of PEFT's configuration, as name=value (JSON). Repeat it."
    ),
]
AllowUnmatched = Annotated[
    bool, typer.Option("--allow-unmatched", help="List targets that match nothing instead of failing.")
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Fail over a role that the model lacks or that cannot be adapted."),
]


def peft_options(pairs: list[str] | None) -> dict[str, Any]:
    """Return ``name=value`` pairs as keyword arguments; a value that is not valid JSON is text.

    Raises:
        PlanError: ``option-pair``: a pair without ``=``.
    """
    import json

    found: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise PlanError(
                f"{pair!r} is not a name=value pair",
                where="--option",
                why="it gives one field of PEFT's configuration, and its value",
                help=f"--option {name or 'use_dora'}=true",
                code="option-pair",
            )
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def split(values: list[str] | None) -> list[str] | None:
    """Flatten repeated options and comma lists; a comma inside brackets belongs to a regular expression."""
    import re

    if not values:
        return None
    parts = (part.strip() for value in values for part in re.split(r",(?![^\[({]*[\])}])", value))
    return [part for part in parts if part]


def weighted(adapters: list[str]) -> dict[str, float]:
    """Read ``DIR:0.7`` as a folder and its weight; without a number the weight is 1.

    Raises:
        GraftError: ``usage``: an adapter is named twice.
    """
    pairs = [_weighted(text) for text in adapters]
    if len(dict(pairs)) != len(pairs):
        twice = next(name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1)
        raise GraftError(
            "an adapter is named twice",
            where=twice,
            why="each adapter has one weight",
            help="add its weights up: --adapter DIR:SUM",
            code="usage",
        )
    return dict(pairs)


def _weighted(text: str) -> tuple[str, float]:
    folder, colon, number = text.rpartition(":")
    try:
        return (folder, float(number)) if colon and folder else (text, 1.0)
    except ValueError:
        return text, 1.0
