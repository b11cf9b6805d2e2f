"""A conversion that is interrupted, or not equal, leaves nothing that could be taken for one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.converting.served_adapters import Bench

import graftkit as gk
from graftkit.converting import prove_equal
from graftkit.converting.delta import Factors
from graftkit.converting.dialects import all_dialects, peft
from graftkit.converting.dialects.vllm import VllmDialect
from graftkit.converting.errors import ConvertError
from graftkit.converting.safetensors_file import OutTensor
from graftkit.modeling.unwrapping import PEFT_PREFIX


@pytest.fixture
def place(bench: Callable[[str], Bench]) -> Bench:
    return bench("llama")


@pytest.fixture
def adapter(place: Bench) -> Path:
    return place.adapter(target_modules=["q_proj", "v_proj"], r=2)


def left(place: Bench) -> set[str]:
    """Return what is in the folder beside the base and the adapter."""
    return {path.name for path in place.folder.iterdir()} - {"base", "adapter"}


class StoppedError(Exception):
    """Stands for an interrupt."""


def test_an_interrupted_comparison_reuses_what_was_written(
    place: Bench, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(StoppedError):
        patched.setattr(VllmDialect, "read", stop)
        gk.convert(adapter, place.folder / "out", to="vllm", base=place.base)
    assert left(place) == {".out.partial"}
    done = gk.convert(adapter, place.folder / "out", to="vllm", base=place.base)
    assert done.resumed
    assert left(place) == {"out"}
    assert set(place.updates(adapter))


def test_what_was_written_for_another_adapter_is_not_reused(
    place: Bench, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(StoppedError):
        patched.setattr(VllmDialect, "read", stop)
        gk.convert(adapter, place.folder / "out", to="vllm", base=place.base)
    place.adapter(target_modules=["k_proj"], r=3)
    assert not gk.convert(adapter, place.folder / "out", to="vllm", base=place.base).resumed


def test_an_interrupt_while_writing_leaves_nothing(
    place: Bench, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(StoppedError):
        patched.setattr(VllmDialect, "write", write_half)
        gk.convert(adapter, place.folder / "out", to="vllm", base=place.base)
    assert left(place) == set()


def stop(*_: object) -> None:
    raise StoppedError


def write_half(_self: object, _deltas: object, _base: object, folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    raise StoppedError


@pytest.mark.parametrize("fault", ["scaled", "left out", "added", "swapped"])
def test_what_is_not_equal_is_not_published(
    place: Bench, adapter: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftkit.converting.dialects._pairs.Pair.tensors", broken(fault))
    with pytest.raises(ConvertError) as caught:
        gk.convert(adapter, place.folder / "out", to="vllm", base=place.base)
    assert caught.value.code == "convert-not-equal"
    assert "proj" in str(caught.value.where)
    assert left(place) == set()


def test_what_only_another_tool_would_load_is_not_published(
    place: Bench, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = peft._tensors

    def without_prefix(places: tuple[Any, Any], group: tuple[Factors, ...]) -> Iterable[OutTensor]:
        a, b = (replace(each, name=each.name.removeprefix(PEFT_PREFIX)) for each in places)
        return whole((a, b), group)

    monkeypatch.setattr(peft, "_tensors", without_prefix)
    with pytest.raises(ConvertError) as caught:
        gk.convert(adapter, place.folder / "out", to="peft", base=place.base)
    assert caught.value.code == "convert-not-equal"
    assert left(place) == set()


def broken(fault: str) -> Callable[..., tuple[object, ...]]:
    """Return a method that writes the pair of one module wrong."""
    from graftkit.converting.dialects._pairs import Pair

    whole = Pair.tensors

    def tensors(pair: Pair) -> tuple[object, ...]:
        a, b = whole(pair)
        if not pair.module.endswith("1.self_attn.v_proj"):
            return a, b
        if fault == "scaled":
            return a, replace(b, make=lambda: b.make() * (1 + 2**-20))
        if fault == "left out":
            return ()
        if fault == "added":
            other = [replace(t, name=t.name.replace("v_proj", "k_proj")) for t in (a, b)]
            return (a, b, *other)
        return a, replace(b, make=lambda: b.make().flip(0))

    return tensors


def test_rounding_is_judged_element_by_element() -> None:
    size = torch.tensor([1.0, 1e-3], dtype=torch.float64)
    off = torch.tensor([0.0, 1e-6], dtype=torch.float64)
    assert prove_equal._relative(off, size) == pytest.approx(1e-3)


def test_each_form_has_its_own_name() -> None:
    names = [dialect.name for dialect in all_dialects()]
    assert len(set(names)) == len(names)
    assert {"peft", "vllm", "sglang", "llama.cpp"} <= {d.name for d in all_dialects() if d.writes}
