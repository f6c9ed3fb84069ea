"""A real Llama whose heads do what is written on them: ground truth for everything that measures, changes or replaces heads.

A trained model's heads are never known for certain, so a detector that is wrong by a position, or averages the wrong rows, still looks
plausible on it. Here chosen heads are written into the weights of an ordinary `transformers.LlamaForCausalLM` (rotary embedding, RMSNorm,
grouped keys, residual stream), with no training, and every attention row is known in closed form: a set of target keys that share the
row equally, and the first token (BOS) where there is no target.

    planted = planted_llama({(0, 0): Previous(), (0, 1): Duplicate(), (1, 0): Induction(), (1, 1): Sink(), (1, 2): Offset(5)})
    ids = planted.prompt(block=25, repeats=4)            # BOS, then 25 distinct tokens four times
    planted.expected(ids)[1, 0]                          # [1, 101, 101], float64
    planted.model(ids)                                   # a live model: capture it, ablate it, generate with it

How it is built:

- `kinds`: what each kind of head attends to. `codes`: unit codes of tokens and of blocks. `rotary`: which rotary pairs carry position
  and which stand still, so that content and position live side by side in one head dimension.
- `layout`: where each feature lives in the residual stream and in the keys of a group; refuses what does not fit.
- `build`: writes the weights. `model`: the result, with its truth table and its expected attention.
- `tokenizer`: words for the ids, for whatever wants text.
"""

from __future__ import annotations

from headscope.models.planted.build import planted_llama
from headscope.models.planted.kinds import BlockLocal, Duplicate, Induction, Kind, Offset, Previous, Sink, Uniform, Vertical, VisionLabel
from headscope.models.planted.model import PlantedModel

__all__ = [
    "BlockLocal",
    "Duplicate",
    "Induction",
    "Kind",
    "Offset",
    "PlantedModel",
    "Previous",
    "Sink",
    "Uniform",
    "Vertical",
    "VisionLabel",
    "planted_llama",
]
