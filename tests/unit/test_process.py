"""What a process that does one thing leaves out."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("bitsandbytes")

_CODE = """
import gc, sys
before = gc.get_threshold()
from graftkit.process import collect_garbage_seldom, load_no_compiler
load_no_compiler()
collect_garbage_seldom()
import bitsandbytes
assert "torch._inductor.lowering" not in sys.modules
assert gc.get_threshold() > before
"""


def test_bitsandbytes_brings_no_compiler_and_garbage_is_collected_seldom() -> None:
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
