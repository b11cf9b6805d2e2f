"""PP-FormulaNet does not say where its input embeddings are, and PEFT therefore cannot put an adapter on it.

Needs torch, transformers and peft; runs on a CPU in seconds. Exits with 1 while the fault is there.
"""

import sys
from importlib.metadata import version

from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, PPFormulaNetForConditionalGeneration

TEXT = {"vocab_size": 64, "d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 32, "decoder_attention_heads": 2}
VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "mlp_dim": 32,
    "output_channels": 16, "post_conv_in_channels": 16, "post_conv_mid_channels": 16, "post_conv_out_channels": 16,
    "global_attn_indexes": [0], "decoder_hidden_size": 32,
}  # fmt: skip

print("peft", version("peft"), "transformers", version("transformers"), "torch", version("torch"))
config = AutoConfig.for_model("pp_formulanet", text_config=TEXT, vision_config=VISION)
model = PPFormulaNetForConditionalGeneration(config)
print("expected: a PeftModel")
try:
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
except NotImplementedError as error:
    print(f"actual: NotImplementedError: {error}")
    sys.exit(1)
print(f"actual: a {type(adapted).__name__}")
