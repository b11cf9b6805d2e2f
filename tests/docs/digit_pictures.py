"""Lets transformers read pictures for Gemma 4, by being imported.

Its own class loads only where torchvision is installed; that of the demo has no video part.
"""

from __future__ import annotations

from transformers import AutoProcessor, Gemma4Config

from graftkit.demo.processor import digit_processor

AutoProcessor.register(Gemma4Config, type(digit_processor()), exist_ok=True)
