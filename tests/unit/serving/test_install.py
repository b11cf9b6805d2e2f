"""Engines are found where they were installed; where they were not, the error is the command that does it."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import pytest

from graftkit.errors import EngineError
from graftkit.serving import install
from graftkit.serving.install import INSTALLATIONS, engine_python, installation_of, python_in


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder without engines."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def environment(folder: Path, *, has_engine: bool) -> Path:
    """Write an environment whose Python finds every module, or none."""
    python = python_in(folder)
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nexit {0 if has_engine else 1}\n")
    python.chmod(0o755)
    return python


def code(engine: str, python: Path | str | None = None) -> str:
    with pytest.raises(EngineError) as caught:
        engine_python(engine, python)
    return caught.value.code


@pytest.mark.parametrize("engine", sorted(INSTALLATIONS))
def test_without_the_engine_the_error_says_how_to_install_it(elsewhere: Path, engine: str) -> None:
    with pytest.raises(EngineError) as caught:
        engine_python(engine)
    assert caught.value.code == "engine-missing"
    assert installation_of(engine).command in (caught.value.help or "")


def test_an_engine_nobody_knows_is_refused() -> None:
    assert code("ollama") == "engine-unknown"


def test_the_installed_environment_is_found(elsewhere: Path) -> None:
    python = environment(elsewhere / ".engines" / "mlx", has_engine=True)
    assert engine_python("mlx") == python


def test_an_environment_may_be_named_by_its_folder_or_its_python(elsewhere: Path) -> None:
    python = environment(elsewhere / "venv", has_engine=True)
    assert engine_python("vllm", elsewhere / "venv") == python
    assert engine_python("vllm", python) == python


def test_an_environment_without_the_engine_is_refused(elsewhere: Path) -> None:
    environment(elsewhere / "venv", has_engine=False)
    assert code("vllm", elsewhere / "venv") == "engine-missing"
    assert code("vllm", elsewhere / "nowhere") == "engine-missing"


def test_a_python_that_cannot_be_run_is_refused(elsewhere: Path) -> None:
    broken = elsewhere / "python"
    broken.write_text("not a program")
    assert code("vllm", broken) == "engine-missing"


def test_the_real_python_is_asked_for_the_module(elsewhere: Path) -> None:
    assert code("llama.cpp", sys.executable) == "engine-missing"


def test_an_installed_environment_is_not_installed_again(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = elsewhere / "mlx"
    environment(folder, has_engine=True)
    (folder / ".installed").write_text(INSTALLATIONS["mlx"].fingerprint)
    monkeypatch.setenv("PATH", "")
    install.install("mlx", folder)


def test_a_step_that_fails_is_an_error_and_leaves_no_mark(elsewhere: Path) -> None:
    folder = elsewhere / "mlx"
    environment(folder, has_engine=False)  # its pip fails
    with pytest.raises(EngineError) as caught:
        install.install("mlx", folder)
    assert caught.value.code == "engine-install"
    assert not (folder / ".installed").exists()


def test_the_command_line_needs_an_engine_and_a_folder(elsewhere: Path) -> None:
    assert install.main([]) == 2
    assert install.main(["ollama", "somewhere"]) == 2


def test_what_brings_a_torch_of_its_own_is_left_out(elsewhere: Path) -> None:
    import zipfile

    wheel = elsewhere / "engine-1.0-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", "Name: engine", "Version: 1.0"]
    lines += [f"Requires-Dist: {r}" for r in ("numpy>=2", "torch==2.13.0+cpu", "torchvision", 'x; extra == "y"')]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("engine-1.0.dist-info/METADATA", "\n".join(lines))
    assert [r for r in install.requirements_of(wheel) if not install.is_from_torch(r)] == ["numpy>=2"]


def test_a_source_distribution_writes_nothing_outside_its_folder(elsewhere: Path) -> None:
    source = elsewhere / "engine" / "src"
    source.mkdir(parents=True)
    with tarfile.open(source / "engine.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("../../escaped")
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"x"))
    with pytest.raises(tarfile.FilterError):
        install.unpack_source(elsewhere / "engine")
    assert not (elsewhere / "escaped").exists()
