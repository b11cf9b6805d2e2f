"""Which of transformers' model types are built from their default configuration, and which of these hold linears.

``python -m tests.families.buildable`` writes the table, on the meta device: a minute for all of them.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from graftkit.errors import GraftError
from graftkit.files import write_text
from graftkit.surveying.sources.build import build_on_meta

TABLE = Path(__file__).with_name("buildable.toml")
_HEAD = "# Written by `make buildable`: what each model type's default configuration is built into.\n"


class Built(StrEnum):
    """What a default configuration becomes."""

    LINEARS = "with_linears"
    NO_LINEARS = "without_linears"
    NOTHING = "not_built"


def built(model_type: str) -> Built:
    """Build a model type from its default configuration on the meta device, and look for linears in it.

    transformers' ``Conv1D`` of GPT-2 is a linear with its weight transposed.
    """
    from torch import nn
    from transformers import CONFIG_MAPPING
    from transformers.pytorch_utils import Conv1D

    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception:  # a configuration without defaults raises whatever its fields run into
        return Built.NOTHING
    try:
        model = build_on_meta(config)
    except GraftError:
        return Built.NOTHING
    return Built.LINEARS if any(isinstance(m, (nn.Linear, Conv1D)) for m in model.modules()) else Built.NO_LINEARS


def read_buildable() -> dict[str, Built]:
    """Return model type -> what it was built into when the table was written."""
    found: Mapping[str, list[str]] = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {model_type: kind for kind in Built for model_type in found[kind]}


def main() -> int:
    """Write the table."""
    from transformers import CONFIG_MAPPING

    found = {model_type: built(model_type) for model_type in sorted(CONFIG_MAPPING)}
    parts = [
        f"{kind} = [\n" + "".join(f"  {json.dumps(name)},\n" for name, of in found.items() if of is kind) + "]\n"
        for kind in Built
    ]
    write_text(TABLE, "\n".join([_HEAD, *parts]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
