"""``graft prove``: does the real engine apply this adapter, or serve this merged checkpoint?"""

from __future__ import annotations

import json as json_text
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftkit.cli import options
from graftkit.cli.output import Format, only_data_on_stdout
from graftkit.cli.progress import progress_bar
from graftkit.errors import GraftError

if TYPE_CHECKING:
    from graftkit.serving.prove import Proof


def prove(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A folder with weights, served itself; else as MODEL of the other commands: its twin is.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", help="The engine: vllm, llama.cpp or mlx.", show_default=False)
    ] = "",
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter", "-a", help="An adapter's folder; on a twin its configuration with random factors."
        ),
    ] = None,
    merged: Annotated[
        str | None, typer.Option("--merged", help="A merged checkpoint, served in the place of base and adapter.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="What --merged was merged into, a folder.")] = None,
    python: Annotated[
        str | None,
        typer.Option("--python", help="The engine's Python, or its environment. Default: .engines/TARGET."),
    ] = None,
    twin: Annotated[
        bool, typer.Option("--twin", help="Serve a tiny random twin even where MODEL is a folder with weights.")
    ] = False,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Serve the files as PEFT writes them, without converting them.")
    ] = False,
    engine_option: Annotated[
        list[str] | None,
        typer.Option("--engine-option", help="A further argument of the engine, as name=value (JSON). Repeat it."),
    ] = None,
    targets: options.Targets = None,
    scope: options.Scope = None,
    method: options.MethodOption = "lora",
    r: options.R = None,
    alpha: options.Alpha = None,
    option: options.PeftOption = None,
    time_limit: Annotated[
        float, typer.Option("--time-limit", help="Seconds for one start of the engine.")
    ] = 1800.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the twin, its adapter and the prompts.")] = 0,
    fail_level: options.FailLevelOption = "error",
    output_format: options.FindingsFormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Serve base and adapter in the real engine, and compare its log-probabilities with PEFT's."""
    with only_data_on_stdout(output_format, json=json) as output:
        shared: dict[str, Any] = {
            "target": target,
            "adapter": adapter,
            "python": python,
            "engine_options": options.peft_options(engine_option),
            "time_limit": time_limit,
            "seed": seed,
        }
        asked: dict[str, Any] = {
            "targets": options.split(targets),
            "scope": options.split(scope),
            "method": None if method == "lora" else method,
            "r": r,
            "alpha": alpha,
            **options.peft_options(option),
        }
        request = {name: value for name, value in asked.items() if value is not None}
        _check_usage(model, merged, base, adapter, target, request)
        with progress_bar() as on_progress:
            if merged is not None:
                from graftkit.serving.prove_merged import prove_merged

                proof = prove_merged(merged, base=base, on_progress=on_progress, **shared)
            else:
                from graftkit.serving.prove import prove as run_proof

                on_twin = True if twin else None
                proof = run_proof(
                    str(model), on_twin=on_twin, as_is=as_is, on_progress=on_progress, **shared, **request
                )
        _conclude(output, proof, fail_level)


def _conclude(output: Any, proof: Proof, fail_level: options.FailLevel) -> None:
    from graftkit.cli.findings_text import findings_text
    from graftkit.findings import Severity
    from graftkit.report.annotations import to_annotations
    from graftkit.report.sarif import to_sarif

    report = proof.report
    output.result(
        proof,
        human=lambda: "\n\n".join([*_sites(proof), findings_text(report, verbose=True)]),
        sarif=lambda: json_text.dumps(to_sarif(report), indent=2),
        github=lambda: to_annotations(report),
    )
    if report.at_or_above(Severity(fail_level)):
        raise typer.Exit(1)


def _sites(proof: Proof) -> list[str]:
    """Return the table of what was served site by site, where that was done."""
    from graftkit.text import table

    if not proof.sites:
        return []
    rows = [
        (site, str(found.outcome), _nats(found.error), _nats(found.effect)) for site, found in proof.sites.items()
    ]
    return [table(("site", "served alone", "off by", "effect"), rows)]


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _check_usage(
    model: str | None,
    merged: str | None,
    base: str | None,
    adapter: str | None,
    target: str,
    request: dict[str, Any],
) -> None:
    """Refuse options that cannot be used together.

    Raises:
        GraftError: ``usage``.
    """
    checks = (
        (not target, "no engine was named", "--target vllm, llama.cpp or mlx"),
        (model is None and merged is None, "nothing to prove", "name a MODEL, or --merged with a folder"),
        (
            model is not None and merged is not None,
            "both a MODEL and --merged were given",
            "leave one of them out",
        ),
        (base is not None and merged is None, "--base belongs to --merged", "name the base as MODEL"),
        (
            merged is not None and adapter is not None and base is None,
            "an --adapter that was merged needs its --base",
            "give both",
        ),
        (bool(request) and (adapter or merged) is not None, "the adapter is given already", "leave --adapter out"),
    )
    for wrong, why, advice in checks:
        if wrong:
            raise GraftError(
                "these options cannot be used together", where="graft prove", why=why, help=advice, code="usage"
            )
