"""Audio and text with Gemma 4, from Python: the recipe with some values of its own, and what came of it.

TRL has no collator for audio; graftkit's trainers do, so that this goes through the recipe beside it.
Tests run it as it is, with a twin as `google/gemma-4-E2B-it`, sounds as `sounds`.
"""

import graftkit as gk

MODEL = "google/gemma-4-E2B-it"

print(gk.plan(MODEL, targets="all-linear", scope=["language", "audio"], r=16, alpha=32))

recipe = gk.read_recipe("audio.yaml", ["args.output_dir=out/audio_py", "args.learning_rate=5e-5"])
result = gk.train(recipe)
print(result.steps, result.curve("loss"), result.folder)
print(gk.check(result.folder, base=MODEL))
