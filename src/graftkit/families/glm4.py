"""GLM-4: what an engine's converter looks up in its vocabulary."""

from __future__ import annotations

from graftkit.families._base import Family, ServedTwin

FAMILY = Family(
    name="glm4",
    model_types=("glm4",),
    # ``Glm4Model.set_vocab`` in llama.cpp's conversion/glm.py.
    served_twin=ServedTwin(tokens={"<|endoftext|>": "<|endoftext|>", "<|user|>": "<|user|>"}),
)
