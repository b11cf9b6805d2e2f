"""A saved adapter as its configuration and the headers of its tensors describe it, and its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graftkit.adapters.file import DEFAULT_ALPHA, DEFAULT_RANK, AdapterFile
from graftkit.checks.peft_config.schema import declared
from graftkit.checks.peft_config.validate import config_problems
from graftkit.modeling.unwrapping import PEFT_PREFIX, without_base_layers
from graftkit.planning.matching import is_all_linear, suffixes, target_matcher, value_at

_CHUNK = 1 << 22
# Below it, squares in single precision lose their digits.
_TINY = 1e-15
# Sources: peft.tuners.lora.layer (Linear, Conv, Embedding), one axis of each tensor is the rank.
_RANK_AXES: Mapping[str, int] = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as its configuration and header describe it. No tensor data is read.

    Attributes:
        file: the adapter's configuration and the headers of its tensors.
        paths: further module paths that its patterns will be matched with: those of the base.
    """

    file: AdapterFile
    paths: tuple[str, ...] = ()

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with the fields of the configuration, whatever the tensors are."""
        return config_problems(
            self.file.config, self.file.peft_type, (*self.modules, *self.paths), modules=len(self.file.tensors)
        )

    @cached_property
    def prefix(self) -> str | None:
        """The prefix of the method's tensors ("lora_"); None where PEFT keeps none in a model's layers."""
        method = declared(self.file.peft_type)
        return None if method is None else method.prefix

    @cached_property
    def modules(self) -> Mapping[str, tuple[str, ...]]:
        """Module path, as the file has it -> the names of the tensors that adapt it."""
        found: dict[str, list[str]] = {}
        for name in self.file.tensors:
            core = self.module_of(name)
            if core is not None:
                found.setdefault(core, []).append(name)
        return {core: tuple(names) for core, names in found.items()}

    def module_of(self, name: str) -> str | None:
        """Return the module that a tensor adapts, as the file has it; None for a weight that was saved whole."""
        if self.prefix is None or not name.startswith(PEFT_PREFIX):
            return None
        core, found, _ = name.removeprefix(PEFT_PREFIX).partition(f".{self.prefix}")
        if not found or core.startswith(self.prefix):
            return None
        return without_base_layers(core)

    @cached_property
    def parameters(self) -> frozenset[str]:
        """The modules that are adapted through ``target_parameters``."""
        holders = {t.rpartition(".")[0] for t in self.file.config.get("target_parameters") or ()}
        if not holders:
            return frozenset()
        return frozenset(m for m in self.modules if "" in holders or not holders.isdisjoint(suffixes(m)))

    @cached_property
    def targets(self) -> str | tuple[str, ...] | None:
        """``target_modules`` as PEFT matches it, or None where it leaves the choice to PEFT."""
        given = self.file.config.get("target_modules")
        if given is None or is_all_linear(given):
            return None
        return given if isinstance(given, str) else tuple(given)

    @cached_property
    def matches(self) -> Callable[[str], bool]:
        """A function that checks whether the configuration's targets, with its filters, name a module path.

        Source: ``peft.tuners.tuners_utils.check_target_module_exists``.
        """
        return target_matcher({**self.file.config, "target_modules": self.targets})

    def rank(self, path: str) -> int:
        """Return a module's rank according to the configuration.

        Source: ``peft.tuners.lora.model.LoraModel._create_and_replace``.
        """
        return int(value_at(self.file.config.get("rank_pattern"), path, self.default_rank))

    @property
    def default_rank(self) -> int:
        """The rank of modules that no pattern names."""
        return int(self.file.config.get("r", DEFAULT_RANK))

    def alpha(self, path: str) -> float:
        """Return a module's alpha according to the configuration.

        Source: ``peft.tuners.lora.model.LoraModel._create_and_replace``.
        """
        return float(value_at(self.file.config.get("alpha_pattern"), path, self.default_alpha))

    @property
    def default_alpha(self) -> float:
        """The alpha of modules that no pattern names."""
        return float(self.file.config.get("lora_alpha", DEFAULT_ALPHA))

    def rank_of_shape(self, name: str) -> int | None:
        """Return the rank that a tensor's shape shows, or None where it shows none.

        A convolution's ``lora_B``, (out, r / groups, 1, …), shows it without its groups: ``lora_A`` tells there.
        Source: ``peft.tuners.lora.layer._ConvNd.update_layer``.
        """
        shape: tuple[int, ...] = self.file.tensors[name].shape
        if ".lora_B." in name and len(shape) > 2:
            return None
        axis = next((_RANK_AXES[part] for part in name.split(".") if part in _RANK_AXES), None)
        return shape[axis] if axis is not None and len(shape) > axis and all(shape) else None


@dataclass(frozen=True, slots=True)
class TensorStats:
    """The squared L2 norm of one tensor, and whether all its values are finite."""

    square: float
    finite: bool


@dataclass(frozen=True)
class TensorData:
    """The data of an adapter's tensors, read when first asked for, one tensor at a time."""

    file: AdapterFile

    @cached_property
    def stats(self) -> Mapping[str, TensorStats]:
        """Statistics by tensor name."""
        from safetensors import safe_open

        with safe_open(str(self.file.weights_path), framework="pt") as opened:
            return {name: _stats(opened.get_tensor(name)) for name in self.file.tensors}


def _stats(tensor: Any) -> TensorStats:
    parts = tensor.flatten().split(_CHUNK) if tensor.numel() else ()
    square = sum(_norm(part.abs() if part.is_complex() else part) ** 2 for part in parts)
    return TensorStats(square, math.isfinite(square))


def _norm(part: Any) -> float:
    """Return the L2 norm, computed in float32, which is many times faster, unless the squares leave its range."""
    import torch

    fast = float(torch.linalg.vector_norm(part.float()))
    if (fast > _TINY and math.isfinite(fast)) or not bool(part.any()):
        return fast
    return float(torch.linalg.vector_norm(part.double()))
