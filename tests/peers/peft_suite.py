"""Run the test modules of PEFT's own source distribution, and read what became of each test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

PLUGINS = Path(__file__).with_name("plugins")


def fetch_suite(folder: Path) -> Path:
    """Return the unpacked source distribution of the installed PEFT, from the package index.

    Raises:
        subprocess.CalledProcessError: the package index cannot be reached.
    """
    wanted = f"peft=={version('peft')}"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft", wanted]
    subprocess.run([*download, "--dest", folder], check=True)
    [archive] = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(folder, filter="data")
    suite = folder / archive.name.removesuffix(".tar.gz")
    # Its test modules import each other relatively, and the file that makes that possible is not distributed.
    (suite / "tests" / "__init__.py").touch()
    (suite / "no_options.ini").write_text("[pytest]\n")
    return suite


def start(suite: Path, tests: Sequence[str], log: Path, *plugins: str) -> subprocess.Popen[bytes]:
    """Start pytest on some of the suite's tests, in a process that writes each report as a line of ``log``."""
    # Run from the suite's folder, which is all that its own configuration would say besides measuring coverage.
    command = [sys.executable, "-m", "pytest", *tests, "-c", "no_options.ini", "-q", "-W", "ignore"]
    loaded = [word for plugin in ("peft_offline", *plugins) for word in ("-p", plugin)]
    environment = {**os.environ, "PYTHONPATH": str(PLUGINS), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    command += ["-p", "no:cacheprovider", *loaded, f"--report-log={log}"]
    with log.with_suffix(".txt").open("wb") as screen:
        return subprocess.Popen(command, cwd=suite, env=environment, stdout=screen, stderr=subprocess.STDOUT)


def outcomes(log: Path) -> dict[str, str]:
    """Return what became of each test: "passed", "skipped", "failed", or the stage that failed before the test."""
    found: dict[str, str] = {}
    for line in log.read_text().splitlines():
        report = json.loads(line)
        if report["$report_type"] == "TestReport" and (report["when"] == "call" or report["outcome"] != "passed"):
            found[report["nodeid"]] = outcome(report)
    return found


def outcome(report: dict[str, object]) -> str:
    """Return a report's outcome, a failure with the stage and the kind of the exception."""
    if report["outcome"] != "failed":
        return str(report["outcome"])
    crash = (report["longrepr"] or {}).get("reprcrash") if isinstance(report["longrepr"], dict) else None
    kind = crash["message"].split(":")[0].splitlines()[0] if crash else "unknown"
    return f"failed in {report['when']}: {kind}"
