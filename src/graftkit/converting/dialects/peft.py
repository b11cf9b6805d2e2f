"""Stock PEFT's own form: what ``save_pretrained`` writes and ``PeftModel.from_pretrained`` loads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from graftkit.adapters.file import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from graftkit.adapters.scale import check_scales
from graftkit.converting.base import ConvertBase
from graftkit.converting.delta import Deltas, Factors, Other, ReadPair, Slice
from graftkit.converting.dialects._base import DialectFormat
from graftkit.converting.dialects._pairs import ORIGIN, common_scale, read_expert, rescaled, stacked_tensors, zeros
from graftkit.converting.foreign import can_be_foreign, read_foreign
from graftkit.converting.initial import is_the_bases, moved_base, trained_rows
from graftkit.converting.safetensors_file import OutTensor, write_safetensors
from graftkit.engines import Feature
from graftkit.errors import MergeError
from graftkit.files import write_text
from graftkit.merging.adapter.effects import Effects, attach_on_meta, core_path, expected_shapes, read_effects
from graftkit.merging.adapter.tensors import AdapterTensors
from graftkit.merging.arithmetic.changes import BiasDelta, Change, LowRank, PeftLayer, SavedRows, SavedWeight
from graftkit.merging.unsupported import rebuilds_base
from graftkit.planning.config.build import config_dict
from graftkit.planning.matching import rewritten_names, smallest_exact
from graftkit.surveying import kinds
from graftkit.surveying.ties import tied_names

if TYPE_CHECKING:
    import torch

_WEIGHT = ".weight"
_ENDS = ("lora_A.weight", "lora_B.weight")


@dataclass(frozen=True)
class PeftDialect(DialectFormat):
    """What stock PEFT reads."""

    name: ClassVar[str] = "peft"
    # Of alpha / r, and of B where the experts of a layer have several scales.
    rounding: ClassVar[float] = 2.0**-24

    def recognises(self, folder: Path) -> bool:
        return (folder / CONFIG_NAME).is_file()

    def refusals(self, deltas: Deltas, base: ConvertBase) -> dict[str, str]:
        del base
        return {other.name: f"{other.feature.words} cannot be written as factors" for other in deltas.others}

    def read(self, folder: Path, base: ConvertBase) -> Deltas:
        """Read an adapter as PEFT does.

        What depends on the base's weights, an initializer that moved them and trained tokens, is read as factors.

        Raises:
            AdapterError: the folder is not a usable adapter.
            MergeError: ``merge-does-not-fit``: a tensor belongs to no module of the base; or it is of a kind whose
                update depends on its input.
        """
        file = read_adapter(folder)
        try:
            effects = read_effects(file, base.model)
        except MergeError:
            # PEFT would load nothing of it, or refuse it.
            if can_be_foreign(file):
                return read_foreign(file, base)
            raise
        return _deltas(effects, base)

    def read_back(self, folder: Path, base: ConvertBase) -> Deltas:
        return _deltas(read_effects(read_adapter(folder), base.model), base)

    def write(self, deltas: Deltas, base: ConvertBase, folder: Path) -> None:
        groups = {name: _one_group(several, base) for name, several in deltas.by_parameter().items()}
        config = _config(groups, deltas.config, base)
        places = _places(config, base)
        write_text(folder / CONFIG_NAME, json.dumps(config_dict(config), indent=2, sort_keys=True) + "\n")
        every = (tensor for name, group in groups.items() for tensor in _tensors(places[name], group))
        write_safetensors(folder / WEIGHTS_NAME, every)


# ---- reading ----


def _deltas(effects: Effects, base: ConvertBase) -> Deltas:
    file = effects.tensors.file
    check_scales(file.config)
    factors: list[Factors] = []
    others: list[Other] = []
    for parameter, changes in effects.changes.items():
        for change in changes:
            found = _as_factors(parameter, change, effects, base)
            factors += found or []
            others += [Other(_feature(change), parameter)] if found is None else []
    origin = {name: file.config[name] for name in ORIGIN if file.config.get(name) is not None}
    return Deltas(tuple(factors), tuple(others), origin)


def _as_factors(parameter: str, change: Change, effects: Effects, base: ConvertBase) -> list[Factors] | None:
    """Return a change as factors, None where it is not a product of two matrices."""
    if isinstance(change, LowRank) and change.is_plain:
        return list(_low_rank(parameter, change, effects, base))
    if isinstance(change, SavedRows) and not _is_tied(parameter, base):
        return [trained_rows(change, parameter, effects, base)]
    if isinstance(change, PeftLayer) and rebuilds_base(effects.config):
        if not parameter.endswith(_WEIGHT) and getattr(effects.config, "bias", "none") == "none":
            return []  # its layer's bias, which no initializer moves
        found = moved_base(change, effects, base) if parameter.endswith(_WEIGHT) else None
        return [found] if found is not None else None
    if isinstance(change, SavedWeight) and is_the_bases(change, parameter, effects, base):
        return []
    return None


def _is_tied(parameter: str, base: ConvertBase) -> bool:
    return any(parameter in names for names in tied_names(base.model))


def _low_rank(parameter: str, change: LowRank, effects: Effects, base: ConvertBase) -> Iterator[Factors]:
    tensors = effects.tensors
    shape = base.matrix(parameter)
    numbers = range(change.experts) if change.experts else (None,)
    for number in numbers:
        yield Factors(
            at=Slice(parameter, number),
            rank=change.rank,
            shape=shape,
            scale=change.scale,
            dtype=_dtype(tensors, change.b),
            name=change.b,
            read=_reader(tensors, change, number),
        )


def _reader(tensors: AdapterTensors, change: LowRank, number: int | None) -> ReadPair:
    def read() -> tuple[torch.Tensor, torch.Tensor]:
        if number is None:
            return tensors.read_cached(change.a).flatten(1), tensors.read_cached(change.b).flatten(1)
        return read_expert(tensors, (change.a, change.b), change.rank, number)

    return read


def _dtype(tensors: AdapterTensors, name: str) -> str:
    stored = tensors.file.tensors.get(name)
    return "F32" if stored is None else stored.dtype


def _feature(change: Change) -> Feature:
    if isinstance(change, LowRank):
        return Feature.DORA
    if isinstance(change, BiasDelta):
        return Feature.BIAS
    if isinstance(change, SavedRows):
        return Feature.TRAINABLE_TOKENS
    return Feature.OTHER_METHOD if isinstance(change, PeftLayer) else Feature.MODULES_TO_SAVE


# ---- writing ----


@dataclass(frozen=True)
class _Place:
    """One tensor of the file: those of a convolution have its kernel's axes too."""

    name: str
    shape: tuple[int, ...]


def _one_group(several: tuple[Factors, ...], base: ConvertBase) -> tuple[Factors, ...]:
    """Return a parameter's updates, of one rank and scale: PEFT stacks those of all experts in one pair."""
    if several[0].at.expert is None:
        return several
    rank, scale = common_scale(several)
    given = {factors.at.expert: factors for factors in several}
    count = base.shapes[several[0].at.parameter][0]
    whole = (given.get(n) or zeros(Slice(several[0].at.parameter, n), several[0].shape) for n in range(count))
    return tuple(rescaled(factors, scale, rank) for factors in whole)


def _config(groups: Mapping[str, tuple[Factors, ...]], origin: Mapping[str, Any], base: ConvertBase) -> Any:
    """Return the configuration that targets exactly these parameters, with their ranks and scales."""
    from peft import LoraConfig

    modules = [name.removesuffix(_WEIGHT) for name in groups if _by_module(name, base)]
    parameters = [name for name in groups if not _by_module(name, base)]
    paths = {name: name.removesuffix(_WEIGHT) if _by_module(name, base) else name for name in groups}
    first = {paths[name]: group[0] for name, group in groups.items()}
    rank, scale = common_scale(first.values())
    kinds_of = {site.kind for path in modules if (site := base.model_map.by_path.get(path)) is not None}
    safe = not rewritten_names(base.model_map.model.model_type)
    fields: dict[str, Any] = {
        **origin,
        "task_type": origin.get("task_type") or base.model_map.model.task_type,
        "r": rank,
        "lora_alpha": _number(scale * rank),
        "rank_pattern": {re.escape(path): f.rank for path, f in first.items() if f.rank != rank},
        "alpha_pattern": {
            re.escape(path): _number(f.scale * f.rank)
            for path, f in first.items()
            if f.scale * f.rank != scale * rank
        },
        "target_modules": smallest_exact(modules, base.model_map.module_paths, regex_is_safe=safe),
        "fan_in_fan_out": kinds_of == {kinds.TRANSPOSED},
        "inference_mode": True,
    }
    if parameters:
        fields["target_parameters"] = smallest_exact(
            parameters, base.model_map.parameter_paths, regex_is_safe=False
        )
    return LoraConfig(**fields)


def _by_module(parameter: str, base: ConvertBase) -> bool:
    """Check whether PEFT adapts a parameter through its module; some names it takes for experts' on loading."""
    path = parameter.removesuffix(_WEIGHT)
    site = base.model_map.by_path.get(path)
    return site is not None and site.kind != kinds.PARAMETER and path.rpartition(".")[2] not in _rewritten(base)


def _rewritten(base: ConvertBase) -> Mapping[str, str]:
    return rewritten_names(base.model_map.model.model_type)


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _places(config: Any, base: ConvertBase) -> dict[str, tuple[_Place, _Place]]:
    """Return parameter -> A and B in the file, as PEFT, attached to the model, has them."""
    from peft.tuners.lora.layer import Embedding, LoraLayer, ParamWrapper

    found = {}
    adapted = attach_on_meta(base.model, config)
    for name, layer in adapted.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        leaf = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        ends = ("lora_embedding_A", "lora_embedding_B") if isinstance(layer, Embedding) else _ENDS
        shapes = expected_shapes(layer)
        first, second = (_Place(f"{name}.{end}", shapes[end]) for end in ends)
        found[f"{core_path(name)}.{leaf}"] = (first, second)
    return found


def _tensors(places: tuple[_Place, _Place], group: tuple[Factors, ...]) -> Iterable[OutTensor]:
    """Return A and B of one parameter, those of all its experts stacked."""
    if group[0].at.expert is not None:
        return stacked_tensors((places[0].name, places[1].name), group)
    factors, (a, b) = group[0], places
    return (
        OutTensor(a.name, factors.dtype, a.shape, lambda: factors.read()[0].reshape(a.shape)),
        OutTensor(b.name, factors.dtype, b.shape, lambda: factors.read()[1].reshape(b.shape)),
    )


DIALECT = PeftDialect()
