"""Which disk tensors and parameters transformers converts into each other, and the conversion both ways."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from graftkit.errors import MergeError
from graftkit.surveying.checkpoint.keys import KeyReader
from graftkit.text import some

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Group:
    """Disk tensors and parameters that are converted together: one of each where only the name differs.

    Attributes:
        disk: names in the checkpoint -> the converter's source pattern that matches them.
        params: names in the model.
        converter: transformers' converter, to be copied before use; None where both sides are the same tensor.
        first: the parameter under which transformers runs the converter.
        inner: name in the checkpoint -> its name after plain renamings, which the converter reads.
    """

    disk: Mapping[str, str]
    params: tuple[str, ...]
    converter: Any = field(repr=False)
    first: str
    inner: Mapping[str, str] = field(repr=False)

    def load(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert disk tensors to parameters, as ``from_pretrained`` does."""
        if self.converter is None:
            return {self.params[0]: tensors[next(iter(self.disk))]}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.disk.items():
            converter.add_tensor(self.first, name, pattern, tensors[name])
        return _single(converter.convert(self.first, model=model, config=model.config))

    def save(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert parameters (all of the group) to disk tensors, as ``save_pretrained`` does.

        Raises:
            MergeError: ``merge-layout``: they come out under names that the checkpoint does not have.
        """
        if self.converter is None:
            return {next(iter(self.disk)): tensors[self.params[0]]}
        reverse = self.converter.reverse_transform()
        first = ""
        for name in self.params:
            renamed, pattern = reverse.rename_source_key(name)
            first = first or renamed
            reverse.add_tensor(first, name, pattern, tensors[name])
        made = _single(reverse.convert(first, model=model, config=model.config))
        return self._as_stored(made)

    def _as_stored(self, made: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors under the checkpoint's names, which may have a prefix that the model's do not."""
        found = {}
        for name, inner in self.inner.items():
            fits = [m for m in made if m == inner] or [m for m in made if _ends_alike(m, inner)]
            if len(fits) == 1:
                found[name] = made[fits[0]]
        if len(found) != len(self.disk) or len(made) != len(found):
            raise MergeError(
                "the checkpoint stores these parameters in a layout that transformers does not write",
                where=", ".join(self.params[:3]),
                why=f"on disk: {some(self.disk, 2)}; transformers would write {some(made, 2)}",
                help="load the base with from_pretrained(), save it with save_pretrained(), and merge onto that",
                code="merge-layout",
            )
        return found


@dataclass(frozen=True)
class Groups:
    """Every group of a checkpoint.

    Attributes:
        of_param: parameter or buffer name -> its group; missing where no file contains it.
        unknown: disk names that the model's class does not use.
    """

    of_param: Mapping[str, Group] = field(repr=False)
    unknown: tuple[str, ...]


def group_weights(model: PreTrainedModel, names: Iterable[str]) -> Groups:
    """Group the checkpoint's names as ``from_pretrained`` would convert them."""
    from transformers.core_model_loading import dot_natural_key

    reader = KeyReader.of(model)
    gathered: dict[str, dict[str, str]] = {}
    unknown = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = reader.target_of(name)
        if target is None:
            unknown.append(name)
        else:
            gathered.setdefault(target, {})[name] = pattern
    groups = [_group(reader, target, disk) for target, disk in gathered.items()]
    return Groups(MappingProxyType({p: g for g in groups for p in g.params}), tuple(unknown))


def _group(reader: KeyReader, target: str, disk: dict[str, str]) -> Group:
    from transformers.core_model_loading import apply_renamings

    inner = {name: apply_renamings(name, reader.renamings) for name in disk}
    pattern = next(iter(disk.values()))
    converter = next((c for c in reader.converters if pattern and pattern in c.source_patterns), None)
    if converter is None:
        # Of two names for one parameter, the later one wins on loading; both are kept equal.
        return Group(MappingProxyType(disk), (target,), None, target, MappingProxyType(inner))
    params = _params(reader, converter, target)
    return Group(MappingProxyType(disk), params, converter, target, MappingProxyType(inner))


def _params(reader: KeyReader, converter: Any, target: str) -> tuple[str, ...]:
    """Return the parameters that one run of the converter makes: the target, and its siblings by pattern."""
    first = converter.target_patterns[0]
    plain = first.replace(r"\1", "")
    if len(converter.target_patterns) == 1 or plain not in target:
        return (target,)
    siblings = (target.replace(plain, p.replace(r"\1", ""), 1) for p in converter.target_patterns)
    return tuple(name for name in siblings if name in reader.known)


def _single(made: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _ends_alike(one: str, other: str) -> bool:
    return one.endswith(f".{other}") or other.endswith(f".{one}")
