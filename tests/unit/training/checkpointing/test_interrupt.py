"""Ctrl-C requests a checkpoint and the end; a second one ends the run at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from graftkit.training.checkpointing.interrupt import SaveOnInterrupt

ALONE = SimpleNamespace(world_size=1, device="cpu")


@pytest.fixture
def repeat_window() -> float:
    """Seconds in which a second interrupt counts as the first."""
    return 60.0


@pytest.fixture
def callback(repeat_window: float) -> Iterator[SaveOnInterrupt]:
    before = signal.getsignal(signal.SIGINT)
    made = SaveOnInterrupt(repeat_window)
    made.on_train_begin()
    yield made
    made.restore()
    assert signal.getsignal(signal.SIGINT) is before


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def step(callback: SaveOnInterrupt) -> TrainerControl:
    control = TrainerControl(should_evaluate=True)
    callback.on_step_end(ALONE, None, control)
    return control


def test_a_step_without_it_goes_on(callback: SaveOnInterrupt) -> None:
    control = step(callback)
    assert not control.should_save
    assert not control.should_training_stop
    assert control.should_evaluate


def test_it_saves_and_stops_after_the_step_and_measures_nothing(callback: SaveOnInterrupt) -> None:
    press()
    assert callback.requested
    control = step(callback)
    assert control.should_save
    assert control.should_training_stop
    assert not control.should_evaluate


def test_the_launcher_may_repeat_it(callback: SaveOnInterrupt) -> None:
    press()
    press()
    assert step(callback).should_save


@pytest.mark.parametrize("repeat_window", [0.0])
@pytest.mark.usefixtures("callback")
def test_a_later_one_ends_the_run_at_once() -> None:
    press()
    with pytest.raises(KeyboardInterrupt):
        press()


def test_after_training_it_is_an_interrupt_again(callback: SaveOnInterrupt) -> None:
    callback.on_train_end()
    with pytest.raises(KeyboardInterrupt):
        press()
    assert not callback.requested


def test_another_thread_leaves_the_signal_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=SaveOnInterrupt().on_train_begin)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
