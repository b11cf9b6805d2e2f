"""The demo's way from digits on disk to a trained model: a few steps, so that each test is quick."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from graftkit.demo import digits, processor, training
from graftkit.demo.evaluation import accuracy, model_inputs, predict
from graftkit.demo.proof import prove
from graftkit.findings import Severity
from graftkit.modeling.threads import one_thread
from graftkit.recipes.recipe import Recipe
from graftkit.training.result import TrainingResult
from graftkit.twins.twin import twin

FEW = {"max_steps": 16, "per_device_train_batch_size": 32, "warmup_steps": 2, "logging_steps": 4}
TWO = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}


@pytest.fixture(scope="module")
def split() -> digits.DigitSplit:
    return digits.load_digit_split()


@pytest.fixture(scope="module")
def made() -> Any:
    return processor.digit_processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, split: digits.DigitSplit, made: Any) -> Path:
    """A folder with the base, its processor and the training data."""
    folder = tmp_path_factory.mktemp("digits")
    twin("google/gemma-4-E2B-it", overrides=processor.config_overrides()).save_pretrained(folder / "base")
    made.save_pretrained(folder / "base")
    split.train.save_to_disk(folder / "train")
    return folder


@pytest.fixture(autouse=True)
def loadable_processor(made: Any) -> Any:
    with processor.known_to_transformers(made):
        yield


def write_recipe(folder: Path, output: Path, **arguments: Any) -> Recipe:
    return training.write_recipe(
        folder / "recipe.yaml",
        base=folder / "base",
        data=folder / "train",
        output=output,
        scope=("language", "vision"),
        **arguments,
    )


@pytest.fixture(scope="module")
def trained(folder: Path, made: Any) -> tuple[TrainingResult, PeftModel]:
    with processor.known_to_transformers(made):
        return training.train_adapter(write_recipe(folder, folder / "adapter", **FEW))


def test_loss_falls(trained: tuple[TrainingResult, PeftModel]) -> None:
    result, model = trained
    losses = result.curve("loss")
    assert [step for step, _ in losses] == [4, 8, 12, 16]
    assert losses[-1][1] < 0.75 * losses[0][1]
    assert (result.steps, model.training) == (16, False)


def test_both_towers_are_trained(trained: tuple[TrainingResult, PeftModel]) -> None:
    # lora_B starts at zero: what is not zero now was moved by a gradient.
    moved = {name: bool(p.any()) for name, p in trained[1].named_parameters() if "lora_B" in name}
    assert all(moved.values())
    assert any("vision_tower" in name for name in moved)
    assert any("language_model" in name for name in moved)


def test_the_model_gets_its_own_forward_back(trained: tuple[TrainingResult, PeftModel]) -> None:
    assert "forward" not in vars(trained[1].get_base_model())


def test_accuracy_counts_the_right_tokens(
    trained: tuple[TrainingResult, PeftModel], made: Any, split: digits.DigitSplit
) -> None:
    _, model = trained
    rows = split.held_out.select(range(150))
    answers = predict(model, made, rows)
    right = sum(a == b for a, b in zip(answers, rows["completion"], strict=True))
    assert accuracy(model, made, rows) == right / 150
    assert predict(model, made, rows.select(range(5))) == answers[:5]
    assert right / 150 > 0.15  # already better than guessing


def test_a_changed_adapter_file_is_noticed(
    trained: tuple[TrainingResult, PeftModel], folder: Path, made: Any, split: digits.DigitSplit, tmp_path: Path
) -> None:
    result, model = trained
    shutil.copytree(result.folder, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(file).items()}, file)
    batch = model_inputs(made, split.held_out[:4])
    report = prove(model, batch, folder / "base", tmp_path / "adapter", tmp_path / "merged")
    assert {finding.code: finding.severity for finding in report} == {
        "fresh_process_reload": Severity.ERROR,
        "merged_in_memory": Severity.OK,
        "merged_checkpoint": Severity.OK,
    }


def test_a_missing_adapter_file_is_noticed(
    trained: tuple[TrainingResult, PeftModel], folder: Path, made: Any, split: digits.DigitSplit, tmp_path: Path
) -> None:
    batch = model_inputs(made, split.held_out[:4])
    (tmp_path / "adapter").mkdir()
    report = prove(trained[1], batch, folder / "base", tmp_path / "adapter", tmp_path / "merged")
    assert [finding.code for finding in report if finding.severity is Severity.ERROR] == ["fresh_process_reload"]


def test_nothing_goes_to_stdout_and_only_the_output_is_written(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    training.train_adapter(write_recipe(folder, Path("adapter"), **TWO))
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "2/2" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_same_recipe_same_run(folder: Path, tmp_path: Path) -> None:
    first, second = (training.train_adapter(write_recipe(folder, tmp_path, **TWO))[0] for _ in range(2))
    assert first.curve("loss") == second.curve("loss")


def test_ctrl_c_ends_the_run(folder: Path, tmp_path: Path) -> None:
    class PressCtrlC(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        training.train_adapter(write_recipe(folder, tmp_path, **TWO), PressCtrlC())


def test_threads_are_as_many_after_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
