"""A batch's recipe, and the batch that it makes for a model: symbolic, so that it fits any size of a class."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeGuard

from graftkit.families import IGNORED_LABEL
from graftkit.modeling.device import cast_inputs
from graftkit.modeling.module_mode import evaluating
from graftkit.twins.batches.expressions import evaluate
from graftkit.twins.batches.tensors import TensorFunctions

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

Recipe = Mapping[str, Mapping[str, str]]
"""Modality -> input -> expression.

Modalities are "image", "video", "audio", and "text" and "other", which are always given. Names in an expression
are fields of the model's configuration; ``B``, the rows; ``T``, the tokens of a row. ``placeholders`` is not an
input but a list of token ids that ``tokens`` puts into each row; there ``features`` is how many feature vectors a
model computes for a row from that modality's inputs. Functions are those of ``TensorFunctions``, and for text
``tokens(n)``, ``ended(n)``, ``words(n)``, ``targets()`` and ``types()``.
"""

MODALITIES = ("text", "image", "audio", "video")
PLACEHOLDERS = "placeholders"
_ALWAYS = ("text", "other")
_ORDER = ("image", "video", "audio", *_ALWAYS)
# mm_token_type_ids of transformers' processors: 0 is text.
_TYPES = {"image": 1, "video": 2, "audio": 3}
_TOKENS_WITHOUT_TEXT = 12
_SEVERAL_IMAGES_A_ROW = 5  # axes
# Models of characters state no vocabulary: every code point is one.
_CHARACTERS = 128
_NAME = re.compile(r"[A-Za-z]\w*")


def make_batch(
    recipe: Recipe,
    model: PreTrainedModel,
    batch_size: int,
    generator: torch.Generator,
    modalities: frozenset[str] = frozenset(MODALITIES),
) -> dict[str, Any]:
    """Return the inputs that a recipe stands for, on the CPU and in float32; flags are Python's.

    Args:
        recipe: of the model's class. A modality whose part this model lacks is left out.
        model: it is run where placeholders depend on the number of features.
        batch_size: number of rows.
        generator: of random values.
        modalities: which of image, video and audio to feed.

    Raises:
        ValueError, LookupError, AttributeError: it does not fit the model's configuration.
    """
    maker = _Maker(model, batch_size, generator)
    for modality in _ORDER:
        wanted = modality in _ALWAYS or (
            modality in modalities and _has_parts(model.config, recipe.get(modality, {}))
        )
        if modality in recipe and wanted:
            maker.add(modality, recipe[modality])
    return maker.batch


def is_recipe(value: Any) -> TypeGuard[Recipe]:
    """Check whether a value that was read from a file has the form of a recipe."""
    groups = value.values() if isinstance(value, Mapping) else [None]
    return all(isinstance(group, Mapping) and all(isinstance(e, str) for e in group.values()) for group in groups)


def _has_parts(config: PretrainedConfig, inputs: Mapping[str, str]) -> bool:
    """Check that a configuration has every part whose fields the expressions name."""
    named = {name for expression in inputs.values() for name in _NAME.findall(expression)}
    return all(getattr(config, name, None) is not None for name in named & set(config.sub_configs))


class _Maker:
    """One batch while it is made, modality by modality."""

    def __init__(self, model: PreTrainedModel, batch_size: int, generator: torch.Generator) -> None:
        self.model = model
        self.batch_size = batch_size
        self.functions = TensorFunctions(model, batch_size, generator)
        self.batch: dict[str, Any] = {}
        self.placeholders: dict[str, list[int]] = {}
        self.given: dict[str, Any] = {}  # the inputs of the modality that is being added

    def add(self, modality: str, inputs: Mapping[str, str]) -> None:
        """Add the inputs of one modality."""
        self.given, self.modality = {}, modality
        for name, expression in inputs.items():
            if name != PLACEHOLDERS:
                value = evaluate(expression, self.lookup)
                self.given[name] = self.batch[name] = value
        if PLACEHOLDERS in inputs:
            self.placeholders[modality] = evaluate(inputs[PLACEHOLDERS], self.lookup)

    def lookup(self, name: str) -> Any:
        """Return what a name stands for in an expression."""
        if name == "B":
            return self.batch_size
        if name == "T":
            return self.batch["input_ids"].shape[1] if "input_ids" in self.batch else _TOKENS_WITHOUT_TEXT
        if name == "features":
            return features_per_row(self.model, self.modality, self.given, self.batch_size)
        if name in ("tokens", "words", "ended", "targets", "types"):
            return getattr(self, name)
        if not name.startswith("_") and hasattr(TensorFunctions, name):
            return getattr(self.functions, name)
        return getattr(self.model.config, name)

    def tokens(self, length: int) -> torch.Tensor:
        """Return random text with the placeholders of every modality before its second half: (B, T)."""
        import torch

        ids = self.words(length)
        soft = [token for tokens in self.placeholders.values() for token in tokens]
        middle = torch.tensor(soft, dtype=torch.long).expand(self.batch_size, len(soft))
        return torch.cat([ids[:, : length // 2], middle, ids[:, length // 2 :]], dim=1)

    def words(self, length: int) -> torch.Tensor:
        """Return random text without placeholders: (B, length)."""
        return self.functions.integers(*text_ids(self.model.config), self.batch_size, length)

    def ended(self, length: int) -> torch.Tensor:
        """Return ``tokens`` of which the last is the end of the text: (B, T)."""
        ids = self.tokens(length)
        ids[:, -1] = self.model.config.get_text_config().eos_token_id
        return ids

    def targets(self) -> torch.Tensor:
        """Return the tokens as labels, without those of placeholders: (B, T)."""
        return self.batch["input_ids"].masked_fill(self.types().bool(), IGNORED_LABEL)  # type: ignore[no-any-return]

    def types(self) -> torch.Tensor:
        """Return the modality of each token, 0 for text: (B, T)."""
        import torch

        types = torch.zeros_like(self.batch["input_ids"])
        for modality, tokens in self.placeholders.items():
            types[torch.isin(self.batch["input_ids"], torch.tensor(tokens))] = _TYPES.get(modality, 0)
        return types


def text_ids(config: PretrainedConfig) -> tuple[int, int]:
    """Return the longest range [low, high) of ids that are not special tokens; the first three count as such.

    A placeholder among the words would be one more than the modality has features.
    """
    vocabulary = _vocabulary(config)
    special = sorted({2, vocabulary, *(i for i in _special_ids(config) if 2 < i < vocabulary)})
    low, high = max(pairwise(special), key=lambda ends: ends[1] - ends[0])
    return (low + 1, high) if low + 1 < high <= vocabulary else (0, vocabulary)


def _vocabulary(config: PretrainedConfig) -> int:
    """Return the size of the text's vocabulary: its configuration's, or the smallest that any part has."""
    names = ("vocab_size", "text_vocab_size", "n_vocab")
    parts = [config.get_text_config(), config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        sizes = [getattr(part, name, None) for name in names]
        if known := [size for size in sizes if isinstance(size, int) and size > 0]:
            return min(known)
    return _CHARACTERS


def _special_ids(config: PretrainedConfig) -> set[int]:
    fields = config.to_dict()
    parts = [fields, *(v for v in fields.values() if isinstance(v, dict))]
    endings = ("_token_id", "_token_index", "_token_ids", "_patch_id")
    values = [v for part in parts for k, v in part.items() if str(k).endswith(endings)]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return {i for i in flat if isinstance(i, int)}


class CannotCountError(ValueError):
    """The number of a modality's features is not known before the forward runs."""


def features_per_row(model: PreTrainedModel, modality: str, inputs: Mapping[str, Any], batch_size: int) -> int:
    """Return how many feature vectors a row the model computes from a modality's inputs; the tower is run.

    Raises:
        CannotCountError: the model has no method for it, or one that wants other inputs.
    """
    import torch

    compute = _features_method(model, f"get_{modality}_features")
    accepted = inspect.signature(compute).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    given = {k: v for k, v in cast_inputs(model, inputs).items() if takes_any or k in accepted}
    named = [p for p in accepted.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if missing := [p.name for p in named if p.default is p.empty and p.name not in given]:
        raise CannotCountError(f"get_{modality}_features() wants {', '.join(missing)}")
    with torch.no_grad(), evaluating(model):
        try:
            features = compute(**given)
        except Exception:
            one_by_one = _flat(given)
            if one_by_one is None:
                raise
            features = compute(**one_by_one)
        return _vectors(features) // batch_size


def _flat(inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the inputs with each of a row's several images as a row, as forwards do; None where none has any."""
    several = {name for name, value in inputs.items() if getattr(value, "ndim", 0) == _SEVERAL_IMAGES_A_ROW}
    if not several:
        return None
    return {name: value.flatten(0, 1) if name in several else value for name, value in inputs.items()}


def _features_method(model: PreTrainedModel, name: str) -> Any:
    for module in (model, model.base_model, *model.modules()):
        if (method := getattr(module, name, None)) is not None:
            return method
    raise CannotCountError(f"no module has {name}()")


def _vectors(features: Any) -> int:
    """Count the feature vectors in a tower's output: a tensor, several, or an object that holds them."""
    import torch

    if isinstance(features, torch.Tensor):
        return math.prod(features.shape[:-1])
    for name in ("pooler_output", "last_hidden_state"):
        if (output := getattr(features, name, None)) is not None:
            return _vectors(output)
    return sum(_vectors(part) for part in features)


def value_of(expression: str, model: PreTrainedModel, batch_size: int = 2) -> Any:
    """Return the value that an expression without text and random numbers has for a model."""
    import torch

    return evaluate(expression, _Maker(model, batch_size, torch.Generator()).lookup)
