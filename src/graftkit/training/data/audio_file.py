"""One sound in a file, or in a file's bytes: opened before training, read while it runs."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from graftkit.errors import DataError, MissingDependencyError


@dataclass(frozen=True)
class SoundFile:
    """A sound that a row names.

    Attributes:
        path: of the file, as the row has it; empty where there is none.
        content: the file's bytes, or None.
    """

    path: str
    content: bytes | None = None

    @classmethod
    def of(cls, sound: Any, where: str) -> SoundFile:
        """What a column's cell means: a path, bytes, or a mapping with ``path`` or ``bytes``.

        Raises:
            DataError: ``data-audio``: it is none of these.
        """
        both = (sound.get("path"), sound.get("bytes")) if isinstance(sound, Mapping) else (sound, sound)
        path = both[0] if isinstance(both[0], str) else ""
        content = both[1] if isinstance(both[1], bytes) else None
        if not path and content is None:
            help = "a column holds paths, files with bytes, or arrays, and no two of them"
            raise refused("a sound is no file", where, f"it is {str(sound)[:60]!r}", help)
        return cls(path, content)

    def opened(self, home: Path, where: str) -> str | None:
        """Its full path, None where it comes as bytes; its header has been read.

        Raises:
            DataError: ``data-audio``: there is no such file, or libsndfile does not read it.
            MissingDependencyError: nothing reads it.
        """
        if self.content is not None:
            _open(BytesIO(self.content), self.path or "its bytes", where)
            return None
        file = (home / Path(self.path).expanduser()).resolve()
        if not file.is_file():
            raise refused("a sound is not there", where, str(file), "paths are relative to the data file")
        _open(str(file), str(file), where)
        return str(file)

    def read(self, sampling_rate: int) -> Any:
        """Float32 samples of shape (T,) in [-1, 1]: one channel, at this rate in Hz.

        Read by transformers with soundfile and soxr, as its processors read files, whatever else is installed.

        Raises:
            DataError: ``data-audio``: the file is broken behind its header.
        """
        from transformers.audio_utils import load_audio

        source = self.path if self.content is None else f"data:;base64,{b64encode(self.content).decode()}"
        try:
            return load_audio(source, sampling_rate, backend="soundfile")
        except (RuntimeError, ValueError, OSError) as error:
            raise _unreadable(self.path or "a sound that came as bytes", str(error)) from error


def refused(what: str, where: str, why: str, help: str) -> DataError:
    """The error of a sound that cannot be trained on."""
    return DataError(what, where=where, why=why, help=help, code="data-audio")


def _unreadable(where: str, why: str) -> DataError:
    help = "WAV, FLAC, OGG and MP3 are read; `ffmpeg -i FILE FILE.wav` converts others"
    return refused("a sound cannot be read", where, why, help)


def _open(source: Any, name: str, where: str) -> None:
    """Read a file's header, which tells how long it is."""
    soundfile = _soundfile()
    try:
        frames = soundfile.info(source).frames
    except (RuntimeError, OSError) as error:  # libsndfile's are RuntimeErrors
        raise _unreadable(where, f"{name}: {error}") from error
    if not frames:
        raise _unreadable(where, f"{name} holds no sample")


def _soundfile() -> Any:
    try:
        import soundfile
        import soxr  # noqa: F401  # transformers asks for it even where no rate has to change
    except (ImportError, OSError) as error:  # OSError: the package is there, and libsndfile is not
        raise MissingDependencyError(
            "files of sounds cannot be read", why=str(error), help="pip install soundfile soxr"
        ) from error
    return soundfile
