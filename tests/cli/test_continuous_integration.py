"""The hooks, the action and the workflows: valid by their own schemas, and their commands do what they say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from ruamel.yaml import YAML
from torch import nn

from graftkit.recipes.libraries import libraries_of
from graftkit.recipes.recipe import read_recipe

ROOT = Path(__file__).parents[2]
HOOKS = ROOT / ".pre-commit-hooks.yaml"
ACTION = ROOT / "action.yml"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
BIN = Path(sys.executable).parent
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")


def read(file: Path) -> Any:
    return YAML(typ="safe").load(file.read_text())


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{BIN}:{os.environ['PATH']}", **variables}
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


# ---- their own formats


@pytest.mark.parametrize("file", [ACTION, *WORKFLOWS], ids=lambda file: file.name)
def test_it_is_what_its_host_reads(file: Path) -> None:
    kind = "vendor.github-actions" if file == ACTION else "vendor.github-workflows"
    done = run(BIN / "check-jsonschema", "--builtin-schema", kind, file)
    assert done.returncode == 0, done.stdout


def test_a_manifest_that_is_wrong_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "action.yml").write_text(ACTION.read_text().replace("using: composite", "using: compost"))
    done = run(BIN / "check-jsonschema", "--builtin-schema", "vendor.github-actions", tmp_path / "action.yml")
    assert done.returncode == 1


def test_the_targets_of_the_workflows_exist() -> None:
    text = "\n".join(file.read_text() for file in WORKFLOWS)
    targets = set(re.findall(r"make ([\w-]+)", text))
    assert targets >= {"lint", "test", "matrix-next", "test-families"}
    for target in targets:
        assert run("make", "--dry-run", target).returncode == 0, target


# ---- what a release is published with


def test_a_release_names_its_addresses(tmp_path: Path) -> None:
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    steps = read(ROOT / ".github" / "workflows" / "release.yml")["jobs"]["package"]["steps"]
    (command,) = [step["run"] for step in steps if "address.py" in step.get("run", "")]
    addresses = {"SITE": "https://docs.test/graftkit/", "REPOSITORY": "https://code.test/graftkit"}
    done = run("sh", "-c", command.replace(".github", f"{ROOT}/.github"), cwd=tmp_path, **addresses)
    assert done.returncode == 0, done.stderr
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    assert project["urls"] == {"Documentation": addresses["SITE"], "Source": addresses["REPOSITORY"]}
    links = re.findall(r"\]\(([^)]+)\)", (tmp_path / "README.md").read_text())
    assert all(link.startswith("https://") for link in links)
    for link in links:
        if page := link.partition(addresses["SITE"])[2]:
            sources = (f"{page.rstrip('/')}.md", f"{page}README.md", page)
            assert any((ROOT / "docs" / source).is_file() for source in sources), link


# ---- the hooks, by pre-commit itself


@pytest.fixture
def repository(tmp_path: Path, twin_of: Callable[[str], nn.Module]) -> Path:
    folder = tmp_path / "theirs"
    folder.mkdir()
    # Installing would need this version on an index.
    own = ("language", "additional_dependencies")
    hooks = [{**{k: v for k, v in hook.items() if k not in own}, "language": "system"} for hook in read(HOOKS)]
    YAML().dump({"repos": [{"repo": "local", "hooks": hooks}]}, folder / ".pre-commit-config.yaml")
    adapter = get_peft_model(twin_of("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained(folder / "one adapter")
    (folder / "bin").mkdir()
    command = folder / "bin" / "graft"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from graftkit.cli.main import main; main()" "$@"\n')
    command.chmod(0o755)
    for arguments in (["init", "--quiet"], ["add", "."]):
        assert run("git", *arguments, cwd=folder).returncode == 0
    return folder


def hook(name: str, repository: Path) -> subprocess.CompletedProcess[str]:
    path = f"{repository / 'bin'}:{BIN}:{os.environ['PATH']}"
    cache = str(repository.parent / "cache")
    return run(BIN / "pre-commit", "run", name, "--all-files", cwd=repository, PATH=path, PRE_COMMIT_HOME=cache)


def test_the_hooks_are_valid() -> None:
    assert run(BIN / "pre-commit", "validate-manifest", HOOKS).returncode == 0


def test_recipes_are_examined_with_the_libraries_that_they_need(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: llama\ndata: {path: rows.jsonl}\ntrainer: sft\nargs: {}\n")
    needed = {library.install for library in libraries_of(read_recipe(tmp_path / "recipe.yaml")) if library.key}
    (doctor,) = [hook for hook in read(HOOKS) if hook["id"] == "graft-doctor"]
    assert {read(ACTION)["inputs"]["package"]["default"]} == needed
    assert {name.replace(".[", "graftkit[") for name in doctor["additional_dependencies"]} == needed


def test_the_hook_checks_adapters(repository: Path) -> None:
    done = hook("graft-check", repository)
    assert done.returncode == 0, done.stdout
    assert "Passed" in done.stdout
    shutil.copytree(repository / "one adapter", repository / "broken")
    (repository / "broken" / "adapter_model.safetensors").write_bytes(b"\x00" * 64)
    run("git", "add", ".", cwd=repository)
    done = hook("graft-check", repository)
    assert done.returncode == 1
    assert "GK505" in done.stdout


def test_the_hook_examines_every_recipe(repository: Path) -> None:
    (repository / "recipe.yaml").write_text("model: nothing\nunknown: 1\n")
    (repository / "recipe-two.yaml").write_text("not: [a\n")
    run("git", "add", ".", cwd=repository)
    done = hook("graft-doctor", repository)
    assert done.returncode == 1
    assert "recipe-two.yaml" in done.stdout
    assert "[recipe-syntax]" in done.stdout
    assert "[recipe-invalid]" in done.stdout


# ---- the action's own script


def examine(folder: Path, **inputs: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """Run the step as its host does: inputs in the environment, results in the file of outputs."""
    action = read(ACTION)
    given = {name: str(field.get("default", "")) for name, field in action["inputs"].items()} | {
        name.replace("_", "-"): value for name, value in inputs.items()
    }
    step = next(step for step in action["runs"]["steps"] if step.get("id") == "examine")
    outputs = folder / "outputs"
    variables = {name: resolved(value, given) for name, value in step["env"].items()}
    done = run("bash", "-eo", "pipefail", "-c", step["run"], cwd=folder, GITHUB_OUTPUT=str(outputs), **variables)
    lines = outputs.read_text().splitlines() if outputs.is_file() else []
    return done, dict(line.split("=", 1) for line in lines)


def resolved(text: str, inputs: Mapping[str, str]) -> str:
    return EXPRESSION.sub(lambda found: inputs[found[1].removeprefix("inputs.")], text)


@pytest.fixture
def path_with_graft(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys.modules[__name__], "BIN", repository / "bin")
    monkeypatch.setenv("PATH", f"{BIN.parent}:{os.environ['PATH']}")
    return repository


def test_the_action_writes_sarif(path_with_graft: Path) -> None:
    done, outputs = examine(path_with_graft, adapter="one adapter")
    assert done.returncode == 0, done.stderr
    assert outputs == {"status": "0", "found": "true"}
    log = json.loads((path_with_graft / "graftkit-sarif" / "check.sarif").read_text())
    assert log["version"] == "2.1.0"


def test_the_worst_status_is_the_actions(path_with_graft: Path) -> None:
    (path_with_graft / "one adapter" / "adapter_model.safetensors").write_bytes(b"\x00" * 64)
    done, outputs = examine(path_with_graft, adapter="one adapter", recipe="missing.yaml")
    assert done.returncode == 0, done.stderr
    assert outputs == {"status": "2", "found": "true"}
    assert not (path_with_graft / "graftkit-sarif" / "doctor.sarif").exists()
    assert "missing.yaml" in done.stderr


def test_what_is_given_is_never_run(path_with_graft: Path) -> None:
    _, outputs = examine(path_with_graft, adapter="$(touch ran); touch ran")
    assert outputs["status"] == "2"
    assert not (path_with_graft / "ran").exists()


def test_the_action_interpolates_nothing_into_scripts() -> None:
    scripts = [step["run"] for step in read(ACTION)["runs"]["steps"] if "run" in step]
    assert scripts
    assert not [script for script in scripts if EXPRESSION.search(script)]
