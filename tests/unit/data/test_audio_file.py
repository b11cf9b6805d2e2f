"""Audio files: what is read of them at which rate, and how those that cannot be read are refused."""

from __future__ import annotations

import sys
import wave
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftkit.data.audio_file import AudioFile
from graftkit.errors import DataError, MissingDependencyError

soundfile = pytest.importorskip("soundfile")

RATE = 16_000


def tone(hertz: float, seconds: float = 0.5, rate: int = RATE, loudness: float = 0.5) -> Any:
    return (loudness * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def loudest(samples: Any, rate: int = RATE) -> float:
    """Return the frequency with the most energy, in Hz."""
    spectrum = np.abs(np.fft.rfft(samples))
    return float(np.fft.rfftfreq(len(samples), 1 / rate)[int(spectrum.argmax())])


def code_of(raised: pytest.ExceptionInfo[DataError]) -> str:
    return raised.value.code


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_a_tone_is_heard_at_the_rate_that_is_asked_for(tmp_path: Path, kind: str, rate: int) -> None:
    file = tmp_path / f"tone.{kind}"
    soundfile.write(file, tone(440, rate=rate), rate)
    samples = AudioFile(str(file)).read(RATE)
    assert samples.dtype == np.float32
    # An MP3 is written in whole blocks.
    assert samples.shape == (RATE // 2,) or (kind == "mp3" and RATE // 2 < len(samples) < RATE // 2 + 2000)
    assert loudest(samples) == pytest.approx(440, abs=2)
    # The ends of a sound that is resampled or coded are off.
    assert np.abs(samples[1000:-1000] - tone(440)[1000:-1000]).max() < 0.05


def test_a_wave_file_of_the_standard_library(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((tone(440) * 32767).astype("<i2").tobytes())
    samples = AudioFile(str(tmp_path / "tone.wav")).read(RATE)
    assert np.abs(samples - tone(440)).max() < 1e-4


def test_channels_are_mixed(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "two.wav", np.stack([tone(440), tone(880)], 1), RATE, subtype="FLOAT")
    samples = AudioFile(str(tmp_path / "two.wav")).read(RATE)
    assert np.abs(samples - (tone(440) + tone(880)) / 2).max() < 1e-6


def test_bytes_are_heard_as_their_file(tmp_path: Path) -> None:
    file = tmp_path / "tone.flac"
    soundfile.write(file, tone(440, rate=22_050), 22_050)
    kept = AudioFile.of({"path": "tone.flac", "bytes": file.read_bytes()}, "a row")
    assert kept.check(tmp_path / "elsewhere", "a row") is None
    assert np.array_equal(kept.read(RATE), AudioFile(str(file)).read(RATE))
    assert np.array_equal(AudioFile.of(file.read_bytes(), "a row").read(RATE), kept.read(RATE))


def test_a_path_is_relative_to_its_home(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "tone.wav", tone(440), RATE)
    full = str((tmp_path / "in" / "tone.wav").resolve())
    assert AudioFile("tone.wav").check(tmp_path / "in", "a row") == full
    assert AudioFile(full).check(tmp_path, "a row") == full


def broken(folder: Path, kind: str) -> None:
    file = folder / "tone.flac"
    soundfile.write(file, tone(440), RATE)
    content = file.read_bytes()
    if kind == "absent":
        file.unlink()
    elif kind == "a folder":
        file.unlink()
        file.mkdir()
    elif kind == "text":
        file.write_text("no sound")
    elif kind == "nothing":
        file.write_bytes(b"")
    elif kind == "without samples":
        soundfile.write(file, np.zeros(0), RATE, format="WAV")
    else:
        file.write_bytes(content[:20])


@pytest.mark.parametrize(
    "kind", ["absent", "a folder", "text", "nothing", "without samples", "cut within its header"]
)
def test_what_cannot_be_opened_is_refused_with_row_and_file(tmp_path: Path, kind: str) -> None:
    broken(tmp_path, kind)
    with pytest.raises(DataError) as caught:
        AudioFile("tone.flac").check(tmp_path, "rows.jsonl, row 3")
    assert code_of(caught) == "data-audio"
    assert caught.value.where == "rows.jsonl, row 3"
    assert str(tmp_path / "tone.flac") in str(caught.value.why)


def test_bytes_that_are_not_audio_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        AudioFile("inner.wav", b"no sound").check(tmp_path, "rows.parquet, row 2")
    assert code_of(caught) == "data-audio"
    assert "inner.wav" in str(caught.value.why)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_file_broken_behind_its_header_is_refused_when_it_is_read(tmp_path: Path, as_bytes: bool) -> None:
    file = tmp_path / "tone.flac"
    buffer = BytesIO()
    soundfile.write(buffer, np.random.default_rng(0).uniform(-1, 1, RATE), RATE, format="FLAC")
    content = bytearray(buffer.getvalue())
    content[len(content) // 2 : len(content) // 2 + 2000] = b"\xff\x00" * 1000
    file.write_bytes(content)
    audio = AudioFile(str(file), bytes(content) if as_bytes else None)
    audio.check(tmp_path, "a row")
    with pytest.raises(DataError) as caught:
        audio.read(RATE)
    assert (code_of(caught), caught.value.where) == ("data-audio", str(file))


@pytest.mark.parametrize("value", [[0.0, 0.5], 5, "", {"path": None}, {"url": "https://x"}], ids=str)
def test_what_is_no_file_is_refused(value: Any) -> None:
    with pytest.raises(DataError) as caught:
        AudioFile.of(value, "rows.jsonl, row 1")
    assert code_of(caught) == "data-audio"
    assert caught.value.where == "rows.jsonl, row 1"


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
def test_without_what_reads_them_files_are_refused_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    soundfile.write(tmp_path / "tone.wav", tone(440), RATE)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError) as caught:
        AudioFile("tone.wav").check(tmp_path, "a row")
    assert package in str(caught.value.why)
    assert package in str(caught.value.help)
