"""Trains `bundled:needle`: a six-layer Llama that finds codes and entries in haystacks of up to 16,384 words.

    python -m headscope.models.bundled.train_needle --out DIR --device cuda

Retrieval does not appear in long haystacks from nothing (after 2,300 steps at all lengths no answer was right). It is learnt at 96 tokens
within some 500 steps, and then carried to longer haystacks, each about twice the last, as soon as that one is mastered: by the share of
right answers, which the seed decides. A last part of fixed length mixes all lengths while the rate falls. Some sentences are said twice,
which rewards copying heads before any question is understood; and some haystacks hold needles that have words in common, so that a key
has to be read whole (without them, entries of one adjective were mistaken for each other). Several questions are asked per haystack, since
one alone gives a gradient on a few words out of thousands. The other words are learnt at a lower weight, so that generated text stays text.

Only the designated key heads learn to look far (`narrowed.py` says how, and why). Without that, all sixteen heads of layers 2 and 3 copied
from the needle, one head of layer 0 was needed by everything, and a fifth of the answers to needles that are alike were wrong (now none).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from headscope.models.bundled import data_needle as data
from headscope.models.bundled.narrowed import Narrowed, attach
from headscope.models.bundled.training import Trainer, arguments, autocast, generator, save, say, settle
from headscope.models.bundled.words import save_tokenizer


@dataclass(frozen=True, slots=True)
class Stage:
    """Haystacks of one length: how many a step, needles in each, questions about it."""

    length: int
    count: int
    needles: int
    asked: int


STAGES = (
    Stage(96, 128, 2, 2),
    Stage(192, 80, 4, 3),
    Stage(384, 48, 7, 5),
    Stage(768, 32, 12, 8),
    Stage(1536, 24, 20, 10),
    Stage(3072, 16, 32, 16),
    Stage(8192, 6, 40, 24),
)
MIXED = (
    (Stage(512, 64, 8, 6), 0.1),
    (Stage(2048, 24, 24, 12), 0.2),
    (Stage(8192, 10, 40, 24), 0.45),
    (Stage(16384, 5, 64, 32), 0.25),
)
MASTERED = 0.88
"""Share of answer words that are right, of codes and of entries each: a model that guesses one word of a code in five is below it."""
DESIGNATED = {3: 2}
"""Layer -> how many of its key heads, from the first, may look far: heads 3.0 to 3.3, four of 48."""


def build(hidden: int = 256, layers: int = 6) -> Any:
    """The untrained model: 4.9 M weights, 8 query and 4 key heads of width 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(data.ids_of()),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 4,
        max_position_embeddings=data.LONGEST,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=data.BOS_ID,
        initializer_range=hidden**-0.5,
        eos_token_id=data.EOS_ID,
    )
    return LlamaForCausalLM(config)


def loss_of(model: Any, drawn: data.Batch, whole: int, device: str, language: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, share of answer words that are right in the first `whole` haystacks); `language` weighs all the other words."""
    with autocast(device):
        logits = model(input_ids=drawn.ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    answers, words = drawn.labels[:, 1:].flatten(), drawn.ids[:, 1:].flatten()
    asked = answers >= 0
    each = torch.nn.functional.cross_entropy(logits.float(), words, ignore_index=0, reduction="none")
    loss = (each * asked).sum() / asked.sum() + language * each.mean()
    counted = asked.view(len(drawn.ids), -1)[:whole].flatten()
    return loss, ((logits.argmax(-1) == answers)[: len(counted)] & counted).sum() / counted.sum()


def main() -> None:
    """Command line."""
    parser = arguments("train bundled:needle", steps=1500)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--last", type=int, default=250, help="steps of the last part: all lengths, falling rate")
    parser.add_argument("--alike", type=float, default=0.4, help="share of haystacks whose needles have words in common")
    parser.add_argument("--scale", type=float, default=1.0, help="haystacks a step, as a share of the usual number; 0.2 suits a CPU")
    parser.add_argument("--closed", type=float, default=0.7, help="share of the steps in which all but the designated heads stream")
    parser.add_argument("--pull", type=float, default=1.0, help="weight of what their outputs owe to distant keys, in the other steps")
    parser.add_argument("--lost", type=float, default=0.1, help="share of them that write nothing, in half of the haystacks")
    given = parser.parse_args()
    settle(given.seed, strict=True)
    model = build().to(given.device).train()
    narrowed = Narrowed(DESIGNATED)
    attach(model, narrowed)
    source = generator(given.seed + 1, given.device)
    dice = torch.Generator().manual_seed(given.seed + 2)
    trainer = Trainer(model, given.steps + given.last, given.rate, warm=100, cool=1.0)
    stage, begun = 0, -1
    smooth = {kind: torch.zeros((), device=given.device) for kind in ("code", "entry")}
    shares = torch.tensor([share for _, share in MIXED])
    while begun < 0 or trainer.done < begun + given.last:
        step = trainer.done
        if begun < 0 and (stage == len(STAGES) or step >= given.steps):
            say(f"step {step}: the last part begins with {stage} of {len(STAGES)} lengths mastered, {trainer.seconds:.0f} s")
            begun = step
        now = STAGES[stage] if begun < 0 else MIXED[int(torch.multinomial(shares, 1, generator=dice))][0]
        kind = "code" if int(torch.randint(0, 2, (), generator=dice)) else "entry"
        needles = int(torch.randint(now.asked, now.needles + 1, (), generator=dice))
        count = max(1, round(now.count * given.scale))
        repeat, language = (0.3, 0.3) if begun < 0 else (0.1, 0.1)
        drawn = data.batch(count, now.length, kind, needles, now.asked, source, repeat=repeat, alike=given.alike)
        narrowed.set(bool(torch.rand((), generator=dice) < given.closed), narrowed.drop(count, model.config, given.lost, source))
        loss, right = loss_of(model, drawn, (count + 1) // 2, given.device, language)
        if narrowed.strays:
            loss = loss + given.pull * torch.stack(narrowed.strays).mean()
        trainer.step(loss, 0.0 if begun < 0 else (step + 1 - begun) / given.last)
        smooth[kind] = 0.9 * smooth[kind] + 0.1 * right
        if step % 100 == 0:
            shown = "  ".join(f"{name} {value.item():.3f}" for name, value in smooth.items())
            say(f"step {step}  length {now.length}  loss {loss.item():.3f}  {shown}  {trainer.seconds:.0f} s")
        if begun < 0 and step % 10 == 0 and min(smooth.values()).item() > MASTERED:
            say(f"step {step}: {now.length} mastered after {trainer.seconds:.0f} s")
            stage, smooth = stage + 1, {name: 0.7 * value for name, value in smooth.items()}
    model.set_attn_implementation("sdpa")
    facts = {"seconds": trainer.seconds, "steps": trainer.done, "seed": given.seed, "device": given.device}
    save(model.eval(), given.out, **facts, last=trainer.done - begun, mastered=stage)
    save_tokenizer(data.tokenizer(), given.out)


if __name__ == "__main__":
    main()
