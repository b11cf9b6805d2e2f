"""``graft verify``: the contract checks on a live model or its twin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftkit.cli import options, reporting
from graftkit.cli.output import Format, only_data_on_stdout, progress_console
from graftkit.errors import GraftError

if TYPE_CHECKING:
    from graftkit.findings import Report
    from graftkit.recipes.settings import CheckSettings


def verify(
    model: options.RecipesModel = None,
    recipe: reporting.RecipeOption = None,
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
    select: reporting.Select = None,
    ignore: reporting.Ignore = None,
    fix: reporting.FixOption = False,
    fail_level: options.FailLevelOption = options.FailLevel.ERROR,
    trust_remote_code: options.TrustRemoteCode = False,
    revision: options.Revision = None,
    output_format: options.FormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Attach the planned adapter and prove that it trains, merges, saves and reloads.

    With --recipe, what is proven is the recipe: its adapter, its quantization and its training settings. The other
    options that say what to adapt are then its own.
    """
    place = _Place(model, twin, seed, trust_remote_code, revision)
    with only_data_on_stdout(options.chosen(output_format, json)) as output:
        if recipe is not None:
            _refuse_words(targets, scope, rank, alpha, option, method)
            report = reporting.run_and_fix(lambda: _rehearsed(recipe, place, select, ignore), fix, recipe=recipe)
        else:
            words = {
                "targets": options.split(targets) or "all-linear",
                "scope": options.split(scope),
                "method": method,
                "r": rank,
                "alpha": alpha,
                **options.peft_options(option),
            }
            report = _verified(place, words, reporting.settings_for(select, ignore))
        reporting.conclude(output, report, f"graft verify {model or recipe}", fail_level)


@dataclass(frozen=True)
class _Place:
    """The model, and which form of it is tried."""

    model: str | None
    twin: bool
    seed: int
    trust_remote_code: bool
    revision: str | None


def _rehearsed(file: Path, place: _Place, select: list[str] | None, ignore: list[str] | None) -> Report:
    from graftkit.checks.rehearse import rehearse
    from graftkit.recipes.recipe import read_recipe

    written = read_recipe(file)
    with progress_console().status("rehearsing") as status:
        return rehearse(
            written,
            place.model,
            on_twin=place.twin,
            seed=place.seed,
            settings=reporting.settings_for(select, ignore, written),
            trust_remote_code=place.trust_remote_code,
            revision=place.revision,
            on_progress=lambda progress: status.update(progress.step),
        )


def _verified(place: _Place, words: dict[str, Any], settings: CheckSettings) -> Report:
    from graftkit.attaching.attach import attach
    from graftkit.checks.verify import verify as run_checks
    from graftkit.planning.plan import plan
    from graftkit.twins.example_batch import example_batch

    if place.model is None:
        raise GraftError(
            "nothing to verify",
            why="neither a MODEL nor --recipe was given",
            help="graft verify --help",
            code="usage",
        )
    live = _live_model(place.model, place)
    made = plan(live, **words)
    adapted = attach(live, made)
    batch = example_batch(adapted.get_base_model(), seed=place.seed)
    with progress_console().status("checking") as status:
        return run_checks(
            adapted,
            batch,
            plan=made,
            settings=settings,
            on_progress=lambda progress: status.update(progress.step),
        )


def _refuse_words(*words: Any) -> None:
    if any(word not in (None, "lora") for word in words):
        raise GraftError(
            "--recipe says what to adapt; no other option can",
            help="change the recipe's adapter section, or leave --recipe out",
            code="usage",
        )


def _live_model(name: str, place: _Place) -> Any:
    if place.twin:
        from graftkit.twins.twin import twin

        return twin(name, seed=place.seed, trust_remote_code=place.trust_remote_code, revision=place.revision)
    from graftkit.surveying.sources.load_model import load_model

    return load_model(name, trust_remote_code=place.trust_remote_code, revision=place.revision)
