"""Kills, full disks, broken disks: the output is absent or complete, the base unchanged, the next run resumes."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from graftkit.errors import GraftError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.merging.conftest import Bench

KILLS = 60
# Bytes of a file: more than any of the base's, and less than its last.
LIMIT = 200_000
REPORT = "merge_report.json"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which names its duration."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != REPORT}


def left_in(made: Bench) -> list[str]:
    return sorted(p.name for p in made.folder.iterdir())


@pytest.fixture
def made(bench: Callable[..., Bench]) -> Bench:
    made = bench("llama", shard="60KB")
    assert len(list(made.base.glob("*.safetensors"))) > 4
    (made.base / "tokenizer.json").write_text("{}")
    _enlarge_the_last_file(made.base)
    return made


def _enlarge_the_last_file(base: Path) -> None:
    """A tensor that the class does not know, so that a limit on sizes stops the last file alone."""
    last = max(base.glob("*.safetensors"))
    save_file({**load_file(last), "extra": torch.zeros(2 * LIMIT)}, last, {"format": "pt"})
    index = base / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["extra"] = last.name
    index.write_text(json.dumps(fields))


@pytest.fixture
def adapter(made: Bench) -> Path:
    return made.adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


@pytest.fixture
def whole(made: Bench, adapter: Path) -> dict[str, bytes]:
    """What an undisturbed merge writes."""
    made.merge(adapter)
    found = contents(made.out)
    assert {"tokenizer.json", "config.json", "model.safetensors.index.json"} <= set(found)
    shutil.rmtree(made.out)
    return found


def in_a_child(work: Callable[[], Any], limit: int | None = None) -> int:
    """Start ``work`` in a child process; it exits with 0, or 1 after an error."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def test_kills_at_any_moment(made: Bench, adapter: Path, whole: dict[str, bytes]) -> None:
    before = contents(made.base)
    started = time.perf_counter()
    made.merge(adapter)
    usual = time.perf_counter() - started
    shutil.rmtree(made.out)
    chance = random.Random(0)
    landed = 0
    for _ in range(4 * KILLS):
        if landed == KILLS:
            break
        child = in_a_child(lambda: made.merge(adapter))
        time.sleep(chance.uniform(0, usual))
        os.kill(child, signal.SIGKILL)
        landed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if not made.out.exists() and chance.random() < 0.2:
            made.merge(adapter)
        if made.out.exists():
            assert contents(made.out) == whole
            shutil.rmtree(made.out)
    assert landed == KILLS
    assert contents(made.base) == before
    made.merge(adapter)
    assert contents(made.out) == whole
    assert left_in(made) == ["adapter", "base", "out"]


def test_a_kill_while_an_earlier_merge_is_replaced(made: Bench, adapter: Path, whole: dict[str, bytes]) -> None:
    """The old output stays, or the new one is there, or the next run brings the old one back."""
    made.merge(adapter)
    chance = random.Random(1)
    for _ in range(10):
        child = in_a_child(lambda: made.merge(adapter))
        time.sleep(chance.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not made.out.exists() or contents(made.out) == whole
    made.merge(adapter)
    assert contents(made.out) == whole


def test_a_full_disk_stops_it(made: Bench, adapter: Path, whole: dict[str, bytes]) -> None:
    child = in_a_child(lambda: made.merge(adapter), limit=LIMIT)
    assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 1
    assert not made.out.exists()
    report = made.merge(adapter)
    assert contents(made.out) == whole
    assert 0 < len(report.resumed) < len(list(made.base.glob("*.safetensors")))


@pytest.mark.parametrize("tokenizer", [0, 8 * 2**20], ids=["weights", "a large tokenizer"])
def test_the_need_for_space_is_known_before(
    tokenizer: int, made: Bench, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = sum(p.stat().st_size for p in made.base.glob("*.safetensors"))
    free = weights + 4 * 2**20 if tokenizer else weights - 1
    (made.base / "tokenizer.json").write_bytes(b" " * tokenizer)
    usage = shutil.disk_usage(made.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    with pytest.raises(GraftError) as caught:
        made.merge(adapter)
    assert caught.value.code == "output-no-space"
    assert left_in(made) == ["adapter", "base"]


@pytest.mark.parametrize(("call", "good"), [("pwrite", 3), ("fsync", 12)])
def test_a_disk_that_fails(
    call: str, good: int, made: Bench, adapter: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    true, left = getattr(os, call), [good]

    def fails(*given: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return true(*given)

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(GraftError) as caught:
        made.merge(adapter)
    assert caught.value.code == "output-not-writable"
    assert "Input/output error" in str(caught.value.why)
    assert not made.out.exists()
    monkeypatch.undo()
    made.merge(adapter)
    assert contents(made.out) == whole


def test_a_read_only_place(made: Bench, adapter: Path) -> None:
    place = made.folder / "shelf"
    place.mkdir()
    place.chmod(0o555)
    from graftkit.merging.merge import merge

    try:
        with pytest.raises(GraftError) as caught:
            merge(made.base, adapter, place / "out")
    finally:
        place.chmod(0o755)
    assert caught.value.code == "output-not-writable"
    assert not list(place.iterdir())


def test_a_read_only_output(made: Bench, adapter: Path) -> None:
    made.merge(adapter)
    before = contents(made.out)
    made.out.chmod(0o555)
    try:
        with pytest.raises(GraftError) as caught:
            made.merge(adapter, weights=[0.5])
    finally:
        made.out.chmod(0o755)
    assert caught.value.code == "output-not-writable"
    assert contents(made.out) == before


def test_an_interrupt_leaves_finished_files_for_the_next_run(
    made: Bench, adapter: Path, whole: dict[str, bytes]
) -> None:
    shards = len(list(made.base.glob("*.safetensors")))

    def stop(state: Any) -> None:
        if state.done > state.total * 0.7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.merge(adapter, on_progress=stop)
    assert not made.out.exists()
    report = made.merge(adapter)
    assert contents(made.out) == whole
    assert 0 < len(report.resumed) < shards


def test_another_merge_starts_over(made: Bench, adapter: Path, whole: dict[str, bytes]) -> None:
    """A merge with other weights, or of another adapter, cannot use what an interrupted run left."""
    os.waitpid(in_a_child(lambda: made.merge(adapter), limit=LIMIT), 0)
    assert len(list(made.folder.glob(".out.partial/files/*"))) > 2
    report = made.merge(adapter, weights=[0.5])
    assert report.resumed == ()
    assert contents(made.out) != whole


def test_two_merges_into_one_folder(made: Bench, adapter: Path) -> None:
    from graftkit.merging.io.staging import staging_dir

    with staging_dir(made.out) as staging, pytest.raises(GraftError) as caught:
        staging.start("of another")
        made.merge(adapter)
    assert caught.value.code == "merge-busy"
    assert left_in(made) == ["adapter", "base"], "a run without finished files leaves nothing"


def test_an_earlier_merge_is_replaced(made: Bench, adapter: Path, whole: dict[str, bytes]) -> None:
    made.merge(adapter, weights=[0.5])
    made.merge(adapter)
    assert contents(made.out) == whole
    assert not list(made.folder.glob(".*"))


# ---- what is left beside the output ----


def interrupted(made: Bench, adapter: Path) -> set[str]:
    """Let a run fail at its last file; returns the files that it has left."""
    os.waitpid(in_a_child(lambda: made.merge(adapter), limit=LIMIT), 0)
    found = {p.name for p in made.folder.glob(".out.partial/files/*")}
    assert len(found) > 2
    return found


def test_only_finished_files_are_kept_for_the_next_run(made: Bench, adapter: Path) -> None:
    weights = {p.name for p in made.base.glob("*.safetensors")}
    assert interrupted(made, adapter) == weights - {max(weights)}
    assert {p.name for p in made.folder.glob(".out.partial/*")} == {"files", "ledger.json", "lock"}


def test_a_failure_before_any_file_is_finished_leaves_nothing(
    made: Bench, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fails)
    with pytest.raises(GraftError) as caught:
        made.merge(adapter)
    assert caught.value.code == "output-not-writable"
    assert left_in(made) == ["adapter", "base"]


def test_a_refusal_on_the_way_leaves_nothing(made: Bench, adapter: Path) -> None:
    """The same merge would be refused again: files finished by then are useless."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[max(tensors)][0, 0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(GraftError) as caught:
        made.merge(adapter)
    assert caught.value.code == "merge-not-finite"
    assert left_in(made) == ["adapter", "base"]


def test_a_refusal_before_the_start_leaves_what_an_earlier_run_can_use(
    made: Bench, adapter: Path, whole: dict[str, bytes]
) -> None:
    waiting = interrupted(made, adapter)
    with pytest.raises(GraftError) as caught:
        made.merge(adapter, tied="maybe")
    assert caught.value.code == "merge-tied-choice"
    report = made.merge(adapter)
    assert set(report.resumed) == waiting
    assert contents(made.out) == whole


def test_what_another_merge_left_is_removed(made: Bench, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(made, adapter)
    usage = shutil.disk_usage(made.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(GraftError) as caught:
        made.merge(adapter, weights=[0.5])
    assert caught.value.code == "output-no-space"
    assert left_in(made) == ["adapter", "base"]


def test_what_a_kill_left_of_the_small_files_is_removed(made: Bench, adapter: Path) -> None:
    interrupted(made, adapter)
    for name in (".ledger.json.a1b2", "files/.config.json.a1b2", "files/config.json"):
        (made.folder / ".out.partial" / name).write_text("{")
    made.merge(adapter)
    assert left_in(made) == ["adapter", "base", "out"]


def test_the_folder_of_the_next_run_is_left_alone(made: Bench) -> None:
    """One run has published, and another has begun in a folder of the same name, before the first has returned."""
    from graftkit.merging.io.staging import staging_dir

    with staging_dir(made.out) as staging:
        staging.remove()
        staging.files.mkdir(parents=True)
        (staging.root / "lock").touch()
    assert staging.files.is_dir()


def test_a_run_that_ends_while_another_starts(made: Bench, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock was removed with its folder: the next run would get another file of the same name."""
    import fcntl

    true = fcntl.flock

    def late(*given: Any) -> None:
        true(*given)
        shutil.rmtree(made.folder / ".out.partial")

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(GraftError) as caught:
        made.merge(adapter)
    assert caught.value.code == "merge-busy"
    assert left_in(made) == ["adapter", "base"]
