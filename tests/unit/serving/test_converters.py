"""llama.cpp's converters run one after another in a process of their own, whatever one of them does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from graftkit.serving.workers.llama_cpp import Converters

# Stands where a checkout of llama.cpp has its converters: it does what the source folder's name says.
_SCRIPT = """
import argparse, os, sys
from pathlib import Path
from conversion.base import TextModel

parser = argparse.ArgumentParser()
parser.add_argument("--outtype"); parser.add_argument("--outfile"); parser.add_argument("source")
arguments = parser.parse_args()
what = Path(arguments.source).name
print("this goes to stdout")
if what == "raises":
    raise ValueError("no such architecture")
if what == "exits":
    sys.exit("not a model")
if what == "dies":
    os._exit(3)
if what != "writes-nothing":
    Path(arguments.outfile).write_text(TextModel().get_vocab_base_pre(None) + arguments.outtype)
"""
_BASE = """
class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError
"""


@pytest.fixture
def converters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Converters]:
    checkout = tmp_path / "checkout"
    (checkout / "conversion").mkdir(parents=True)
    (checkout / "conversion" / "__init__.py").touch()
    (checkout / "conversion" / "base.py").write_text(_BASE)
    (checkout / "convert_hf_to_gguf.py").write_text(_SCRIPT)
    monkeypatch.setenv("LLAMA_CPP_SOURCE", str(checkout))
    with closing(Converters()) as started:
        yield started


def convert(converters: Converters, folder: Path, what: str) -> str:
    return converters.convert(folder / what, folder / f"{what}.gguf", "convert_hf_to_gguf.py").read_text()


def test_an_unknown_tokenizer_is_no_obstacle(converters: Converters, tmp_path: Path) -> None:
    assert convert(converters, tmp_path, "model") == "gpt-2f32"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("raises", "no such architecture"),
        ("exits", "not a model"),
        ("dies", "failed"),
        ("writes-nothing", "failed"),
    ],
)
def test_a_failure_is_an_error_and_the_next_conversion_runs(
    what: str, words: str, converters: Converters, tmp_path: Path
) -> None:
    convert(converters, tmp_path, "before")
    with pytest.raises(RuntimeError, match=words):
        convert(converters, tmp_path, what)
    assert convert(converters, tmp_path, "after") == "gpt-2f32"


def test_the_words_of_an_earlier_failure_are_not_repeated(converters: Converters, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        convert(converters, tmp_path, "raises")
    with pytest.raises(RuntimeError) as error:
        convert(converters, tmp_path, "writes-nothing")
    assert "no such architecture" not in str(error.value)


def test_a_missing_checkout_is_named(
    converters: Converters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP_SOURCE", str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError):
        converters.convert(tmp_path, tmp_path / "out.gguf", "convert_hf_to_gguf.py")
