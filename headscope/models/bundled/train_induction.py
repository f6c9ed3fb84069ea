"""Trains `bundled:induction`: a Llama of two layers whose MLPs write nothing, on words said twice.

    python -m headscope.models.bundled.train_induction --out DIR

With no MLP and no other task the circuit is the textbook one: a head of layer 0 copies each word's predecessor, heads of layer 1 look
for the place whose predecessor is the present word and copy what stands there (Olsson et al., arXiv:2209.11895).
The down projections are zero and frozen rather than left out, so that the checkpoint stays a plain LlamaForCausalLM.
"""

from __future__ import annotations

from typing import Any

import torch

from headscope.models.bundled import data_induction as data
from headscope.models.bundled.training import Trainer, arguments, generator, save, say, settle
from headscope.models.bundled.words import save_tokenizer


def build() -> Any:
    """The untrained model, 103 K weights (98 K of them do something)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=data.FIRST + len(data.WORDS),
        hidden_size=96,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=data.LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.08,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        layer.mlp.requires_grad_(False)
    return model


def main() -> None:
    """Command line."""
    parser = arguments("train bundled:induction", steps=3000)
    parser.set_defaults(device="cpu")  # the shipped weights come from one: nothing here is large enough for more
    given = parser.parse_args()
    settle(given.seed, strict=True)
    model = build().to(given.device).train()
    source = generator(given.seed + 1, given.device)
    sizes = torch.Generator().manual_seed(given.seed + 2)
    trainer = Trainer(model, given.steps, 3e-3, warm=100, cool=0.4, decay=0.05)
    while trainer.progress < 1:
        step = trainer.done
        longest = 31 if trainer.progress < 0.5 else 100
        period = int(torch.randint(8, longest + 1, (), generator=sizes))
        prefix = int(torch.randint(0, 25, (), generator=sizes))
        ids, labels = data.batch(max(16, 2048 // period), period, source, prefix=prefix)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        trainer.step(loss)
        if step % 200 == 0:
            hit = (logits.argmax(-1) == labels[:, 1:])[labels[:, 1:] >= 0].float().mean()
            say(f"step {step}  loss {loss.item():.3f}  second copy {hit.item():.3f}  {trainer.seconds:.0f} s")
    save(model.eval(), given.out, seconds=trainer.seconds, steps=trainer.done, seed=given.seed, device=given.device)
    save_tokenizer(data.tokenizer(), given.out)


if __name__ == "__main__":
    main()
