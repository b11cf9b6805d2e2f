"""GGUF files that hold a LoRA adapter for llama.cpp, written and read through the ``gguf`` package.

Source of the layout: ``llama_adapter_lora_init_impl`` in llama.cpp's ``src/llama-adapter.cpp``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.converting.errors import not_writable
from graftkit.errors import AdapterError, MissingDependencyError, reraise_as

if TYPE_CHECKING:
    import torch

MAGIC = b"GGUF"
SUFFIX = ".gguf"
_HUB = "https://huggingface.co/"
# Endings of a pair's names after the name of the base's tensor.
A, B = ".lora_a", ".lora_b"

# Reads one tensor, or of a stacked one the matrix of one expert; float32.
ReadTensor = Callable[[int | None], "torch.Tensor"]


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one tensor of the base, as the file has them.

    Attributes:
        name: of the base's tensor in a GGUF model: "blk.0.attn_q.weight".
        a_shape, b_shape: with experts (experts, r, in) and (experts, out, r); else (r, in) and (out, r), and of
            the token embeddings (tokens, r) and (width, r).
        a, b: read the factors, in these shapes.
    """

    name: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    a: ReadTensor = field(repr=False, compare=False)
    b: ReadTensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class LoraFile:
    """An adapter as llama.cpp sees it.

    Attributes:
        architecture: llama.cpp's name: "llama"; it loads the adapter into no other.
        alpha: each pair is scaled by ``alpha / r``, and by 1 where it is 0.
        pairs: in the file's order.
        rest: tensors that belong to no pair: norms, which llama.cpp skips.
        base: the hub id of the model that it was made for, or "".
        activated: whether it waits for an invocation sequence (aLoRA).
    """

    architecture: str
    alpha: float
    pairs: tuple[LoraPair, ...]
    rest: tuple[str, ...] = ()
    base: str = ""
    activated: bool = False

    def scale(self, pair: LoraPair) -> float:
        """Return what llama.cpp multiplies a pair's product by.

        Source: ``llama_adapter_lora_weight::get_scale`` in ``src/llama-adapter.h``.
        """
        return self.alpha / pair.b_shape[-1] if self.alpha else 1.0


def gguf() -> Any:
    """Return the ``gguf`` module.

    Raises:
        MissingDependencyError: ``missing-dependency``: it is not installed.
    """
    try:
        import gguf as module
    except ImportError as error:
        raise MissingDependencyError(
            "adapters for llama.cpp need the gguf package",
            why=str(error),
            help="pip install 'graftkit[gguf]'",
        ) from error
    return module


def write_lora_file(path: Path, file: LoraFile) -> None:
    """Write an adapter, one tensor in memory at a time, in float32.

    Raises:
        OutputError: ``output-not-writable``.
        MissingDependencyError: as :func:`gguf`.
    """
    module = gguf()
    writer = module.GGUFWriter(None, file.architecture)
    writer.add_type(module.GGUFType.ADAPTER)
    writer.add_string(module.Keys.Adapter.TYPE, "lora")
    writer.add_float32(module.Keys.Adapter.LORA_ALPHA, file.alpha)
    if file.base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, file.base.rpartition("/")[2])
        writer.add_base_model_repo_url(0, f"{_HUB}{file.base}")
    with reraise_as(not_writable, path):
        try:
            _write_tensors(writer, path, file.pairs)
        finally:
            writer.close()


def _write_tensors(writer: Any, path: Path, pairs: Sequence[LoraPair]) -> None:
    import math

    import numpy as np

    tensors = [t for p in pairs for t in ((p.name + A, p.a_shape, p.a), (p.name + B, p.b_shape, p.b))]
    for name, shape, _ in tensors:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * math.prod(shape))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape, read in tensors:
        values = read(None).float().contiguous().numpy()
        if values.shape != shape:
            raise ValueError(f"{name} is {list(values.shape)}, and {list(shape)} was announced")
        writer.write_tensor_data(values)


def is_gguf(path: Path) -> bool:
    """Check whether a file begins as a GGUF file does."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_lora_file(path: Path) -> LoraFile:
    """Read an adapter's header, without trusting it; its tensors are mapped, and read when asked for.

    Raises:
        AdapterError: ``adapter-gguf``: it is malformed or truncated, or it is a model and no adapter.
        MissingDependencyError: as :func:`gguf`.
    """
    module = gguf()
    with _as_malformed(path):
        reader = module.GGUFReader(path)
        fields = {key: reader.fields[key].contents() for key in reader.fields if not _is_long(reader.fields[key])}
    kind = fields.get(module.Keys.General.TYPE)
    if kind != module.GGUFType.ADAPTER:
        raise _bad(path, f"its general.type is {kind!r}, and an adapter's is {module.GGUFType.ADAPTER!r}")
    method = fields.get(module.Keys.Adapter.TYPE)
    if method != "lora":
        raise _bad(path, f"its adapter.type is {method!r}, and llama.cpp reads 'lora' alone")
    architecture = fields.get(module.Keys.General.ARCHITECTURE)
    alpha = fields.get(module.Keys.Adapter.LORA_ALPHA, 0.0)
    if not isinstance(architecture, str) or not isinstance(alpha, int | float):
        raise _bad(path, "it does not say its architecture, or its alpha is not a number")
    pairs, rest = _paired(path, {str(tensor.name): tensor for tensor in reader.tensors})
    base = str(fields.get(module.Keys.General.BASE_MODEL_REPO_URL.format(id=0), ""))
    return LoraFile(
        architecture,
        float(alpha),
        pairs,
        rest,
        base.removeprefix(_HUB) if base.startswith(_HUB) else "",
        activated=module.Keys.Adapter.ALORA_INVOCATION_TOKENS in reader.fields,
    )


def _is_long(field: Any) -> bool:
    """Check whether a field is an array, whose elements nobody here asks for."""
    return len(field.types) > 1


def _paired(path: Path, tensors: Mapping[str, Any]) -> tuple[tuple[LoraPair, ...], tuple[str, ...]]:
    names = dict.fromkeys(n.removesuffix(A).removesuffix(B) for n in tensors if n.endswith((A, B)))
    rest = tuple(n for n in tensors if not n.endswith((A, B)))
    # Source: "has unexpected suffix" in llama_adapter_lora_init_impl.
    unexpected = [name for name in rest if not name.endswith("_norm.weight")]
    if unexpected:
        raise _bad(path, f"{unexpected[0]} is neither the A nor the B of a tensor")
    pairs = []
    for name in names:
        if name + A not in tensors or name + B not in tensors:
            raise _bad(path, f"{name} has only one of A and B")
        a, b = tensors[name + A], tensors[name + B]
        pairs.append(LoraPair(name, _shape(a), _shape(b), _reader(path, a), _reader(path, b)))
    return tuple(pairs), rest


def _shape(tensor: Any) -> tuple[int, ...]:
    """Return a tensor's shape, slowest axis first, where GGUF has the fastest first."""
    return tuple(int(length) for length in reversed(tensor.shape))


def _reader(path: Path, tensor: Any) -> ReadTensor:
    def read(expert: int | None) -> torch.Tensor:
        import numpy as np
        import torch

        with _as_malformed(path):
            stored, shape = tensor.data, _shape(tensor)
            if expert is not None:
                stored, shape = stored[expert], shape[1:]
            values = gguf().quants.dequantize(stored, tensor.tensor_type)
            found = torch.from_numpy(np.array(values, dtype=np.float32).reshape(shape))
        if not bool(found.isfinite().all()):
            raise _bad(path, f"{tensor.name} contains values that are not finite")
        return found

    return read


@contextmanager
def _as_malformed(path: Path) -> Iterator[None]:
    """Turn whatever the package raises at a file that it cannot follow into one error."""
    try:
        yield
    except Exception as error:
        raise _bad(path, f"{type(error).__name__}: {error}") from error


def _bad(path: Path, why: str) -> AdapterError:
    return AdapterError(
        "the file is not a LoRA adapter for llama.cpp",
        where=str(path),
        why=why,
        help="compare it with one that llama.cpp's convert_lora_to_gguf.py, or graft convert, has written",
        code="adapter-gguf",
    )
