"""An engine that works, dies, hangs, floods, or writes nonsense: each is a small program in its Python's place."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from graftkit.errors import EngineError
from graftkit.serving.engine_process import EngineRun, Job, serve

Engine = Callable[[str], Path]

# What every program below begins with: it reads its job as launch.py does.
PRELUDE = """
import json, os, sys, time
from pathlib import Path
import numpy as np
folder = Path(sys.argv[-1])
job = json.loads((folder / "job.json").read_text())
out = folder / "served"
out.mkdir()
models = {}

def write(current=None, **fields):
    known = {"version": "1.0", "replaced": [], "models": models, "current": current}
    (out / "result.json").write_text(json.dumps({**known, **fields}))

def answer(name, value):
    file = f"{len(models)}.npy"
    np.save(out / file, np.full((len(job["prefixes"]), 5), value, np.float32))
    models[name] = {"file": file}
    write()
"""


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Return a program, as the path that is started in the place of the engine's Python."""

    def make(body: str) -> Path:
        script = tmp_path / "program.py"
        script.write_text(PRELUDE + textwrap.dedent(body))
        start = tmp_path / "python"
        start.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
        start.chmod(0o755)
        return start

    return make


def run(python: Path, *names: str, time_limit: float = 60) -> EngineRun:
    job = Job(Path("base"), {name: Path(name) for name in names}, [[1, 2], [3]])
    return serve("vllm", python, job, time_limit=time_limit)


def failure(python: Path, *names: str, time_limit: float = 60) -> EngineError:
    with pytest.raises(EngineError) as caught:
        run(python, *names, time_limit=time_limit)
    return caught.value


def test_base_and_adapters_come_back(engine: Engine) -> None:
    found = run(
        engine("""
            answer("", -1)
            models["b"] = {"refused": "ValueError: no such rank"}
            answer("a", -2)
            write(replaced=["a kernel"])
        """),
        "a",
        "b",
    )
    assert found.engine == "vllm 1.0"
    assert found.replaced == ("a kernel",)
    assert np.array_equal(found.base.values, np.full((2, 5), -1, np.float32))
    assert np.array_equal(found.adapters["a"].values, np.full((2, 5), -2, np.float32))
    assert found.adapters["b"].refusal == "ValueError: no such rank"


def test_a_refused_base_leaves_no_adapters(engine: Engine) -> None:
    found = run(engine("models[''] = {'refused': 'no such architecture'}; write(); sys.exit(1)"), "a")
    assert found.base.refusal == "no such architecture"
    assert found.adapters == {}


def test_an_adapter_that_kills_the_engine_is_refused_and_the_rest_are_served(engine: Engine) -> None:
    found = run(
        engine("""
            answer("", -1)
            for name in job["adapters"]:
                if name == "bad":
                    write(current=name)
                    sys.stderr.write("GGML_ASSERT failed\\n")
                    sys.stderr.flush()
                    os.abort()
                answer(name, -2)
        """),
        "first",
        "bad",
        "last",
    )
    assert found.adapters["first"].values is not None
    assert found.adapters["last"].values is not None
    assert found.adapters["bad"].values is None
    assert "GGML_ASSERT failed" in (found.adapters["bad"].refusal or "")
    assert "SIGABRT" in (found.adapters["bad"].refusal or "")


def test_an_engine_that_dies_at_once_is_an_error_with_its_last_words(engine: Engine) -> None:
    found = failure(engine("sys.exit('no libcudart')"))
    assert found.code == "engine-died"
    assert "no libcudart" in (found.why or "")


def test_an_engine_that_dies_on_the_base_is_an_error(engine: Engine) -> None:
    assert failure(engine("write(current=''); os.abort()"), "a").code == "engine-died"


def test_an_engine_that_hangs_is_killed_with_its_children(engine: Engine) -> None:
    python = engine("""
        import subprocess
        child = subprocess.Popen(["sleep", "600"])
        print("waiting in", child.pid, flush=True)
        time.sleep(600)
    """)
    started = time.monotonic()
    found = failure(python, time_limit=2)
    assert found.code == "engine-timeout"
    assert time.monotonic() - started < 30
    child = int((found.why or "").split("waiting in ")[1].split()[0])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_an_engine_that_prints_for_ever_is_cut_to_its_last_words(engine: Engine) -> None:
    found = failure(engine("print('x' * 50_000_000); print('the end', flush=True); sys.exit(1)"))
    assert found.code == "engine-died"
    assert "the end" in (found.why or "")
    assert len(found.why or "") < 5000


@pytest.mark.parametrize(
    "body",
    [
        "(out / 'result.json').write_text('<html>')",
        "(out / 'result.json').write_text('[]')",
        "(out / 'result.json').write_text(json.dumps('x' * 5_000_000))",
        "write(models={'': {'file': '../../../etc/passwd'}})",
        "write(models={'': {'file': 'missing.npy'}})",
        "models[''] = {}; write()",
        "np.save(out / '0.npy', np.zeros((9, 5), np.float32)); models[''] = {'file': '0.npy'}; write()",
        "np.save(out / '0.npy', np.zeros((2, 5))); models[''] = {'file': '0.npy'}; write()",
    ],
    ids=["html", "list", "huge", "elsewhere", "no file", "no answer", "other shape", "other dtype"],
)
def test_an_answer_that_is_none_is_an_error(engine: Engine, body: str) -> None:
    assert failure(engine(body)).code == "engine-answer"


def test_a_forgotten_adapter_is_an_error(engine: Engine) -> None:
    assert failure(engine("answer('', -1)"), "a").code == "engine-answer"


def test_an_engine_that_ends_without_a_word_on_any_adapter_is_not_started_for_ever(engine: Engine) -> None:
    assert failure(engine("answer('', -1); sys.exit(1)"), "a").code == "engine-answer"


def test_an_adapter_after_which_the_engine_ends_is_refused_and_the_rest_are_served(engine: Engine) -> None:
    found = run(
        engine("""
            answer("", -1)
            name = next(iter(job["adapters"]))
            models[name] = {"refused": f"no {name}"}
            write()
            sys.exit(1)
        """),
        "a",
        "b",
    )
    assert {name: answer.refusal for name, answer in found.adapters.items()} == {"a": "no a", "b": "no b"}


def test_nothing_is_unpickled(engine: Engine, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    python = engine(f"""
        class Trap:
            def __reduce__(self):
                return (os.mkdir, ({str(mark)!r},))
        np.save(out / "0.npy", np.array([[Trap()], [Trap()]], dtype=object), allow_pickle=True)
        models[""] = {{"file": "0.npy"}}
        write()
    """)
    assert failure(python).code == "engine-answer"
    assert not mark.exists()


def test_a_python_that_is_not_there_is_a_missing_engine(tmp_path: Path) -> None:
    found = failure(tmp_path / "nowhere")
    assert found.code == "engine-missing"
    assert "graftkit.serving.install vllm" in (found.help or "")


def test_an_engine_gets_no_secrets(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "PYTHONPATH"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("PLAIN", "kept")
    found = run(engine("models[''] = {'refused': ' '.join(os.environ.get(n, '-') for n in "
                       "('HF_TOKEN', 'OPENAI_API_KEY', 'PYTHONPATH', 'PLAIN'))}; write()"))  # fmt: skip
    assert found.base.refusal == "- - - kept"


def test_nothing_is_left_in_the_temporary_folder(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    run(engine("answer('', -1)"))
    failure(engine("os.abort()"))
    assert not list(temporary.iterdir())
