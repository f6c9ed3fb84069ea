"""Trains the bundled diffusion transformers on scikit-learn's digits by flow matching.

    python -m headscope.models.bundled.train_dit --kind dit --out DIR      # DiTTransformer2DModel, unconditional
    python -m headscope.models.bundled.train_dit --kind sd3 --out DIR      # SD3Transformer2DModel, class words as text

The averaged weights are what is kept. Needs the extra: pip install "headscope[diffusion]".
"""

from __future__ import annotations

from typing import Any

import torch

from headscope.models.bundled import data_dit as data
from headscope.models.bundled.flow import text_table, velocity
from headscope.models.bundled.training import Trainer, arguments, autocast, generator, save, say, settle


def build(kind: str) -> Any:
    """The untrained model: 6 layers, 6 heads of width 16, one token per pixel."""
    from diffusers import DiTTransformer2DModel, SD3Transformer2DModel

    if kind == "dit":
        return DiTTransformer2DModel(
            num_attention_heads=6,
            attention_head_dim=16,
            in_channels=1,
            out_channels=1,
            num_layers=6,
            sample_size=data.SIZE,
            patch_size=1,
            num_embeds_ada_norm=1,
        )
    return SD3Transformer2DModel(
        sample_size=data.SIZE,
        patch_size=1,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=6,
        joint_attention_dim=96,
        caption_projection_dim=96,
        pooled_projection_dim=96,
        pos_embed_max_size=data.SIZE,
    )


def main() -> None:
    """Command line."""
    parser = arguments("train bundled:dit or bundled:sd3", steps=4000)
    parser.add_argument("--kind", choices=("dit", "sd3"), required=True)
    parser.add_argument("--batch", type=int, default=512, help="pictures a step")
    given = parser.parse_args()
    settle(given.seed)
    model = build(given.kind).to(given.device).train()
    source = generator(given.seed + 1, given.device)
    pictures, labels = data.pictures(False, given.device)
    table = text_table().to(given.device)
    trainer = Trainer(model, given.steps, 1e-3, warm=100, cool=0.7, decay=0.01, ema=0.998)
    while trainer.progress < 1:
        step = trainer.done
        pick = torch.randint(0, len(pictures), (given.batch,), generator=source, device=given.device)
        x = pictures[pick]
        noise = torch.randn(x.shape, generator=source, device=given.device)
        t = torch.sigmoid(torch.randn(given.batch, generator=source, device=given.device))
        text = table[data.random_text(labels[pick], source, drop=0.15)] if given.kind == "sd3" else None
        spread = t[:, None, None, None]
        with autocast(given.device):
            found = velocity(model, (1 - spread) * x + spread * noise, t, text)
        loss = torch.nn.functional.mse_loss(found.float(), noise - x)
        trainer.step(loss)
        if step % 200 == 0:
            say(f"step {step}  loss {loss.item():.4f}  {trainer.seconds:.0f} s")
    trainer.use_average()
    save(model.eval(), given.out, seconds=trainer.seconds, steps=trainer.done, seed=given.seed, device=given.device)
    if given.kind == "sd3":
        from safetensors.torch import save_file

        save_file({"words": table.cpu().contiguous()}, given.out / "text.safetensors", metadata={"words": " ".join(data.WORDS)})


if __name__ == "__main__":
    main()
