"""The guard where several processes train one model: what is in parts, and who hears of an error."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import graftkit as gk
from graftkit.errors import GraftError, TrainingError
from graftkit.modeling.sharding import is_sharded
from graftkit.training.distributed.collectives import found_by_first, summed
from graftkit.training.guard.preflight import runs_alone
from graftkit.training.guard.saved_check import read_back
from graftkit.training.guard.step_monitor import Course

PROCESSES = 2


def test_alone_a_process_hears_itself() -> None:
    error = TrainingError("bad", code="guard")
    assert found_by_first(lambda: error) is error
    assert found_by_first(lambda: None) is None
    assert summed(torch.ones(2)).tolist() == [1, 1]


def test_two_processes(tmp_path: Path) -> None:
    """One start for all that takes two processes: starting them is what takes the time."""
    mp.spawn(_process, args=(str(tmp_path),), nprocs=PROCESSES)  # type: ignore[no-untyped-call]
    told = {file.name: file.read_text() for file in tmp_path.glob("*.txt")}
    assert told == {f"{rank}.txt": "ok" for rank in range(PROCESSES)}


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    try:
        _all_hear_what_the_first_finds(rank)
        _parts_are_seen_as_the_whole(rank, Path(folder))
        told = "ok"
    except BaseException:
        told = traceback.format_exc()
    Path(folder, f"{rank}.txt").write_text(told)
    dist.barrier()
    dist.destroy_process_group()


def _all_hear_what_the_first_finds(rank: int) -> None:
    def look() -> GraftError | None:
        assert rank == 0
        return TrainingError("bad", where="step 3", code="not-finite")

    heard = found_by_first(look)
    assert heard is not None
    assert (heard.code, heard.where) == ("not-finite", "step 3")

    def broken() -> GraftError | None:
        raise ValueError("no number")

    stopped = found_by_first(broken)
    assert stopped is not None
    assert "ValueError: no number" in str(stopped.why)


def _parts_are_seen_as_the_whole(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole, parted = _adapted(), _adapted()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in parted.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(parted, mesh=mesh)
    assert (is_sharded(whole), is_sharded(parted)) == (False, True)
    assert (runs_alone(whole), runs_alone(parted)) == (True, False)
    expected, seen = _course(whole, rank, average=True), _course(parted, rank, average=False)
    for one, other in zip(expected.points, seen.points, strict=True):
        assert other.gradient == pytest.approx(one.gradient, rel=1e-5)
        assert other.update == pytest.approx(one.update, rel=1e-5)
    assert seen.watch.lives.untrained == ()
    full = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in parted.state_dict().items()}
    if rank == 0:
        _saved_parts(parted, full, folder)


def _adapted() -> Any:
    torch.manual_seed(0)
    model = gk.twin("qwen3")
    return gk.attach(model, gk.plan(model, targets="attention", r=3))


def _course(model: Any, rank: int, *, average: bool) -> Course:
    """Four steps on this process's own data; ``average`` does by hand what FSDP does of itself."""
    ids = torch.arange(12)[None] + 4 * rank
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    course = Course(model)
    for step in range(1, 5):
        course.begin()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        if average:
            for parameter in trained:
                dist.all_reduce(parameter.grad)
                parameter.grad /= PROCESSES
        assert course.gradients() == ()
        optimizer.step()
        assert course.end(step, learns=True) == ()
    return course


def _saved_parts(model: Any, full: dict[str, torch.Tensor], folder: Path) -> None:
    model.save_pretrained(folder / "good", state_dict=full)
    good = {finding.code: finding for finding in read_back(folder / "good", model)}
    assert not [finding for finding in good.values() if finding.severity == "error"]
    assert good["GK403"].evidence["compared"] == "names and shapes"
    model.save_pretrained(folder / "bad", state_dict={name: t.new_empty(0) for name, t in full.items()})
    bad = {finding.code: finding.severity for finding in read_back(folder / "bad", model)}
    assert (bad["GK401"], bad["GK403"]) == ("error", "error")
    (folder / "shards" / "pytorch_model_fsdp_0").mkdir(parents=True)
    assert {finding.severity for finding in read_back(folder / "shards", model)} == {"unknown"}
