"""Change a recipe so that it no longer fails as it did: each repair reads one kind of error."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from graftkit.twins.batches.candidates.named import optional, other
from graftkit.twins.batches.expressions import call_arguments
from graftkit.twins.batches.facts import ModelFacts
from graftkit.twins.batches.recipe import PLACEHOLDERS, CannotCountError, Recipe, value_of
from graftkit.twins.batches.trial import Failure

if TYPE_CHECKING:
    from torch import nn

Repair = Callable[[ModelFacts, Recipe, Failure], Recipe | None]

# Features of a modality that the model does not say the number of: any number shows what the forward wants.
_SOME = 4
# Rows of a trial, where the error does not tell.
_ROWS = 2
# Inputs that the search adds, with what belongs to them.
_OF_A_MODALITY = re.compile(r"pixel_values(_videos)?|input_features|input_values|(image|video)_grid_\w+")
# More vectors than a small picture or clip has.
_MANY = 600
_MISMATCH = re.compile(r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)")
_TOO_SHORT = re.compile(r"(?i)kernel size can't be greater|output size is too small|padding size should be less")
# By how much an axis grows that was too short.
_LONGER = 8
_COUNTS = re.compile(r"tokens\D*?(\d+)\D+?features?\D*?(\d+)", re.IGNORECASE | re.DOTALL)


def repaired(facts: ModelFacts, recipe: Recipe, failure: Failure) -> Recipe | None:
    """Return the recipe with the first repair that changes it, or None."""
    for repair in _REPAIRS:
        changed = repair(facts, recipe, failure)
        if changed is not None and changed != recipe:
            return changed
    return None


def given(recipe: Recipe) -> dict[str, str]:
    """Return all inputs of a recipe: name -> expression."""
    return {name: text for group in recipe.values() for name, text in group.items() if name != PLACEHOLDERS}


def with_input(recipe: Recipe, name: str, expression: str, group: str = "other") -> Recipe:
    """Return the recipe with one more input, or another expression for one that it has."""
    owner = next((modality for modality, inputs in recipe.items() if name in inputs), group)
    return {**recipe, owner: {**recipe.get(owner, {}), name: expression}}


def without_input(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe without an input."""
    return {group: {n: e for n, e in inputs.items() if n != name} for group, inputs in recipe.items()}


def _add(facts: ModelFacts, recipe: Recipe, names: Iterable[str]) -> Recipe:
    for name in names:
        if not facts.takes(name) or name in given(recipe) or _OF_A_MODALITY.fullmatch(name):
            continue
        if expression := other(facts, name):
            recipe = with_input(recipe, name, expression)
    return recipe


def missing_input(facts: ModelFacts, recipe: Recipe, failure: Failure) -> Recipe | None:
    """Add what the error says is missing, by the name it uses."""
    text = failure.message
    names = re.findall(r"'(\w+)'", text) if "required" in text else []
    patterns = (
        r"specify (?:either |exactly one of )?`?(\w+)`?",
        r"`(\w+)` (?:cannot be|must be|is required|should be|has to be|need)",
        r"(\w+) (?:must be|is required|should be|has to be|needs? to be) (?:provided|specified|given|passed|set)",
        r"(?:provide|pass|give|missing|requires?) (?:the |both |a |an )?`?(\w+)`?",
    )
    for pattern in patterns:
        names += re.findall(pattern, text)
    return _add(facts, recipe, names)


def placeholders_unknown(_facts: ModelFacts, recipe: Recipe, failure: Failure) -> Recipe | None:
    """Put some placeholders where the number of features cannot be computed; the forward then tells its own."""
    counted = [m for m, g in recipe.items() if "features" in g.get(PLACEHOLDERS, "")]
    if not counted or not isinstance(failure.error, CannotCountError):
        return None
    token = recipe[counted[0]][PLACEHOLDERS].partition("*")[0].strip()
    return with_input_in(recipe, counted[0], PLACEHOLDERS, f"{token} * {_SOME}")


def with_input_in(recipe: Recipe, group: str, name: str, expression: str) -> Recipe:
    """Return the recipe with an expression in a group, whatever other groups have."""
    return {**recipe, group: {**recipe.get(group, {}), name: expression}}


def placeholder_count(facts: ModelFacts, recipe: Recipe, failure: Failure) -> Recipe | None:
    """Put as many placeholders as the error says that there are features."""
    counts = _COUNTS.search(failure.message)
    soft = [modality for modality, group in recipe.items() if PLACEHOLDERS in group]
    if not counts or not soft:
        return None
    tokens, features = int(counts[1]), int(counts[2])
    named = [modality for modality in soft if modality in failure.message.lower()]
    modality = (named or soft)[0]
    token, _, old = recipe[modality][PLACEHOLDERS].partition("*")
    number = int(old) if old.strip().isdigit() else None
    rows = tokens // number if number and tokens and tokens % number == 0 else _ROWS
    wanted = features // rows
    seen = math.prod(failure.given[:-1]) // rows
    if wanted > _MANY:  # some classes count values, not vectors
        wanted //= value_of(facts.width, facts.model)
    elif wanted == number and seen:  # and some count pictures
        wanted = seen
    return with_input_in(recipe, modality, PLACEHOLDERS, f"{token.strip()} * {max(1, wanted)}")


def labels_refused(_facts: ModelFacts, recipe: Recipe, failure: Failure) -> Recipe | None:
    """Leave labels out where the loss cannot be computed from them."""
    if "labels" not in given(recipe) or not any("loss" in f or "label" in line for f, line in failure.frames):
        return None
    return without_input(recipe, "labels")


def no_cache(facts: ModelFacts, recipe: Recipe, failure: Failure) -> Recipe | None:
    """Switch the cache off where filling it fails."""
    text = " ".join([failure.message, *(part for frame in failure.frames for part in frame)])
    if not re.search(r"get_seq_length|past_key_values|cache", text) or "use_cache" in given(recipe):
        return None
    return with_input(recipe, "use_cache", "False") if facts.takes("use_cache") or facts.takes_keywords else None


def unexpected_keyword(_facts: ModelFacts, recipe: Recipe, failure: Failure) -> Recipe | None:
    """Leave out what a part of the model does not take."""
    names = re.findall(r"unexpected keyword argument '(\w+)'", failure.message)
    return without_input(recipe, names[0]) if names and names[0] in given(recipe) else None


def input_width(facts: ModelFacts, recipe: Recipe, failure: Failure) -> Recipe | None:
    """Give the module that failed as many features or channels as its weight takes."""
    if not failure.module or not failure.given:
        return None
    module = facts.model.get_submodule(failure.module)
    axis, wanted = _taken(module)
    if not wanted or len(failure.given) < abs(axis) or failure.given[axis] == wanted:
        return None
    for name, expression in given(recipe).items():
        function, sizes = call_arguments(expression)
        if function != "normal" or len(sizes) < 2:
            continue
        at = _same_axis(facts, sizes, failure.given, axis)
        if at is not None:
            sizes[at] = f'inputs_of("{failure.module}")'
            return with_input(recipe, name, f"normal({', '.join(sizes)})")
    return None


def too_short(facts: ModelFacts, recipe: Recipe, failure: Failure) -> Recipe | None:
    """Lengthen what a convolution found too short for its kernel."""
    if not failure.module or not _TOO_SHORT.search(failure.message):
        return None
    axes = len(getattr(facts.model.get_submodule(failure.module), "kernel_size", ()))
    for name, expression in given(recipe).items():
        function, sizes = call_arguments(expression)
        if axes and function == "normal" and len(sizes) == len(failure.given):
            sizes[-axes:] = [f"{_LONGER} * {size}" for size in sizes[-axes:]]
            return with_input(recipe, name, f"normal({', '.join(sizes)})")
    return None


def text_length(_facts: ModelFacts, recipe: Recipe, failure: Failure) -> Recipe | None:
    """Make a text as long as the features that are added to it, step by step."""
    sizes = _MISMATCH.search(failure.message)
    function, length = call_arguments(given(recipe).get("input_ids", "0"))
    if sizes is None or function != "tokens" or length[0] not in sizes.groups():
        return None
    if any(PLACEHOLDERS in group for group in recipe.values()):
        return None
    other_length = next((size for size in sizes.groups() if size != length[0]), length[0])
    return with_input(recipe, "input_ids", f"tokens({other_length})")


def keys_unmasked(facts: ModelFacts, recipe: Recipe, failure: Failure) -> Recipe | None:
    """Give a mask of as many keys as attention has, where the model makes one for fewer."""
    sizes = _MISMATCH.search(failure.message)
    name = "attention_mask"
    attends = any("attention" in path for path, _ in failure.frames[-2:])
    if sizes is None or not attends or not facts.takes(name) or name in given(recipe):
        return None
    return with_input(recipe, name, f"ones(B, {max(int(size) for size in sizes.groups())})")


def guarded_input(facts: ModelFacts, recipe: Recipe, failure: Failure) -> Recipe | None:
    """Add the inputs on whose absence it depends that an error was raised."""
    absent = set(optional(facts, list(given(recipe))))
    return _add(facts, recipe, (name for name in failure.guards if name in absent))


def _taken(module: nn.Module) -> tuple[int, int]:
    """Return the axis of a module's input that its weight fixes, and the size that it wants; 0 for any."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return -1, module.in_features
    if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        return -1 - len(module.kernel_size), module.in_channels
    if isinstance(module, nn.LayerNorm):
        return -1, int(module.normalized_shape[-1])
    own = list(module.parameters(recurse=False))
    if len(own) == 1 and own[0].ndim == 1 and len(own[0]) > 1:  # a norm of the model's own
        return -1, len(own[0])
    return 0, 0


def _same_axis(facts: ModelFacts, sizes: list[str], shape: tuple[int, ...], axis: int) -> int | None:
    """Return the axis of an input that arrives at a module in this place."""
    values = [_size(facts, size) for size in sizes]
    arrived = shape[axis]
    if len(values) >= abs(axis) and values[axis] == arrived:
        return len(sizes) + axis
    return len(values) - 1 - values[::-1].index(arrived) if arrived in values[1:] else None


def _size(facts: ModelFacts, size: str) -> Any:
    try:
        return value_of(size, facts.model)
    except (ValueError, LookupError, AttributeError, TypeError):
        return None


def index_range(facts: ModelFacts, recipe: Recipe, failure: Failure) -> Recipe | None:
    """Draw indices that the table at which the forward failed has."""
    from torch import nn

    if "index out of range" not in failure.message or not failure.module:
        return None
    if not isinstance(facts.model.get_submodule(failure.module), nn.Embedding):
        return None
    limit = f'rows_of("{failure.module}")'
    for name, expression in given(recipe).items():
        function, values = call_arguments(expression)
        shape = tuple(_size(facts, value) for value in values[2:])
        if function == "integers" and values[1] != limit and shape == failure.given[: len(shape)]:
            return with_input(recipe, name, f"integers({values[0]}, {limit}, {', '.join(values[2:])})")
        plain = function == "words" or (
            function == "tokens" and not any(PLACEHOLDERS in g for g in recipe.values())
        )
        if plain and failure.given[1:] == (_size(facts, values[0]),):
            return with_input(recipe, name, f"integers(0, {limit}, B, {values[0]})")
    return None


def positions_unknown(facts: ModelFacts, recipe: Recipe, failure: Failure) -> Recipe | None:
    """Number the tokens along time, height and width where the model fails to do so from its tokens and grids."""
    if "position_ids" in given(recipe) or not facts.takes("position_ids", "input_ids"):
        return None
    if not any("get_rope_index" in line for _, line in failure.frames):
        return None
    # Classes that write a time between the steps of a video can only number one step, which is tried next.
    if any("video" in name and value.startswith("rows(2") for name, value in given(recipe).items()):
        return None
    return with_input(recipe, "position_ids", "stacked(3, counting(T))")


def something_is_none(facts: ModelFacts, recipe: Recipe, failure: Failure) -> Recipe | None:
    """Add every optional input where the model computes with one that is None."""
    if "None" not in failure.message:
        return None
    names = optional(facts, list(given(recipe)))
    mentioned = [n for n in names if any(re.search(rf"\b{n}\b", line) for _, line in failure.frames)]
    return _add(facts, recipe, mentioned or names)


_REPAIRS: tuple[Repair, ...] = (
    no_cache,
    missing_input,
    unexpected_keyword,
    placeholder_count,
    input_width,
    too_short,
    text_length,
    keys_unmasked,
    index_range,
    labels_refused,
    positions_unknown,
    something_is_none,
    guarded_input,
    placeholders_unknown,
)
