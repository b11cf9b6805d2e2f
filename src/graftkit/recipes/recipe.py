"""A training recipe: one YAML file that names the model, the adapter, the data and the trainer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from graftkit.errors import MissingDependencyError, RecipeError
from graftkit.planning.config.options import instead_of
from graftkit.recipes.arguments import unknown_arguments
from graftkit.recipes.document import Document, Key, parse_value, read_document
from graftkit.recipes.problems import Problem, problems
from graftkit.recipes.settings import CheckSettings
from graftkit.recipes.trainers import TrainerName
from graftkit.text import suggest

if TYPE_CHECKING:
    from graftkit.planning.plan import Plan

# What `graft doctor` looks for in the current folder.
NAMES = ("recipe.yaml", "recipe.yml")

_SECTION = ConfigDict(extra="forbid", frozen=True)


def _check_option(name: str) -> str:
    """Refuse an option whose value the recipe takes from a key."""
    if name in AdapterSection.model_fields or name in ("model", "quantization"):
        raise PydanticCustomError("not_an_option", "it would override the recipe's key {name}", {"name": name})
    return name


_Option = Annotated[str, AfterValidator(_check_option)]


class AdapterSection(BaseModel):
    """What to adapt, as ``graftkit.plan`` takes it; or a stock PEFT configuration, used as it is."""

    model_config = _SECTION

    targets: str | list[str] = Field(default="all-linear", description="all-linear, a role, a name, a pattern.")
    scope: str | list[str] | None = Field(
        default=None, description="Towers, or paths of modules; null for the towers that every batch feeds."
    )
    method: str = Field(default="lora", description="lora, dora, rslora, or any method of PEFT by name.")
    r: int | None = Field(default=None, description="Rank.")
    alpha: float | None = Field(default=None, description="Numerator of the scale.")
    dropout: float | None = Field(default=None, description="Dropout on the adapter's input, 0 to 1.")
    allow_unmatched: bool = Field(default=False, description="List targets that match nothing instead of failing.")
    strict: bool = Field(
        default=False, description="Fail over a role that the model lacks or that cannot be adapted."
    )
    options: dict[_Option, Any] = Field(default={}, description="Further fields of PEFT's configuration class.")
    peft_config: dict[str, Any] | None = Field(
        default=None,
        description=(
            "A stock PEFT configuration, as adapter_config.json has it, instead of the other keys; peft_type is"
            " LORA where it is not given."
        ),
    )

    @field_validator("peft_config")
    @classmethod
    def _of_a_method(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if value is None else {"peft_type": "LORA", **value}

    def plan_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of ``graftkit.plan``."""
        given = self.model_dump(exclude={"options", "peft_config"})
        return {**given, **self.options}


class DataSection(BaseModel):
    """What is trained on."""

    model_config = _SECTION

    path: str | None = Field(
        default=None,
        description="A JSON, JSONL, CSV or Parquet file, a folder, a saved dataset, or a hub id.",
    )
    split: str = Field(default="train", description="The split of path.")
    eval_path: str | None = Field(
        default=None, description="Data to evaluate on; null for none, or for eval_share."
    )
    eval_split: str | None = Field(default=None, description="The split to evaluate on.")
    eval_share: float | None = Field(
        default=None, gt=0, lt=1, description="Share of the data to keep out of training and evaluate on."
    )
    columns: dict[str, str] = Field(default={}, description="The trainer's column -> the data's column.")
    limit: int | None = Field(default=None, gt=0, description="Number of samples to use, at most.")
    reward: str | list[str] | None = Field(
        default=None, description="For grpo: built-in rewards, or functions as package.module:function."
    )
    modalities: list[Literal["text", "image", "audio"]] | None = Field(
        default=None, description="Modalities of the batches; null for those of the data's columns."
    )


class RecipeFields(BaseModel):
    """The recipe's keys."""

    model_config = _SECTION

    model: str = Field(description="A hub id, a local directory, a config.json, or a transformers model type.")
    adapter: AdapterSection = AdapterSection()
    quantization: Literal["4bit", "8bit"] | None = Field(
        default=None, description="How bitsandbytes quantizes the frozen base."
    )
    data: DataSection = DataSection()
    trainer: TrainerName = TrainerName.SFT
    args: dict[str, Any] = Field(default={}, description="Fields of TRL's own configuration class, unchanged.")
    checks: CheckSettings = CheckSettings()


@dataclass(frozen=True)
class Recipe:
    """A recipe that has been read.

    Attributes:
        document: the file, with the line of each key.
        fields: the keys, with defaults filled in.
    """

    document: Document
    fields: RecipeFields

    @property
    def path(self) -> Path:
        return self.document.path

    @property
    def args(self) -> Mapping[str, Any]:
        """TRL's arguments, as written."""
        return self.fields.args

    def line(self, key: str) -> int | None:
        """Return the line of a dotted key (``"args.packing"``), or of its nearest parent in the file."""
        place = self.document.place(tuple(key.split(".")))
        return place[0] if place else None

    def plan(self, model: Any) -> Plan:
        """Plan the recipe's adapter on this model. Not for a recipe with a stock PEFT configuration.

        Raises:
            PlanError: the request cannot be met exactly.
        """
        from graftkit.planning.plan import plan

        return plan(model, quantization=self.fields.quantization, **self.fields.adapter.plan_kwargs())


def read_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: a YAML file.
        overrides: ``key.key=value`` pairs that replace what the file says; the value is YAML.

    Raises:
        RecipeError: ``recipe-not-found``, ``recipe-syntax`` or ``recipe-invalid``, with file, line and column;
            ``recipe-override`` for a pair that is not a key and a value.
    """
    document = read_document(path)
    fields = document.plain()
    overridden = [_override(fields, pair) for pair in overrides]
    try:
        return Recipe(document, RecipeFields.model_validate(fields))
    except ValidationError as error:
        found = problems(error, RecipeFields)
        # What an override broke is corrected where it was given; the file may wait.
        if not any(_override_of(problem.key, overridden) for problem in found):
            found += _unknown_arguments(document, fields)
        raise _invalid(found, lambda key: _where(document, key, overridden)) from error


def _unknown_arguments(document: Document, fields: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the unknown arguments of a recipe that is not valid: whoever corrects it sees them at once."""
    trainer, args = fields.get("trainer", TrainerName.SFT), fields.get("args")
    if trainer in list(TrainerName) and isinstance(args, Mapping):
        with suppress(MissingDependencyError):
            for unknown in unknown_arguments(document, TrainerName(trainer), args):
                why = f"{TrainerName(trainer).config_class} has no argument {unknown.name!r}"
                yield Problem(why, ("args", unknown.name), unknown.advice)


def _invalid(found: Sequence[Problem], place: Callable[[Key], str]) -> RecipeError:
    """Return the error for all that is wrong in a recipe, each with its place."""
    advice = {problem: _option_hint(problem.key) or problem.advice for problem in found}
    first, fallback = (
        found[0],
        f"correct the value there; graft train --init {TrainerName.SFT} shows what each key takes",
    )
    if len(found) == 1:
        what, why, hint = f"the recipe is not valid at {first.name}", first.why, advice[first]
    else:
        what = f"the recipe is not valid in {len(found)} places"
        why = "\n       ".join(f"{place(problem.key)} {problem.name}: {problem.why}" for problem in found)
        hint = "\n        ".join(f"{problem.name}: {text}" for problem, text in advice.items() if text)
    return RecipeError(what, where=place(first.key), why=why, help=hint or fallback, code="recipe-invalid")


def _option_hint(key: Key) -> str | None:
    """Return where a misplaced key of ``adapter`` or of its options goes; None for any other key."""
    if len(key) == 3 and key[:2] == ("adapter", "options"):
        moved = f"{key[2]}: VALUE"
        return f"adapter: {{{moved}}}" if key[2] in AdapterSection.model_fields else moved
    if len(key) != 2 or key[0] != "adapter" or key[1] in AdapterSection.model_fields:
        return None
    if (instead := instead_of(str(key[1]))) is not None:
        return instead
    near = suggest(str(key[1]), AdapterSection.model_fields)
    hint = f"a field of PEFT's configuration goes under options: adapter: {{options: {{{key[1]}: VALUE}}}}"
    return f"{near} {hint}" if near else hint


def _override(fields: dict[str, Any], pair: str) -> Key:
    """Set the pair's value, and return its key."""
    name, _, value = pair.partition("=")
    key = tuple(name.split("."))
    if "=" not in pair or not all(key):
        raise RecipeError(
            f"not an override: {pair!r}",
            where="--set",
            why="it names a key of the recipe, by its path, and the new value after =",
            help="--set args.max_steps=10",
            code="recipe-override",
        )
    for parent in key[:-1]:
        nested = fields.get(parent)
        fields[parent] = fields = dict(nested) if isinstance(nested, Mapping) else {}
    fields[key[-1]] = parse_value(value, f"--set {name}")
    return key


def _where(document: Document, key: Key, overridden: Iterable[Key]) -> str:
    """Return where a key was set: in the file, or in an override of it, of a part of it, or of its parent."""
    name = _override_of(key, overridden)
    return f"--set {'.'.join(map(str, name))}" if name else document.where(key)


def _override_of(key: Key, overridden: Iterable[Key]) -> Key | None:
    return next((name for name in overridden if all(map(operator.eq, name, key))), None)


def find_recipe(folder: str | Path = ".") -> Path | None:
    """Return the recipe of a folder, or None."""
    return next((file for name in NAMES if (file := Path(folder) / name).is_file()), None)
