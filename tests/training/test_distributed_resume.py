"""Several processes that were cut short resume as if nothing had happened, or are refused."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tests.training.proof import loads_in_stock_peft
from tests.training.small import save_model, started, wait_for
from tests.training.test_distributed import (
    ALIKE,
    GLOO,
    PROCESSES,
    needs_deepspeed,
    output_of,
    ran,
    recipe,
    words,
    zero,
)

from graftkit.training.checkpointing.checkpoints import last_complete_checkpoint, read_info
from graftkit.training.distributed.sharding import Sharding

pytestmark = pytest.mark.distributed

# An epoch has 12 steps: the last one of a run lies within it, where transformers would train one more.
STEPS, EVERY = 10, 2
LAST = f"checkpoint-{STEPS}"
# Dropout draws from the random state that a checkpoint has to bring back, in each process.
FIELDS = {"adapter": {"r": 4, "dropout": 0.1}}
WAYS = [
    pytest.param("ddp", id="DDP"),
    pytest.param("zero-2", id="ZeRO-2", marks=needs_deepspeed),
    pytest.param("zero-3", id="ZeRO-3", marks=needs_deepspeed),
]


@dataclass(frozen=True)
class Run:
    """A folder to train in, and the way in which its processes share the work.

    Attributes:
        folder: of the recipe; the output is in ``sft`` below it.
        way: "ddp", "zero-2" or "zero-3".
        base: the base model.
    """

    folder: Path
    way: str
    base: Path

    @property
    def output(self) -> Path:
        return self.folder / "sft"

    def command(self, *more: str, processes: int = PROCESSES) -> list[str]:
        """Return an ``accelerate launch`` command, after writing the recipe."""
        stage = self.way.removeprefix("zero-")
        file, flags = self.recipe(), ["--multi_gpu"]
        if stage.isdigit():
            flags = zero(self.folder, int(stage))
        flags += [*(flag for flag in ALIKE if "num_processes" not in flag), f"--num_processes={processes}"]
        launch = [sys.executable, "-m", "accelerate.commands.launch", *flags]
        return [*launch, "--module", "graftkit.cli.main", "train", str(file), "--json", *more]

    def recipe(self, **args: Any) -> Path:
        how = {"use_cpu": True} if self.way == "ddp" else GLOO
        given = {"max_steps": STEPS, "save_steps": EVERY, **how, **args}
        return recipe(self.folder, self.base, args=given, **{name: dict(of) for name, of in FIELDS.items()})

    def train(self, *more: str, processes: int = PROCESSES) -> subprocess.CompletedProcess[str]:
        return ran(self.command(*more, processes=processes), self.folder, {})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), words())


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Return the uninterrupted run, made once for each way."""
    made: dict[str, Run] = {}

    def of(way: str) -> Run:
        if way not in made:
            run = Run(tmp_path_factory.mktemp(way), way, base)
            done = run.train()
            assert done.returncode == 0, done.stderr
            made[way] = run
        return made[way]

    return of


def as_left_by(run: Run, folder: Path, way: str) -> Run:
    """Copy what a run left, to resume it in some way."""
    shutil.copytree(run.output, folder / "sft")
    return Run(folder, way, run.base)


def kill(process: subprocess.Popen[str]) -> None:
    """As a power cut does: the launcher and all that it started, which are in process groups of their own."""
    launcher = psutil.Process(process.pid)
    for one in (launcher, *launcher.children(recursive=True)):
        one.kill()
    process.communicate()


def same_run(done: subprocess.CompletedProcess[str], expected: Run) -> None:
    """Check that curve, metrics and adapter are the same, in files that stock PEFT takes."""
    assert done.returncode == 0, done.stderr
    seen = output_of(done)
    assert seen["steps"] == STEPS
    assert not seen["interrupted"]
    assert losses(seen["history"]) == pytest.approx(losses(history(expected)), rel=1e-5)
    folder = Path(seen["folder"])
    again, before = (load_file(place / "adapter_model.safetensors") for place in (folder, expected.output))
    assert again.keys() == before.keys()
    assert all(torch.allclose(again[name], before[name], rtol=1e-4, atol=1e-6) for name in before)
    stock = loads_in_stock_peft(expected.base, folder)
    assert stock.faithful


def history(run: Run) -> list[dict[str, Any]]:
    state = json.loads((run.output / LAST / "trainer_state.json").read_text(encoding="utf-8"))
    return list(state["log_history"])


def losses(entries: list[dict[str, Any]]) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


@pytest.mark.parametrize("way", WAYS)
def test_after_a_kill_the_curve_is_that_of_an_uninterrupted_run(
    tmp_path: Path, base: Path, whole: Callable[[str], Run], way: str
) -> None:
    run = Run(tmp_path, way, base)
    process = subprocess.Popen(
        run.command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=run.folder
    )
    # The moment this checkpoint's folder appears, it is being written.
    wait_for(run.output / "checkpoint-6", process)
    kill(process)
    assert not (run.output / LAST).exists()
    same_run(run.train("--resume"), whole(way))


def test_processes_end_after_their_launcher_is_killed(tmp_path: Path, base: Path) -> None:
    run = Run(tmp_path, "ddp", base)
    endless = [f"--set=args.{change}" for change in ("max_steps=100_000", "save_steps=5", "save_total_limit=2")]
    with (tmp_path / "output").open("w") as out:
        process = subprocess.Popen(run.command(*endless), stdout=out, stderr=out, text=True, cwd=tmp_path)
    wait_for(run.output / "checkpoint-5", process)
    left = psutil.Process(process.pid).children(recursive=True)
    assert len(left) == PROCESSES
    process.kill()
    process.wait()
    try:
        until(lambda: all(has_ended(one) for one in left))
    finally:
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    assert "interrupted" in (run.output / "report.html").read_text(encoding="utf-8")
    saved = last_complete_checkpoint(run.output)
    assert saved is not None
    done = run.train("--resume", f"--set=args.max_steps={int(saved.name.removeprefix('checkpoint-')) + 2}")
    assert done.returncode == 0, done.stderr


def has_ended(process: psutil.Process) -> bool:
    """Check whether a process has ended; the child of a parent that is gone may stay as a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def damaged(run: Run, harm: Mapping[str, str]) -> None:
    """Return the last checkpoint, after each named file was lost or cut."""
    for name, what in harm.items():
        file = run.output / LAST / name.format(STEPS)
        content = file.read_bytes()
        file.unlink()
        if what == "cut":
            file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("way", "harm"),
    [
        pytest.param("ddp", {"rng_state_1.pth": "lost"}, id="DDP, a random state not yet written"),
        pytest.param("ddp", {"optimizer.pt": "cut"}, id="DDP, half of the optimizer"),
        pytest.param(
            "zero-2",
            {"global_step{}/zero_pp_rank_1_mp_rank_00_optim_states.pt": "cut"},
            id="ZeRO-2, half of a part of the optimizer",
            marks=needs_deepspeed,
        ),
        pytest.param(
            "zero-3",
            {"global_step{}/zero_pp_rank_1_mp_rank_00_model_states.pt": "lost"},
            id="ZeRO-3, a part of the model lost",
            marks=needs_deepspeed,
        ),
    ],
)
def test_a_half_written_checkpoint_is_skipped(
    tmp_path: Path, whole: Callable[[str], Run], way: str, harm: Mapping[str, str]
) -> None:
    run = as_left_by(whole(way), tmp_path, way)
    damaged(run, harm)
    same_run(run.train("--resume"), whole(way))


@pytest.mark.parametrize("way", WAYS)
def test_a_finished_run_has_nothing_left_to_train(tmp_path: Path, whole: Callable[[str], Run], way: str) -> None:
    run = as_left_by(whole(way), tmp_path, way)
    (run.output / "adapter_model.safetensors").unlink()  # cut after the last checkpoint, before the end
    done = run.train("--resume")
    same_run(done, whole(way))
    assert output_of(done)["metrics"]["eval_loss"] > 0
    again, before = (load_file(of.output / "adapter_model.safetensors") for of in (run, whole(way)))
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert not (run.output / f"checkpoint-{STEPS + 1}").exists()


@needs_deepspeed
@pytest.mark.parametrize(
    ("before", "after", "processes", "named"),
    [
        pytest.param("ddp", "zero-3", 2, Sharding.NONE, id="DDP to ZeRO-3"),
        pytest.param("zero-2", "ddp", 2, Sharding.ZERO_2, id="ZeRO-2 to DDP"),
        pytest.param("zero-3", "zero-2", 2, Sharding.ZERO_3, id="ZeRO-3 to ZeRO-2"),
        pytest.param("zero-2", "zero-2", 1, "DeepSpeed", id="ZeRO-2 in one process"),
        pytest.param("zero-3", "zero-3", 1, "DeepSpeed", id="ZeRO-3 in one process"),
    ],
)
def test_what_cannot_be_read_that_way_is_refused(
    tmp_path: Path, whole: Callable[[str], Run], before: str, after: str, processes: int, named: str
) -> None:
    run = as_left_by(whole(before), tmp_path, after)
    shutil.rmtree(run.output / LAST)
    page = (run.output / "report.html").read_bytes()
    done = run.train("--resume", processes=processes)
    assert done.returncode != 0
    error = output_of(done)["error"]
    assert error["code"] == "cannot-resume"
    assert named in error["why"]
    assert (run.output / "report.html").read_bytes() == page
    assert not (run.output / LAST).exists()


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_ctrl_c_under_zero_saves_and_the_run_goes_on(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    run = Run(tmp_path, f"zero-{stage}", base)
    endless = {"max_steps": 100_000, "save_steps": 5, "save_total_limit": 2, "lr_scheduler_type": "constant"}
    file = run.recipe(**endless)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    accelerate_uses(zero(tmp_path, stage)[-1].partition("=")[2], tmp_path / "accelerate" / "default_config.yaml")
    process = started("train", str(file), "--launch", str(PROCESSES), "--json", cwd=tmp_path)
    wait_for(run.output / "checkpoint-5", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    seen = json.loads(out[out.index("{\n") :])
    assert seen["interrupted"]
    done = seen["steps"]
    saved = last_complete_checkpoint(run.output)
    assert saved == run.output / f"checkpoint-{done}"
    assert read_info(saved).sharding.value.endswith(f"ZeRO-{stage}")
    graft = [sys.executable, "-m", "graftkit.cli.main", "train", str(file), "--resume", "--json"]
    again = ran([*graft, f"--set=args.max_steps={done + 3}", "--launch", str(PROCESSES)], tmp_path, {})
    assert again.returncode == 0, again.stderr
    assert [*losses(output_of(again)["history"])] == [*range(1, done + 4)]


def accelerate_uses(zero_config: str, file: Path) -> None:
    """accelerate's default configuration, as ``accelerate config`` writes it; JSON is YAML."""
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"deepspeed_config_file": zero_config, "zero3_init_flag": False},
        "num_machines": 1,
        "num_processes": PROCESSES,
        "machine_rank": 0,
        "use_cpu": False,
    }
    file.parent.mkdir()
    file.write_text(json.dumps(settings), encoding="utf-8")
