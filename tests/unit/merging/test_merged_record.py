"""A merged checkpoint takes its adapter's record along, as that of the model that was made of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.unit.checks.observed import by_code
from tests.unit.serving.live_server import Live, serving
from tests.unit.serving.signed import Signed, write_signed
from transformers import AutoModelForCausalLM, AutoTokenizer

import graftkit as gk
from graftkit.adapters.file import RECORD_NAME
from graftkit.adapters.record import AdapterRecord, read_record
from graftkit.checks.check_merged import check_merged, check_shipped
from graftkit.engines.outcome import Outcome


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    return write_signed(tmp_path_factory.mktemp("signed"))


def merged(signed: Signed, out: Path, weight: float = 1.0) -> AdapterRecord | None:
    gk.merge(signed.base, {signed.adapter: weight}, out)
    return read_record(out)


@pytest.mark.parametrize("weight", [1.0, 0.5, 2.0])
def test_the_answers_are_those_of_the_merged_model(signed: Signed, tmp_path: Path, weight: float) -> None:
    record = merged(signed, tmp_path / "out", weight)
    assert record is not None
    assert record.dialect is None
    assert record.merged is not None
    assert record.merged.weights == (weight,)
    assert record.expected is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for prompt in record.expected.prompts:
        with torch.no_grad():
            row = model(torch.tensor([prompt.ids])).logits[0, -1].double().log_softmax(-1)
        assert row[list(prompt.tokens)].tolist() == pytest.approx(prompt.adapter, abs=1e-4)


def test_a_merged_model_is_probed(signed: Signed, tmp_path: Path) -> None:
    merged(signed, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(signed.base)
    for served, outcome in ((tmp_path / "out", Outcome.APPLIED), (signed.base, Outcome.IGNORED)):
        model = AutoModelForCausalLM.from_pretrained(served).eval()
        with serving(Live(tokenizer, {"m": model}, cards=[{"id": "m", "owned_by": "vllm"}], form="ids")) as url:
            assert gk.probe(url, tmp_path / "out").outcome is outcome


def test_another_weight(signed: Signed, tmp_path: Path) -> None:
    record = merged(signed, tmp_path / "out", 0.7)
    assert record is not None
    assert record.expected is None
    assert "expected" in record.unknown
    assert record.tokenizer == signed.record.tokenizer


def test_several_adapters(signed: Signed, tmp_path: Path) -> None:
    shutil.copytree(signed.adapter, tmp_path / "second")
    gk.merge(signed.base, {signed.adapter: 0.5, tmp_path / "second": 0.5}, tmp_path / "out")
    record = read_record(tmp_path / "out")
    assert record is not None
    assert record.merged is not None
    assert record.merged.weights == (0.5, 0.5)
    assert record.expected is None


@pytest.mark.parametrize("content", [None, "{"])
def test_an_adapter_that_says_nothing_of_a_base_that_does(
    signed: Signed, tmp_path: Path, content: str | None
) -> None:
    """What the base says of itself is no longer true."""
    merged(signed, tmp_path / "base")
    shutil.copytree(signed.adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / RECORD_NAME).unlink()
    if content is not None:
        (tmp_path / "adapter" / RECORD_NAME).write_text(content)
    gk.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    record = read_record(tmp_path / "out")
    assert record is None or record.expected is None


def test_the_template_that_is_shipped(signed: Signed, tmp_path: Path) -> None:
    shutil.copytree(signed.base, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }};{% endfor %}"
    )
    gk.merge(tmp_path / "base", signed.adapter, tmp_path / "out")
    found = by_code(check_shipped(tmp_path / "out", signed.adapter))
    assert found["GK511"].severity is gk.Severity.OK
    assert found["GK512"].severity is gk.Severity.WARNING
    report = check_merged(tmp_path / "out", tmp_path / "base", signed.adapter)
    assert report.errors == ()
    assert by_code(report)["GK512"].severity is gk.Severity.WARNING


def test_the_template_of_training(signed: Signed, tmp_path: Path) -> None:
    merged(signed, tmp_path / "out")
    report = check_merged(tmp_path / "out", signed.base, signed.adapter)
    assert {by_code(report)[code].severity for code in ("GK511", "GK512")} == {gk.Severity.OK}
