"""What a model says about its inputs: the forward's signature and documented shapes, its configuration."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graftkit.twins.sizes.field_sizes import is_count

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

_DOCUMENTED = re.compile(r"\n\s+(\w+) \(([^\n]*)\):")
_SHAPE = re.compile(r"of shape `?[(\[]([^)\]]*)[)\]]")
_DEEPEST = 3
# Inputs of other modalities than text: required ones of a part are not asked for.
_FEATURES = re.compile(r"pixel_values|image_|video_|input_features|num_frames")


@dataclass(frozen=True)
class Input:
    """One argument of a forward.

    Attributes:
        name: of the argument.
        required: it has no default.
        kind: "float", "int", "bool", "flag" (a Python bool), "number" (a Python int), or "" if unknown.
        shape: names of its documented axes; empty where they are not documented.
    """

    name: str
    required: bool
    kind: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class ModelFacts:
    """One model, asked for what candidates are made of. Sizes are returned as expressions of a recipe."""

    model: PreTrainedModel

    @cached_property
    def inputs(self) -> dict[str, Input]:
        """Return the forward's arguments, by name."""
        own = _inputs_of(type(self.model))
        if not self.takes_keywords:
            return own
        passed = {
            name: given for module in _passed_on_to(self.model) for name, given in _inputs_of(type(module)).items()
        }
        return own | {name: given for name, given in passed.items() if _FEATURES.match(name) and name not in own}

    @cached_property
    def takes_keywords(self) -> bool:
        """Check whether the forward passes keywords on that it does not name."""
        arguments = inspect.signature(type(self.model).forward).parameters.values()
        return any(a.kind is a.VAR_KEYWORD for a in arguments)

    @cached_property
    def parts(self) -> tuple[tuple[str, PretrainedConfig], ...]:
        """Return the configuration and those inside it, with their paths: ("", root), ("vision_config", …), …"""
        return tuple(_parts("", self.model.config, 0))

    @property
    def is_encoder_decoder(self) -> bool:
        """Check whether the forward has decoder inputs of its own, or makes them from labels."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    def takes(self, *names: str) -> bool:
        """Check whether the forward names all these arguments."""
        return set(names) <= set(self.inputs)

    def lacks(self, kind: str) -> bool:
        """Check whether the configuration has a place for a tower of a kind, and none there."""
        places = [name for name in getattr(self.model.config, "sub_configs", {}) if kind in name]
        return bool(places) and all(getattr(self.model.config, name, None) is None for name in places)

    def fields(self, names: Iterable[str], within: Sequence[str] = ()) -> list[str]:
        """Return every field of these names that is set, as expressions, those of preferred parts first.

        Args:
            names: of fields, best first.
            within: words in the path or the model type of the parts to prefer.
        """

        def away(part: tuple[str, PretrainedConfig]) -> int:
            path, config = part
            text = f"{path} {getattr(config, 'model_type', '')}"
            hits = [rank for rank, word in enumerate(within) if path and word in text]
            return min(hits, default=len(within) + (0 if not path else 1))

        wanted = list(names)
        found = [
            f"{path}.{name}" if path else name
            for path, config in sorted(self.parts, key=away)
            for name in wanted
            if _is_set(getattr(config, name, None))
        ]
        return list(dict.fromkeys(found))

    def count(self, names: Iterable[str], default: Any, within: Sequence[str] = ()) -> str:
        """Return the first of these fields that is a positive number, as an expression; else the default."""
        return next((f for f in self.fields(names, within) if is_count(self.value(f))), str(default))

    def value(self, field: str) -> Any:
        """Return the value of a field by its path, or None."""
        value: Any = self.model.config
        for name in field.split("."):
            value = getattr(value, name, None)
        return value

    @property
    def width(self) -> str:
        """Return the width of the main part's hidden states."""
        return self.count(("hidden_size", "d_model", "n_embd", "embed_dim", "dim"), 64)


def _inputs_of(model_class: type[nn.Module]) -> dict[str, Input]:
    forward = model_class.forward
    documented = dict(_DOCUMENTED.findall(forward.__doc__ or ""))
    arguments = inspect.signature(forward).parameters.values()
    named = [a for a in arguments if a.name != "self" and a.kind not in (a.VAR_KEYWORD, a.VAR_POSITIONAL)]
    return {a.name: _input(a, documented.get(a.name, "")) for a in named}


def _passed_on_to(model: nn.Module) -> Iterable[nn.Module]:
    """Yield the model inside one with a head, and its encoder: they get the keywords that a forward passes on."""
    from transformers import PreTrainedModel

    for name in ("base_model", "model", "encoder"):
        inner = getattr(model, name, None)
        if isinstance(inner, PreTrainedModel) and inner is not model:
            yield inner
            yield from _passed_on_to(inner)


def _parts(path: str, config: Any, depth: int) -> Iterable[tuple[str, PretrainedConfig]]:
    yield path, config
    if depth < _DEEPEST:
        for name in getattr(config, "sub_configs", {}):
            inner = getattr(config, name, None)
            if hasattr(inner, "to_dict"):
                yield from _parts(f"{path}.{name}" if path else name, inner, depth + 1)


def _is_set(value: Any) -> bool:
    return value is not None and not isinstance(value, str)


def _input(argument: inspect.Parameter, documented: str) -> Input:
    shape = _SHAPE.search(documented)
    axes = tuple(axis.strip(" `") for axis in shape[1].split(",") if axis.strip(" `")) if shape else ()
    required = argument.default is argument.empty
    return Input(argument.name, required, _kind(argument, documented), axes)


def _kind(argument: inspect.Parameter, documented: str) -> str:
    text = f"{argument.annotation} {documented.partition(' of shape')[0]}"
    for kind, words in (
        ("int", ("LongTensor", "IntTensor")),
        ("bool", ("BoolTensor",)),
        ("float", ("FloatTensor",)),
    ):
        if any(word in text for word in words):
            return kind
    if "Tensor" in text:
        return "float"
    if argument.annotation in (int, "int"):
        return "number"
    return "flag" if "bool" in text else ""
