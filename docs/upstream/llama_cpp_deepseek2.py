"""llama.cpp's graph of DeepSeek V2 and V3 multiplies some weights without looking for a LoRA on them.

A weight that a LoRA may be on is multiplied by `build_lora_mm`; `ggml_mul_mat` on a weight of the model ignores
the LoRA without a word. Reads the source alone: needs a checkout of llama.cpp, whose folder is the argument. Exits
with 1 while the fault is there.
"""

import re
import sys
from pathlib import Path

CALL = re.compile(
    r"\b(ggml_mul_mat|build_lora_mm)\s*\(\s*(?:ctx0\s*,\s*)?((?:model\.|layer\.)[\w\[\].]*?(\w+))\s*,"
)

if len(sys.argv) != 2:
    sys.exit("usage: llama_cpp_deepseek2.py FOLDER_OF_LLAMA_CPP")
graph = Path(sys.argv[1], "src", "models", "deepseek2.cpp")
ignored: dict[str, list[int]] = {}
for number, line in enumerate(graph.read_text(encoding="utf-8").splitlines(), start=1):
    for function, _, weight in CALL.findall(line):
        if function == "ggml_mul_mat":
            ignored.setdefault(weight, []).append(number)
print(f"expected: no weight of {graph.name} is multiplied by ggml_mul_mat; actual: {len(ignored)} are")
for weight, lines in ignored.items():
    print(f"    {weight}: lines {', '.join(map(str, lines))}")
sys.exit(1 if ignored else 0)
