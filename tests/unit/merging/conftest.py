"""Bases and adapters on disk, and the expected result: PEFT's own merge in double precision."""

from __future__ import annotations

import copy
import errno
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import graftkit as gk
from graftkit.merging.arithmetic.rounding import rounded
from graftkit.merging.merge import merge, verify_merge

Tensors = dict[str, torch.Tensor]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of PEFT and transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def only_page_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to open a file past the page cache, as some file systems do."""
    true = os.open

    def refuses(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return true(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuses)


def stored(folder: Path) -> Tensors:
    """Read every tensor of a checkpoint folder."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@dataclass(frozen=True)
class Bench:
    """A base and adapters in a folder; ``model`` is the base as it was saved."""

    folder: Path
    model: Any

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def adapter(self, config: Any, name: str = "adapter", spread: float = 0.0, **saving: Any) -> Path:
        """Attach a random adapter and save it; ``spread`` is the scale of noise on every trained value."""
        with quiet():
            adapted = get_peft_model(copy.deepcopy(self.model), config)
            move(adapted, spread)
            adapted.save_pretrained(str(self.folder / name), **saving)
        return self.folder / name

    def merge(self, *adapters: Path, **options: Any) -> Any:
        """Merge with weight 1 each, unless ``weights`` says otherwise."""
        weights = options.pop("weights", [1.0] * len(adapters))
        return merge(self.base, dict(zip(adapters, weights, strict=True)), self.out, **options)

    def loaded(self, folder: Path | None = None, dtype: torch.dtype = torch.float64) -> Any:
        with quiet():
            return type(self.model).from_pretrained(folder or self.base, dtype=dtype).eval()

    def exact(self, adapter: Path) -> Tensors:
        """Merge with PEFT in double precision; returns the tensors under their names on disk."""
        with quiet():
            adapted = PeftModel.from_pretrained(self.loaded(), str(adapter))
            merged: Any = adapted.merge_and_unload()
            merged.save_pretrained(self.folder / "exact")
        return stored(self.folder / "exact")

    def assert_same_files(self) -> None:
        """Assert that the headers (names, order, dtypes, shapes, metadata) equal the base's byte for byte."""
        files = sorted(p.name for p in self.base.glob("*.safetensors"))
        assert files
        assert files == sorted(p.name for p in self.out.glob("*.safetensors"))
        for name in files:
            assert _header(self.base / name) == _header(self.out / name)

    def assert_exact(self, expected: Tensors, share: float = 1e-4) -> set[str]:
        """Assert that the elements are the rounded expected values; returns changed names.

        Double precision settles every element of a 16-bit checkpoint, and all but a share of a 32-bit one.
        """
        before, after = stored(self.base), stored(self.out)
        assert set(before) == set(after)
        changed = {name for name in before if not torch.equal(_bits(before[name]), _bits(after[name]))}
        doubtful = wrong = 0
        for name in before:
            if name not in expected:
                # PEFT's save leaves it out: another name of a shared weight, or one that the class does not know.
                assert name not in changed
                continue
            right = rounded(expected[name].double().clone(), after[name].dtype)
            off = after[name] != right
            torch.testing.assert_close(after[name], right, rtol=2**-6, atol=1e-5)
            doubtful += off.numel() if name in changed and right.dtype is torch.float32 else 0
            wrong += int(off.sum())
        assert changed
        assert wrong <= (doubtful and max(2, share * doubtful)), f"{wrong} elements are misrounded"
        return changed

    def assert_verifies(self, *adapters: Path) -> None:
        evidence = verify_merge(self.base, dict.fromkeys(adapters, 1.0), self.out)
        assert evidence.ok, evidence.problems

    @staticmethod
    def quiet() -> Any:
        """Silence warnings of PEFT and transformers."""
        return quiet()

    @staticmethod
    def stored(folder: Path) -> Tensors:
        return stored(folder)


def move(adapted: nn.Module, spread: float) -> None:
    """Add noise of that scale to what is trained."""
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad and spread:
                parameter.add_(torch.randn_like(parameter) * spread)


@pytest.fixture
def bench(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> Callable[..., Bench]:
    """Save a twin as a base, in bfloat16 by default."""

    def make(
        name: str, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB", overrides: dict[str, Any] | None = None
    ) -> Bench:
        torch.manual_seed(0)
        with quiet():
            model: Any = (gk.twin(name, overrides=overrides) if overrides else twin_of(name)).to(dtype)
            model.save_pretrained(tmp_path / "base", max_shard_size=shard)
        return Bench(tmp_path, model)

    return make


def _header(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[: 8 + int.from_bytes(raw[:8], "little")]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
