"""Offline, small and deterministic: what every test here may count on."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

# Before any Hugging Face package is imported, in this process and in those that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests run side by side: a second thread on matrices this small only waits for the others.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from tests.families.turns import SEED, VARIABLE, fix_seed, fix_turn
from torch import nn

import graftkit as gk

torch.set_num_threads(1)


def pytest_configure() -> None:
    fix_turn(os.environ, datetime.now(UTC).date())
    fix_seed(os.environ)
    # Models are made of many objects: looking for garbage as often as Python does took a fifth of the time.
    gc.set_threshold(20_000, 10, 10)


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported by now is never garbage


def pytest_report_header() -> str:
    return f"families: {VARIABLE}={os.environ[VARIABLE]} {SEED}={os.environ[SEED]}"


USUAL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session", autouse=True)
def _new_assets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty cache of what was found out about classes: an earlier run must not decide what this one sees."""
    folder = str(tmp_path_factory.mktemp("assets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ASSETS_CACHE", folder)
        patch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_extensions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """PEFT's BOFT compiles where it is attached, and waits without end for the lock of a run that was killed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield


@pytest.fixture(scope="session")
def _twins() -> dict[str, nn.Module]:
    return {}


@pytest.fixture
def twin_of(_twins: dict[str, nn.Module]) -> Callable[[str], nn.Module]:
    """A fresh twin of a model by name: built once a session, copied for each test that changes it."""

    def make(name: str) -> nn.Module:
        if name not in _twins:
            _twins[name] = gk.twin(name)
        return copy.deepcopy(_twins[name])

    return make


@pytest.fixture
def e2b(twin_of: Callable[[str], nn.Module]) -> nn.Module:
    """A twin of Gemma 4 E2B: wrapped towers with finite bounds, KV sharing, tied embeddings."""
    return twin_of("google/gemma-4-E2B-it")


@pytest.fixture
def usual_seven() -> tuple[str, ...]:
    """The module names that most recipes list."""
    return USUAL_SEVEN
