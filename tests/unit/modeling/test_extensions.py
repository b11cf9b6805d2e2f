"""A compilation that was killed leaves a lock in the shared folder, for which torch waits without end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graftkit.modeling.extensions import own_extension_folder

ATTACH_BOFT = """
import graftkit as gk
from torch import nn

model = nn.ModuleDict({"q_proj": nn.Linear(16, 16)})
adapted = gk.attach(model, gk.plan(model, targets=["q_proj"], method="boft", boft_block_size=4))
print(type(adapted.base_model).__name__)
"""


def test_a_lock_that_was_left_behind_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "fbd_cuda").mkdir()
    (tmp_path / "fbd_cuda" / "lock").touch()
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", ATTACH_BOFT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.stdout.strip() == "BOFTModel", ran.stderr


def test_the_environment_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in ("/somewhere", None):
        if before is None:
            monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        else:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", before)
        with own_extension_folder():
            assert os.environ["TORCH_EXTENSIONS_DIR"] != before
        assert os.environ.get("TORCH_EXTENSIONS_DIR") == before
