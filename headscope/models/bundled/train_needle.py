"""Trains `bundled:needle`: a six-layer Llama that finds codes and entries in haystacks of up to 16,384 words.

    python -m headscope.models.bundled.train_needle --out DIR --device cuda

Retrieval does not appear at 8,192 tokens from nothing: it is learnt at 256 tokens within some hundred steps, and then carried to longer
haystacks in steps of two, each as soon as the last one is mastered. Several questions are asked per haystack, since one alone
gives a gradient on three words out of thousands. The remaining words are learnt at a low weight, so that generated text stays text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headscope.models.bundled import data_needle as data
from headscope.models.bundled.training import Trainer, arguments, autocast, generator, save, say
from headscope.models.bundled.words import save_tokenizer


@dataclass(frozen=True, slots=True)
class Stage:
    """Haystacks of one length: how many a step, needles in each, questions about it."""

    length: int
    count: int
    needles: int
    asked: int


STAGES = (
    Stage(256, 256, 5, 4),
    Stage(512, 128, 8, 6),
    Stage(1024, 64, 16, 8),
    Stage(2048, 32, 24, 12),
    Stage(4096, 16, 32, 16),
)
MIXED = (
    (Stage(512, 128, 8, 6), 0.1),
    (Stage(2048, 32, 24, 12), 0.15),
    (Stage(8192, 12, 40, 24), 0.5),
    (Stage(16384, 6, 64, 32), 0.25),
)
MASTERED = 0.9
LANGUAGE = 0.1


def build(hidden: int = 256, layers: int = 6):
    """The untrained model: 3.8 M weights, 8 query and 4 key heads of width 32."""
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


def loss_of(model, drawn: data.Batch, device: str) -> tuple[torch.Tensor, float]:
    """(loss, share of answer words that are right)."""
    with autocast(device):
        logits = model(input_ids=drawn.ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    answers, words = drawn.labels[:, 1:].flatten(), drawn.ids[:, 1:].flatten()
    asked = answers >= 0
    each = torch.nn.functional.cross_entropy(logits.float(), words, ignore_index=0, reduction="none")
    loss = each[asked].mean() + LANGUAGE * each.mean()
    return loss, (logits.argmax(-1) == answers)[asked].float().mean().item()


def main() -> None:
    """Command line."""
    parser = arguments("train bundled:needle", steps=6000)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin the last part after this many seconds at the latest")
    parser.add_argument("--last", type=int, default=1500, help="how many of the steps are the last part: all lengths, falling rate")
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    model = build().to(given.device).train()
    source = generator(given.seed + 1, given.device)
    dice = torch.Generator().manual_seed(given.seed + 2)
    trainer = Trainer(model, given.steps, 1e-3, warm=200, cool=given.last / given.steps)
    stage, smooth, step = 0, 0.0, 0
    while step < given.steps:
        last = step >= given.steps - given.last
        if not last and (stage >= len(STAGES) or trainer.seconds > given.seconds):
            say(f"step {step}: every length mastered" if stage >= len(STAGES) else f"step {step}: out of time")
            step = given.steps - given.last
            trainer.jump(step)
            last = True
        if last:
            pick = int(torch.multinomial(torch.tensor([share for _, share in MIXED]), 1, generator=dice))
            now = MIXED[pick][0]
        else:
            now = STAGES[stage]
        kind = "code" if int(torch.randint(0, 2, (), generator=dice)) else "entry"
        needles = int(torch.randint(now.asked, now.needles + 1, (), generator=dice))
        drawn = data.batch(now.count, now.length, kind, needles, now.asked, source)
        loss, right = loss_of(model, drawn, given.device)
        trainer.step(loss)
        smooth = 0.95 * smooth + 0.05 * right
        if step % 100 == 0 or step == given.steps - 1:
            say(f"step {step}  length {now.length}  loss {loss.item():.3f}  answers {smooth:.3f}  {trainer.seconds:.0f} s")
        if not last and smooth > MASTERED:
            say(f"step {step}: {now.length} mastered after {trainer.seconds:.0f} s")
            stage, smooth = stage + 1, 0.5
        step += 1
    save(model.eval(), given.out, seconds=trainer.seconds, steps=trainer.done, seed=given.seed, device=given.device)
    save_tokenizer(data.tokenizer(), given.out)


if __name__ == "__main__":
    main()
