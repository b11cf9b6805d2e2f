"""The guard's figures reach the trackers of a real run, beside what the trainer logs, in the same run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import Trainer, TrainingArguments

import graftkit as gk
from graftkit.training.guard.step_monitor import StepStats
from graftkit.training.guard.tracking import Trackers, figures

STEP = StepStats(3, {"language": 0.5, "vision": float("nan")}, {"language": 0.25}, {"vision": 0.125})


@pytest.fixture
def train(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> Callable[..., gk.Guard]:
    def run(tracker: str, **options: Any) -> gk.Guard:
        model = twin_of("llama")
        plan = gk.plan(model, targets="attention", r=2)
        rows = [{"input_ids": torch.arange(4, 12), "labels": torch.arange(4, 12)}] * 8
        guard = gk.Guard(plan, **options)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            report_to=tracker,
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=2,
            save_strategy="no",
            max_steps=4,
            per_device_train_batch_size=2,
        )
        Trainer(
            gk.attach(model, plan), arguments, train_dataset=Dataset.from_list(rows), callbacks=[guard]
        ).train()
        return guard

    return run


def test_each_figure_has_a_name() -> None:
    assert figures(STEP) == {
        "graftkit/gradient_norm/language": 0.5,
        "graftkit/relative_update/language": 0.25,
        "graftkit/clamped_share/vision": 0.125,
    }


@pytest.mark.parametrize("every", [None, 1])
def test_tensorboard_has_them_in_the_trainers_run(
    train: Callable[..., gk.Guard], tmp_path: Path, every: int | None
) -> None:
    guard = train("tensorboard", every=every)
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    read = EventAccumulator(str(folder)).Reload()
    written = {event.step: event.value for event in read.Scalars("graftkit/gradient_norm/language")}
    assert written == pytest.approx({step.step: step.gradient["language"] for step in guard.steps})
    assert sorted(written) == ([2, 4] if every is None else [1, 2, 3, 4])
    # The trainer's own norm, over all towers, says the same.
    trainers = {event.step: event.value for event in read.Scalars("train/grad_norm")}
    assert {step: written[step] for step in trainers} == pytest.approx(trainers, rel=1e-3)


def test_a_folder_of_the_users_is_taken(
    train: Callable[..., gk.Guard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    train("tensorboard")
    tags = EventAccumulator(str(tmp_path / "events")).Reload().Tags()["scalars"]
    assert {"train/loss", "graftkit/relative_update/language"} <= set(tags)


def test_wandb_has_them_in_the_trainers_run(
    train: Callable[..., gk.Guard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    guard = train("wandb")
    run = wandb.run
    assert run is not None
    summary = dict(run.summary)
    run.finish()
    assert summary["graftkit/gradient_norm/language"] == pytest.approx(guard.steps[-1].gradient["language"])
    assert "train/loss" in summary


def test_nothing_is_written_without_a_tracker(tmp_path: Path) -> None:
    trackers = Trackers([], str(tmp_path / "run"))
    trackers.write([STEP])
    trackers.close()
    assert not (tmp_path / "run").exists()
