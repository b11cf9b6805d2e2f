"""PEFT puts no adapter on models that do not say where their input embeddings are, because they have none.

Needs torch, transformers and peft; runs on a CPU in seconds. Exits with 1 while the fault is there.
"""

import sys
from importlib.metadata import version

from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, GraniteSpeech5ForCTC, PPFormulaNetForConditionalGeneration

TEXT = {"vocab_size": 64, "d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 32, "decoder_attention_heads": 2}
VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "mlp_dim": 32,
    "output_channels": 16, "post_conv_in_channels": 16, "post_conv_mid_channels": 16, "post_conv_out_channels": 16,
    "global_attn_indexes": [0], "decoder_hidden_size": 32,
}  # fmt: skip
ENCODER = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "subsample_layers": [0],
}  # fmt: skip
# Model type -> its class, and a small configuration.
CASES = {
    "pp_formulanet": (PPFormulaNetForConditionalGeneration, {"text_config": TEXT, "vision_config": VISION}),
    "granite_speech5_ctc": (GraniteSpeech5ForCTC, {"encoder_config": ENCODER, "vocab_size": 64}),
}

print("peft", version("peft"), "transformers", version("transformers"), "torch", version("torch"))
faulty = False
for model_type, (model_class, sizes) in CASES.items():
    model = model_class(AutoConfig.for_model(model_type, **sizes))
    try:
        found = f"a {type(get_peft_model(model, LoraConfig(target_modules=['q_proj', 'v_proj']))).__name__}"
    except NotImplementedError as error:
        found, faulty = f"NotImplementedError: {error}", True
    print(f"{model_type}: expected: a PeftModel; actual: {found}")
sys.exit(1 if faulty else 0)
