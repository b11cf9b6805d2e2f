"""What PEFT's source declares for a method, read as text, is what the imported PEFT declares."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftType

from graftkit.checks.peft_config import peft_source
from graftkit.checks.peft_config.peft_source import written_method
from graftkit.checks.peft_config.schema import declared, imported

METHODS = [kind.value for kind in PeftType]


@pytest.mark.parametrize("method", METHODS)
def test_the_text_agrees_with_peft(method: str) -> None:
    assert imported(method) is not None
    assert declared(method) == imported(method)


def test_the_text_is_enough_for_most_methods_and_lora() -> None:
    read = [method for method in METHODS if written_method(method) is not None]
    assert "LORA" in read
    assert len(read) > len(METHODS) / 2


@pytest.mark.parametrize(
    "name", ["", "lora", "FOO", "../LORA", "LORA/../LORA", "LORA\x1b[31m\ud800", "\0"], ids=ascii
)
def test_an_unknown_method_is_none(name: str) -> None:
    assert written_method(name) is None
    assert declared(name) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("    r: int", "    r: Hertz", id="a type that is defined elsewhere"),
        pytest.param("    r: int", "    r: int | ", id="invalid Python"),
        pytest.param("@dataclass\nclass LoraConfig(", "class LoraConfig(", id="not a dataclass"),
        pytest.param("class LoraConfig(PeftConfig)", "class LoraConfig(Other)", id="another base"),
        pytest.param("class LoraConfig(", "class LoRAConfig(", id="another name"),
    ],
)
def test_a_source_that_cannot_be_followed_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    """PEFT is imported then: a guess would be worse than the seconds."""
    installed = peft_source._home()
    for name in ("config.py", "utils/peft_types.py", "tuners/lora/__init__.py", "tuners/lora/config.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((installed / name).read_bytes())
    monkeypatch.setattr(peft_source, "_home", lambda: tmp_path)
    assert written_method("LORA") is not None
    file = tmp_path / "tuners/lora/config.py"
    assert file.read_text().count(before)
    file.write_text(file.read_text().replace(before, after))
    assert written_method("LORA") is None


def test_without_a_source_peft_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_source, "_home", lambda: tmp_path)
    declared.cache_clear()
    try:
        assert declared("LORA") == imported("LORA")
    finally:
        declared.cache_clear()
