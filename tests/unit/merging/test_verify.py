"""The verification finds results that are wrong, each for its own reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from graftkit.errors import MergeError, SourceError
from graftkit.merging import verify as verification
from graftkit.merging.io.shard_layout import layout_of
from graftkit.merging.merge import plan_merge, verify_merge
from graftkit.merging.verify import Evidence, verify_shard
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
    return made.adapter(config, spread=0.01)


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


def _other_sign(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.clone().flatten()
    flat[1] *= -1
    return flat.view(tensor.shape)


def _without_a_row(base: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
    merged = merged.clone()
    merged[5] = base[5]
    return merged


def _exchanged(merged: torch.Tensor) -> torch.Tensor:
    merged = merged.clone()
    merged[:8], merged[8:16] = merged[8:16].clone(), merged[:8].clone()
    return merged


def sample_of(made: Bench, adapters: Path | dict[Path, float]) -> Evidence:
    """Verify as a merge does before it publishes."""
    plan = plan_merge(made.base, adapters)
    with ThreadPoolExecutor(1) as pool:
        shards = plan.base.weights.shards
        every = [verify_shard(plan, layout_of(plan, s), made.out / s.name, pool) for s in shards]
    return sum(every, Evidence())


def test_a_good_merge_passes(made: Bench, adapter: Path) -> None:
    report = made.merge(adapter)
    evidence = verify_merge(made.base, adapter, made.out)
    assert evidence.ok
    assert evidence.misrounded == report.evidence.misrounded == 0
    touched = [t for n, t in made.stored(made.base).items() if "q_proj" in n or "up_proj" in n]
    assert evidence.elements == sum(t.numel() for t in touched) > report.evidence.elements > 0
    untouched = [t for n, t in made.stored(made.base).items() if "q_proj" not in n and "up_proj" not in n]
    assert (
        evidence.unchanged_bytes
        == report.evidence.unchanged_bytes
        == sum(t.numel() * t.element_size() for t in untouched)
    )
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
        pytest.param(lambda base, merged: _exchanged(merged), id="two blocks of rows exchanged"),
        pytest.param(_without_a_row, id="a row left out"),
        pytest.param(lambda base, merged: _one_bit(merged), id="the last bit of one element"),
        pytest.param(lambda base, merged: _other_sign(merged), id="the sign of one element"),
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight", [0.0, 0.99, 1.01])
def test_a_wrong_factor_is_found_in_a_sample(
    weight: float, dtype: torch.dtype, bench: Callable[..., Bench]
) -> None:
    """Whatever the dtype: a missing update, and one that is 1 % off."""
    made = bench("llama", dtype=dtype)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    one, two = made.adapter(config, "one"), made.adapter(config, "two", spread=0.1)
    made.merge(one, two, weights=[1.0, weight])
    assert not sample_of(made, {one: 1.0, two: weight}).problems
    changed = {n for n in made.stored(made.base) if "q_proj" in n or "up_proj" in n}
    assert {p.partition(":")[0] for p in sample_of(made, {one: 1.0, two: 1.0}).problems} == changed


def test_an_exchange_of_two_experts_is_found_in_a_sample(bench: Callable[..., Bench]) -> None:
    """One tensor with many experts: the sample has a row of each."""
    made = bench("gpt_oss")
    adapter = made.adapter(LoraConfig(r=4, target_parameters=["mlp.experts.down_proj"], init_lora_weights=False))
    made.merge(adapter)
    assert not sample_of(made, adapter).problems
    name = "model.layers.0.mlp.experts.down_proj"
    rewrite(made.out, name, lambda merged: torch.cat([merged[1:2], merged[:1], merged[2:]]))
    assert [p.partition(":")[0] for p in sample_of(made, adapter).problems] == [name]


def _cancelled(made: Bench, adapter: Path) -> tuple[torch.Tensor, list[int]]:
    """Make base and update cancel almost wholly in three elements, and merge.

    Returns:
        The merged weight as others compute it, in float32: a good merge too; and where those elements are.
    """
    tensors = load_file(adapter / "adapter_model.safetensors")
    stem = f"base_model.model.{TOUCHED.removesuffix('.weight')}"
    a, b = (tensors[f"{stem}.lora_{side}.weight"] for side in "AB")
    scale = 2.0  # alpha 8, rank 4
    opposite = (-scale * (b.double() @ a.double())).flatten()
    left = (opposite.bfloat16().double() - opposite).abs() / opposite.abs()
    at = left.argsort()[:3]

    def cancel(weight: torch.Tensor) -> torch.Tensor:
        flat = weight.clone().flatten()
        flat[at] = opposite[at].to(weight.dtype)
        return flat.view(weight.shape)

    rewrite(made.base, TOUCHED, cancel)
    made.merge(adapter)
    base = made.stored(made.base)[TOUCHED]
    return (base.float() + scale * (b @ a)).to(base.dtype), at.tolist()


def test_where_base_and_update_cancel_single_precision_may_be_off(made: Bench, adapter: Path) -> None:
    merged, _ = _cancelled(made, adapter)
    assert verify_merge(made.base, adapter, made.out).misrounded == 0
    ours = made.stored(made.out)[TOUCHED]
    rewrite(made.out, TOUCHED, lambda _: merged)
    units = (merged.view(torch.int16).int() - ours.view(torch.int16).int()).abs()
    assert int(units.max()) > 1, "nothing is off: this test shows nothing"
    evidence = verify_merge(made.base, adapter, made.out)
    assert evidence.ok, evidence.problems
    assert evidence.misrounded == int((units > 0).sum())


def test_where_base_and_update_cancel_more_than_that_is_found(made: Bench, adapter: Path) -> None:
    merged, at = _cancelled(made, adapter)
    wrong = merged.clone().flatten()
    wrong[at[0]] += made.stored(made.base)[TOUCHED].flatten()[at[0]] * 2**-16
    rewrite(made.out, TOUCHED, lambda _: wrong.view(merged.shape))
    assert {p.partition(":")[0] for p in verify_merge(made.base, adapter, made.out).problems} == {TOUCHED}


def test_too_many_misrounded_are_found() -> None:
    usual = Evidence(elements=10**8, misrounded=9_000)
    assert usual.judged().ok
    assert not replace(usual, misrounded=11_000).judged().ok


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


def test_values_that_the_type_cannot_hold_are_not_published(made: Bench, adapter: Path) -> None:
    """Rounded correctly they are infinite, as in PEFT's merge."""
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 1e60}))
    with pytest.raises(MergeError) as caught:
        made.merge(adapter)
    assert caught.value.code == "merge-overflow"
    assert not made.out.exists()
