"""Mutations of real adapter folders: whatever is in them, ``check`` gives a report or a ``GraftError``.

Not part of ``make test``: run it with ``-m fuzz``. ``GRAFTKIT_FUZZ_EXAMPLES`` bounds it: mutations a test, 200 if
it is not set.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from transformers import AutoConfig

import graftkit as gk
from graftkit.checks.check import check
from graftkit.errors import GraftError

pytestmark = pytest.mark.fuzz

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EXAMPLES = int(os.environ.get("GRAFTKIT_FUZZ_EXAMPLES", "200"))
bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)

KINDS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 3}),
    "dora": LoraConfig(r=2, target_modules=r".*\.(q|v)_proj", use_dora=True, modules_to_save=["lm_head"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=2, target_modules=["q_proj"]),
}
NAMES = st.sampled_from(
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.lora_A.weight",
        "base_model.model.lm_head.weight",
        "base_model.model..lora_A.weight",
        "base_model.model.lora_A",
        "base_model.vera_A",
        "lora_A",
        "",
        "__metadata__",
        "../../etc/passwd",
    ]
) | st.text(max_size=30)
NUMBERS = st.integers(-(2**70), 2**70) | st.integers(-2, 40) | st.floats() | st.booleans()
LEAVES = (
    st.none()
    | NUMBERS
    | st.text(max_size=12)
    | st.sampled_from([*KINDS, "LORA", "q_proj", "all-linear", "(", "(a+)+$"])
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
TARGETS = st.sampled_from(["vllm", "vllm==0.10.0", "sglang", "llama_cpp", None])


@pytest.fixture(scope="module")
def base() -> gk.ModelMap:
    return gk.survey("llama")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One real adapter a method, as PEFT saves it."""
    made = {}
    for name, config in KINDS.items():
        torch.manual_seed(0)
        model = get_peft_model(gk.twin(AutoConfig.for_model("llama")), config)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name], save_embedding_layers=False)
    return made


@pytest.fixture(autouse=True, scope="module")
def crashes_are_raised() -> Iterator[None]:
    """A rule that crashes would otherwise become a finding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFT_DEBUG", "1")
        yield


def examined(folder: Path, base: gk.ModelMap | None, target: str | None, data: bool) -> None:
    """Check a folder; what may be raised are errors of graftkit's own."""
    try:
        report = check(folder, base, target=target, data=data)
    except GraftError as error:
        str(error).encode("utf-8", "strict")
        return
    str(report).encode("utf-8", "strict")
    json.dumps(report.to_dict())


class Copy:
    """Copy a folder, for one example to change."""

    def __init__(self, folder: Path) -> None:
        self._room = tempfile.TemporaryDirectory(prefix="graftkit-fuzz-")
        self.path = Path(self._room.name) / "adapter"
        shutil.copytree(folder, self.path)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self._room.cleanup()


@bounded
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), target=TARGETS, read=st.booleans())
def test_fields_of_the_configuration(
    folders: dict[str, Path], base: gk.ModelMap, data: st.DataObject, kind: str, target: str | None, read: bool
) -> None:
    with Copy(folders[kind]) as folder:
        config = json.loads((folder / CONFIG).read_text())
        names = st.sampled_from(sorted(config)) | st.text(max_size=10)
        config |= data.draw(st.dictionaries(names, JSON, max_size=4))
        for name in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=2)):
            config.pop(name, None)
        (folder / CONFIG).write_text(json.dumps(config))
        examined(folder, base, target, read)


@st.composite
def _spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes cut, doubled, turned over or replaced, mostly near the start, where the structure is."""
    spoilt = bytearray(content)
    near = min(len(spoilt), 600)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(near, 1)) | st.integers(0, len(spoilt)))
        length = draw(st.integers(0, 16))
        how = draw(st.sampled_from(["replace", "cut", "double", "truncate"]))
        if how == "replace":
            spoilt[at : at + length] = draw(st.binary(max_size=16))
        elif how == "cut":
            del spoilt[at : at + length]
        elif how == "double":
            spoilt[at:at] = spoilt[at : at + length]
        else:
            del spoilt[at:]
    return bytes(spoilt)


@bounded
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), name=st.sampled_from([CONFIG, WEIGHTS]))
def test_bytes_of_the_files(
    folders: dict[str, Path], base: gk.ModelMap, data: st.DataObject, kind: str, name: str
) -> None:
    with Copy(folders[kind]) as folder:
        (folder / name).write_bytes(data.draw(_spoilt((folder / name).read_bytes())))
        examined(folder, base, "vllm", True)


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F4", "F3_NEW", ""]) | JSON,
        "shape": st.lists(st.integers(0, 8) | NUMBERS, max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(0, 64) | NUMBERS, min_size=2, max_size=2) | JSON,
    }
)


@bounded
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), target=TARGETS)
def test_entries_of_the_header(
    folders: dict[str, Path], base: gk.ModelMap, data: st.DataObject, kind: str, target: str | None
) -> None:
    with Copy(folders[kind]) as folder:
        header, body = _parts((folder / WEIGHTS).read_bytes())
        header |= data.draw(st.dictionaries(st.sampled_from(sorted(header)) | NAMES, ENTRIES | JSON, max_size=3))
        _write(folder, header, body)
        examined(folder, base, target, True)


@st.composite
def _laid_out(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A header that is well-formed, of tensors that nobody would save."""
    header: dict[str, Any] = {}
    at = 0
    for name in draw(st.lists(NAMES, max_size=6, unique=True)):
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        dtype, size = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("I8", 1), ("C64", 8), ("F8_E5M2", 1)]))
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return header, draw(st.binary(min_size=at, max_size=at)) if at < 4_000 else b"\0" * at


@bounded
@given(made=_laid_out(), kind=st.sampled_from(sorted(KINDS)), target=TARGETS, with_base=st.booleans())
def test_files_that_are_well_formed(
    folders: dict[str, Path],
    base: gk.ModelMap,
    made: tuple[dict[str, Any], bytes],
    kind: str,
    target: str | None,
    with_base: bool,
) -> None:
    with Copy(folders[kind]) as folder:
        _write(folder, *made)
        examined(folder, base if with_base else None, target, True)


def _parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _write(folder: Path, header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    before = set(Path.cwd().iterdir())
    yield
    assert set(Path.cwd().iterdir()) == before
