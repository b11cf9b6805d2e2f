"""A GGUF adapter, as llama.cpp and Ollama's runner load it: ``adapter.gguf``.

Names, splits and the order of rows follow the converter that makes the base's GGUF (``conversion/*.py`` beside
llama.cpp's ``convert_hf_to_gguf.py``); an adapter that is laid out otherwise loads, and computes something else.
Only classes are known here whose adapters were compared with PEFT's in llama.cpp itself.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from graftkit.converting.base import ConvertBase
from graftkit.converting.delta import Deltas, Factors, ReadPair, Slice
from graftkit.converting.dialects._base import DialectFormat
from graftkit.converting.gguf_file import (
    SUFFIX,
    LoraFile,
    LoraPair,
    gguf,
    is_gguf,
    read_lora_file,
    write_lora_file,
)
from graftkit.converting.stacks import Place, Updates, halves, stored_slices, unplaced, updates_by_place
from graftkit.errors import AdapterError
from graftkit.merging.checkpoint.parameters import read_parameter
from graftkit.surveying.sources.hub import is_hub_id

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Architecture:
    """How llama.cpp holds the models of a class; ``gguf_classes.toml`` says what the fields are."""

    architecture: str
    permuted: bool = False
    expert_scale: str = ""


@cache
def _classes() -> Mapping[str, _Architecture]:
    text = resources.files("graftkit.converting").joinpath("gguf_classes.toml").read_text(encoding="utf-8")
    return MappingProxyType({name: _Architecture(**fields) for name, fields in tomllib.loads(text).items()})


# Tensors, by their names in ``gguf.MODEL_TENSOR``, whose adapters llama.cpp adds: those that it multiplies through
# ``build_lora_mm``, ``build_lora_mm_id`` or ``build_inp_embd`` (``src/llama-graph.cpp``, ``src/models/*.cpp``).
# Adapters on any other load, and are never used.
_APPLIED = frozenset(
    {"TOKEN_EMBD", "OUTPUT", "ATTN_Q", "ATTN_K", "ATTN_V", "ATTN_QKV", "ATTN_OUT"}
    | {"FFN_GATE", "FFN_UP", "FFN_DOWN", "FFN_GATE_INP", "FFN_GATE_EXP", "FFN_UP_EXP", "FFN_DOWN_EXP"}
    | {"FFN_GATE_UP_EXP", "FFN_GATE_SHEXP", "FFN_UP_SHEXP", "FFN_DOWN_SHEXP", "FFN_GATE_INP_SHEXP"}
    | {"PER_LAYER_INP_GATE", "PER_LAYER_PROJ"}
)

_FUSED = re.compile(r"(?P<holder>.*\.experts)\.gate_up_proj")
# The converter gives Mixtral's merged experts this name: ``LlamaModel.modify_tensors``.
_MIXTRAL = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(w[123])")


@dataclass(frozen=True)
class _GgufPlace(Place):
    """Where a tensor of a GGUF model lies in transformers' model.

    Attributes:
        heads: number of heads whose rows are reordered, 0 where none are.
        scale: the parameter with one number for each expert that the engine multiplies its output by, or "".
    """

    heads: int = 0
    scale: str = ""

    def order(self) -> torch.Tensor:
        """Return, for each row in llama.cpp, its index in transformers' model.

        Source: ``LlamaModel.permute`` in llama.cpp's ``conversion/llama.py``.
        """
        import torch

        rows = torch.arange(self.shape[0])
        if not self.heads:
            return rows
        return rows.view(self.heads, 2, -1).transpose(1, 2).reshape(-1)

    def in_file(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B in the file: A of the token embeddings is (tokens, r)."""
        a, b = self.shapes(rank)
        return (a[::-1] if self.embedding else a), b


@dataclass(frozen=True)
class LlamaCppDialect(DialectFormat):
    """What llama.cpp reads with ``--lora``."""

    name: ClassVar[str] = "llama.cpp"
    engine: ClassVar[str | None] = "llama.cpp"
    weights_name: ClassVar[str] = "adapter.gguf"
    # Factors become float32, with a factor where ranks or scales differ, and so does alpha.
    rounding: ClassVar[float] = 2.0**-22

    def recognises(self, folder: Path) -> bool:
        return _gguf_file(folder) is not None

    def base_of(self, folder: Path) -> str | None:
        """Return the hub id that the GGUF file names.

        Raises:
            AdapterError: as :meth:`read`.
            MissingDependencyError: the gguf package is not installed.
        """
        return _hub_id(read_lora_file(_the_file(folder)))

    def refusals(self, deltas: Deltas, base: ConvertBase) -> dict[str, str]:
        """Return what llama.cpp would refuse, ignore, or crash at; and classes nobody has compared."""
        if base.architecture not in _classes():
            known = ", ".join(sorted(_classes()))
            return {base.architecture: f"adapters of this class were never compared in llama.cpp; known: {known}"}
        return unplaced(deltas, _places(base).values(), base, "llama.cpp")

    def write(self, deltas: Deltas, base: ConvertBase, folder: Path) -> None:
        """Write ``adapter.gguf``.

        Where all updates ask for one ``alpha / r``, B stays as it is; else each B is multiplied by what it lacks.

        Raises:
            MissingDependencyError: the gguf package is not installed.
        """
        places = _places(base)
        updates = updates_by_place(deltas, places)
        alpha = _alpha(updates.values())
        pairs = tuple(_pair(name, places[name], found, alpha, base) for name, found in updates.items())
        architecture = gguf().MODEL_ARCH_NAMES[_model_arch(base)]
        origin = str(deltas.config.get("base_model_name_or_path") or "")
        write_lora_file(
            folder / self.weights_name,
            LoraFile(architecture, alpha, pairs, base=origin if is_hub_id(origin) else ""),
        )

    def read(self, folder: Path, base: ConvertBase) -> Deltas:
        """Read the folder's GGUF file, as llama.cpp adds it to this base.

        Raises:
            AdapterError: ``adapter-gguf``: it is not a LoRA adapter, or activated by tokens (aLoRA);
                ``adapter-does-not-fit``: of another architecture, or of another base.
            MissingDependencyError: the gguf package is not installed.
        """
        path = _the_file(folder)
        file = read_lora_file(path)
        _check_architecture(file, base, path)
        places = _places(base)
        factors = [f for pair in file.pairs for f in _factors(pair, file, places.get(pair.name), base, path)]
        name = _hub_id(file)
        origin = {"base_model_name_or_path": name} if name else {}
        return Deltas(tuple(factors), config=MappingProxyType(origin))


def _gguf_file(folder: Path) -> Path | None:
    if folder.is_file():
        return folder if is_gguf(folder) else None
    found = sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []
    return found[0] if len(found) == 1 and is_gguf(found[0]) else None


def _the_file(folder: Path) -> Path:
    """Return a folder's one GGUF file.

    Raises:
        AdapterError: ``adapter-gguf``.
    """
    path = _gguf_file(folder)
    if path is None:
        raise AdapterError(
            "there is no GGUF file, or more than one",
            where=str(folder),
            help="name a folder with the one file that llama.cpp loads",
            code="adapter-gguf",
        )
    return path


def _hub_id(file: LoraFile) -> str | None:
    return file.base if is_hub_id(file.base) else None


def _model_arch(base: ConvertBase) -> Any:
    return getattr(gguf().MODEL_ARCH, _classes()[base.architecture].architecture)


# ---- where tensors are ----


def _places(base: ConvertBase) -> dict[str, _GgufPlace]:
    """Return the tensors of the base's GGUF that take an adapter, by name."""
    architecture = _classes()[base.architecture]
    names = gguf().get_tensor_name_map(_model_arch(base), base.model.config.get_text_config().num_hidden_layers)
    found: dict[str, list[Slice]] = {}
    kinds: dict[str, str] = {}
    for key, at in _as_converted(base, names):
        kind, name = names.get_type_and_name(key) or (None, "")
        if kind is not None and kind.name in _APPLIED:
            found.setdefault(f"{name}.weight", []).append(at)
            kinds[f"{name}.weight"] = kind.name
    return {name: _place(slices, kinds[name], architecture, base) for name, slices in found.items()}


def _as_converted(base: ConvertBase, names: Any) -> Iterator[tuple[str, Slice]]:
    """Yield each slice of the base, and the name by which the converter looks up the tensor that holds it."""
    for module, at in stored_slices(base):
        # Source: ``ModelBase.filter_tensors`` in ``conversion/base.py``.
        key = _MIXTRAL.sub(r"layers.\1.feed_forward.experts.\2", module.replace("language_model.", ""))
        fused = _FUSED.fullmatch(key)
        if fused is None or names.get_type_and_name(key) is not None:
            yield key, at
            continue
        for leaf, half in zip(("gate_proj", "up_proj"), halves(at, base), strict=True):
            yield f"{fused['holder']}.{leaf}", half


def _place(slices: Iterable[Slice], kind: str, architecture: _Architecture, base: ConvertBase) -> _GgufPlace:
    place = Place.of(slices, base)
    heads = _heads(kind, base) if architecture.permuted else 0
    scale = ""
    if kind == "FFN_DOWN_EXP" and architecture.expert_scale:
        holder = place.slices[0].parameter.partition(".experts.")[0]
        scale = f"{holder}.{architecture.expert_scale}"
    return _GgufPlace(**vars(place), heads=heads, scale=scale)


def _heads(kind: str, base: ConvertBase) -> int:
    config = base.model.config.get_text_config()
    heads = {"ATTN_Q": config.num_attention_heads, "ATTN_K": config.num_key_value_heads}
    return int(heads.get(kind, 0))


# ---- writing ----


def _alpha(updates: Iterable[Updates]) -> float:
    """Return the one alpha of the file: what all updates ask for, else the largest rank."""
    every = tuple(updates)
    asked = {factors.scale * found.rank for found in every for factors in found.given}
    alpha = asked.pop() if len(asked) == 1 else 0.0
    # llama.cpp takes 0 for "no scale".
    return alpha or float(max(found.rank for found in every))


def _pair(name: str, place: _GgufPlace, found: Updates, alpha: float, base: ConvertBase) -> LoraPair:
    scale = alpha / found.rank

    def read_a(_: int | None) -> torch.Tensor:
        made = found.stacked(scale, found.rank)[0]
        return (made.T if place.embedding else made).float()

    def read_b(_: int | None) -> torch.Tensor:
        made = found.stacked(scale, found.rank)[1][..., place.order(), :]
        if place.scale:
            made *= read_parameter(base.weights, place.scale).double()[:, None, None]
        return made.float()

    return LoraPair(name, *place.in_file(found.rank), read_a, read_b)


# ---- reading ----


def _check_architecture(file: LoraFile, base: ConvertBase, path: Path) -> None:
    known = _classes().get(base.architecture)
    own = gguf().MODEL_ARCH_NAMES[_model_arch(base)] if known else None
    if file.architecture != own:
        said = f"the base's class {base.architecture} is {own!r}" if own else f"{base.architecture} is not known"
        raise _does_not_fit(path, f"it was made for the architecture {file.architecture!r}, and {said} there")
    if file.activated:
        raise AdapterError(
            "the adapter is activated by a sequence of tokens",
            where=str(path),
            why="it is an aLoRA: what it adds to the weights depends on the prompt",
            help="keep the PEFT adapter that it was made from",
            code="adapter-gguf",
        )
    if not file.pairs:
        raise _does_not_fit(path, "it contains no pair of factors")


def _factors(
    pair: LoraPair, file: LoraFile, place: _GgufPlace | None, base: ConvertBase, path: Path
) -> Iterator[Factors]:
    if place is None:
        raise _does_not_fit(path, f"the base has no {pair.name}")
    rank = pair.b_shape[-1]
    if (pair.a_shape, pair.b_shape) != place.in_file(rank):
        made = f"A {list(pair.a_shape)} and B {list(pair.b_shape)}"
        raise _does_not_fit(path, f"{pair.name} has {made}, and the base's matrix is {list(place.shape)}")
    for number, at in enumerate(place.slices):
        read = _reader(pair, place, number, base)
        yield Factors(at, rank, place.shape, file.scale(pair), "F32", pair.name, read)


def _reader(pair: LoraPair, place: _GgufPlace, number: int, base: ConvertBase) -> ReadPair:
    def read() -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        expert = place.expert(number)
        a, b = pair.a(expert), pair.b(expert)
        if place.scale:
            b = b.double() / read_parameter(base.weights, place.scale)[number]
        back = torch.empty_like(b)
        back[place.order()] = b
        return (a.T if place.embedding else a), back

    return read


def _does_not_fit(path: Path, why: str) -> AdapterError:
    return AdapterError(
        "the GGUF adapter does not fit this base",
        where=str(path),
        why=why,
        help="name the base that it was made for",
        code="adapter-does-not-fit",
    )


DIALECT = LlamaCppDialect()
