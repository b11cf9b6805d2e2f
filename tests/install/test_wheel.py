"""What somebody gets who installs the wheel in an environment of its own: every file, every command, the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.install

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
Run = Callable[..., subprocess.CompletedProcess[str]]


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    # Nothing of the checkout may be found: neither its source nor its environment.
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env={**inherited, **variables}, capture_output=True, text=True, check=False
    )


def done(*command: str | Path, cwd: Path, **variables: str) -> str:
    result = run(*command, cwd=cwd, **variables)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (made,) = folder.glob("graftkit-*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with the wheel and nothing but what it requires."""
    folder = tmp_path_factory.mktemp("environment")
    done(sys.executable, "-m", "venv", folder, cwd=folder)
    found = folder / "bin" / "python"
    install(found, next(line for line in pins() if line.startswith("torch==")))
    install(found, str(wheel))
    return found


def install(python: Path, what: str) -> None:
    pinned = ROOT / "constraints.txt"
    done(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        pinned,
        what,
        cwd=python.parent,
    )


def pins() -> list[str]:
    return (ROOT / "constraints.txt").read_text().splitlines()


def graft(python: Path, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(python.parent / "graft", *arguments, cwd=cwd, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="2")


def test_the_wheel_has_every_file(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("graftkit/")}
    here = {str(f.relative_to(SOURCE)) for f in (SOURCE / "graftkit").rglob("*") if f.is_file()}
    assert packed == {name for name in here if "__pycache__" not in name}


def test_it_says_its_version(python: Path, tmp_path: Path) -> None:
    said = graft(python, "--version", cwd=tmp_path).stdout.strip()
    listed: Any = json.loads(graft(python, "env", "--json", cwd=tmp_path).stdout)
    assert listed["packages"]["graftkit"] == said
    assert listed["packages"]["trl"] is None


def test_rules_are_read_without_a_network(python: Path, tmp_path: Path) -> None:
    shown = graft(python, "rules", "GK601", cwd=tmp_path)
    assert shown.returncode == 0
    assert "GK601" in shown.stdout


def test_what_needs_no_extra_works_without(python: Path, tmp_path: Path) -> None:
    for arguments in (["survey", "llama"], ["plan", "llama"], ["verify", "llama", "--twin"], ["doctor", "llama"]):
        result = graft(python, *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr


def test_a_missing_extra_is_named(python: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "recipe.yaml").write_text("model: llama\ndata: {path: rows.jsonl}\nargs: {output_dir: out}\n")
    for arguments in (["train", "recipe.yaml"], ["demo"]):
        result = graft(python, *arguments, "--json", cwd=tmp_path)
        assert result.returncode == 2
        assert "graftkit[train]" in json.dumps(json.loads(result.stdout)["error"])


def test_the_demo_runs_with_its_extra(python: Path, wheel: Path, tmp_path: Path) -> None:
    install(python, f"graftkit[train,quant] @ {wheel.as_uri()}")
    result = graft(python, "demo", cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert list((tmp_path / "graft-demo").glob("*.html"))
