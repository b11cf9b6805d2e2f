"""Bases and random adapters on disk, and what a dialect makes of them."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import graftkit as gk
from graftkit.converting.base import ConvertBase, open_convert_base
from graftkit.converting.delta import Deltas, Factors
from graftkit.converting.dialects.peft import DIALECT as PEFT
from graftkit.converting.join import joined


@dataclass(frozen=True)
class Served:
    """A base in a folder, with the model that was saved there."""

    folder: Path
    model: Any

    @cached_property
    def base(self) -> ConvertBase:
        return open_convert_base(self.folder)

    def adapter(self, folder: Path, config: LoraConfig | None = None, **request: Any) -> Path:
        """Save an adapter with random factors in stock form: of a configuration, or of what is planned."""
        torch.manual_seed(0)
        model = copy.deepcopy(self.model)
        with warnings.catch_warnings():
            # PEFT's remarks on adapters of tied and of embedding weights.
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, config) if config else gk.attach(model, gk.plan(model, **request))
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name:
                    parameter.data = torch.randn_like(parameter)
            adapted.save_pretrained(folder, save_embedding_layers=False)
        return folder

    def deltas(self, folder: Path, config: LoraConfig | None = None, **request: Any) -> Deltas:
        return self.read(self.adapter(folder, config, **request))

    def read(self, folder: Path) -> Deltas:
        """Read a folder in stock form."""
        return PEFT.read(folder, self.base)


def largest_difference(original: Deltas, found: Deltas, base: ConvertBase) -> float:
    """Return the largest error of an element, in units of the sum of the absolute products that make it up."""
    others = {factors.at: factors for factors in joined(found, base)}
    worst = 0.0
    for factors in original:
        (a, b), (other_a, other_b) = factors.exact(), others.pop(factors.at).exact()
        sizes = b.abs() @ a.abs() + 1e-300
        worst = max(worst, float(((b @ a - other_b @ other_a).abs() / sizes).max()))
    assert not any(bool(a.any() and b.any()) for a, b in (factors.exact() for factors in others.values()))
    return worst


def factors_of(deltas: Deltas, parameter: str, expert: int | None = None) -> Factors:
    """Return the one update of a matrix."""
    (found,) = (f for f in deltas if f.at.parameter == parameter and f.at.expert == expert)
    return found


def served_twin(name: str, folder: Path, **overrides: Any) -> Served:
    """Write a twin, with its weights, as a base."""
    model = gk.twin(name, overrides=overrides or None)
    model.save_pretrained(folder)
    return Served(folder, model)
