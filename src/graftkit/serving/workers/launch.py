"""Serve a base and its adapters in one engine, and write the log-probabilities of the next tokens.

Run as ``python -P launch.py ENGINE JOB`` by the Python that the engine is installed in, where ENGINE is the stem
of a file beside this one. ``JOB/job.json`` holds

- ``base``: the folder of the model, or the file that the engine loads;
- ``adapters``: name -> folder or file, as the engine takes it;
- ``prefixes``: lists of token ids;
- ``max_rank``: of the adapters;
- ``options``: further arguments of the engine; ``requests``: adapter -> further arguments of its loading.

After each model ``JOB/served/result.json`` is written again: the engine, its version, which of its parts were
replaced, and for each model the file beside it with its log-probabilities (float32, (prefixes, vocabulary)) or the
engine's words if it refused. The base's name is "".
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class Session(Protocol):
    """A base that an engine has loaded.

    Attributes:
        version: the engine's version.
        replaced: the parts of the engine that were replaced so far, as kernels that need a GPU.
    """

    version: str
    replaced: Sequence[str]

    def base(self) -> Any:
        """Return the base's log-probabilities after each prefix: float32, (prefixes, vocabulary)."""

    def load(self, name: str, path: str) -> Any:
        """Return an adapter as the engine has loaded it; what it raises is a refusal, and it can go on."""

    def adapted(self, adapter: Any) -> Any:
        """Return the log-probabilities with an adapter; what it raises ends the engine."""


def main(engine: str, folder: Path) -> None:
    """Serve what the job asks for; end with 1 where the engine cannot go on."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    results = Results(folder / "served")
    results.begin("")
    try:
        session = _worker(engine).start(job, folder)
        results.session = session
        results.add("", session.base())
    except Exception as error:
        results.refuse("", _words(error))
        raise
    for name, path in job["adapters"].items():
        results.begin(name)
        try:
            adapter = session.load(name, path)
        except Exception as error:
            results.refuse(name, _words(error))
            continue
        try:
            results.add(name, session.adapted(adapter))
        except Exception as error:
            results.refuse(name, _words(error))
            raise


def _worker(engine: str) -> Any:
    """Load the file of an engine without a search path: under its own name it would hide the engine's package."""
    spec = importlib.util.spec_from_file_location(f"serve_in_{engine}", Path(__file__).with_name(f"{engine}.py"))
    if spec is None or spec.loader is None:
        raise ImportError(f"there is no file for {engine}")
    worker = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = worker  # dataclasses look their module up
    spec.loader.exec_module(worker)
    return worker


def _words(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Results:
    """What is written for graftkit, after each model: the process may not live to serve the next.

    Attributes:
        session: what serves, once it has started.
    """

    session: Session | None = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fields: dict[str, Any] = {"version": None, "replaced": [], "models": {}, "current": None}
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, name: str) -> None:
        """Note that a model is being served: if the process dies, it was this one."""
        self._fields["current"] = name
        self._write()

    def add(self, name: str, values: Any) -> None:
        """Write the log-probabilities of one model."""
        import numpy as np

        file = f"{len(self._fields['models'])}.npy"
        np.save(self._folder / file, np.asarray(values, dtype=np.float32), allow_pickle=False)
        self._note(name, {"file": file})

    def refuse(self, name: str, words: str) -> None:
        """Write why the engine does not serve a model."""
        self._note(name, {"refused": words})

    def _note(self, name: str, entry: dict[str, str]) -> None:
        self._fields["models"][name] = entry
        self._fields["current"] = None
        self._write()

    def _write(self) -> None:
        if self.session is not None:
            self._fields |= {"version": self.session.version, "replaced": list(self.session.replaced)}
        beside = self._folder / "result.json.part"
        beside.write_text(json.dumps(self._fields), encoding="utf-8")
        beside.replace(self._folder / "result.json")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
