"""Ten tones, as short noisy samples of random loudness and phase, and the question which one it is."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16_000
PROMPT = "<bos><|audio|>"
_SAMPLES = 2560
# A fifth of an octave apart at the low end; each is several mel bins from its neighbours.
_HERTZ = tuple(300 * 1.3**tone for tone in range(10))


def sound(tone: int, random: np.random.Generator) -> Any:
    """0.16 s at 16 kHz, float32 in [-1, 1]: a sine, as loud as its noise at the quietest."""
    loudness, phase = random.uniform(0.1, 0.5), random.uniform(0, 2 * np.pi)
    wave = loudness * np.sin(2 * np.pi * _HERTZ[tone] * np.arange(_SAMPLES) / RATE + phase)
    return (wave + 0.1 * random.standard_normal(_SAMPLES)).clip(-1, 1).astype(np.float32)


def save_tones(folder: Path, rows: int, seed: int) -> Any:
    """As many sounds of every tone, saved as a dataset of audio, prompt and completion."""
    from datasets import Dataset, Features, List, Value

    random = np.random.default_rng(seed)
    tones = [row % 10 for row in range(rows)]
    features = Features(
        {"audio": List(Value("float32")), "prompt": Value("string"), "completion": Value("string")}
    )
    made = Dataset.from_dict(
        {
            "audio": [sound(tone, random) for tone in tones],
            "prompt": [PROMPT] * rows,
            "completion": [str(tone) for tone in tones],
        },
        features=features,
    )
    made.save_to_disk(folder)
    return made


def write_tones(folder: Path, rows: int, seed: int) -> list[dict[str, Any]]:
    """As many sounds of every tone: a WAV file each, beside a rows.jsonl that names them.

    Returns:
        The rows with their sounds as arrays instead.
    """
    folder.mkdir()
    random = np.random.default_rng(seed)
    made = [{"audio": sound(r % 10, random), "prompt": PROMPT, "completion": str(r % 10)} for r in range(rows)]
    for at, row in enumerate(made):
        _write_wave(folder / f"{at}.wav", row["audio"])
    named = ({**row, "audio": f"{at}.wav"} for at, row in enumerate(made))
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in named))
    return made


def _write_wave(file: Path, samples: Any) -> None:
    """In 16 bits, one channel."""
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes((samples * 32767).astype("<i2").tobytes())
