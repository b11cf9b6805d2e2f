"""What a checkpoint holds against what its class expects, from headers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graftkit as gk
from graftkit.errors import SourceError

NAMES = ["google/gemma-4-E2B-it", "llama", "mixtral", "qwen3_moe", "t5", "llava", "deepseek_v3", "gpt_oss"]


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_is_whole(twin_of: Callable[[str], nn.Module], tmp_path: Path, name: str) -> None:
    """Names on disk are predicted exactly, for fused experts, renamed towers, ties and buffers alike."""
    twin_of(name).save_pretrained(tmp_path)
    found = gk.survey(str(tmp_path), headers=True).checkpoint
    assert found is not None
    assert (found.unknown, found.missing) == ((), ())
    assert found.tensors == len(load_file(tmp_path / "model.safetensors"))


def test_lost_clip_bounds_and_foreign_keys_show(e2b: nn.Module, tmp_path: Path) -> None:
    e2b.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    bounds = [key for key in tensors if key.endswith(("_min", "_max"))]
    kept = {key: tensor for key, tensor in tensors.items() if key not in bounds}
    save_file({**kept, "mtp.head.weight": torch.zeros(2)}, file)
    model_map = gk.survey(str(tmp_path), headers=True)
    assert bounds
    assert model_map.checkpoint is not None
    assert model_map.checkpoint.missing == tuple(sorted(bounds))
    assert model_map.checkpoint.unknown == ("mtp.head.weight",)
    assert model_map.checkpoint.unknown[0] in str(model_map)
    assert model_map.to_dict()["checkpoint"]["unknown"] == ["mtp.head.weight"]


def test_without_asking_no_file_is_read(e2b: nn.Module, tmp_path: Path) -> None:
    e2b.config.save_pretrained(tmp_path)
    assert gk.survey(str(tmp_path)).checkpoint is None
    with pytest.raises(SourceError):
        gk.survey(str(tmp_path), headers=True)
