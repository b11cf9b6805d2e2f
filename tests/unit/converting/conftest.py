"""A base and adapters in a folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.converting.served_adapters import Bench
from torch import nn


@pytest.fixture
def bench(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> Callable[[str], Bench]:
    def make(name: str, dtype: torch.dtype = torch.float32) -> Bench:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = twin_of(name).to(dtype)
            model.save_pretrained(tmp_path / "base")
        return Bench(tmp_path, type(model))

    return make
