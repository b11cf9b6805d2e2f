"""Weights that several modules share: what an adapter on one module does to the others."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from graftkit.errors import MergeError
from graftkit.merging.adapter.effects import shares_rows
from graftkit.merging.adapter.tensors import AdapterTensors
from graftkit.merging.arithmetic.changes import Change, LowRank, SavedRows, SavedWeight
from graftkit.merging.checkpoint.parameters import read_parameter
from graftkit.surveying.sources.build import build_on_meta
from graftkit.surveying.sources.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graftkit.merging.adapter.effects import Effects
    from graftkit.merging.checkpoint.base import Base

CHOICES = ("share", "untie")
_FLAG = "tie_word_embeddings"


@dataclass(frozen=True)
class Ties:
    """What happens to shared weights.

    Attributes:
        stored_as: parameter -> the names of its weight on disk; empty if its change equals that of another name of
            the weight, and is made there.
        untied: names that the output has in addition to the base's -> the name whose weight they start from.
    """

    stored_as: Mapping[str, tuple[str, ...]]
    untied: Mapping[str, str]

    def targets(self, param: str) -> tuple[str, ...]:
        """Return the parameters to change on disk where ``param`` is changed."""
        return self.stored_as.get(param, (param,))


def resolve_ties(base: Base, effects: Sequence[Effects], tied: str | None) -> Ties:
    """Decide what happens to every shared weight that an adapter changes.

    Raises:
        MergeError: ``merge-tied``: an adapter changes only some of the modules that share a weight, and no choice
            was made; ``merge-tied-choice``: the choice is unknown or not possible here.
    """
    if tied is not None and tied not in CHOICES:
        raise MergeError(
            f"unknown choice for tied weights: {tied!r}", help="share or untie", code="merge-tied-choice"
        )
    touched = {param for effect in effects for param in effect.changes}
    stored_as: dict[str, tuple[str, ...]] = {}
    wanted: dict[str, tuple[str, ...]] = {}
    for names in dict.fromkeys(base.ties[p] for p in sorted(touched) if p in base.ties):
        stored = tuple(n for n in names if n in base.groups.of_param) or names[:1]
        changed = [n for n in names if n in touched]
        if _all_equal(base, changed, names, effects):
            stored_as.update({**dict.fromkeys(changed, ()), changed[0]: stored})
        elif tied is None:
            raise _no_choice(changed, names)
        elif tied == "share":
            _check_sharing(base, stored[0], changed, effects)
            stored_as.update(dict.fromkeys(changed, stored))
        else:
            wanted[changed[0]] = names
    return Ties(MappingProxyType(stored_as), MappingProxyType(_untied(base, wanted)))


def untied_config(model: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``config.json`` of a checkpoint with untied input and output embeddings.

    ``tie_word_embeddings`` becomes false only where that changes nothing else: some classes also scale their
    outputs by it, and some ignore it. There it stays as it was, which is correct too: transformers does not tie
    weights that have different values in the files (``PreTrainedModel.tie_weights``).

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
    """Check whether any module's forward depends on whether embeddings are tied."""
    codes = (
        getattr(inspect.unwrap(kind.forward), "__code__", None) for kind in {type(m) for m in model.modules()}
    )
    return any(code is not None and _FLAG in code.co_names for code in codes)


def _configs(config: Any) -> Iterator[Any]:
    """Yield a configuration and all its sub-configurations."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        if (inner := getattr(config, name, None)) is not None:
            yield from _configs(inner)


def _untied(base: Base, wanted: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return the names that need their own tensor -> the name whose weight they start from.

    The configuration unties all weights at once, so that other shared weights need their own tensors too. Building
    the class shows which: some classes share weights in any configuration.
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
                f"{type(base.model).__name__} cannot untie these weights",
                where=changed,
                why=f"the class shares it with {', '.join(n for n in names if n != changed)} in any configuration",
                help="choose share, or serve the adapter unmerged",
                code="merge-tied-choice",
            )
    return untied


def _all_equal(base: Base, changed: Sequence[str], names: Sequence[str], effects: Sequence[Effects]) -> bool:
    """Check whether every module that shares the weight gets the same change, so that it can stay shared."""
    for effect in effects:
        first, *others = (effect.changes.get(name, ()) for name in changed)
        if _are_rows((first, *others)) and shares_rows(base.model, effect.config, names):
            continue
        if len(changed) != len(names):
            return False
        for other in others:
            pairs = zip(first, other, strict=False)
            if len(other) != len(first) or not all(_equal(one, two, effect.tensors) for one, two in pairs):
                return False
    return True


def _are_rows(changes: Iterable[Sequence[Change]]) -> bool:
    given = [change for several in changes for change in several]
    return bool(given) and all(isinstance(change, SavedRows) for change in given)


def _equal(one: Change, other: Change, tensors: AdapterTensors) -> bool:
    """Check whether two changes of one adapter are the same, value for value."""
    import torch

    if isinstance(one, SavedWeight) and isinstance(other, SavedWeight):
        return torch.equal(tensors.read(one.tensor), tensors.read(other.tensor))
    if isinstance(one, SavedRows) and isinstance(other, SavedRows):
        return one.at == other.at and torch.equal(tensors.read(one.tensor), tensors.read(other.tensor))
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return one.scale == other.scale and all(map(torch.equal, one.outer(tensors), other.outer(tensors)))
    return False


def _no_choice(changed: Sequence[str], names: Sequence[str]) -> MergeError:
    others = ", ".join(n for n in names if n not in changed)
    if others:
        what = "the adapter changes one of several modules that share a weight"
        why = f"the base shares it with {others}: merging changes both, but the adapter changed one"
    else:
        what = "the adapter changes modules that share a weight, each differently"
        why = "the base has one weight for all of them"
    return MergeError(
        what,
        where=", ".join(changed),
        why=why,
        help='tied="untie" (--tied untie) keeps them separate in the result, as in training; tied="share" '
        "(--tied share) changes the shared weight, as PEFT's merge does",
        code="merge-tied",
    )


def _check_sharing(base: Base, stored: str, changed: Sequence[str], effects: Sequence[Effects]) -> None:
    """Refuse to give one weight the saved values of several modules: updates add up, values do not.

    Args:
        stored: the weight's name in the base's files.
        changed: the names that the adapters change.
    """
    for effect in effects:
        replaced = [name for name in changed if _sets_values(base, stored, effect, name)]
        if len(replaced) > 1:
            raise MergeError(
                "saved values of several modules cannot share a weight",
                where=", ".join(replaced),
                why="the adapter holds values for each of them, and one weight has room for one",
                help="choose untie, which keeps them separate in the result, as in training",
                code="merge-tied-choice",
            )


def _sets_values(base: Base, stored: str, effect: Effects, name: str) -> bool:
    """Check whether an adapter replaces values of a weight; PEFT also saves embeddings that it only adapts."""
    import torch

    for change in effect.changes.get(name, ()):
        if isinstance(change, SavedWeight):
            saved, own = effect.tensors.read(change.tensor), read_parameter(base, stored)
            if not torch.equal(saved.double(), own.double()):
                return True
        elif change.replaces:
            return True
    return False
