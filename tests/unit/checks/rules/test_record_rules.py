"""Each rule on an adapter's record finds the fault it is for; the base of training gives none of them cause."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.checks.observed import by_code, seen
from tests.unit.serving.signed import Signed, write_signed
from transformers import AutoTokenizer

import graftkit as gk
from graftkit.adapters.file import RECORD_NAME
from graftkit.adapters.record import BaseRecord, read_record, write_record
from graftkit.checks.check import check
from graftkit.findings import Finding, Severity
from graftkit.serving.engine_twin import write_engine_twin

CODES = ("GK510", "GK511", "GK512", "GK513")
OK, ERROR, WARNING, INFO, UNKNOWN = "ok", "error", "warning", "info", "unknown"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    return write_signed(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def copied(trained: Signed, tmp_path: Path) -> Signed:
    """The same base and adapter in other folders, to change."""
    copy = Signed(tmp_path / "base", tmp_path / "adapter")
    shutil.copytree(trained.base, copy.base)
    shutil.copytree(trained.adapter, copy.adapter)
    return copy


def findings(signed: Signed, base: Path | str | None = None) -> dict[str, Finding]:
    return by_code(check(signed.adapter, str(base or signed.base)))


def verdicts(signed: Signed, base: Path | str | None = None) -> dict[str, Severity]:
    found = findings(signed, base)
    return {code: found[code].severity for code in CODES if code in found}


def rewrite(base: Path, seed: int | None = None, dtype: torch.dtype | None = None) -> None:
    """Change every weight of a base, or store it in another dtype."""
    path = base / "model.safetensors"
    tensors = load_file(path)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        tensors = {n: t + 1e-3 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    save_file({name: t.to(dtype or t.dtype) for name, t in tensors.items()}, path, {"format": "pt"})


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.rule_passes("GK510", "GK511", "GK512", "GK513")
def test_the_base_of_training(copied: Signed) -> None:
    """In another folder, as on another machine."""
    assert verdicts(copied) == dict.fromkeys(CODES, OK)


def test_without_a_record_there_is_nothing_to_say(copied: Signed) -> None:
    (copied.adapter / RECORD_NAME).unlink()
    assert verdicts(copied) == {}


def test_without_a_base_there_is_nothing_to_say(copied: Signed) -> None:
    report = check(copied.adapter)
    assert not {finding.code for finding in report} & set(CODES)


@pytest.mark.rule_fails("GK510")
def test_a_sibling(copied: Signed) -> None:
    """All names, shapes and dtypes are those of the base; the values are others."""
    rewrite(copied.base, seed=0)
    assert verdicts(copied) == {"GK510": ERROR, "GK511": OK, "GK512": OK, "GK513": OK}


@pytest.mark.rule_fails("GK510")
def test_another_architecture(copied: Signed, tmp_path: Path) -> None:
    write_engine_twin("llama", tmp_path / "llama")
    found = findings(copied, tmp_path / "llama")
    assert found["GK510"].severity is Severity.ERROR
    assert "weights" not in found["GK510"].evidence


def test_another_dtype_is_the_same_base(copied: Signed) -> None:
    rewrite(copied.base, dtype=torch.bfloat16)
    assert verdicts(copied) == {"GK510": OK, "GK511": OK, "GK512": OK, "GK513": INFO}


def test_weights_that_are_not_here(copied: Signed) -> None:
    (copied.base / "model.safetensors").unlink()
    assert verdicts(copied) == {"GK510": UNKNOWN, "GK511": OK, "GK512": OK, "GK513": UNKNOWN}


def test_a_base_by_its_model_type(copied: Signed) -> None:
    assert verdicts(copied, "qwen3") == dict.fromkeys(CODES, UNKNOWN)


def test_a_record_without_sections(copied: Signed) -> None:
    record = read_record(copied.adapter)
    assert record is not None
    assert record.base is not None
    base = record.base.model_copy(update={"fingerprint": None})
    write_record(copied.adapter, record.model_copy(update={"tokenizer": None, "base": base}))
    assert verdicts(copied) == {"GK510": UNKNOWN, "GK511": UNKNOWN, "GK512": UNKNOWN, "GK513": OK}
    write_record(copied.adapter, record.model_copy(update={"base": None}))
    assert verdicts(copied)["GK510"] == UNKNOWN


@pytest.mark.rule_fails("GK510")
def test_a_record_that_cannot_be_read(copied: Signed) -> None:
    (copied.adapter / RECORD_NAME).write_text('{"format": ')
    found = findings(copied)
    assert found["GK510"].severity is Severity.WARNING
    assert found["GK510"].evidence["refusal"] == "adapter-record"
    assert {found[code].severity for code in CODES[1:]} == {Severity.UNKNOWN}
    # The adapter itself is as good as before: stock PEFT does not read the file.
    assert found["GK501"].severity is Severity.OK


@pytest.mark.rule_fails("GK511")
def test_another_tokenizer(copied: Signed) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copied.base)
    tokenizer.add_tokens(["<|marker|>"])
    tokenizer.save_pretrained(copied.base)
    assert verdicts(copied) == {"GK510": OK, "GK511": ERROR, "GK512": OK, "GK513": OK}
    AutoTokenizer.from_pretrained(copied.base).save_pretrained(copied.adapter)
    assert verdicts(copied)["GK511"] == WARNING


@pytest.mark.rule_fails("GK512")
@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"]
)
def test_another_template(copied: Signed, template: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copied.base)
    (copied.base / "chat_template.jinja").unlink()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(copied.base)
    assert verdicts(copied) == {"GK510": OK, "GK511": OK, "GK512": WARNING, "GK513": OK}


@pytest.mark.rule_passes("GK512")
def test_a_template_that_renders_alike(copied: Signed) -> None:
    path = copied.base / "chat_template.jinja"
    path.write_text("{# another revision #}" + path.read_text())
    assert verdicts(copied)["GK512"] == OK


@pytest.mark.rule_fails("GK513")
def test_a_base_that_was_quantized(copied: Signed) -> None:
    """As a GPTQ copy says of itself; its embeddings are stored as they were."""
    edit_json(copied.base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert check_base(copied) == WARNING


@pytest.mark.rule_passes("GK513")
@pytest.mark.parametrize(
    ("in_memory", "stored", "now", "verdict"),
    [
        pytest.param("bitsandbytes 4-bit", None, None, INFO, id="QLoRA, on the whole base"),
        pytest.param("gptq", "gptq", "gptq", OK, id="as it was stored"),
        pytest.param(None, "gptq", None, INFO, id="no longer quantized"),
        pytest.param("gptq", "gptq", "awq", WARNING, id="by another method"),
        pytest.param(None, None, None, OK, id="never quantized"),
    ],
)
def test_quantizations(
    copied: Signed, in_memory: str | None, stored: str | None, now: str | None, verdict: str
) -> None:
    record = read_record(copied.adapter)
    assert record is not None
    assert record.base is not None
    base = BaseRecord(**{**dict(record.base), "quantization": in_memory, "stored_quantization": stored})
    write_record(copied.adapter, record.model_copy(update={"base": base}))
    if now is not None:
        edit_json(copied.base / "config.json", quantization_config={"quant_method": now, "bits": 4})
    assert check_base(copied) == verdict
    if verdict != OK:
        # What this test promises to have seen.
        write_record(copied.adapter, record)
        edit_json(copied.base / "config.json", quantization_config=None)
        assert check_base(copied) == OK


def check_base(signed: Signed) -> Severity:
    return seen("GK513", record=read_record(signed.adapter), base_folder=signed.base).severity


def test_the_weights_of_a_hub_s_model_are_looked_for_in_its_cache(copied: Signed) -> None:
    """Nothing is downloaded, and what is not there is unknown."""
    found = by_code(check(copied.adapter, gk.survey("qwen3"), revision="main"))
    assert found["GK510"].severity is Severity.UNKNOWN
