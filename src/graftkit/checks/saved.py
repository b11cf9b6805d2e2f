"""Ways to read a saved adapter: what its configuration promises, and what its tensors hold."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any

from graftkit.adapters.file import AdapterFile
from graftkit.adapters.landing import PEFT_PREFIX, Atlas
from graftkit.checks.config_kinds import wrong_kinds
from graftkit.planning.matching import LONGEST_NAME, rewritten_names, suffixes, target_matcher
from graftkit.surveying.sites import ModelMap, Site

# Beyond this many comparisons of a pattern's key with a module, the answer would take minutes.
_MOST_COMPARISONS = 20_000_000
_LEAST_MODULES = 2_000
_CHUNK = 1 << 22
# Below it, squares in single precision lose their digits.
_TINY = 1e-15
_Fields = dict[str, tuple[str, Callable[[Any], bool]]]
# Sources: peft.tuners.lora.layer (Linear, Conv, Embedding), one axis of each tensor is the rank.
_RANK_AXES: Mapping[str, int] = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
_DEFAULT_RANK = 8
_DEFAULT_ALPHA = 8


@dataclass(frozen=True)
class Saved:
    """One adapter as it is described by its configuration and its header. No tensor data is read.

    Attributes:
        file: the adapter.
        paths: further module paths that its patterns will be matched with: those of the base.
    """

    file: AdapterFile
    paths: tuple[str, ...] = ()

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with the configuration's own fields, whatever the tensors are."""
        return config_problems(
            self.file.config, self.file.peft_type, (*self.modules, *self.paths), modules=len(self.file.tensors)
        )

    @cached_property
    def prefix(self) -> str | None:
        """How the method's tensors begin ("lora_"), or None where PEFT keeps none in a model's layers."""
        from peft import PeftType, PromptLearningConfig
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING

        try:
            kind = PeftType(self.file.peft_type)
            prompts = issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[kind], PromptLearningConfig)
            return None if prompts else str(PEFT_TYPE_TO_PREFIX_MAPPING[kind])
        except (KeyError, ValueError):
            return None

    @cached_property
    def modules(self) -> Mapping[str, tuple[str, ...]]:
        """Module path, as the file spells it -> the names of the tensors that adapt it."""
        found: dict[str, list[str]] = {}
        for name in self.file.tensors:
            core = self.module_of(name)
            if core is not None:
                found.setdefault(core, []).append(name)
        return {core: tuple(names) for core, names in found.items()}

    def module_of(self, name: str) -> str | None:
        """The module a tensor adapts, as the file spells it; None for a weight that was saved whole."""
        if self.prefix is None or not name.startswith(PEFT_PREFIX):
            return None
        core, found, _ = name.removeprefix(PEFT_PREFIX).partition(f".{self.prefix}")
        if not found or core.startswith(self.prefix):
            return None
        nested = "base_layer" in core
        return ".".join(part for part in core.split(".") if part != "base_layer") if nested else core

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
        if given is None or given == "all-linear":
            return None
        return given if isinstance(given, str) else tuple(given)

    def matches(self, path: str) -> bool:
        """Whether the configuration's targets, with its filters, name this module.

        Source: ``peft.tuners.tuners_utils.check_target_module_exists``.
        """
        return self._matcher(path)

    @cached_property
    def _matcher(self) -> Callable[[str], bool]:
        return target_matcher({**self.file.config, "target_modules": self.targets})

    def rank(self, path: str) -> int:
        """The rank that the configuration promises for a module.

        Source: ``peft.tuners.lora.model.LoraModel._create_and_replace``.
        """
        return int(self._by_pattern("rank_pattern", path, self.default_rank))

    @property
    def default_rank(self) -> int:
        """The rank of the modules that no pattern names."""
        return int(self.file.config.get("r", _DEFAULT_RANK))

    def alpha(self, path: str) -> float:
        """The alpha that the configuration promises for a module; for the empty path, that of all others.

        Source: ``peft.tuners.lora.model.LoraModel._create_and_replace``.
        """
        default = self.file.config.get("lora_alpha", _DEFAULT_ALPHA)
        return float(self._by_pattern("alpha_pattern", path, default) if path else default)

    def _by_pattern(self, field: str, path: str, default: Any) -> Any:
        from peft.utils.other import get_pattern_key

        pattern = self.file.config.get(field)
        if not pattern:
            return default
        key = get_pattern_key(pattern.keys(), path) if len(path) <= LONGEST_NAME else path
        return pattern.get(key, default)

    def shown_rank(self, name: str) -> int | None:
        """The rank that a tensor's shape shows, or None where it shows none."""
        shape: tuple[int, ...] = self.file.tensors[name].shape
        axis = next((_RANK_AXES[part] for part in name.split(".") if part in _RANK_AXES), None)
        return shape[axis] if axis is not None and len(shape) > axis and all(shape) else None


@dataclass(frozen=True)
class Fit:
    """An adapter held against a base.

    Attributes:
        saved: the adapter.
        base: the map of the base.
    """

    saved: Saved
    base: ModelMap

    @cached_property
    def _atlas(self) -> Atlas:
        assert self.saved.prefix is not None
        return Atlas(self.base, self.saved.prefix)

    @property
    def sites(self) -> Mapping[str, Site]:
        """Site by each of its names: its own path, and those of its wrappers."""
        return self._atlas.sites

    def holds_parameters(self, core: str) -> bool:
        """Whether a module's own parameters, stacked experts, can be adapted."""
        return core in self._atlas.parameter_holders

    @cached_property
    def inner(self) -> Mapping[str, str]:
        """Wrapper's path -> the path of the linear inside it."""
        return {name: site.path for site in self.base if site.wrapper for name in site.names[1:]}

    @cached_property
    def wrapped(self) -> tuple[str, ...]:
        """The wrappers that the saved targets name."""
        return tuple(name for name in self.inner if self.saved.targets and self.saved.matches(name))

    @cached_property
    def planned(self) -> tuple[str, ...]:
        """The sites that the saved targets reach, where a wrapper's name counts for what is inside it."""
        reached = [p for p in self.base.module_paths if self.saved.matches(p) and not self._rewritten(p)]
        paths = {self.inner.get(path, path) for path in reached}
        return tuple(path for path in self.base.module_paths if path in paths and path in self.sites)

    def _rewritten(self, path: str) -> bool:
        """Whether PEFT takes this module's target for one of stacked experts when it loads the adapter.

        Source: ``peft.utils.transformers_weight_conversion._convert_peft_config_moe``.
        """
        return self.saved.file.peft_type == "LORA" and path.rpartition(".")[2] in self.rewritten

    @cached_property
    def rewritten(self) -> frozenset[str]:
        """Leaf names that PEFT takes for stacked experts on this base."""
        return rewritten_names(self.base.model.model_type)

    @cached_property
    def lost(self) -> Mapping[str, str]:
        """Tensor -> why stock PEFT leaves it out when it loads the adapter onto this base."""
        planned = frozenset(self.planned) if self.saved.targets is not None else None
        found = {}
        for name in self.saved.file.tensors:
            why = self._why_lost(name, planned)
            if why:
                found[name] = why
        return found

    def _why_lost(self, name: str, planned: frozenset[str] | None) -> str:
        core = self.saved.module_of(name)
        if core is not None and self._one_of_the_experts(core):
            return ""
        place = self._atlas.place(name, self.saved.file.tensors[name])
        if isinstance(place, str):
            return place
        if place.new_name != name:
            return place.why
        if core is None or planned is None or core in self.saved.parameters or place.module in planned:
            return ""
        if place.module is None:
            return f"no target names a parameter of {core}"
        if self._rewritten(place.module):
            return f"PEFT takes the target {place.module.rpartition('.')[2]} for stacked experts on this base"
        return f"no target names {place.module}"

    def _one_of_the_experts(self, core: str) -> bool:
        """Whether PEFT stacks this tensor with those of the other experts when it loads the adapter."""
        parts = core.split(".")
        return (
            len(parts) > 2
            and parts[-1] in self.rewritten
            and parts[-2].isdigit()
            and ".".join(parts[:-2]) in self._atlas.parameter_holders
        )

    def places(self, name: str) -> bool:
        """Whether the base has a place of a fitting shape for a tensor of this name, whatever is targeted."""
        return not isinstance(self._atlas.place(name, self._header(name)), str)

    def _header(self, name: str) -> Any:
        return self.saved.file.tensors[name]

    def fits_as(self, name: str, renamed: str) -> bool:
        """Whether the tensor would fit under another name."""
        return not isinstance(self._atlas.place(renamed, self._header(name)), str)


@dataclass(frozen=True, slots=True)
class Stat:
    """What the data of one tensor is like: its squared norm, and whether every value is finite."""

    square: float
    finite: bool


@dataclass(frozen=True)
class TensorData:
    """The adapter's data. It is read when it is first asked for, one tensor at a time.

    Attributes:
        file: the adapter.
    """

    file: AdapterFile

    @cached_property
    def stats(self) -> Mapping[str, Stat]:
        """One ``Stat`` a tensor, by name."""
        from safetensors import safe_open

        with safe_open(str(self.file.weights_path), framework="pt") as opened:
            return {name: _stat(opened.get_tensor(name)) for name in self.file.tensors}


def _stat(tensor: Any) -> Stat:
    parts = tensor.flatten().split(_CHUNK) if tensor.numel() else ()
    square = sum(_norm(part.abs() if part.is_complex() else part) ** 2 for part in parts)
    return Stat(square, math.isfinite(square))


def _norm(part: Any) -> float:
    """In single precision, which is many times faster, unless the squares leave its range."""
    import torch

    fast = float(torch.linalg.vector_norm(part.float()))
    if (fast > _TINY and math.isfinite(fast)) or not bool(part.any()):
        return fast
    return float(torch.linalg.vector_norm(part.double()))


def some(items: Iterable[object], limit: int = 3) -> str:
    """The first few of a list, safe to print, and how many more there are."""
    every = [_shown(item) for item in items]
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more


def printable(text: str, longest: int = 1000) -> str:
    """Text with control characters written out, cut to a length that a report can show."""
    plain = "".join(mark if mark.isprintable() or mark == "\n" else f"\\x{ord(mark):02x}" for mark in text)
    return plain if len(plain) <= longest else f"{plain[: longest - 3]}..."


def _shown(item: object) -> str:
    text = item if isinstance(item, str) and item.isprintable() and item else repr(item)
    return text if len(text) <= 120 else f"{text[:117]}..."


# ---- the configuration's fields ----


def config_problems(
    config: Mapping[str, Any], peft_type: str, paths: Iterable[str], *, modules: int = 0
) -> tuple[str, ...]:
    """What is wrong with a configuration's own fields: their types, and patterns or lists that have no end.

    Args:
        config: the fields, as adapter_config.json has them.
        peft_type: the method, as PEFT spells it.
        paths: the module paths that its patterns will be matched with.
        modules: how many modules there are at the least.
    """
    # What only LoRA wants: others give these fields a meaning of their own (OFT's r may be 0).
    fields = _FIELDS | (_LORA_FIELDS if peft_type == "LORA" else {})
    found = [
        f"{name} is {_shown(config[name])}, not {expected}"
        for name, (expected, fits) in fields.items()
        if name in config and not fits(config[name])
    ]
    found += [wrong for wrong in wrong_kinds(config, peft_type) if wrong.partition(" ")[0] not in fields]
    # The first fault is enough: each trial of a pattern may take its whole time.
    faults = chain(_too_many(config, max(modules, _LEAST_MODULES)), _pattern_problems(config, paths))
    return tuple(found) or tuple(islice(faults, 1))


def _too_many(config: Mapping[str, Any], modules: int) -> Iterable[str]:
    """Lists that PEFT compares with every module, and that are longer than any model needs."""
    for name in ("rank_pattern", "alpha_pattern", "exclude_modules", "modules_to_save", "layers_pattern"):
        entries = config.get(name) or ()
        if not isinstance(entries, str) and len(entries) * modules > _MOST_COMPARISONS:
            yield f"{name} has {len(entries)} entries, more than any model needs"


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _whole(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    return type(value) in {int, float} and math.isfinite(value)


def _ranks(value: Any) -> bool:
    return isinstance(value, dict) and all(_whole(rank) and rank > 0 for rank in value.values())


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


# Field -> what PEFT expects there. Source: peft.LoraConfig, whose names the other methods share.
_FIELDS: _Fields = {
    "r": ("a whole number", lambda v: v is None or _whole(v)),
    "target_modules": ("a string or a list of strings", lambda v: v is None or isinstance(v, str) or _strings(v)),
    "exclude_modules": ("a string or a list of strings", lambda v: v is None or isinstance(v, str) or _strings(v)),
    "modules_to_save": ("a list of strings", lambda v: v is None or _strings(v)),
    "target_parameters": ("a list of strings", lambda v: v is None or _strings(v)),
    "layers_pattern": ("a string or a list of strings", lambda v: v is None or isinstance(v, str) or _strings(v)),
    "layers_to_transform": (
        "a whole number or a list of them",
        lambda v: v is None or _whole(v) or (isinstance(v, list) and all(map(_whole, v))),
    ),
    "rank_pattern": ("an object", lambda v: v is None or isinstance(v, dict)),
    "alpha_pattern": ("an object", lambda v: v is None or isinstance(v, dict)),
}

_LORA_FIELDS: _Fields = {
    "r": ("a positive whole number", lambda v: _whole(v) and v > 0),
    "lora_alpha": ("a number", _number),
    "rank_pattern": ("an object of positive whole numbers", lambda v: v is None or _ranks(v)),
    "alpha_pattern": ("an object of numbers", lambda v: v is None or _numbers(v)),
}


def _pattern_problems(config: Mapping[str, Any], paths: Iterable[str]) -> Iterable[str]:
    """Regular expressions that cannot be read, or that would keep PEFT busy for ever."""
    patterns = [item for item in _patterns(config) if not re.fullmatch(r"[\w.]+", item[1])]
    for field, given, form in patterns:
        try:
            re.compile(form.format(given) if form else given)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"{field} holds {_shown(given)}, which is no regular expression: {error}"
            return
    forms = [form.format(given) if form else given for _, given, form in patterns]
    # One repetition alone is at most quadratic.
    looping = [at for at, form in enumerate(forms) if len(_REPEATS.findall(form)) > 1]
    endless = _endless([forms[at] for at in looping], paths) if looping else None
    if endless is not None:
        field, given, _ = patterns[looping[endless]]
        yield f"{field} holds {_shown(given)}, which does not finish on the module names in {_PATIENCE} s"


def _patterns(config: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Every string of the configuration that PEFT runs as a regular expression, and the form it puts it in.

    Sources: ``peft.tuners.tuners_utils.check_target_module_exists``, ``peft.utils.other.get_pattern_key``.
    """
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str):
            yield name, config[name], ""
    for name in ("rank_pattern", "alpha_pattern"):
        yield from ((name, key, r"(.*\.)?({})$") for key in config.get(name) or ())
    yield from (("modules_to_save", key, r"(^|.*\.){}($|\..*)") for key in config.get("modules_to_save") or ())
    layers = config.get("layers_pattern") or ()
    for key in (layers,) if isinstance(layers, str) else layers:
        yield "layers_pattern", key, r"(?:^|.*?\.){}\.(\d+)\."


_REPEATS = re.compile(r"[*+{]")
# All of a configuration's expressions together take milliseconds on the largest models.
_PATIENCE = 10
_TRIAL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for at, pattern in enumerate(patterns):
    print(at, flush=True)
    match = re.compile(pattern).match
    for name in names:
        match(name)
"""


def _endless(patterns: list[str], paths: Iterable[str]) -> int | None:
    """Which regular expression does not finish on these names: tried in a process that can be ended."""
    names = [path for path in paths if len(path) <= LONGEST_NAME]
    # PEFT matches whole names; a match that may stop early would hide how long a refusal takes.
    given = json.dumps(([f"(?:{pattern})\\Z" for pattern in patterns], names)).encode()
    command = [sys.executable, "-I", "-S", "-c", _TRIAL]
    try:
        subprocess.run(command, input=given, timeout=_PATIENCE, check=True, capture_output=True)
    except subprocess.TimeoutExpired as slow:
        return int((slow.stdout or b"0").split()[-1])
    return None
