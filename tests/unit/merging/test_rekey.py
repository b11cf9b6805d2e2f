"""A base whose weights have other names: refused where it would load as noise, and copied under its names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.unit.merging.conftest import stored
from torch import nn

import graftkit as gk
from graftkit.checks.check_merged import check_merged
from graftkit.errors import GraftError, MergeError, OutputError, SourceError
from graftkit.merging.merge import merge, plan_merge
from graftkit.merging.rekey import rekey

INDEX = "model.safetensors.index.json"


def renamed_copy(model: Any, folder: Path, change: Callable[[str], str | None], **options: Any) -> Path:
    """Save a model under other names; a tensor whose new name is None is left out."""
    model.save_pretrained(folder, **options)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({new: t for key, t in tensors.items() if (new := change(key))}, file, {"format": "pt"})
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {change(key): file for key, file in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))
    return folder


def without_wrapper(key: str) -> str:
    """The keys of transformers#45388."""
    return key.replace(".linear.weight", ".weight")


def unwrapped(key: str) -> str | None:
    """The keys after a permanent unwrap: the clip bounds are gone as well."""
    return None if key.endswith(("_min", "_max")) else without_wrapper(key)


def moved_adapter(model: Any, folder: Path) -> Path:
    config = LoraConfig(r=2, target_modules=r".*vision_tower.*\.q_proj\.linear|.*language_model.*\.o_proj")
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    adapted.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "500KB"}], ids=["one file", "shards"])
def test_the_copy_is_the_base_under_its_right_names(
    e2b: nn.Module, tmp_path: Path, options: dict[str, Any]
) -> None:
    model: Any = e2b
    base = renamed_copy(model, tmp_path / "base", without_wrapper, **options)
    model.save_pretrained(tmp_path / "right", **options)
    done = rekey(base, tmp_path / "out")
    right, out = stored(tmp_path / "right"), stored(tmp_path / "out")
    assert out.keys() == right.keys()
    assert all(torch.equal(out[key], right[key]) for key in right)
    assert set(done.renamed.values()) == {key for key in right if key.endswith(".linear.weight")}
    assert {p.name for p in base.iterdir()} == {p.name for p in (tmp_path / "out").iterdir()}
    _, report = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    if options:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index == json.loads((tmp_path / "right" / INDEX).read_text())


def test_a_merge_refuses_the_base_and_takes_the_copy(e2b: nn.Module, tmp_path: Path) -> None:
    model: Any = e2b
    base = renamed_copy(model, tmp_path / "base", without_wrapper)
    model.save_pretrained(tmp_path / "right")
    adapter = moved_adapter(model, tmp_path / "adapter")
    for run in (merge, plan_merge):
        with pytest.raises(SourceError) as caught:
            run(base, adapter, tmp_path / "out")
        assert caught.value.code == "weights-incomplete"
    assert not (tmp_path / "out").exists()
    rekey(base, tmp_path / "copy")
    merge(tmp_path / "copy", adapter, tmp_path / "out")
    merge(tmp_path / "right", adapter, tmp_path / "expected")
    out, expected = stored(tmp_path / "out"), stored(tmp_path / "expected")
    assert out.keys() == expected.keys()
    assert all(torch.equal(out[key], expected[key]) for key in expected)
    assert any(not torch.equal(out[key], tensor) for key, tensor in stored(tmp_path / "right").items())
    with pytest.raises(SourceError) as caught:
        check_merged(tmp_path / "out", base, adapter)
    assert caught.value.code == "weights-incomplete"


def test_after_an_unwrap_the_bounds_stay_missing_and_that_is_said(e2b: nn.Module, tmp_path: Path) -> None:
    model: Any = e2b
    base = renamed_copy(model, tmp_path / "base", unwrapped)
    done = rekey(base, tmp_path / "out")
    assert len(done.buffers) == 4 * len(done.renamed)
    assert done.to_dict()["missing_buffers"] == list(done.buffers)
    _, report = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert set(done.buffers) == report["missing_keys"]
    planned = plan_merge(tmp_path / "out", moved_adapter(model, tmp_path / "adapter"))
    assert planned.to_dict()["missing_buffers"] == len(done.buffers)


def _with_query(key: str) -> str:
    return key.replace("q_proj", "query")


@pytest.mark.parametrize(
    ("change", "out", "code"),
    [
        pytest.param(str, "out", "rekey-not-needed", id="the right names"),
        pytest.param(_with_query, "out", "weights-incomplete", id="another word"),
        pytest.param(without_wrapper, "base", "merge-same-place", id="onto the base"),
        pytest.param(without_wrapper, "base/inside", "merge-same-place", id="into the base"),
    ],
)
def test_what_cannot_be_renamed(
    e2b: nn.Module, tmp_path: Path, change: Callable[[str], str | None], out: str, code: str
) -> None:
    base = renamed_copy(e2b, tmp_path / "base", change)
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    with pytest.raises((SourceError, MergeError)) as caught:
        rekey(base, tmp_path / out)
    assert caught.value.code == code
    assert caught.value.help
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_folder_with_files_is_never_replaced(e2b: nn.Module, tmp_path: Path) -> None:
    base = renamed_copy(e2b, tmp_path / "base", without_wrapper)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputError) as caught:
        rekey(base, tmp_path / "out")
    assert caught.value.code == "output-not-empty"


@pytest.mark.parametrize("uses", ["check", "migrate", "verify", "doctor"])
def test_every_reader_of_a_base_notices(e2b: nn.Module, tmp_path: Path, uses: str) -> None:
    base = str(renamed_copy(e2b, tmp_path / "base", without_wrapper))
    adapter = moved_adapter(e2b, tmp_path / "adapter")
    if uses == "migrate":
        with pytest.raises(GraftError) as caught:
            gk.migrate(adapter, base)
        assert caught.value.code == "weights-incomplete"
        return
    report = {
        "check": lambda: gk.check(adapter, base),
        "doctor": lambda: gk.doctor(base),
        "verify": lambda: _verified(base),
    }[uses]()
    assert {f.code: f.severity for f in report}["GK003"] is gk.Severity.ERROR


def _verified(base: str) -> gk.Report:
    """A model that the user loaded, with the random weights that transformers made up."""
    from transformers import Gemma4ForConditionalGeneration

    from graftkit.recipes.settings import CheckSettings

    model = Gemma4ForConditionalGeneration.from_pretrained(base)
    adapted = gk.attach(model, gk.plan(model, r=2))
    return gk.verify(adapted, checkpoint=base, settings=CheckSettings(select=("GK003",)))
