"""The guard where several processes train one model: sharded parameters, and errors on every process."""

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
from graftkit.training.distributed.collectives import check_on_first_process, sum_over_processes
from graftkit.training.guard.preflight import can_run_alone
from graftkit.training.guard.saved_check import check_checkpoint
from graftkit.training.guard.step_monitor import StepMonitor

PROCESSES = 2


def test_a_single_process_raises_its_own_errors() -> None:
    error = TrainingError("bad", code="guard")
    with pytest.raises(TrainingError) as caught:
        check_on_first_process(lambda: error)
    assert caught.value is error
    check_on_first_process(lambda: None)
    assert sum_over_processes(torch.ones(2)).tolist() == [1, 1]


def test_two_processes(tmp_path: Path) -> None:
    """One start for all that takes two processes: starting them is what takes the time."""
    mp.spawn(_process, args=(str(tmp_path),), nprocs=PROCESSES)  # type: ignore[no-untyped-call]
    outcomes = {file.name: file.read_text() for file in tmp_path.glob("*.txt")}
    assert outcomes == {f"{rank}.txt": "ok" for rank in range(PROCESSES)}


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    try:
        _the_first_process_stops_all(rank)
        _shards_are_measured_as_the_whole(rank, Path(folder))
        outcome = "ok"
    except BaseException:
        outcome = traceback.format_exc()
    Path(folder, f"{rank}.txt").write_text(outcome)
    dist.barrier()
    dist.destroy_process_group()


def _the_first_process_stops_all(rank: int) -> None:
    def check() -> GraftError | None:
        assert rank == 0
        return TrainingError("bad", where="step 3", code="not-finite")

    with pytest.raises(TrainingError) as caught:
        check_on_first_process(check)
    assert (caught.value.code, caught.value.where) == ("not-finite", "step 3")

    def broken() -> GraftError | None:
        raise ValueError("no number")

    with pytest.raises(TrainingError) as stopped:
        check_on_first_process(broken)
    assert stopped.value.code == "guard"
    assert "ValueError: no number" in str(stopped.value.why)


def _shards_are_measured_as_the_whole(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole, sharded = _adapted(), _adapted()
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in sharded.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert (is_sharded(whole), is_sharded(sharded)) == (False, True)
    assert (can_run_alone(whole), can_run_alone(sharded)) == (True, False)
    expected, seen = _monitored(whole, rank, average=True), _monitored(sharded, rank, average=False)
    for one, other in zip(expected.steps, seen.steps, strict=True):
        assert other.gradient == pytest.approx(one.gradient, rel=1e-5)
        assert other.update == pytest.approx(one.update, rel=1e-5)
    assert seen.activity.untrained == ()
    full = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in sharded.state_dict().items()}
    if rank == 0:
        _saved_shards(sharded, full, folder)


def _adapted() -> Any:
    torch.manual_seed(0)
    model = gk.twin("qwen3")
    return gk.attach(model, gk.plan(model, targets="attention", r=3))


def _monitored(model: Any, rank: int, *, average: bool) -> StepMonitor:
    """Four steps on this process's own data; ``average`` does by hand what FSDP does by itself."""
    ids = torch.arange(12)[None] + 4 * rank
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    monitor = StepMonitor(model)
    for step in range(1, 5):
        monitor.begin()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        if average:
            for parameter in trained:
                dist.all_reduce(parameter.grad)
                parameter.grad /= PROCESSES
        assert monitor.gradients() == ()
        optimizer.step()
        assert monitor.end(step, learns=True) == ()
    return monitor


def _saved_shards(model: Any, full: dict[str, torch.Tensor], folder: Path) -> None:
    model.save_pretrained(folder / "good", state_dict=full)
    good = {finding.code: finding for finding in check_checkpoint(folder / "good", model)}
    assert not [finding for finding in good.values() if finding.severity == "error"]
    assert good["GK403"].evidence["compared"] == "names and shapes"
    model.save_pretrained(folder / "bad", state_dict={name: t.new_empty(0) for name, t in full.items()})
    bad = {finding.code: finding.severity for finding in check_checkpoint(folder / "bad", model)}
    assert (bad["GK401"], bad["GK403"]) == ("error", "error")
    (folder / "shards" / "pytorch_model_fsdp_0").mkdir(parents=True)
    assert {finding.severity for finding in check_checkpoint(folder / "shards", model)} == {"unknown"}
