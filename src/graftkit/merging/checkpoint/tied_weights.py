"""Weights that several modules share: what an adapter on one of them does to the others."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from graftkit.errors import MergeError
from graftkit.merging.adapter.tensors import AdapterTensors
from graftkit.merging.arithmetic.changes import Change, LowRank, Rows, Whole
from graftkit.surveying.sources.build import build_on_meta
from graftkit.surveying.sources.quiet import quiet_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from graftkit.merging.adapter.effects import Effects
    from graftkit.merging.checkpoint.base import Base

CHOICES = ("share", "untie")
_FLAG = "tie_word_embeddings"


@dataclass(frozen=True)
class Ties:
    """What happens to shared weights.

    Attributes:
        places: parameter -> the names under which the weight that it changes lies on disk; none for a parameter
            whose change is that of another name of the weight, and is done there.
        untied: names that the output has beyond the base's -> the name whose weight they start from.
    """

    places: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    untied: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def targets(self, param: str) -> tuple[str, ...]:
        """The parameters to change on disk where ``param`` is changed."""
        return self.places.get(param, (param,))


def settle(base: Base, effects: Sequence[tuple[Effects, float]], tied: str | None) -> Ties:
    """Decide what happens to every shared weight that an adapter changes.

    Raises:
        MergeError: ``merge-tied``: an adapter changes one of the modules that share a weight, the others stay as
            they are, and no choice was made; ``merge-tied-choice``: the choice is none of the two, or the class
            cannot be untied.
    """
    if tied is not None and tied not in CHOICES:
        raise MergeError(
            f"no such choice for tied weights: {tied!r}", help="share or untie", code="merge-tied-choice"
        )
    touched = {param for effect, _ in effects for param in effect.changes}
    places: dict[str, tuple[str, ...]] = {}
    wanted: dict[str, tuple[str, ...]] = {}
    for names in dict.fromkeys(base.ties[p] for p in sorted(touched) if p in base.ties):
        stored = tuple(n for n in names if n in base.groups.of_param) or names[:1]
        changed = [n for n in names if n in touched]
        if _all_alike(changed, names, effects):
            places.update({**dict.fromkeys(changed, ()), changed[0]: stored})
        elif tied is None:
            raise _choose(changed, names)
        elif tied == "share":
            places.update(dict.fromkeys(changed, stored))
        else:
            wanted[changed[0]] = names
    return Ties(MappingProxyType(places), MappingProxyType(_untied(base, wanted)))


def untied_config(model: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint that keeps input and output embeddings apart.

    It says that they are apart only where that changes nothing else: some classes take it for a sign of how they
    scale their outputs, and some do not take it at all. There it stays as it was, which is right too: transformers
    does not tie weights that it finds in the files with different values (``PreTrainedModel.tie_weights``).

    Args:
        model: the base.
        given: its ``config.json``.
    """
    apart = _with_flag_off(given)
    with quiet_transformers():
        before, after = (type(model.config).from_dict(copy.deepcopy(dict(c))).to_dict() for c in (given, apart))
    taken = not any(_flags(after))
    nothing_else = _with_flag_off(before) == _with_flag_off(after) and not _computes_by_flag(model)
    return apart if taken and nothing_else else dict(given)


def _with_flag_off(config: Mapping[str, Any]) -> dict[str, Any]:
    made = {name: _with_flag_off(v) if isinstance(v, dict) else v for name, v in config.items()}
    return {**made, _FLAG: False} if "model_type" in config else made


def _flags(config: Mapping[str, Any]) -> Iterator[Any]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flags(value)
        elif name == _FLAG:
            yield value


def _computes_by_flag(model: PreTrainedModel) -> bool:
    """Whether a module's forward computes something else where embeddings are tied."""
    codes = (
        getattr(inspect.unwrap(kind.forward), "__code__", None) for kind in {type(m) for m in model.modules()}
    )
    return any(code is not None and _FLAG in code.co_names for code in codes)


def _configs(config: Any) -> Iterator[Any]:
    """A configuration and all that are inside it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        if (inner := getattr(config, name, None)) is not None:
            yield from _configs(inner)


def _untied(base: Base, wanted: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """The names that need a tensor of their own -> the name whose weight they start from.

    The configuration unties everything at once, so that other shared weights need theirs too. The class that is
    built from it says which: not every class lets go.
    """
    if not wanted:
        return {}
    config = copy.deepcopy(base.model.config)
    for one in _configs(config):
        one.tie_word_embeddings = False
    apart = dict(build_on_meta(config, type(base.model)).named_parameters(remove_duplicate=False))
    untied = {}
    for names in dict.fromkeys(base.ties.values()):
        stored = [n for n in names if n in base.groups.of_param]
        for name in names:
            if stored and name not in stored and name in apart and apart[name] is not apart.get(stored[0]):
                untied[name] = stored[0]
    for changed, names in wanted.items():
        if any(apart.get(n) is apart.get(changed) for n in names if n != changed):
            raise MergeError(
                f"{type(base.model).__name__} cannot keep these weights apart",
                where=changed,
                why=f"its class shares it with {', '.join(n for n in names if n != changed)} in any configuration",
                help="choose share, or serve the adapter unmerged",
                code="merge-tied-choice",
            )
    return untied


def _all_alike(changed: Sequence[str], names: Sequence[str], effects: Sequence[tuple[Effects, float]]) -> bool:
    """Whether every module that shares the weight gets the same change, so that the weight can stay shared."""
    for effect, _ in effects:
        first, *others = (effect.changes.get(name, ()) for name in changed)
        if first and all(isinstance(c, Rows) for c in first):
            # PEFT keeps trained rows in step on all modules that share the weight.
            continue
        if len(changed) != len(names):
            return False
        tensors = effect.tensors
        if not all(len(o) == len(first) and all(map(_Alike(tensors), first, o)) for o in others):
            return False
    return True


@dataclass(frozen=True)
class _Alike:
    """Whether two changes of one adapter are the same, value for value."""

    tensors: AdapterTensors

    def __call__(self, one: Change, other: Change) -> bool:
        import torch

        if isinstance(one, Whole) and isinstance(other, Whole):
            return torch.equal(self.tensors.read(one.tensor), self.tensors.read(other.tensor))
        if isinstance(one, LowRank) and isinstance(other, LowRank):
            pairs = zip(self._sides(one), self._sides(other), strict=True)
            return one.scale == other.scale and all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
        return False

    def _sides(self, change: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self.tensors.read(change.a), self.tensors.read(change.b)
        return (a.T, b.T) if change.flip else (b, a)


def _choose(changed: Sequence[str], names: Sequence[str]) -> MergeError:
    others = ", ".join(n for n in names if n not in changed) or "they are adapted differently"
    return MergeError(
        "the adapter changes one of several modules that share a weight",
        where=", ".join(changed),
        why=f"the base shares it with {others}: merging changes both, and the adapter changed one",
        help='tied="untie" (--tied untie) keeps them apart in the result, as in training; tied="share" '
        "(--tied share) changes the shared weight, as PEFT's merge does",
        code="merge-tied",
    )
