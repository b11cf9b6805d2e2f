"""mlx-lm's form: ``adapters.safetensors`` beside an ``adapter_config.json`` of its own.

Sources: ``load_adapters`` and ``linear_to_lora_layers`` in ``mlx_lm/tuner/utils.py``, ``mlx_lm/tuner/lora.py``.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from graftkit.adapters.file import CONFIG_NAME, read_object
from graftkit.converting.base import ConvertBase
from graftkit.converting.delta import Deltas, Factors, Other, ReadPair, Slice
from graftkit.converting.dialects._base import DialectFormat
from graftkit.converting.safetensors_file import OutTensor, write_safetensors
from graftkit.converting.stacks import Place, Updates, halves, stored_slices, unplaced, updates_by_place
from graftkit.converting.tensor_file import TensorFile, does_not_fit
from graftkit.engines import Feature
from graftkit.errors import AdapterError
from graftkit.files import write_text

if TYPE_CHECKING:
    import torch

WEIGHTS_NAME = "adapters.safetensors"
_A, _B = ".lora_a", ".lora_b"
_FUSED = re.compile(r"(?P<holder>.*\.experts)\.gate_up_proj")
_DTYPE = "F32"


@dataclass(frozen=True)
class _Names:
    """How mlx-lm calls the modules of a class; ``mlx_classes.toml`` says what the fields are."""

    names: tuple[tuple[str, str], ...] = ()
    only: str = ""

    def of(self, module: str) -> str:
        for pattern, replacement in self.names:
            module = re.sub(pattern, replacement, module)
        return module


@cache
def _classes() -> Mapping[str, _Names]:
    text = resources.files("graftkit.converting").joinpath("mlx_classes.toml").read_text(encoding="utf-8")
    return MappingProxyType({name: _Names(**fields) for name, fields in tomllib.loads(text).items()})


@dataclass(frozen=True)
class MlxDialect(DialectFormat):
    """What mlx-lm reads with ``--adapter-path``."""

    name: ClassVar[str] = "mlx"
    engine: ClassVar[str | None] = "mlx"
    weights_name: ClassVar[str] = WEIGHTS_NAME
    # B with another scale than the first is kept in single precision.
    rounding: ClassVar[float] = 2.0**-24

    def recognises(self, folder: Path) -> bool:
        return (folder / WEIGHTS_NAME).is_file()

    def base_of(self, folder: Path) -> str | None:
        """Return what mlx-lm was asked to train."""
        name = read_object(folder / CONFIG_NAME).get("model")
        return name if isinstance(name, str) and name else None

    def refusals(self, deltas: Deltas, base: ConvertBase) -> dict[str, str]:
        """Return what mlx-lm has no module for, and classes nobody has compared."""
        if base.architecture not in _classes():
            known = ", ".join(sorted(_classes()))
            return {base.architecture: f"adapters of this class were never compared in mlx-lm; known: {known}"}
        return unplaced(deltas, _places(base).values(), base, "mlx-lm")

    def write(self, deltas: Deltas, base: ConvertBase, folder: Path) -> None:
        """Write both files. mlx-lm has one rank and one scale: ranks are filled up with zeros.

        Where all updates have one scale and one dtype, no value changes; else B is multiplied by its scale.
        """
        updates = updates_by_place(deltas, _places(base))
        scales = {factors.scale for found in updates.values() for factors in found.given}
        dtypes = {factors.dtype for found in updates.values() for factors in found.given}
        moved = len(scales) == len(dtypes) == 1
        scale, dtype = (scales.pop(), dtypes.pop()) if moved else (1.0, _DTYPE)
        rank = max(found.rank for found in updates.values())
        config = {
            "fine_tune_type": "lora",
            "num_layers": base.model.config.get_text_config().num_hidden_layers,
            "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": list(updates)},
        }
        if deltas.config.get("base_model_name_or_path"):
            config["model"] = deltas.config["base_model_name_or_path"]
        write_text(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_safetensors(
            folder / WEIGHTS_NAME,
            (t for name, found in updates.items() for t in _tensors(name, found, rank, scale or 1.0, dtype)),
        )

    def read(self, folder: Path, base: ConvertBase) -> Deltas:
        """Read both files, as mlx-lm does.

        Raises:
            AdapterError: ``adapter-config``: there is no configuration of mlx-lm's; ``adapter-weights``: the
                tensors cannot be read; ``adapter-does-not-fit``: one has no place in the base.
        """
        config = _config(folder / CONFIG_NAME)
        file = TensorFile.open(folder / WEIGHTS_NAME)
        origin = {"base_model_name_or_path": config["model"]} if isinstance(config.get("model"), str) else {}
        kind = config.get("fine_tune_type", "lora")
        if kind != "lora":
            feature = Feature.DORA if kind == "dora" else Feature.MODULES_TO_SAVE
            return Deltas((), (Other(feature, f"fine_tune_type: {kind}"),), MappingProxyType(origin))
        scale = _scale(config, folder / CONFIG_NAME)
        places = _places(base) if base.architecture in _classes() else {}
        factors = [f for name in _modules(file) for f in _factors(name, file, places.get(name), scale)]
        return Deltas(tuple(factors), config=MappingProxyType(origin))


def _places(base: ConvertBase) -> dict[str, Place]:
    """Return what each module of mlx-lm's model holds, by name."""
    names = _classes()[base.architecture]
    found: dict[str, list[Slice]] = {}
    for stored, at in stored_slices(base):
        for module, part in _split(stored, at, base):
            name = names.of(module)
            if name.startswith(names.only):
                found.setdefault(name, []).append(part)
    return {name: Place.of(slices, base) for name, slices in found.items()}


def _split(module: str, at: Slice, base: ConvertBase) -> Iterator[tuple[str, Slice]]:
    """Yield the halves of a fused projection of experts: mlx-lm's are apart in every class."""
    fused = _FUSED.fullmatch(module)
    if fused is None:
        yield module, at
        return
    for leaf, half in zip(("gate_proj", "up_proj"), halves(at, base), strict=True):
        yield f"{fused['holder']}.{leaf}", half


# ---- writing ----


def _tensors(name: str, found: Updates, rank: int, scale: float, dtype: str) -> Iterator[OutTensor]:
    a_shape, b_shape = found.place.shapes(rank)
    if not found.place.stacked:
        a_shape, b_shape = a_shape[::-1], b_shape[::-1]

    def read(which: int) -> torch.Tensor:
        made = found.stacked(scale, rank)[which]
        return made if found.place.stacked else made.T

    yield OutTensor(name + _A, dtype, a_shape, partial(read, 0))
    yield OutTensor(name + _B, dtype, b_shape, partial(read, 1))


# ---- reading ----


def _config(path: Path) -> dict[str, Any]:
    config = read_object(path)
    if "fine_tune_type" not in config and "lora_parameters" not in config:
        raise _bad_config(path, "it has neither fine_tune_type nor lora_parameters")
    return config


def _scale(config: Mapping[str, Any], path: Path) -> float:
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise _bad_config(path, "lora_parameters has no scale")
    return float(scale)


def _modules(file: TensorFile) -> list[str]:
    """Return the modules that have a pair of factors.

    Raises:
        AdapterError: ``adapter-does-not-fit``: a tensor is not a factor, or lacks the other one.
    """
    found = dict.fromkeys(name.removesuffix(_A).removesuffix(_B) for name in file.shapes)
    for name in file.shapes:
        if not name.endswith((_A, _B)):
            raise does_not_fit(file.path, name, "it is neither lora_a nor lora_b")
    for module in found:
        if module + _A not in file.shapes or module + _B not in file.shapes:
            raise does_not_fit(file.path, module, "it has only one of lora_a and lora_b")
    return list(found)


def _factors(name: str, file: TensorFile, place: Place | None, scale: float) -> Iterator[Factors]:
    a, b = name + _A, name + _B
    if place is None:
        raise does_not_fit(file.path, a, f"mlx-lm has no module {name} for this base")
    rank = file.shapes[b][-1] if place.stacked else file.shapes[b][0]
    expected = place.shapes(rank) if place.stacked else tuple(shape[::-1] for shape in place.shapes(rank))
    if (file.shapes[a], file.shapes[b]) != expected:
        made = f"{list(file.shapes[a])} and {list(file.shapes[b])}"
        raise does_not_fit(file.path, a, f"{made} do not make {list(place.shape)}")
    for number, at in enumerate(place.slices):
        yield Factors(at, rank, place.shape, scale, file.dtype(b), b, _reader(file, name, place.expert(number)))


def _reader(file: TensorFile, name: str, expert: int | None) -> ReadPair:
    def read() -> tuple[torch.Tensor, torch.Tensor]:
        a, b = file.read(name + _A, expert), file.read(name + _B, expert)
        return (a.T, b.T) if expert is None else (a, b)

    return read


def _bad_config(path: Path, why: str) -> AdapterError:
    return AdapterError(
        f"no usable {CONFIG_NAME}",
        where=str(path),
        why=why,
        help="name a folder that mlx_lm.lora, or graft convert --to mlx, has written",
        code="adapter-config",
    )


DIALECT = MlxDialect()
