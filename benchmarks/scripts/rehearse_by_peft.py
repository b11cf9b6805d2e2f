"""What one tries by hand before training Gemma 4: ``rehearse_by_peft.py CONFIG.json``.

A small random model of the architecture, LoRA on the linears of its text and vision towers, two steps, and the
adapter saved, loaded again and merged, each time with the same logits.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

fields = json.loads(Path(sys.argv[1]).read_text())
text = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "head_dim": 32,
    "global_head_dim": 32,
}
small = {**text, "vocab_size": 512, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16}
layers = ["sliding_attention"] * 4 + ["full_attention"] + ["sliding_attention"] * 4 + ["full_attention"]
fields["text_config"] |= {**small, "num_hidden_layers": 10, "layer_types": layers, "num_kv_shared_layers": 5}
fields["vision_config"] |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
fields["vision_config"] |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
fields["audio_config"] = None
torch.manual_seed(0)
base = Gemma4ForConditionalGeneration(Gemma4Config.from_dict(fields)).eval()
state = {name: value.clone() for name, value in base.state_dict().items()}
inner = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)(\.linear)?"
towers = [name for name, m in base.named_modules() if type(m) is torch.nn.Linear and "audio" not in name]
targets = [name for name in towers if re.fullmatch(inner, name)]
model = get_peft_model(base, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
ids = torch.randint(8, 500, (2, 16))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for _ in range(2):
    loss = model(input_ids=ids, labels=ids, mm_token_type_ids=torch.zeros_like(ids)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    expected = model(input_ids=ids).logits
    model.save_pretrained(folder)
    again = Gemma4ForConditionalGeneration(Gemma4Config.from_dict(fields)).eval()
    again.load_state_dict(state)
    reloaded = PeftModel.from_pretrained(again, folder)
    torch.testing.assert_close(reloaded(input_ids=ids).logits, expected)
    torch.testing.assert_close(reloaded.merge_and_unload()(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-3)
