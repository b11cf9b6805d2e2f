"""After a power cut, the newest complete checkpoint is found, and one cut short is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graftkit.errors import TrainingError
from graftkit.training.checkpointing.checkpoints import checkpoint_to_resume, last_complete_checkpoint

FILES = ("adapter_model.safetensors", "trainer_state.json")


def checkpoint(folder: Path, step: int) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    save_file({"a": torch.ones(64)}, made / "adapter_model.safetensors")
    (made / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return made


def cut(file: Path) -> None:
    """As a kill leaves it: with half of what was to be written."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def test_the_newest_by_number(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        checkpoint(tmp_path, step)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("file", FILES)
def test_one_that_was_cut_short_is_skipped(tmp_path: Path, file: str) -> None:
    whole, broken = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20)
    cut(broken / file)
    assert last_complete_checkpoint(tmp_path) == whole
    assert broken.is_dir()


def test_weights_in_folders_count(tmp_path: Path) -> None:
    whole, broken = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20)
    (broken / "other").mkdir()
    save_file({"a": torch.ones(64)}, broken / "other" / "adapter_model.safetensors")
    cut(broken / "other" / "adapter_model.safetensors")
    assert last_complete_checkpoint(tmp_path) == whole


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(None, id="no state yet"),
        pytest.param("[]", id="no mapping"),
        pytest.param('{"global_step": 9}', id="of another step"),
        pytest.param("{}", id="empty"),
    ],
)
def test_without_a_valid_state_there_is_no_checkpoint(tmp_path: Path, state: str | None) -> None:
    file = checkpoint(tmp_path, 10) / "trainer_state.json"
    file.unlink()
    if state is not None:
        file.write_text(state)
    assert last_complete_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", ["checkpoint-last", "checkpoint-10.tmp", "tmp-checkpoint-10"])
def test_other_names_are_no_checkpoints(tmp_path: Path, name: str) -> None:
    checkpoint(tmp_path, 10).rename(tmp_path / name)
    (tmp_path / "checkpoint-30").write_text("a file")
    assert last_complete_checkpoint(tmp_path) is None


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        checkpoint_to_resume(tmp_path / "absent")
    assert caught.value.code == "nothing-to-resume"
    whole = checkpoint(tmp_path, 10)
    assert checkpoint_to_resume(tmp_path) == whole
