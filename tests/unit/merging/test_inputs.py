"""A base or an adapter that is removed, or breaks, during the merge: the error names the file."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, ShiraConfig

from graftkit.errors import AdapterError, GraftError, OutputError, SourceError
from graftkit.merging import run as merging
from graftkit.merging.merge import verify_merge

if TYPE_CHECKING:
    from tests.unit.merging.conftest import Bench

WEIGHTS = "adapter_model.safetensors"
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "dora": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, use_dora=True),
    "through peft": LoHaConfig(r=2, target_modules=["q_proj", "down_proj"], init_weights=False),
    "with integers": ShiraConfig(r=2, target_modules=["q_proj", "down_proj"]),
}


@pytest.fixture
def made(bench: Callable[..., Bench]) -> Bench:
    made = bench("llama", dtype=torch.float32, shard="60KB")
    (made.base / "tokenizer.json").write_text("{}")
    return made


@pytest.fixture
def adapter(made: Bench) -> Path:
    return made.adapter(CONFIGS["lora"])


def last_of(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def remove(path: Path) -> None:
    path.unlink()


def after_the_plan(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[], Any]) -> None:
    """What happens once the headers have been read, and before a tensor is."""
    true = merging.check_space

    def check_space(target: Path, needed: int) -> None:
        true(target, needed)
        spoil()

    monkeypatch.setattr(merging, "check_space", check_space)


def failure(made: Bench, adapter: Path) -> GraftError:
    with pytest.raises(GraftError) as caught:
        made.merge(adapter)
    assert caught.value.help
    assert not made.out.exists()
    return caught.value


@pytest.mark.parametrize("spoil", [cut, remove], ids=lambda f: f.__name__)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_file_of_the_base(
    config: str, spoil: Callable[[Path], None], made: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = made.adapter(CONFIGS[config], spread=0.05)
    victim = last_of(made.base)
    after_the_plan(monkeypatch, lambda: spoil(victim))
    error = failure(made, adapter)
    assert isinstance(error, SourceError)
    assert (error.code, error.where) == ("not-readable", str(victim))


@pytest.mark.parametrize("spoil", [cut, remove], ids=lambda f: f.__name__)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_adapter(
    config: str, spoil: Callable[[Path], None], made: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = made.adapter(CONFIGS[config], spread=0.05)
    after_the_plan(monkeypatch, lambda: spoil(adapter / WEIGHTS))
    error = failure(made, adapter)
    assert isinstance(error, AdapterError)
    assert (error.code, error.where) == ("adapter-weights", str(adapter / WEIGHTS))


def test_a_removed_tokenizer(made: Bench, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result would look complete without it."""
    after_the_plan(monkeypatch, (made.base / "tokenizer.json").unlink)
    error = failure(made, adapter)
    assert (error.code, error.where) == ("not-readable", str(made.base / "tokenizer.json"))


def test_the_whole_base(made: Bench, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after_the_plan(monkeypatch, lambda: shutil.rmtree(made.base))
    error = failure(made, adapter)
    assert isinstance(error, SourceError)
    assert str(error.where).startswith(str(made.base))


def broken(monkeypatch: pytest.MonkeyPatch, which: Callable[[Path], bool]) -> None:
    """Reading from these files fails as it does where a disk is broken."""
    true = os.preadv

    def preadv(fd: int, *rest: Any) -> int:
        if which(Path(f"/proc/self/fd/{fd}").readlink()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return true(fd, *rest)

    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize(
    ("which", "kind", "code"),
    [
        pytest.param(lambda p: p.parent.name == "base", SourceError, "not-readable", id="the base's weights"),
        pytest.param(lambda p: p.name == "tokenizer.json", SourceError, "not-readable", id="its tokenizer"),
        pytest.param(lambda p: p.name == WEIGHTS, AdapterError, "adapter-weights", id="the adapter"),
        pytest.param(lambda p: p.suffix == ".part", OutputError, "output-not-readable", id="the output"),
    ],
)
def test_a_disk_that_cannot_be_read(
    which: Callable[[Path], bool],
    kind: type[GraftError],
    code: str,
    made: Bench,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken(monkeypatch, which)
    error = failure(made, adapter)
    assert isinstance(error, kind)
    assert error.code == code
    assert which(Path(str(error.where)))
    assert "Input/output error" in str(error.why)
    monkeypatch.undo()
    made.merge(adapter)
    made.assert_verifies(adapter)


def test_finished_files_are_reused_once_the_file_is_back(
    made: Bench, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, last = made.folder / "away", last_of(made.base)
    after_the_plan(monkeypatch, lambda: last.rename(away))
    assert failure(made, adapter).where == str(last)
    monkeypatch.undo()
    away.rename(last)
    report = made.merge(adapter)
    assert len(report.resumed) == len(list(made.base.glob("*.safetensors"))) - 1
    made.assert_verifies(adapter)


def test_checking_names_the_file_too(made: Bench, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made.merge(adapter)
    for folder, kind in ((made.base, SourceError), (made.out, OutputError)):
        with monkeypatch.context() as patch, pytest.raises(kind) as caught:
            broken(patch, lambda p, folder=folder: p.parent == folder)  # type: ignore[misc]
            verify_merge(made.base, adapter, made.out)
        assert Path(str(caught.value.where)).parent == folder
