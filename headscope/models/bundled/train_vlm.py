"""Trains `bundled:vlm`: a LLaVA (CLIP vision tower, two-layer projector, Llama text model) on grids of digits.

    python -m headscope.models.bundled.train_vlm --out DIR --device cuda

Everything is trained together from nothing: the towers are small, and the questions are few in kind. Six turns are asked about each
picture; one of them reads the whole grid, which teaches the tower to see, before the others can be answered at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from headscope.models.bundled import data_vlm as data
from headscope.models.bundled.training import Trainer, arguments, autocast, generator, save, say, settle, write_json
from headscope.models.bundled.words import save_tokenizer


def build(hidden: int = 256, layers: int = 5, sight: int = 128) -> Any:
    """The untrained model: 3.8 M weights; text of 8 query and 4 key heads of width 32, vision of 4 layers and 4 heads."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    table = data.ids_of()
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = CLIPVisionConfig(
        hidden_size=sight,
        intermediate_size=3 * sight,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=data.SIZE,
        patch_size=data.PATCH,
        projection_dim=sight,
        initializer_factor=1.0,
    )
    text = LlamaConfig(
        vocab_size=len(table),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.04,
        tie_word_embeddings=False,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=table[data.IMAGE],
        image_seq_length=data.TOKENS,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        **special,
    )
    return LlavaForConditionalGeneration(config)


def save_processor(out: Path) -> None:
    """The tokenizer and what a LlavaProcessor needs beside it."""
    save_tokenizer(data.tokenizer(), out)
    image = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": data.SIZE, "width": data.SIZE},
        "resample": 2,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_convert_rgb": True,
    }
    whole = {
        "processor_class": "LlavaProcessor",
        "patch_size": data.PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": data.IMAGE,
    }
    write_json(out / "preprocessor_config.json", image)
    write_json(out / "processor_config.json", whole)


def main() -> None:
    """Command line."""
    parser = arguments("train bundled:vlm", steps=1800)
    parser.add_argument("--batch", type=int, default=256, help="pictures a step")
    given = parser.parse_args()
    settle(given.seed)
    model = build().to(given.device).train()
    source = generator(given.seed + 1, given.device)
    dice = torch.Generator().manual_seed(given.seed + 2)
    trainer = Trainer(model, given.steps, 8e-4, warm=300, cool=0.5, decay=0.1)
    smooth = dict.fromkeys(data.KINDS, 0.0)
    while trainer.progress < 1:
        step = trainer.done
        scene = data.scenes(given.batch, source)
        kinds = ["read", "position", "position", "count", "count", "presence", "presence", "presence"]
        kinds = [kinds[place] for place in torch.randperm(len(kinds), generator=dice).tolist()][:6]
        ids, labels = data.dialogue(kinds, scene, source)
        with autocast(given.device):
            found = model(input_ids=ids, pixel_values=data.pixel_values(scene.pixels), use_cache=False)
        asked = labels[:, 1:] >= 0
        logits, wanted = found.logits[:, :-1][asked].float(), labels[:, 1:][asked]
        trainer.step(torch.nn.functional.cross_entropy(logits, wanted))
        if step % 100 == 0:
            right = (found.logits[:, :-1].argmax(-1) == labels[:, 1:]) | ~asked
            place = 1 + data.TOKENS
            for kind in kinds:
                width = {"read": 18, "position": 14, "count": 12, "presence": 11}[kind]
                smooth[kind] = right[:, place - 1 : place + width - 1].all(1).float().mean().item()
                place += width
            shown = "  ".join(f"{kind} {value:.3f}" for kind, value in smooth.items())
            say(f"step {step}  {shown}  {trainer.seconds:.0f} s")
    save(model.eval(), given.out, seconds=trainer.seconds, steps=trainer.done, seed=given.seed, device=given.device)
    save_processor(given.out)


if __name__ == "__main__":
    main()
