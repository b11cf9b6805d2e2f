"""Mamba 2 and the hybrids built on it: weights that the mixer reads past their modules."""

from __future__ import annotations

from graftkit.families._base import Bypassed, Family

_CONV = "the mixer hands conv1d.weight to a causal convolution function"
_OUT = "in training the fused kernel reads out_proj.weight"

# From the mixers' forward in transformers: ``mamba2_split_conv1d_scan_combined`` takes ``outproj_weight``. The
# mixer is "mixer" in mamba2 and nemotron_h and "mamba" in the others; the attention of nemotron_h is a
# "mixer" too, and its output projection is o_proj. PEFT refuses these names for mamba2, nemotron_h and
# falcon_h1 only (``_check_lora_target_modules_mamba``).
FAMILY = Family(
    name="mamba2",
    model_types=("mamba2", "bamba", "granitemoehybrid", "nemotron_h", "falcon_h1"),
    bypassed=(
        Bypassed("*mixer.conv1d", _CONV),
        Bypassed("*mamba.conv1d", _CONV),
        Bypassed("*mixer.out_proj", _OUT),
        Bypassed("*mamba.out_proj", _OUT),
    ),
)
