"""``graft merge``: the folders it takes, its plan, its report and its errors."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from tests.cli.running import fields_of, forked, graft, refused
from torch import nn

from graftkit.text import size


@pytest.fixture
def base(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> Path:
    model: Any = twin_of("llama")
    model.save_pretrained(tmp_path / "base", max_shard_size="200KB")
    return tmp_path / "base"


@pytest.fixture
def adapter(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> Path:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(twin_of("llama"), config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_a_merge_and_its_report(base: Path, adapter: Path, tmp_path: Path) -> None:
    done = graft("merge", base, adapter, tmp_path / "out", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    fields = fields_of(done)
    assert fields["changed"] == 4
    assert fields["verification"]["problems"] == []
    assert {p.name for p in base.iterdir()} | {"merge_report.json"} == {
        p.name for p in (tmp_path / "out").iterdir()
    }


def test_for_people(base: Path, adapter: Path, tmp_path: Path) -> None:
    done = graft("merge", base, adapter, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 21" in done.stdout
    assert str(tmp_path / "out") in done.stdout


def test_progress_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The file, bytes of bytes, the rate, and the time left."""
    from graftkit.cli.progress import progress_bar
    from graftkit.progress import Progress

    for name, value in {"TTY_COMPATIBLE": "1", "TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    with progress_bar(in_bytes=True) as show:
        for done in (1_000_000, 2_000_000, 3_000_000):
            show(Progress("model-00002-of-00004.safetensors", done, 8_000_000))
            time.sleep(0.05)  # a rate needs two moments
    printed = capsys.readouterr()
    assert "model-00002-of-00004.safetensors" in printed.err
    assert "3.0/8.0 MB" in printed.err
    assert re.search(r"\d (k|M|G)B/s 0:00:0\d", printed.err)
    assert not printed.out


def test_a_dry_run_writes_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    done = forked("merge", base, adapter, tmp_path / "out", "--dry-run", "--json")
    fields = fields_of(done)
    assert done.returncode == 0
    assert fields["bytes"] == sum(p.stat().st_size for p in base.glob("*.safetensors"))
    assert sum(s["changed"] for s in fields["shards"]) == fields["changed"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    printed = forked("merge", base, adapter, tmp_path / "out", "--dry-run").stdout
    assert size(fields["bytes"]) in printed
    for path in base.glob("*.safetensors"):
        assert re.search(rf"{path.name} +{re.escape(size(path.stat().st_size))} ", printed)


def test_a_merged_checkpoint_is_checked_against_its_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert forked("merge", base, adapter, tmp_path / "out").returncode == 0
    args = ("check-merged", tmp_path / "out", "--base", base, "--adapter")
    exact = graft(*args, adapter, "--json")
    assert exact.returncode == 0, exact.stdout + exact.stderr
    assert {f["code"]: f["severity"] for f in fields_of(exact)["findings"]}["GK606"] == "ok"
    other = forked(*args, f"{adapter}:0.5", "--json")
    assert other.returncode == 1
    assert {f["code"]: f["severity"] for f in fields_of(other)["findings"]}["GK606"] == "error"


def test_several_adapters_with_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.symlink_to(adapter, target_is_directory=True)
    options = ("--adapter", f"{adapter}:0.7", "--adapter", f"{other}:-0.7")
    done = forked("merge", base, tmp_path / "out", *options, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [a["weight"] for a in fields_of(done)["adapters"]] == [0.7, -0.7]


@pytest.mark.parametrize(
    ("args", "code"),
    [
        pytest.param(("{base}", "{adapter}"), "usage", id="no output"),
        pytest.param(
            ("{base}", "{adapter}", "{out}", "--adapter", "{adapter}"), "usage", id="an adapter too many"
        ),
        pytest.param(("{base}", "{adapter}", "{base}"), "merge-same-place", id="onto the base"),
        pytest.param(("{base}", "{base}", "{out}"), "adapter-config", id="no adapter"),
        pytest.param(("{adapter}", "{adapter}", "{out}"), "not-a-model-directory", id="no base"),
        pytest.param(("{base}", "{adapter}", "{out}", "--tied", "maybe"), "usage", id="no such choice"),
    ],
)
def test_what_cannot_be_done_exits_2(
    args: tuple[str, ...], code: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    given = [w.format(base=base, adapter=adapter, out=tmp_path / "out") for w in args]
    error = refused("merge", *given)
    assert error["code"] == code
    assert error["help"]
    assert not (tmp_path / "out").exists()
