"""Every example runs as it is: the script with Python, the recipe with ``graft doctor`` and ``graft train``."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from tests.docs.pages import ROOT, Page
from tests.docs.server import Programs
from tests.docs.stand_ins import Models

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
RECIPES = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
# The other recipes run with `make test-slow`; their scripts, which do the same, always do.
QUICK = {"text.yaml", "dpo.yaml", "grpo.yaml"}
SUBJECTS = {"text", "image", "audio", "dpo", "grpo", "experts", "qlora", "continue_and_merge", "guard"}


def test_each_subject_has_a_script_and_a_recipe() -> None:
    assert {Path(name).stem for name in SCRIPTS} == {Path(name).stem for name in RECIPES} == SUBJECTS


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, run_in: Programs, models: Models) -> Path:
    """A copy of the example and of the recipe of the same name, with what its own sentence says beside it."""
    name = request.node.callspec.params["name"]
    page = Page.read(f"examples/{name}")
    assert page.says_what_runs
    models.put(page.stand_ins, run_in.hub, tmp_path)
    for file in {name, f"{Path(name).stem}.yaml"}:
        shutil.copy(EXAMPLES / file, tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_runs(name: str, folder: Path, run_in: Programs) -> None:
    done = run_in.run(["python", name], folder)
    assert done.returncode == 0, done.stdout[-6000:]
    saved = [path.parent for path in folder.glob("out/*/adapter_config.json")]
    assert saved
    assert all(learned(path) for path in saved)
    for target in re.findall(
        r"gk\.(?:convert|merge)\(.*?\"(out/[^\"]+)\"(?:, to|\))", (folder / name).read_text()
    ):
        assert list((folder / target).glob("*.safetensors")), target


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in RECIPES]
)
def test_the_recipe_runs(name: str, folder: Path, run_in: Programs) -> None:
    checked = run_in.run(["graft", "doctor", "--recipe", name, "--json"], folder)
    assert checked.returncode == 0, checked.stdout
    done = run_in.run(["graft", "train", name], folder)
    assert done.returncode == 0, done.stdout[-6000:]
    recipe: Any = YAML(typ="safe").load((folder / name).read_text())
    out = folder / recipe["args"]["output_dir"]
    # Answers of a random model are all wrong alike, and equal rewards teach nothing.
    assert learned(out) == (name != "grpo.yaml")
    assert (out / "report.html").is_file()
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == recipe["model"]


def learned(adapter: Path) -> bool:
    """Whether training changed something: LoRA's B begins with zeros."""
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    return any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)
