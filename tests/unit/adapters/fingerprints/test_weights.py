"""A base is known by its files again: not a sibling, and not another precision taken for another model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from graftkit.adapters.fingerprints.weights import Likeness, compare_weights, fingerprint
from graftkit.errors import SourceError

LAYERS = 20


def weights(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {"embed.weight": torch.randn(64, 32, generator=generator)}
    for layer in range(LAYERS):
        found[f"layers.{layer}.up.weight"] = torch.randn(48, 32, generator=generator) / 50
        found[f"layers.{layer}.norm.weight"] = torch.ones(32)
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", weights())


def likeness(base: Path, other: Path) -> Likeness:
    return compare_weights(fingerprint(base), other).likeness


def test_the_same_files(base: Path, tmp_path: Path) -> None:
    assert likeness(base, write(tmp_path / "copy", weights())) is Likeness.SAME


def test_the_same_tensors_in_other_files(base: Path, tmp_path: Path) -> None:
    """A model may be saved again in shards of another size."""
    import json

    tensors, folder = weights(), tmp_path / "shards"
    folder.mkdir()
    shards = {"a.safetensors": list(tensors)[:7], "b.safetensors": list(tensors)[7:]}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert likeness(base, folder) is Likeness.SAME


def test_a_sibling_with_equal_headers(base: Path, tmp_path: Path) -> None:
    found = compare_weights(fingerprint(base), write(tmp_path / "it", weights(1)))
    assert found.likeness is Likeness.OTHER
    assert "embed.weight" in found.different


@pytest.mark.parametrize("layer", [0, 7, LAYERS - 1])
def test_one_changed_tensor(base: Path, tmp_path: Path, layer: int) -> None:
    """Whichever it is, as long as the model has no more tensors than are sampled."""
    tensors = weights()
    tensors[f"layers.{layer}.up.weight"] *= 1.01
    assert likeness(base, write(tmp_path / "tuned", tensors)) is Likeness.OTHER


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_another_dtype(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in weights().items()}
    found = compare_weights(fingerprint(base), write(tmp_path / "cast", tensors))
    assert found.likeness is Likeness.ROUNDED
    assert found.dtypes is not None
    assert list(found.dtypes) == ["BF16"]


def test_another_dtype_of_a_sibling(base: Path, tmp_path: Path) -> None:
    nearly = {name: (tensor.float() * 1.01).half() for name, tensor in weights().items()}
    assert likeness(base, write(tmp_path / "cast", nearly)) is Likeness.OTHER


def test_from_single_precision_down(tmp_path: Path) -> None:
    exact = write(tmp_path / "exact", weights(dtype=torch.float32))
    assert likeness(exact, write(tmp_path / "rounded", weights())) is Likeness.ROUNDED
    assert likeness(exact, write(tmp_path / "other", weights(1))) is Likeness.OTHER


def quantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pack the matrices of the layers, as quantizers do: embeddings and norms stay."""
    packed = {
        n: t.to(torch.float32).view(torch.uint8)[:, ::8].contiguous() for n, t in tensors.items() if "up" in n
    }
    return {**tensors, **packed, **{f"{name}.absmax": torch.ones(4) for name in packed}}


def test_a_quantized_copy(base: Path, tmp_path: Path) -> None:
    assert likeness(base, write(tmp_path / "4bit", quantized(weights()))) is Likeness.REPACKED


def test_a_quantized_sibling(base: Path, tmp_path: Path) -> None:
    assert likeness(base, write(tmp_path / "4bit", quantized(weights(1)))) is Likeness.OTHER


def test_norms_alone_prove_nothing(base: Path, tmp_path: Path) -> None:
    """Those of a sibling may be equal."""
    norms = {name: tensor for name, tensor in weights().items() if "norm" in name}
    found = compare_weights(fingerprint(base), write(tmp_path / "norms", norms))
    assert (found.likeness, found.different) == (Likeness.UNKNOWN, ())
    assert found.why


def test_other_names(base: Path, tmp_path: Path) -> None:
    renamed = {f"model.{name}": tensor for name, tensor in weights().items()}
    assert likeness(base, write(tmp_path / "renamed", renamed)) is Likeness.UNKNOWN


def test_it_stays_small_and_reads_little(tmp_path: Path) -> None:
    """However many tensors there are, and whatever their dtypes."""
    tensors = {f"layers.{i}.w": torch.full((4, 4), float(i)) for i in range(1000)}
    tensors |= {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.0),
        "ids": torch.arange(4),
        "nan": torch.tensor([[float("nan")] * 4]),
    }
    found = fingerprint(write(tmp_path / "many", tensors))
    assert len(found.samples) <= 16
    assert compare_weights(found, tmp_path / "many").likeness is Likeness.SAME


def test_no_weights(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        fingerprint(tmp_path)
    with pytest.raises(SourceError):
        compare_weights(fingerprint(base), tmp_path)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_rounding_is_torch_s(value: float) -> None:
    from graftkit.adapters.fingerprints.weights import rounded

    exact = torch.tensor(value, dtype=torch.float64)
    for name, dtype in {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}.items():
        assert rounded(value, name) == exact.float().to(dtype).double().item()
