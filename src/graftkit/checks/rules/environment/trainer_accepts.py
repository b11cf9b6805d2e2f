"""TRL's configuration must accept the values of the recipe's arguments, and the trainer must get what it needs.

## Why it matters

A missing reward, tracker or library of an optimizer is refused only after the model was loaded.

## Example

`trainer: grpo` without `data: {reward: …}`; `report_to: wandb` without wandb; `optim: lomo` without lomo-optim;
a model that classifies.

## How safe that is

TRL's configuration class itself is tried, with the recipe's values; nothing is trained.

## Sources

- https://github.com/huggingface/transformers/issues/39878
- trl: SFTConfig, DPOConfig, GRPOConfig of the installed version
- transformers: Trainer.get_optimizer_cls_and_kwargs, integrations.get_reporting_integration_callbacks
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from graftkit.checks.chat.conversations import conversations_in
from graftkit.checks.engine.context import CheckContext, UndecidableError
from graftkit.checks.engine.faults import Fault, failed_with
from graftkit.checks.engine.rule import Observation, Rule, passed, unknown
from graftkit.data.rewards import check_rewards
from graftkit.errors import DataError, MissingDependencyError
from graftkit.findings import Severity, Source
from graftkit.recipes.trainer_arguments import argument_refusals
from graftkit.recipes.trainers import TrainerName
from graftkit.surveying.sources.local_processor import template_of


def _check(context: CheckContext) -> Observation:
    faults = [*_model(context), *_reward(context), *_template(context)]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A trial would set up again what these processes share.
        return failed_with(faults, context.recipe) if faults else unknown("the trainer says it in each process")
    name = context.recipe.fields.trainer.config_class
    try:
        faults += [_fault(key, why, name) for key, why in argument_refusals(context.recipe)]
    except MissingDependencyError as error:
        if not faults:
            return unknown(f"{error.what}: {error.why}", help=error.help)
    if faults:
        return failed_with(faults, context.recipe)
    return passed(f"{name} accepts the recipe's arguments", arguments=len(context.recipe.args))


def _model(context: CheckContext) -> Iterator[Fault]:
    """Yield the fault of a class that generates nothing: TRL's trainers set the tokens that end a generation."""
    architecture = None if context.given.base is None else context.given.base.architecture
    if architecture is None or architecture.model_class.can_generate():
        return
    message = f"the trainers take models that generate text; {architecture.model_class.__name__} does not"
    advice = "train it with transformers' Trainer: gk.attach(model, plan), gk.Guard(plan) among its callbacks"
    yield Fault("no-generation", message, advice, "model")


def _reward(context: CheckContext) -> Iterator[Fault]:
    recipe = context.recipe
    if recipe.fields.trainer is TrainerName.GRPO:
        try:
            check_rewards(recipe.fields.data.reward, recipe.path.parent)
        except DataError as error:
            message = ": ".join(part for part in (error.what, error.why) if part)
            yield Fault(error.code, message, error.help or "module:function", "data.reward")


def _template(context: CheckContext) -> Iterator[Fault]:
    """Yield the fault of conversations that nothing can turn into text, where rows and tokenizer are known."""
    processor = context.given.processor
    if context.recipe.fields.trainer is not TrainerName.SFT or processor is None or template_of(processor):
        return
    try:
        found = any(conversations_in(context.training_rows))
    except UndecidableError:  # rows that are not there, or cannot be read, are another matter
        return
    if found:
        message = "the data holds messages, and the tokenizer has no chat template"
        advice = "args: {chat_template_path: FILE.jinja}, or prompt and completion columns of plain text"
        yield Fault("no-chat-template", message, advice, "data.path")


def _fault(key: str, why: str, name: str) -> Fault:
    return Fault("arguments", f"{name} and its trainer refuse {key}: {why}", "change what the message names", key)


RULE = Rule(
    code="GK007",
    title="the trainer accepts the recipe's arguments and has what it needs",
    severity=Severity.ERROR,
    needs=("recipe", "machine"),
    check=_check,
    help="change in the recipe what the trainer names",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
