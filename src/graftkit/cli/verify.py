"""``graft verify``: the contract checks on a live model or its twin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftkit.cli import options
from graftkit.cli.output import Format, only_data_on_stdout, progress_console

if TYPE_CHECKING:
    from graftkit.findings import Report


def verify(
    model: options.Model,
    twin: Annotated[
        bool, typer.Option("--twin", help="Check a tiny random twin of the architecture: needs no weights.")
    ] = False,
    targets: options.Targets = None,
    scope: options.Scope = None,
    method: options.MethodOption = "lora",
    rank: options.Rank = None,
    alpha: options.Alpha = None,
    option: options.PeftOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the twin and of its example batch.")] = 0,
    fail_level: options.FailLevelOption = options.FailLevel.ERROR,
    trust_remote_code: options.TrustRemoteCode = False,
    revision: options.Revision = None,
    output_format: options.FormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Attach the planned adapter and prove that it trains, merges, saves and reloads."""
    with only_data_on_stdout(options.chosen(output_format, json)) as output:
        from graftkit.attaching.inner import attach
        from graftkit.findings import Severity
        from graftkit.planning.plan import plan

        live = _live_model(model, twin, seed, trust_remote_code, revision)
        made = plan(
            live,
            targets=options.split(targets) or "all-linear",
            scope=options.split(scope),
            method=method,
            r=rank,
            alpha=alpha,
            **options.peft_options(option),
        )
        report = _checked(attach(live, made), seed)
        output.result(report)
    if report.at_or_above(Severity(fail_level.value)):
        raise typer.Exit(1)


def _live_model(name: str, twin: bool, seed: int, trust_remote_code: bool, revision: str | None) -> Any:
    if twin:
        from graftkit.twins.build import twin as build_twin

        return build_twin(name, seed=seed, trust_remote_code=trust_remote_code, revision=revision)
    from graftkit.surveying.weights import load_model

    return load_model(name, trust_remote_code=trust_remote_code, revision=revision)


def _checked(model: Any, seed: int) -> Report:
    from graftkit.checks.verify import verify as run_checks
    from graftkit.twins.batch import example_batch

    batch = example_batch(model.get_base_model(), seed=seed)
    with progress_console().status("checking") as status:
        return run_checks(model, batch, progress=lambda rule: status.update(f"{rule.code} {rule.title}"))
