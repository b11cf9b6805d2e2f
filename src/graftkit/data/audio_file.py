"""One audio file, or the bytes of one: checked before training, read while it runs."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from graftkit.errors import DataError, MissingDependencyError


@dataclass(frozen=True)
class AudioFile:
    """An audio file that a row names or contains.

    Attributes:
        path: as the row has it; "" for none.
        content: the file's bytes, or None.
    """

    path: str
    content: bytes | None = None

    @classmethod
    def of(cls, cell: Any, where: str) -> AudioFile:
        """Read a column's cell: a path, bytes, or a mapping with ``path`` or ``bytes``.

        Raises:
            DataError: ``data-audio``: it is none of these.
        """
        both = (cell.get("path"), cell.get("bytes")) if isinstance(cell, Mapping) else (cell, cell)
        path = both[0] if isinstance(both[0], str) else ""
        content = both[1] if isinstance(both[1], bytes) else None
        if not path and content is None:
            help = "a column holds paths, files with bytes, or arrays, and only one of these"
            raise audio_error("not an audio file", where, f"the row has {str(cell)[:60]!r}", help)
        return cls(path, content)

    def check(self, home: Path, where: str) -> str | None:
        """Read the file's header; return the full path, or None for bytes.

        Raises:
            DataError: ``data-audio``: there is no such file, or libsndfile does not read it.
            MissingDependencyError: soundfile or soxr.
        """
        if self.content is not None:
            _check_header(BytesIO(self.content), self.path or "its bytes", where)
            return None
        file = (home / Path(self.path).expanduser()).resolve()
        if not file.is_file():
            raise audio_error("an audio file is missing", where, str(file), "paths are relative to the data file")
        _check_header(str(file), str(file), where)
        return str(file)

    def read(self, sampling_rate: int) -> Any:
        """Return float32 samples of shape (T,) in [-1, 1]: one channel, at this rate in Hz.

        Read by transformers with soundfile and soxr, as its processors read files, whatever else is installed.

        Raises:
            DataError: ``data-audio``: the file is broken behind its header.
        """
        from transformers.audio_utils import load_audio

        source = self.path if self.content is None else f"data:;base64,{b64encode(self.content).decode()}"
        try:
            return load_audio(source, sampling_rate, backend="soundfile")
        except (RuntimeError, ValueError, OSError) as error:
            raise _unreadable(self.path or "audio given as bytes", str(error)) from error


def audio_error(what: str, where: str, why: str, help: str) -> DataError:
    return DataError(what, where=where, why=why, help=help, code="data-audio")


def _unreadable(where: str, why: str) -> DataError:
    help = "WAV, FLAC, OGG and MP3 are read; `ffmpeg -i FILE FILE.wav` converts others"
    return audio_error("an audio file cannot be read", where, why, help)


def _check_header(source: Any, name: str, where: str) -> None:
    soundfile = _soundfile()
    try:
        frames = soundfile.info(source).frames
    except (RuntimeError, OSError) as error:  # libsndfile's are RuntimeErrors
        raise _unreadable(where, f"{name}: {error}") from error
    if not frames:
        raise _unreadable(where, f"{name} has no samples")


def _soundfile() -> Any:
    try:
        import soundfile
        import soxr  # noqa: F401  # transformers asks for it even where no rate has to change
    except (ImportError, OSError) as error:  # OSError: the package is there, and libsndfile is not
        raise MissingDependencyError(
            "audio files cannot be read", why=str(error), help="pip install soundfile soxr"
        ) from error
    return soundfile
