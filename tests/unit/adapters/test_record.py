"""``graftkit.json`` is read without trusting it, and what was written is what is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftkit.adapters.record import (
    RECORD_NAME,
    AdapterRecord,
    BaseRecord,
    Dialect,
    Expected,
    ExpectedPrompt,
    Fingerprint,
    Message,
    PlanRecord,
    TensorSample,
    TokenizerRecord,
    mark_dialect,
    read_record,
    write_record,
)
from graftkit.errors import AdapterError, OutputError

PROMPT = {"ids": [1, 2], "tokens": [3, 4], "base": [-1.0, -2.0], "adapter": [-2.0, -1.0]}


@pytest.fixture
def full() -> AdapterRecord:
    sample = TensorSample(name="x", dtype="BF16", shape=(2, 3), digest="0" * 16, values=(1.0, -0.5))
    prompt = ExpectedPrompt(
        **PROMPT,
        text="Ein Bär",
        messages=(Message(role="user", content="Hi\n"),),
        pieces=("a", "▁b"),
        half=(-1, -2),
    )
    return AdapterRecord(
        dialect=Dialect.PEFT,
        base=BaseRecord(
            id="a/b", fingerprint=Fingerprint(headers="ab" * 32, content="cd" * 32, samples=(sample,) * 3)
        ),
        versions={"peft": "0.21.2"},
        tokenizer=TokenizerRecord(vocabulary="0" * 64, ids=(1, 2), template="1" * 64, rendering="<a>" * 100),
        plan=PlanRecord(method="LORA", r=8, alpha=16.0, modules=4, parameters=100, targets={"attention.q": 4}),
        expected=Expected(prompts=(prompt,), dtype="float32", device="cpu"),
        unknown={"tokenizer": "none was given"},
    )


def test_what_was_written_is_read(full: AdapterRecord, tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    assert read_record(tmp_path / "none") is None
    assert write_record(tmp_path, full).name == RECORD_NAME
    assert read_record(tmp_path) == full


numbers = st.floats(max_value=0, allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(numbers, numbers, st.text()), min_size=1, max_size=8))
def test_every_number_and_text_survives(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[float, float, str]]
) -> None:
    base, adapter, pieces = zip(*rows, strict=True)
    prompt = ExpectedPrompt(ids=(0,), tokens=range(len(rows)), base=base, adapter=adapter, pieces=pieces)
    record = AdapterRecord(expected=Expected(prompts=(prompt,), dtype="bfloat16", device="cuda"))
    folder = tmp_path_factory.mktemp("adapter")
    write_record(folder, record)
    assert read_record(folder) == record


def test_a_converted_adapter_keeps_the_rest(full: AdapterRecord, tmp_path: Path) -> None:
    mark_dialect(tmp_path, Dialect.MLX, full)
    assert read_record(tmp_path) == full.model_copy(update={"dialect": Dialect.MLX})
    mark_dialect(tmp_path, Dialect.VLLM, None)
    assert read_record(tmp_path) == AdapterRecord(dialect=Dialect.VLLM)


def test_fields_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_text(json.dumps({"format": 1, "dialect": "mlx", "mood": {"a": 1}}))
    assert read_record(tmp_path) == AdapterRecord(dialect=Dialect.MLX)


def prompt_with(**changes: Any) -> bytes:
    expected = {"prompts": [PROMPT | changes], "dtype": "float32", "device": "cpu"}
    return json.dumps({"expected": expected}).encode()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"dialect": ', id="truncated"),
        pytest.param(b"\xff\xfe\x00", id="not text"),
        pytest.param(b"[1]", id="a list"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b" " * 2_000_001, id="too large"),
        pytest.param(b'{"format": 2}', id="a later format"),
        pytest.param(b'{"dialect": "klingon"}', id="no such dialect"),
        pytest.param(b'{"base": {"fingerprint": {"headers": "../../etc"}}}', id="no hash"),
        pytest.param(prompt_with(base=[-1.0]), id="too few numbers"),
        pytest.param(prompt_with(tokens=[3, 3]), id="a token twice"),
        pytest.param(prompt_with(tokens=[3, -4]), id="no token"),
        pytest.param(prompt_with(ids=[]), id="an empty prompt"),
        pytest.param(prompt_with(base=[float("nan"), -1.0]), id="not a number"),
        pytest.param(prompt_with(base=[3.0, -1.0]), id="a probability above one"),
        pytest.param(prompt_with(ids=[1] * 5000), id="a long prompt"),
    ],
)
def test_a_broken_record(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RECORD_NAME).write_bytes(content)
    with pytest.raises(AdapterError) as caught:
        read_record(tmp_path)
    assert (caught.value.code, caught.value.where) == ("adapter-record", str(tmp_path / RECORD_NAME))
    assert caught.value.help


def test_the_good_prompt_is_good(tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_bytes(prompt_with())
    assert read_record(tmp_path) is not None


def test_a_folder_of_that_name(tmp_path: Path, full: AdapterRecord) -> None:
    (tmp_path / RECORD_NAME).mkdir()
    with pytest.raises(AdapterError):
        read_record(tmp_path)
    with pytest.raises(OutputError):
        write_record(tmp_path, full)


def test_reading_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, graftkit.adapters.record as r; r.read_record('.');"
        "assert not {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
