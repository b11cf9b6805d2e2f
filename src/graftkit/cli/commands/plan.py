"""``graft plan``: what would be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graftkit.cli import options
from graftkit.cli.output import Format, only_data_on_stdout
from graftkit.cli.progress import progress_bar, working


def plan(
    model: options.Model,
    targets: options.Targets = None,
    scope: options.Scope = None,
    method: options.MethodOption = "lora",
    r: options.R = None,
    alpha: options.Alpha = None,
    dropout: options.Dropout = None,
    quantization: options.Quantization = None,
    option: options.PeftOption = None,
    allow_unmatched: options.AllowUnmatched = False,
    strict: options.Strict = False,
    write: Annotated[
        Path | None, typer.Option("--write", "-w", help="Write the PEFT configuration to this file.")
    ] = None,
    explain: Annotated[
        str | None, typer.Option("--explain", help="Explain one site instead, by its path.")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    revision: options.Revision = None,
    output_format: options.PageFormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Show what would be trained, what would not and why, and what it costs."""
    with only_data_on_stdout(output_format, json=json) as output:
        how: dict[str, Any] = {
            "method": method,
            "r": r,
            "alpha": alpha,
            "dropout": dropout,
            "quantization": quantization,
            **options.peft_options(option),
        }
        if explain is not None and output.format is Format.HTML:
            raise options.format_unsupported(output.format, (Format.HUMAN, Format.JSON))
        with working(f"surveying {model}"):
            from graftkit.planning.explain import explain as explain_site
            from graftkit.planning.plan import check_request
            from graftkit.planning.plan import plan as make_plan
            from graftkit.report.html import render_report
            from graftkit.report.model_pages import plan_page
            from graftkit.surveying.checkpoint.complete import check_complete
            from graftkit.surveying.survey import survey

            check_request(**how)
            model_map = survey(model, trust_remote_code=trust_remote_code, revision=revision)
            check_complete(model_map.checkpoint, model)
        with progress_bar() as show:
            made = make_plan(
                model_map,
                targets=options.split(targets) or "all-linear",
                scope=options.split(scope),
                allow_unmatched=allow_unmatched,
                strict=strict,
                **how,
                on_progress=show,
            )
        if write is not None:
            output.note(f"wrote {_write_config(made.to_dict()['peft_config'], write)}")
        if explain is not None:
            output.result(explain_site(made, explain))
        else:
            output.result(made, html=lambda: render_report(plan_page(made, output.command)))


def _write_config(config: dict[str, object], path: Path) -> Path:
    import json

    from graftkit.files import write_text

    return write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
