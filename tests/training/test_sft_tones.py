"""SFT with WAV files on a twin of Gemma 4 E2B: which of ten tones is played, with an adapted audio tower."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tests.training import gemma
from tests.training.proof import reloaded, run
from tests.training.small import QUICK
from tests.training.tones import write_tones

from graftkit.demo.processor import known_to_transformers
from graftkit.training.trainers.audio_collator import AudioCollator

ARGS = {
    "max_steps": 150,
    "per_device_train_batch_size": 32,
    "learning_rate": 3e-3,
    "warmup_steps": 10,
    "use_cpu": True,
    "save_strategy": "no",
}


def test_tones_are_distinguished(tmp_path: Path) -> None:
    processor = gemma.processor()
    base = gemma.save_base(tmp_path / "base", processor)
    write_tones(tmp_path / "train", 800, seed=0)
    held_out = write_tones(tmp_path / "held out", 200, seed=1)
    fields = {
        "model": str(base),
        "adapter": {"scope": ["language", "audio"], "r": 16, "alpha": 32},
        "data": {"path": "train/rows.jsonl", "eval_path": "held out/rows.jsonl"},
        "args": {**QUICK, **ARGS, "output_dir": str(tmp_path / "out")},
    }
    recipe = tmp_path / "tones.yaml"
    recipe.write_text(json.dumps(fields))
    with known_to_transformers(processor):
        result, model = run(recipe)
    loss = result.curve("loss")
    assert loss[-1][1] < 0.5 * loss[0][1]
    # The completion is one token, taken out of the whole vocabulary: chance among the tones alone is 0.1.
    assert result.metrics["eval_mean_token_accuracy"] > 0.5
    moved = {name for name, up in model.named_parameters() if "lora_B" in name and up.detach().any()}
    assert moved == {name for name, _ in model.named_parameters() if "lora_B" in name}
    assert any("audio_tower" in name for name in moved)
    batch = AudioCollator(processor)(held_out[:4])
    batch["input_features_mask"] = batch["input_features_mask"].to(torch.bool)
    assert reloaded(model, base, result.folder, batch).faithful
