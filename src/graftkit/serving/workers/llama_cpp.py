"""llama.cpp through llama-cpp-python: GGUF files, converted by llama.cpp's own scripts where they are not."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Where the converters are: a checkout of llama.cpp, or the source distribution unpacked beside the engine.
_CHECKOUT = "LLAMA_CPP_SOURCE"
_GGML_F32 = 0
_ERROR_LEVEL = 4
# Lines of a failed conversion that are repeated.
_LAST_LINES = 6


def start(job: dict[str, Any], folder: Path) -> LlamaSession:
    """Convert the base unless it is a GGUF file, and load it; ``options`` are arguments of ``llama_cpp.Llama``."""
    import llama_cpp

    base = Path(job["base"])
    model = base if base.is_file() else _convert(base, folder / "base.gguf", "convert_hf_to_gguf.py")
    return LlamaSession(model, base, folder, job, str(llama_cpp.__version__))


class LlamaSession:
    """A base as a GGUF file (see ``launch.Session``)."""

    replaced: tuple[str, ...] = ()

    def __init__(self, model: Path, base: Path, folder: Path, job: dict[str, Any], version: str) -> None:
        import llama_cpp

        self.version = version
        self._model = model
        self._base = base
        self._folder = folder
        self._prefixes: list[list[int]] = job["prefixes"]
        self._options: dict[str, Any] = job.get("options", {})
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
        return _convert(adapter, out, "convert_lora_to_gguf.py", "--base", str(self._base))

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


def _convert(source: Path, out: Path, script: str, *arguments: str) -> Path:
    """Run a converter of llama.cpp's, in float32.

    Raises:
        RuntimeError: its last lines, where it fails.
    """
    command = [str(_scripts() / script), "--outtype", "f32", "--outfile", str(out), *arguments, str(source)]
    done = subprocess.run(
        [sys.executable, "-P", __file__, *command], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode or not out.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError("\n".join([f"{script} failed", *lines[-_LAST_LINES:]]))
    return out


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


def _run_converter(script: str, arguments: list[str]) -> None:
    """Run a converter in this process; a tokenizer that it does not know is no obstacle.

    It knows tokenizers by a hash, and stops at others. What is served here are token ids, never text.
    """
    import runpy

    sys.path[:0] = [str(Path(script).parent / "gguf-py"), str(Path(script).parent)]
    from conversion import base

    known = base.TextModel.get_vocab_base_pre

    def or_default(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return "gpt-2"

    base.TextModel.get_vocab_base_pre = or_default
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    _run_converter(sys.argv[1], sys.argv[2:])
