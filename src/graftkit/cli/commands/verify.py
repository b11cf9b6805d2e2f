"""``graft verify``: the contract checks on a live model or its twin."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftkit.cli import options, reporting
from graftkit.cli.output import Format, only_data_on_stdout
from graftkit.cli.progress import progress_bar, working
from graftkit.errors import GraftError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from graftkit.findings import Report
    from graftkit.recipes.settings import CheckSettings
    from graftkit.twins.description import TwinDescription


ATTACHING = "planning and attaching the adapter"


def verify(
    model: options.RecipesModel = None,
    recipe: reporting.RecipeFile = None,
    twin: Annotated[
        bool, typer.Option("--twin", help="Check a tiny random twin of the architecture: needs no weights.")
    ] = False,
    targets: options.Targets = None,
    scope: options.Scope = None,
    method: options.MethodOption = "lora",
    r: options.R = None,
    alpha: options.Alpha = None,
    option: options.PeftOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the twin, its adapter and its batch.")] = 0,
    select: reporting.Select = None,
    ignore: reporting.Ignore = None,
    fix: reporting.Fix = False,
    fail_level: options.FailLevelOption = "error",
    verbose: reporting.Verbose = False,
    trust_remote_code: options.TrustRemoteCode = False,
    revision: options.Revision = None,
    output_format: options.ReportFormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Attach the planned adapter and prove that it trains, merges, saves and reloads.

    With --recipe, the recipe is proven: its adapter, its quantization and its training settings. It then says what
    to adapt, and the options for that cannot be given.
    """
    access: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    described: list[TwinDescription] = []
    with only_data_on_stdout(output_format, json=json) as output:
        if recipe is not None:
            if any((targets, scope, method != "lora", r, alpha, option)):
                raise _recipe_decides()

            def check() -> Report:
                from graftkit.checks.rehearse import rehearse
                from graftkit.recipes.recipe import read_recipe

                read = read_recipe(recipe)
                settings = reporting.settings_for(select, ignore, read)
                with progress_bar() as on_progress:
                    return rehearse(
                        read,
                        model,
                        on_twin=twin,
                        seed=seed,
                        settings=settings,
                        on_progress=on_progress,
                        on_description=described.append,
                        **access,
                    )

            report = reporting.run_and_fix(output, check, fix, recipe=recipe)
        elif model is not None:
            how = {"method": method, "r": r, "alpha": alpha, **options.peft_options(option)}
            where = {"targets": options.split(targets) or "all-linear", "scope": options.split(scope)}
            from graftkit.modeling.threads import one_thread
            from graftkit.planning.plan import check_request
            from graftkit.surveying.sources.load_model import check_weights
            from graftkit.surveying.sources.local import local_folder

            settings = reporting.settings_for(select, ignore)
            if not twin:
                check_weights(model, **access)
            check_request(**how)

            def check_model() -> Report:
                with one_thread() if twin else nullcontext():
                    live = _twin(model, seed, access, described) if twin else _loaded(model, access)
                    folder = None if twin else local_folder(model, revision)
                    return _verify(live, where | how, folder, seed, settings)

            report = reporting.run_and_fix(output, check_model, fix)
        else:
            raise _nothing_to_verify()
        last = next(reversed(described), None)
        title = f"graft verify {model or recipe}"
        reporting.conclude(output, report, title, fail_level, verbose=verbose, twin=last)


def _twin(name: str, seed: int, access: dict[str, Any], described: list[TwinDescription]) -> PreTrainedModel:
    from graftkit.twins.description import describe_twin
    from graftkit.twins.twin import twin

    with progress_bar() as on_progress:
        model = twin(name, seed=seed, on_progress=on_progress, **access)
    described.append(describe_twin(model))
    return model


def _loaded(name: str, access: dict[str, Any]) -> PreTrainedModel:
    from graftkit.surveying.sources.load_model import load_model

    with working(f"loading {name}"):
        return load_model(name, **access)


def _verify(
    model: Any, request: dict[str, Any], folder: Path | None, seed: int, settings: CheckSettings
) -> Report:
    from graftkit.attaching.attach import attach
    from graftkit.checks.verify import verify as run_checks
    from graftkit.modeling.random_state import seeding
    from graftkit.planning.plan import plan
    from graftkit.twins.example_batch import example_batch

    with working(ATTACHING):
        planned = plan(model, **request)
        with seeding(model, seed):
            adapted = attach(model, planned)
        batch = example_batch(adapted.get_base_model(), seed=seed)
    with progress_bar() as on_progress:
        return run_checks(
            adapted, batch, plan=planned, checkpoint=folder, settings=settings, on_progress=on_progress
        )


def _nothing_to_verify() -> GraftError:
    return GraftError(
        "nothing to verify",
        where="graft verify",
        why="neither a MODEL nor --recipe was given",
        help="graft verify MODEL --twin, or graft verify --recipe FILE",
        code="usage",
    )


def _recipe_decides() -> GraftError:
    return GraftError(
        "--recipe says what to adapt; no other option can",
        where="--recipe",
        why="--targets, --scope, --method, --r, --alpha and --option would contradict it",
        help="change the recipe's adapter section, or leave --recipe out",
        code="usage",
    )
