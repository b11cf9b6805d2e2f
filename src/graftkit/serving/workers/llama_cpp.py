"""llama.cpp through llama-cpp-python: GGUF files, converted by llama.cpp's own scripts where they are not."""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

# Where the converters are: a checkout of llama.cpp, or the source distribution unpacked beside the engine.
_CHECKOUT = "LLAMA_CPP_SOURCE"
_GGML_F32 = 0
_ERROR_LEVEL = 4
# Lines of a failed conversion or loading that are repeated.
_LAST_LINES = 6


def start(job: dict[str, Any], folder: Path) -> LlamaSession:
    """Convert the base unless it is a GGUF file, and load it; ``options`` are arguments of ``llama_cpp.Llama``."""
    import llama_cpp

    base, converters = Path(job["base"]), Converters()
    model = base if base.is_file() else converters.convert(base, folder / "base.gguf", "convert_hf_to_gguf.py")
    return LlamaSession(model, base, folder, job, str(llama_cpp.__version__), converters)


class LlamaSession:
    """A base as a GGUF file (see ``launch.Session``)."""

    replaced: tuple[str, ...] = ()

    def __init__(
        self, model: Path, base: Path, folder: Path, job: dict[str, Any], version: str, converters: Converters
    ) -> None:
        import llama_cpp

        self.version = version
        self._model = model
        self._base = base
        self._folder = folder
        self._prefixes: list[list[int]] = job["prefixes"]
        self._options: dict[str, Any] = job.get("options", {})
        self._converters = converters
        self._converted = 0
        self._errors: list[str] = []
        # The object has to live as long as the library may call it.
        self._log = llama_cpp.llama_log_callback(self._note)

    def base(self) -> Any:
        return self._log_probabilities(self._open(None))

    def load(self, _name: str, path: str) -> Any:
        return self._open(self._as_gguf(Path(path)))

    def adapted(self, adapter: Any) -> Any:
        return self._log_probabilities(adapter)

    def _as_gguf(self, adapter: Path) -> Path:
        if adapter.is_file():
            return adapter
        files = sorted(adapter.glob("*.gguf"))
        if files:
            return files[0]
        self._converted += 1
        out = self._folder / f"adapter-{self._converted}.gguf"
        return self._converters.convert(adapter, out, "convert_lora_to_gguf.py", "--base", str(self._base))

    def _open(self, adapter: Path | None) -> Any:
        import llama_cpp

        longest = max(len(prefix) for prefix in self._prefixes)
        # Quiet, it would replace the log's receiver; loud, it keeps this one.
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        self._errors.clear()
        options: dict[str, Any] = {"n_ctx": longest + 8, "type_k": _GGML_F32, "type_v": _GGML_F32}
        lora = {} if adapter is None else {"lora_path": str(adapter)}
        try:
            return llama_cpp.Llama(str(self._model), verbose=True, **{**options, **self._options, **lora})
        except (ValueError, RuntimeError, AttributeError) as error:
            said = "\n".join(self._errors[-_LAST_LINES:])
            raise RuntimeError(said or str(error)) from error

    def _note(self, level: int, text: bytes, _data: Any) -> None:
        line = text.decode("utf-8", errors="replace")
        if level == _ERROR_LEVEL:
            self._errors.append(line.strip())
            sys.stderr.write(line)

    def _log_probabilities(self, model: Any) -> Any:
        import numpy as np

        rows = []
        for prefix in self._prefixes:
            model.reset()
            model.eval(prefix)
            logits = np.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),)).astype(np.float64)
            logits -= logits.max()
            rows.append(logits - np.log(np.exp(logits).sum()))
        model.close()
        return np.stack(rows)


class Converters:
    """One process for all of llama.cpp's converters: importing what they need takes longer than a conversion.

    It is started with the first conversion, and again where one ended it. It reads a command a line, as a JSON
    list, and answers each with a line.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115

    def convert(self, source: Path, out: Path, script: str, *arguments: str) -> Path:
        """Run a converter, in float32.

        Raises:
            RuntimeError: its last lines, where it fails.
            FileNotFoundError: the converters are not there.
        """
        command = [str(_scripts() / script), "--outtype", "f32", "--outfile", str(out), *arguments, str(source)]
        before = self._said.seek(0, os.SEEK_END)
        if not self._done(command) or not out.is_file():
            self._said.seek(before)
            said = self._said.read().decode("utf-8", errors="replace")
            lines = [line for line in said.splitlines() if line.strip()]
            raise RuntimeError("\n".join([f"{script} failed", *lines[-_LAST_LINES:]]))
        return out

    def _done(self, command: list[str]) -> bool:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        except OSError:
            return False
        answer = process.stdout.readline()
        if not answer:
            # It has ended, which the system may not say at once.
            self._end()
        return answer == "done\n"

    def close(self) -> None:
        """End the process."""
        self._end()
        self._said.close()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            pipe = subprocess.PIPE
            start = [sys.executable, "-P", __file__]
            self._process = subprocess.Popen(start, stdin=pipe, stdout=pipe, stderr=self._said, text=True)
        return self._process


def _scripts() -> Path:
    """Return the folder of llama.cpp's converters.

    Raises:
        FileNotFoundError: they are not there.
    """
    named = os.environ.get(_CHECKOUT)
    folders = [Path(named)] if named else sorted(Path(sys.prefix, "src").glob("*/vendor/llama.cpp"))
    for folder in folders:
        if (folder / "convert_hf_to_gguf.py").is_file():
            return folder
    raise FileNotFoundError(
        f"llama.cpp's convert_hf_to_gguf.py is not in {Path(sys.prefix, 'src')}/*/vendor/llama.cpp; "
        f"{_CHECKOUT} names a checkout of llama.cpp"
    )


def _prepare(folder: Path) -> None:
    """Let converters be imported; a tokenizer that they do not know is not an obstacle.

    They know tokenizers by a hash, and stop at others. What is served here are token ids, never text.
    """
    sys.path[:0] = [str(folder / "gguf-py"), str(folder)]
    from conversion import base

    known = base.TextModel.get_vocab_base_pre

    def or_default(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return "gpt-2"

    base.TextModel.get_vocab_base_pre = or_default


def _run(command: list[str]) -> bool:
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
        return not error.code
    except Exception:
        traceback.print_exc()
        return False
    return True


def _serve() -> None:
    # What a converter prints is not an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    prepared = False
    for line in sys.stdin:
        command = json.loads(line)
        if not prepared:
            _prepare(Path(command[0]).parent)
            prepared = True
        done = _run(command)
        sys.stderr.flush()
        answers.write("done\n" if done else "failed\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
