"""Runs: what is known is not tried again; a process that dies or hangs, or an interrupt, loses nothing."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.matrix.cells import cell

from graftkit.matrix.cell import Check, Verdict
from graftkit.matrix.processes.worker import Task
from graftkit.matrix.run import Trust, estimate, remaining, run
from graftkit.matrix.store import Store
from graftkit.matrix.trials.origin import made_from, versions
from graftkit.progress import Progress


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "matrix.jsonl")


def test_only_what_the_same_versions_and_code_have_not_tried_remains(store: Store) -> None:
    current = cell("llama", Check.TWIN, versions=versions(), made_from=made_from("llama"))
    store.add([current, replace(current, check=Check.PLAN, made_from="of other code")])
    store.add([replace(current, model_type="bert", versions={**versions(), "peft": "0.1"})])
    checks = [Check.TWIN, Check.PLAN]
    left = remaining(store, ["bert", "llama"], ["lora"], checks)
    assert left == (Task("bert", (("lora", tuple(checks)),)), Task("llama", (("lora", (Check.PLAN,)),)))
    assert remaining(store, ["llama"], ["lora"], [Check.TWIN]) == ()
    assert remaining(store, ["llama"], ["lora"], [Check.TWIN], trust=Trust.NONE) != ()
    assert remaining(store, ["bert", "llama"], ["lora"], [Check.TWIN], trust=Trust.ALL) == ()
    assert remaining(store, ["llama"], ["lora"], [Check.TWIN], seed=1) != ()


def test_what_a_family_is_made_from_depends_on_its_file_and_on_no_other() -> None:
    assert made_from("align_text_model") == made_from(
        "clap_text_model"
    )  # neither a family's file nor a known twin
    assert len({made_from(model_type) for model_type in ("align_text_model", "llama", "opt", "gemma4")}) == 4


def test_the_time_is_estimated_from_earlier_cells_and_shared_by_the_processes(store: Store) -> None:
    store.add([cell("llama", Check.TWIN, seconds=100.0), cell("llama", Check.PLAN, seconds=1000.0)])
    task = Task("llama", (("lora", tuple(Check)),))
    once = estimate(store, [task], 1)
    assert 1100 <= once < 1200
    assert estimate(store, [task, replace(task, model_type="new")], 2) == pytest.approx(once, abs=20)
    assert estimate(store, [], 2) == 0.0


def test_a_process_that_dies_fails_what_it_was_at_and_the_run_goes_on(store: Store) -> None:
    """Kill the process when its first method has come back: it is then at the second one."""
    killed: list[object] = []

    def kill(progress: Progress) -> None:
        if progress.done and not killed:
            killed.extend(multiprocessing.active_children())
            for child in multiprocessing.active_children():
                child.kill()

    checks = (Check.PLAN, Check.ATTACH)
    llama = Task("llama", tuple((method, checks) for method in ("lora", "dora", "rslora")))
    run(store, [llama, Task("vit", (("lora", checks),))], on_progress=kill)
    found = {(c.model_type, c.method): (c.verdict, c.codes) for c in Store(store.path).cells}
    assert found.keys() == {("llama", "lora"), ("llama", "dora"), ("llama", "rslora"), ("vit", "lora")}
    assert found["llama", "lora"] == found["vit", "lora"] == (Verdict.PROVEN, ())
    lost = [c for c in store.cells if c.codes == ("process-died",)]
    assert lost  # of dora, or of rslora where the process was faster than the signal
    assert {(c.model_class, c.verdict) for c in lost} == {("LlamaForCausalLM", Verdict.FAILED)}
    assert multiprocessing.active_children() == []


def test_a_process_that_hangs_is_ended_after_the_limit(store: Store) -> None:
    checks = (Check.TWIN, Check.PLAN)
    run(store, [Task("llama", (("lora", checks), ("dora", checks)))], time_limit=0.01)
    assert {(c.method, c.verdict, c.codes) for c in store.cells} == {
        (method, Verdict.UNKNOWN, ("time-limit",)) for method in ("lora", "dora")
    }


def test_an_interrupt_keeps_what_was_made_and_leaves_no_process(store: Store) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done:
            raise KeyboardInterrupt

    task = Task("llama", (("lora", (Check.PLAN,)), ("dora", (Check.PLAN,))))
    with pytest.raises(KeyboardInterrupt):
        run(store, [task], on_progress=interrupt)
    assert [c.method for c in Store(store.path).cells] == ["lora"]
    assert multiprocessing.active_children() == []
    assert remaining(store, ["llama"], ["lora", "dora"], [Check.PLAN]) == (
        Task("llama", (("dora", (Check.PLAN,)),)),
    )
