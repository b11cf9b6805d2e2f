"""The model, the data and the files that the recipe names must be there, and its output must have a place.

## Why it matters

A name that is mistyped is looked for on the hub, and what is missing is found one run at a time; an output folder
that cannot be written is found at the first save.

## Example

`data: {path: trian.jsonl}` beside a train.jsonl.

## How safe that is

Nothing is downloaded or written to find out; the hub is asked once for what is not on this machine.

## Sources

- https://github.com/huggingface/datasets/issues/807
- transformers: TrainingArguments.deepspeed, Trainer.save_model
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.faults import Fault, failed_with
from graftkit.checks.engine.rule import Observation, Rule, info, passed
from graftkit.data.source import check_source, place_of
from graftkit.errors import DataError, GraftError
from graftkit.findings import Severity, Source
from graftkit.planning.cost import Memory
from graftkit.recipes.trainer_arguments import named_files, output_folder
from graftkit.surveying.sources.local import existing_path
from graftkit.text import size


def _check(context: CheckContext) -> Observation:
    faults = [*_model(context), *_data(context), *_files(context), *_output(context)]
    if context.recipe.fields.data.path is None:
        none = Fault(
            "no-data", "the recipe names no data, which training needs", "data: {path: train.jsonl}", "data"
        )
        if not faults:  # it may yet be given by --set
            return info(none.message, help=none.help)
        faults.append(none)
    if faults:
        return failed_with(faults, context.recipe)
    return passed("what the recipe names is there")


def _model(context: CheckContext) -> Iterator[Fault]:
    if context.given.model_refusal is not None:
        yield _fault(context.given.model_refusal, "model")


def _data(context: CheckContext) -> Iterator[Fault]:
    section = context.recipe.fields.data
    for name, path in {"path": section.path, "eval_path": section.eval_path}.items():
        try:
            if path is not None:
                check_source(path, place_of(path, context.recipe))
        except DataError as error:
            yield _fault(error, f"data.{name}")


def _files(context: CheckContext) -> Iterator[Fault]:
    for name, file in named_files(context.recipe).items():
        if not file.is_file():
            advice = "paths in a recipe are relative to its folder"
            yield Fault("file-missing", f"there is no file {file}", advice, f"args.{name}")


def _output(context: CheckContext) -> Iterator[Fault]:
    """Yield what keeps the output from being written: a place that takes no files, or too few bytes."""
    folder, key = output_folder(context.recipe), "args.output_dir"
    existing = next(place for place in (folder, *folder.parents) if existing_path(str(place)))
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        why = "cannot be written" if existing.is_dir() else "is a file"
        yield Fault("output", f"the output goes to {folder}, and {existing} {why}", "args: {output_dir: …}", key)
        return
    needed = _smallest_save(context)
    if (free := shutil.disk_usage(existing).free) < needed:
        message = f"{existing} has {size(free)} left, and the adapter alone takes {size(needed)}"
        yield Fault("disk-full", message, "free space there, or args: {output_dir: …}", key)


def _smallest_save(context: CheckContext) -> int:
    """Return the bytes of the adapter's weights, 0 where it is not planned: every save writes at least those."""
    memory: Memory | None = None if context.given.plan is None else context.given.plan.memory
    return 0 if memory is None else memory.adapter_weights // 2  # in 16 bit, the least


def _fault(error: GraftError, key: str) -> Fault:
    message = ": ".join(part for part in (error.what, error.where, error.why) if part)
    return Fault(error.code, message, error.help or "name one that is there", key)


RULE = Rule(
    code="GK006",
    title="what the recipe names is there",
    severity=Severity.ERROR,
    needs=("recipe", "machine"),
    check=_check,
    help="correct the name, or put there what it names",
    since="0.1.0",
    source=Source.FILE,
)
