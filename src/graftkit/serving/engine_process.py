"""Run an engine in its own Python: a base and adapters in, log-probabilities or its refusals out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from graftkit.errors import EngineError
from graftkit.progress import Progress
from graftkit.serving.install import installation_of
from graftkit.text import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Seconds for one process: starting, and all that it serves.
TIME_LIMIT = 1800.0
# Bytes that are kept of what an engine prints, and lines of those that are repeated as its words.
_KEPT_OUTPUT = 64 * 1024
_LAST_LINES = 8
_LONGEST_WORDS = 2000
_LARGEST_RESULT = 4 * 1024 * 1024
_WORKERS = Path(__file__).parent / "workers"


@dataclass(frozen=True)
class Job:
    """What an engine is asked to serve.

    Attributes:
        base: the folder of the base, or the file that the engine loads.
        adapters: name -> folder or file, as the engine takes it.
        prefixes: token ids; the token after each is predicted.
        max_rank: of the adapters.
        options: further arguments of the engine.
        requests: adapter -> further arguments of its loading.
    """

    base: Path
    adapters: Mapping[str, Path]
    prefixes: Sequence[Sequence[int]]
    max_rank: int = 16
    options: Mapping[str, Any] = field(default_factory=dict)
    requests: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "base": str(self.base.resolve()),
            "adapters": {name: str(path.resolve()) for name, path in self.adapters.items()},
            "prefixes": [list(map(int, prefix)) for prefix in self.prefixes],
            "max_rank": self.max_rank,
            "options": dict(self.options),
            "requests": {name: dict(arguments) for name, arguments in self.requests.items()},
        }


@dataclass(frozen=True)
class Answer:
    """What an engine made of one model: log-probabilities or a refusal.

    Attributes:
        values: float32 of shape (prefixes, vocabulary); None where it refused.
        refusal: the engine's words; None where it served.
    """

    values: NDArray[Any] | None = field(default=None, compare=False)
    refusal: str | None = None


@dataclass(frozen=True)
class EngineRun:
    """What an engine made of a job.

    Attributes:
        engine: the engine's name and version; the name alone where it did not come so far.
        base: its answer for the base.
        adapters: name -> its answer; none where it refused the base.
        replaced: parts of the engine that were replaced for the run.
    """

    engine: str
    base: Answer
    adapters: Mapping[str, Answer]
    replaced: tuple[str, ...] = ()


def serve(
    engine: str,
    python: Path,
    job: Job,
    *,
    time_limit: float = TIME_LIMIT,
    on_progress: Callable[[Progress], None] | None = None,
) -> EngineRun:
    """Serve a base and its adapters in an engine.

    An adapter that ends the engine's process counts as refused, in the last words of the process, and the engine
    is started again for those that are left.

    Args:
        engine: "vllm", "llama.cpp" or "mlx".
        python: the Python that the engine is installed in (see ``install.engine_python``).
        time_limit: seconds that one process may take; it is killed then, with all that it started.
        on_progress: called as the engine is started.

    Raises:
        EngineError: ``engine-unknown``; ``engine-missing``: that Python cannot be started; ``engine-timeout``;
            ``engine-died``: it ended and had served nothing; ``engine-answer``: what it wrote cannot be read.
    """
    report = on_progress or (lambda _progress: None)
    found: dict[str, Answer] = {}
    while True:
        report(Progress(f"serving in {engine}", len(found), 1 + len(job.adapters)))
        known = len(found)
        waiting = {name: path for name, path in job.adapters.items() if name not in found}
        result = _serve_once(engine, python, replace(job, adapters=waiting), time_limit)
        found |= result.models
        missing = [name for name in job.adapters if name not in found]
        # Without anything new, starting it once more would end in the same way.
        if not missing or found[""].values is None or len(found) == known:
            break
    if missing and found[""].values is not None:
        raise _unreadable(engine, f"it says nothing of {', '.join(missing)}")
    return EngineRun(
        engine=engine if result.version is None else f"{engine} {result.version}",
        base=found.pop(""),
        adapters=found,
        replaced=result.replaced,
    )


def _serve_once(engine: str, python: Path, job: Job, time_limit: float) -> _Result:
    """Start the engine once; the adapter with which its process ends is refused in its last words."""
    with tempfile.TemporaryDirectory(prefix="graftkit-serve-") as temporary:
        folder = Path(temporary)
        (folder / "job.json").write_text(json.dumps(job.to_dict()), encoding="utf-8")
        worker = installation_of(engine).worker
        ended = _run([str(python), "-P", str(_WORKERS / "launch.py"), worker, temporary], engine, time_limit)
        result = _read(folder / "served", len(job.prefixes), engine, ended)
    if "" not in result.models:
        raise _died(engine, ended)
    if result.current is None:
        return result
    return replace(result, models={**result.models, result.current: Answer(refusal=ended.words)})


@dataclass(frozen=True)
class _Ended:
    """How a process ended.

    Attributes:
        status: its exit status, negative for a signal.
        output: the end of what it printed.
    """

    status: int
    output: str

    @property
    def words(self) -> str:
        how = (
            f"it was ended by {signal.Signals(-self.status).name}" if self.status < 0 else f"status {self.status}"
        )
        said = _last_lines(self.output)
        return f"{how}: {said}" if said else how


def _last_lines(output: str) -> str:
    """Return the end of what a program printed, safe to print; "" where it printed nothing."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    return printable("\n".join(lines[-_LAST_LINES:])[-_LONGEST_WORDS:], _LONGEST_WORDS)


def _run(command: list[str], engine: str, time_limit: float) -> _Ended:
    """Run a command to its end; keep the end of what it prints, whatever its length."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
        )
    except OSError as error:
        raise EngineError(
            f"the Python of {engine} cannot be started",
            where=command[0],
            why=error.strerror,
            help=installation_of(engine).command,
            code="engine-missing",
        ) from error
    assert process.stdout is not None
    tail = _Tail(process.stdout)
    try:
        process.wait(time_limit)
    except subprocess.TimeoutExpired as error:
        _kill(process)
        raise EngineError(
            f"{engine} did not finish within {time_limit:.0f} s",
            where=command[0],
            why=f"it printed last: {printed}" if (printed := _last_lines(tail.text())) else "it printed nothing",
            help="--time-limit gives it longer",
            code="engine-timeout",
        ) from error
    except BaseException:
        _kill(process)
        raise
    _kill(process)  # what it left behind would keep the pipe open
    return _Ended(process.returncode, tail.text())


def _environment() -> dict[str, str]:
    """Return this process's variables without its Python's, and without anything that looks like a secret."""
    secret = ("TOKEN", "KEY", "SECRET", "PASSWORD")
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PYTHON") and not name.upper().endswith(secret)
    }


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class _Tail:
    """Read a stream to its end and keep the last bytes: what prints forever must not fill the memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._kept = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self._stream:
            while block := self._stream.read1(8192):  # type: ignore[attr-defined]
                self._kept = (self._kept + block)[-_KEPT_OUTPUT:]

    def text(self) -> str:
        """Return what was kept, once the stream has ended."""
        self._reader.join(timeout=5)
        return self._kept.decode("utf-8", errors="replace")


@dataclass(frozen=True)
class _Result:
    version: str | None
    replaced: tuple[str, ...]
    models: Mapping[str, Answer]
    current: str | None


def _read(folder: Path, prefixes: int, engine: str, ended: _Ended) -> _Result:
    file = folder / "result.json"
    if not file.is_file():
        raise _died(engine, ended)
    try:
        if file.stat().st_size > _LARGEST_RESULT:
            raise ValueError(f"{file.name} has {file.stat().st_size:,} bytes")
        fields = json.loads(file.read_text(encoding="utf-8"))
        models = {str(name): _answer(folder, entry, prefixes) for name, entry in fields["models"].items()}
        version = None if fields["version"] is None else printable(str(fields["version"]))
        replaced = tuple(printable(str(part)) for part in fields["replaced"])
        current = None if fields["current"] is None else str(fields["current"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(engine, f"{type(error).__name__}: {error}; {ended.words}") from error
    return _Result(version, replaced, models, current)


def _answer(folder: Path, entry: Mapping[str, Any], prefixes: int) -> Answer:
    import numpy as np

    if "refused" in entry:
        return Answer(refusal=printable(str(entry["refused"]), _LONGEST_WORDS))
    name = str(entry["file"])
    if Path(name).name != name:
        raise ValueError(f"{name!r} is outside its folder")
    values = np.load(folder / name, allow_pickle=False)
    if values.ndim != 2 or values.shape[0] != prefixes or values.dtype != np.float32:
        raise ValueError(f"{name} holds {values.dtype} of shape {values.shape}, not {prefixes} rows of float32")
    return Answer(values=values)


def _died(engine: str, ended: _Ended) -> EngineError:
    return EngineError(
        f"{engine} ended before it had served the base",
        why=ended.words,
        help="run it alone with that base: its own message names the cause",
        code="engine-died",
    )


def _unreadable(engine: str, why: str) -> EngineError:
    return EngineError(
        f"what {engine} answered cannot be read",
        why=why,
        help="give the Python of the engine itself with --python",
        code="engine-answer",
    )
