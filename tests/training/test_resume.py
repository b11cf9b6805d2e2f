"""A run that is cut short goes on as though nothing had happened."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.small import graft, save_model, started, wait_for, word_tokenizer, write_recipe

from graftkit.errors import TrainingError
from graftkit.recipes.recipe import read_recipe
from graftkit.training.result import TrainingResult
from graftkit.training.run import train

SUMS = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(10) for b in range(10)]
# Dropout draws from the random state that a checkpoint has to bring back.
ADAPTER = {"r": 4, "dropout": 0.1}
ARGS = {
    "max_steps": 30,
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "save_steps": 5,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), word_tokenizer([*map(str, range(19)), "+", "="]))


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """Return the uninterrupted run."""
    return train(read_recipe(recipe(tmp_path_factory.mktemp("whole"), base)))


def recipe(folder: Path, base: Path, **args: Any) -> Path:
    return write_recipe(folder / "sft.yaml", base, SUMS, adapter=ADAPTER, args={**ARGS, **args})


def test_after_a_kill_the_curve_is_that_of_an_uninterrupted_run(
    tmp_path: Path, base: Path, whole: TrainingResult
) -> None:
    file = recipe(tmp_path, base)
    process = started("train", str(file), "--json", cwd=tmp_path)
    # The moment this checkpoint's folder appears, it is being written.
    wait_for(tmp_path / "sft" / "checkpoint-15", process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = graft("train", str(file), "--resume", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    assert output["steps"] == ARGS["max_steps"]
    assert not output["interrupted"]
    losses = [(entry["step"], entry["loss"]) for entry in output["history"] if "loss" in entry]
    assert [step for step, _ in losses] == [step for step, _ in whole.curve("loss")]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in whole.curve("loss")], rel=1e-5)
    assert losses[-1][1] < losses[0][1]


def test_ctrl_c_saves_and_says_so_and_the_run_goes_on(tmp_path: Path, base: Path) -> None:
    endless = {"max_steps": 100_000, "save_steps": 20, "save_total_limit": 2, "lr_scheduler_type": "constant"}
    file = recipe(tmp_path, base, **endless)
    process = started("train", str(file), "--json", cwd=tmp_path)
    wait_for(tmp_path / "sft" / "checkpoint-20", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    output = json.loads(out)
    assert output["interrupted"]
    done = output["steps"]
    assert (tmp_path / "sft" / f"checkpoint-{done}" / "trainer_state.json").is_file()
    assert (tmp_path / "sft" / "adapter_model.safetensors").is_file()
    assert "interrupted" in (tmp_path / "sft" / "report.html").read_text(encoding="utf-8")
    result = train(read_recipe(file, [f"args.max_steps={done + 5}"]), resume=True)
    assert [step for step, _ in result.curve("loss")] == list(range(1, done + 6))
    assert not result.interrupted


def test_a_half_written_checkpoint_is_skipped(tmp_path: Path, base: Path, whole: TrainingResult) -> None:
    file = recipe(tmp_path, base)
    folder = tmp_path / "sft"
    shutil.copytree(whole.folder, folder)
    for name, cut in (("checkpoint-30", "adapter_model.safetensors"), ("checkpoint-25", "trainer_state.json")):
        damaged = folder / name / cut
        damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    result = train(read_recipe(file), resume=True)
    assert result.steps == ARGS["max_steps"]
    losses = [value for _, value in result.curve("loss")]
    assert losses == pytest.approx([value for _, value in whole.curve("loss")], rel=1e-5)
    # Steps 21 to 30 were trained again, because the last whole checkpoint was the twentieth.
    saved = load_file(folder / "checkpoint-30" / "adapter_model.safetensors")
    assert saved.keys() == load_file(whole.folder / "checkpoint-30" / "adapter_model.safetensors").keys()


def test_a_finished_run_has_nothing_left_to_train(tmp_path: Path, base: Path, whole: TrainingResult) -> None:
    file = recipe(tmp_path, base)
    shutil.copytree(whole.folder, tmp_path / "sft")
    (tmp_path / "sft" / "adapter_model.safetensors").unlink()  # cut after the last checkpoint, before the end
    result = train(read_recipe(file), resume=True)
    assert result.steps == ARGS["max_steps"]
    assert result.curve("loss") == whole.curve("loss")
    again, before = (load_file(folder / "adapter_model.safetensors") for folder in (result.folder, whole.folder))
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path, base: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        train(read_recipe(recipe(tmp_path, base)), resume=True)
    assert caught.value.code == "nothing-to-resume"
