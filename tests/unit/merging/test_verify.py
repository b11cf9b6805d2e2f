"""The verification finds results that are wrong, each for its own reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from graftkit.errors import MergeError, SourceError
from graftkit.merging import verify as verification
from graftkit.merging.merge import verify_merge
from graftkit.surveying.checkpoint.headers import INDEX

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.merging.conftest import Bench

TOUCHED = "model.layers.0.self_attn.q_proj.weight"
UNTOUCHED = "model.layers.0.self_attn.k_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def made(bench: Callable[..., Bench]) -> Bench:
    return bench("llama", shard="100KB")


@pytest.fixture
def adapter(made: Bench) -> Path:
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return made.adapter(config)


def file_of(folder: Path, name: str) -> Path:
    return next(p for p in sorted(folder.glob("*.safetensors")) if name in load_file(p))


def rewrite(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = file_of(folder, name)
    tensors = load_file(path)
    save_file({**tensors, name: change(tensors[name])}, path, {"format": "pt"})


def _one_bit(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.clone().flatten()
    flat.view(torch.int16)[-1] ^= 1
    return flat.view(tensor.shape)


def _second_nearest(tensor: torch.Tensor) -> torch.Tensor:
    up = tensor.clone()
    up.view(torch.int16).flatten()[::3] += 1
    return up


def test_a_good_merge_passes(made: Bench, adapter: Path) -> None:
    report = made.merge(adapter)
    evidence = verify_merge(made.base, adapter, made.out)
    assert evidence.ok
    assert evidence == report.evidence
    untouched = [t for n, t in made.stored(made.base).items() if "q_proj" not in n and "up_proj" not in n]
    assert evidence.unchanged_bytes == sum(t.numel() * t.element_size() for t in untouched)
    assert evidence.moved > 0.9 * evidence.elements


def test_a_bit_of_a_tensor_that_nobody_touched_is_found(made: Bench, adapter: Path) -> None:
    made.merge(adapter)
    rewrite(made.out, UNTOUCHED, _one_bit)
    evidence = verify_merge(made.base, adapter, made.out)
    assert [problem.partition(":")[0] for problem in evidence.problems] == [file_of(made.out, UNTOUCHED).name]
    assert evidence.problems[0] in str(evidence)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda base, merged: merged.roll(1, 0), id="rows in another order"),
        pytest.param(lambda base, merged: merged * torch.nan, id="not finite"),
        pytest.param(lambda base, merged: merged + (merged - base), id="the update twice"),
    ],
)
def test_a_wrong_value_is_found(
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], made: Bench, adapter: Path
) -> None:
    made.merge(adapter)
    base = made.stored(made.base)[TOUCHED]
    rewrite(made.out, TOUCHED, lambda merged: change(base, merged))
    evidence = verify_merge(made.base, adapter, made.out)
    assert {problem.partition(":")[0] for problem in evidence.problems} >= {TOUCHED}
    assert evidence.problems[0] in str(evidence)


def test_the_second_nearest_value_too_often_is_found(made: Bench, adapter: Path) -> None:
    made.merge(adapter)
    assert verify_merge(made.base, adapter, made.out).misrounded == 0
    rewrite(made.out, TOUCHED, _second_nearest)
    evidence = verify_merge(made.base, adapter, made.out)
    assert evidence.misrounded > 0
    assert len(evidence.problems) == 1
    assert f"{evidence.misrounded} of {evidence.elements}" in evidence.problems[0]


def test_the_base_is_not_a_merge(made: Bench, adapter: Path) -> None:
    assert not verify_merge(made.base, adapter, made.base).ok


def test_another_weight_is_another_merge(made: Bench, adapter: Path) -> None:
    made.merge(adapter, weights=[0.5])
    assert verify_merge(made.base, {adapter: 0.5}, made.out).ok
    assert not verify_merge(made.base, {adapter: 1.0}, made.out).ok


def _no_file(out: Path) -> str:
    path = max(out.glob("*.safetensors"))
    path.unlink()
    return path.name


def _one_more(out: Path) -> str:
    save_file({"x": torch.ones(1)}, out / "model-extra.safetensors")
    return "model-extra.safetensors"


def _other_names(out: Path) -> str:
    path = min(out.glob("*.safetensors"))
    tensors: Any = load_file(path)
    save_file({f"new.{name}": t for name, t in tensors.items()}, path, {"format": "pt"})
    return path.name


def _other_index(out: Path) -> str:
    path = out / INDEX
    path.write_text(json.dumps({**json.loads(path.read_text()), "metadata": {"total_size": 1}}))
    return INDEX


def _broken_index(out: Path) -> str:
    (out / INDEX).write_text("{")
    return INDEX


def _no_index(out: Path) -> str:
    (out / INDEX).unlink()
    return INDEX


def _no_header(out: Path) -> str:
    path = max(out.glob("*.safetensors"))
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"#" * 20)
    return path.name


def _cut(out: Path) -> str:
    path = max(out.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])
    return path.name


@pytest.mark.parametrize(
    "spoil",
    [_no_file, _one_more, _other_names, _other_index, _broken_index, _no_index, _no_header, _cut],
    ids=lambda f: f.__name__,
)
def test_wrong_files_are_found(spoil: Callable[[Path], str], made: Bench, adapter: Path) -> None:
    made.merge(adapter)
    spoiled = spoil(made.out)
    evidence = verify_merge(made.base, adapter, made.out)
    assert [re.split("[: ]", problem)[0] for problem in evidence.problems] == [spoiled]


def test_a_merge_that_fails_is_not_published(made: Bench, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the arithmetic were wrong: the verification computes something else."""
    true = verification.exact_rows

    def other(terms: Any, base: torch.Tensor, first: int) -> torch.Tensor:
        return true(terms, base, first) * 1.5

    monkeypatch.setattr(verification, "exact_rows", other)
    with pytest.raises(MergeError) as caught:
        made.merge(adapter)
    assert caught.value.code == "merge-not-verified"
    assert sorted(p.name for p in made.folder.iterdir()) == ["adapter", "base"]


def test_a_wrong_file_never_counts_as_finished(
    made: Bench, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed after a failed verification must not be resumed."""
    from graftkit.merging.io.staging import StagingDir

    finished: list[str] = []
    true = StagingDir.finish

    def finish(staging: StagingDir, name: str) -> None:
        finished.append(name)
        true(staging, name)

    monkeypatch.setattr(StagingDir, "finish", finish)
    monkeypatch.setattr(verification, "exact_rows", lambda terms, base, first: base.double() + 1)
    with pytest.raises(MergeError):
        made.merge(adapter)
    files = sorted(made.base.glob("*.safetensors"))
    changed = [p.name for p in files if any("q_proj" in n or "up_proj" in n for n in load_file(p))]
    assert changed
    assert not set(changed) & set(finished)


def test_the_report_is_left_beside_the_weights(made: Bench, adapter: Path) -> None:
    report = made.merge(adapter)
    fields = json.loads((made.out / "merge_report.json").read_text())
    assert fields == json.loads(json.dumps(report.to_dict()))
    assert fields["verification"]["problems"] == []
    assert fields["adapters"] == [{"path": str(adapter), "weight": 1.0}]
    assert fields["changed"] == 4
    assert fields["bytes"] == sum(p.stat().st_size for p in made.base.glob("*.safetensors"))


def test_a_report_that_cannot_be_read(made: Bench, adapter: Path) -> None:
    made.merge(adapter)
    (made.out / "merge_report.json").write_text("[")
    with pytest.raises(SourceError) as caught:
        verify_merge(made.base, adapter, made.out)
    assert caught.value.code == "merge-report"
    assert "tied=" in str(caught.value.help)
    assert verify_merge(made.base, adapter, made.out, tied="share").ok


def test_verification_can_be_skipped(made: Bench, adapter: Path) -> None:
    assert made.merge(adapter, verify=False).evidence is None
    assert verify_merge(made.base, adapter, made.out).ok


def test_progress_reaches_the_end(made: Bench, adapter: Path) -> None:
    reports: list[Any] = []
    made.merge(adapter, on_progress=reports.append)
    assert reports[-1].done == reports[-1].total == sum(p.stat().st_size for p in made.base.glob("*.safetensors"))
    assert [r.done for r in reports] == sorted(r.done for r in reports)
    assert {r.step for r in reports} <= {p.name for p in made.base.iterdir()}
