"""A run that would train the wrong thing does not begin, and its report says why."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.training.small import docstrings, save_model, trained_tokenizer, write_recipe

from graftkit.errors import SourceError, TrainingError
from graftkit.recipes.recipe import read_recipe
from graftkit.training.result import REPORT_NAME
from graftkit.training.run import train


def test_reentrant_checkpointing_on_shared_keys_is_refused_with_a_report(tmp_path: Path) -> None:
    rows = [{"prompt": signature, "completion": summary} for signature, summary in docstrings(32)]
    tokenizer = trained_tokenizer([text for row in rows for text in row.values()])
    base = save_model(tmp_path / "base", tokenizer, "gemma3n_text")
    args = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    }
    recipe = read_recipe(write_recipe(tmp_path / "sft.yaml", base, rows, trainer="sft", args=args))
    with pytest.raises(TrainingError) as caught:
        train(recipe)
    assert caught.value.code == "guard"
    page = (tmp_path / "out" / REPORT_NAME).read_text(encoding="utf-8")
    assert "GK202" in page
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_base_whose_weights_do_not_load_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": signature, "completion": summary} for signature, summary in docstrings(8)]
    base = save_model(tmp_path / "base", trained_tokenizer([text for row in rows for text in row.values()]))
    tensors = load_file(base / "model.safetensors")
    other = {key.replace("q_proj.weight", "q_proj.linear.weight"): tensor for key, tensor in tensors.items()}
    save_file(other, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError) as caught:
        train(read_recipe(write_recipe(tmp_path / "sft.yaml", base, rows)))
    assert caught.value.code == "weights-incomplete"
    assert not (tmp_path / "sft").exists()


def test_what_the_trainer_refuses_is_a_training_error(tmp_path: Path) -> None:
    rows = [{"prompt": signature, "completion": summary} for signature, summary in docstrings(8)]
    base = save_model(tmp_path / "base", trained_tokenizer([text for row in rows for text in row.values()]))
    adapter = {"targets": ["attention", "lm_head"]}
    with pytest.raises(TrainingError) as caught:
        train(read_recipe(write_recipe(tmp_path / "sft.yaml", base, rows, adapter=adapter)))
    assert caught.value.code == "trainer-refused"
    assert "lm_head" in str(caught.value.why)
    assert not (tmp_path / "sft").exists()
