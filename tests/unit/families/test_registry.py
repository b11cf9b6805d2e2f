"""Families: found by listing the folder, light to import, and without overlap."""

from __future__ import annotations

import subprocess
import sys
from fnmatch import fnmatchcase

import pytest

from graftkit.families import all_families, family_of, geometry

FAMILIES = all_families()


def test_the_folder_holds_families():
    assert {"gemma4", "mamba", "mamba2", "jamba"} <= {f.name for f in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_model_type_leads_to_its_family(family):
    assert family.model_types
    assert all(family_of(model_type) is family for model_type in family.model_types)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_model_type_is_known_to_transformers(family):
    from transformers import CONFIG_MAPPING

    assert set(family.model_types) <= set(CONFIG_MAPPING.keys())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_bypassed_pattern_says_why(family):
    assert all(bypassed.pattern and bypassed.reason for bypassed in family.bypassed)


def test_unknown_names_have_no_family_and_no_geometry():
    assert family_of("no-such-type") is None
    assert family_of(None) is None
    assert geometry("nobody/no-such-model") is None


def test_importing_families_imports_neither_torch_nor_transformers():
    code = (
        "import sys, graftkit.families as f; f.all_families(); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Fields beyond a type's defaults that its layers of every kind need.
FIELDS = {"bamba": {"attn_layer_indices": [1]}}
BYPASSED = [(family, model_type) for family in FAMILIES if family.bypassed for model_type in family.model_types]


@pytest.mark.parametrize(("family", "model_type"), BYPASSED, ids=[model_type for _, model_type in BYPASSED])
def test_patterns_hit_the_mixer_and_nothing_of_the_attention(family, model_type):
    from transformers import CONFIG_MAPPING

    from graftkit.surveying.sources.build import build_on_meta
    from graftkit.twins.shrink import shrink

    model = build_on_meta(shrink(CONFIG_MAPPING[model_type](**FIELDS.get(model_type, {}))))
    patterns = [weight.pattern for weight in family.bypassed]
    hit = [name for name, _ in model.named_modules() if any(fnmatchcase(name, p) for p in patterns)]
    leaves = {pattern.rpartition(".")[2] for pattern in patterns}
    assert {name.rpartition(".")[2] for name in hit} == leaves
    assert not [name for name in hit if "attn" in name.replace("linear_attn", "") or "visual" in name]
