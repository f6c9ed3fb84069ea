"""Trains `bundled:vlm`: a LLaVA (CLIP vision tower, two-layer projector, Llama text model) on grids of digits.

    python -m headscope.models.bundled.train_vlm --out DIR --device cuda

Everything is trained together from nothing: the towers are small, and the questions are few in kind. Six turns are asked about each
picture; one of them reads the whole grid, which teaches the tower to see, before the others can be answered at all. A quarter of the
dialogues have no picture, some questions carry a guess (`data_vlm`), and some pictures are noisy: a model that has always had all it needs
in plain sight has no prior to fall back on, and nothing to hallucinate from.

The tower's CLS token, which a LLaVA does not pass on, learns which digits are there, as CLIP's learns what a caption says. Without that
its attention would be what it was at random, and methods that read it (PAINT) would be tried on noise.

Heads that have nothing to do rest on the first token in a large model, and look about at random in one this small, so that where they look
says nothing. Here looking elsewhere than at <bos> costs a little once the model has learned to see, and the embedding of <bos> begins with
one large coordinate, as massive activations have it. That is a choice of the training, not a finding about it.

A large model reads a picture in its middle layers, from the row that writes the answer. One this small reads where it can, so that the
words of a question brought along what they had seen in the first layer, where no probe of the answer's row looks, and the last layers
looked once more. A second run, `--begin`, goes on from the weights of the first with the vision tower held and a price (`--astray`) on
looking at the picture from rows that do not write an answer, and in other layers than those of `MIDDLE`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headscope.models.bundled import data_vlm as data
from headscope.models.bundled.training import Trainer, arguments, autocast, generator, save, say, settle, write_json
from headscope.models.bundled.words import save_tokenizer

TURNS = (*((kind, told) for kind in data.GUESSED for told in (False, True)), ("read", False))
"""(kind, whether it carries a guess) of a dialogue's turns, whose order is drawn anew in every step."""
MIDDLE = (1, 2)
"""Layers in which a row that writes an answer looks at the picture for nothing."""


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


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's dialogues, the first `shown` of which have a picture.

    ids, labels, places int64 [n, N]; pixels [shown, 3, 48, 48]; there float32 [shown, 10]: which digits are; gains float32
    [layers, n, heads] of head outputs; prices float32 [2]: of attention that is not on <bos>, and of attention to the picture that is
    astray (`forward`).
    """

    ids: torch.Tensor
    labels: torch.Tensor
    places: torch.Tensor
    pixels: torch.Tensor
    there: torch.Tensor
    gains: torch.Tensor
    prices: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them, in order."""
        return self.ids, self.labels, self.places, self.pixels, self.there, self.gains, self.prices


def batch_of(
    turns: Sequence[tuple[str, float | None]], config: Any, source: torch.Generator, given: Any, prices: tuple[float, float] = (0.0, 0.0)
) -> Batch:
    """Dialogues of these turns (kind, share of right guesses) about `given.batch` pictures, the last `given.alone` of them told without
    showing the picture.

    Such a row lacks the image tokens and ends in padding. Its text begins anywhere up to where it would stand beside a picture, so that a
    question is read alike in both places. Nobody can read out a grid unseen: there the grid is text that later answers may be read off.
    """
    device, count = source.device, given.batch
    kinds, guesses = [kind for kind, _ in turns], [guess for _, guess in turns]

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=source, device=device)

    more = (data.NOISIEST - data.NOISE) * random(count, 1, 1) * (random(count, 1, 1) < given.noisy)
    scene = data.scenes(count, source, noise=data.NOISE + more, far=given.far)
    ids, labels = data.dialogue(kinds, scene, source, guesses=guesses)
    places = torch.arange(ids.shape[1], device=device).expand_as(ids)
    shown = count - int(given.alone * count)
    if shown < count:
        blind = labels[shown:].clone()
        for kind, (first, end) in zip(kinds, data.layout(kinds, guesses), strict=True):
            if kind == "read":
                blind[:, first:end] = -100
        alone = torch.nn.functional.pad(data.without_picture(ids[shown:]), (0, data.TOKENS))
        blind = torch.nn.functional.pad(data.without_picture(blind), (0, data.TOKENS), value=-100)
        start = (random(count - shown, 1) * (data.TOKENS + 1)).long()
        later = places[shown:] + start * (places[shown:] > 0)
        ids, labels, places = (torch.cat([one[:shown], two]) for one, two in ((ids, alone), (labels, blind), (places, later)))
    text = config.text_config
    gains = 1 + given.jitter * (2 * random(text.num_hidden_layers, count, text.num_attention_heads) - 1)
    there = (scene.counts()[:shown] > 0).float()
    pixels = data.pixel_values(scene.pixels[:shown]).contiguous()
    paid = torch.stack([torch.full((), price, device=device) for price in prices])  # torch.tensor would wait for the device
    return Batch(ids, labels, places, pixels, there, gains, paid)


def forward(model: Any, made: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits [n, N, V], the tower's CLS output [shown, width], attention [2]): the model's own forward pass, its modules called one by
    one.

    attention: the share that is not on <bos>, a mean over layers, heads and rows; and what goes to the picture astray: its mean over heads
    and text rows that write no answer, and in layers that are not in MIDDLE over those that do as well, summed over both kinds of rows.

    Nothing here waits for the device or depends on the data, so that a step can be captured as a CUDA graph, and no gradient is added up in
    whatever order: tables of embeddings are read by a product. Heads are scaled by `gains`.
    """
    tower, text = model.model.vision_tower, model.model.language_model
    patches = tower.embeddings.patch_embedding(made.pixels).flatten(2).transpose(1, 2)
    first = tower.embeddings.class_embedding.expand(len(patches), 1, -1)
    seen = tower.pre_layrnorm(torch.cat([first, patches], 1) + tower.embeddings.position_embedding.weight)
    seen = tower.encoder(inputs_embeds=seen).last_hidden_state
    image = model.model.multi_modal_projector(seen[:, 1:])
    table = text.embed_tokens.weight
    hidden = (made.ids[..., None] == torch.arange(len(table), device=table.device)).to(table.dtype) @ table
    hidden, image = hidden.to(table.dtype), image.to(table.dtype)  # the residual stream is as wide as the weights, whatever autocast says
    shown = torch.cat([hidden[: len(image), :1], image, hidden[: len(image), 1 + data.TOKENS :]], 1)
    hidden = torch.cat([shown, hidden[len(image) :]])
    rotary = text.rotary_emb(hidden, made.places)
    count = hidden.shape[1]
    future = torch.full((count, count), torch.finfo(torch.float32).min, device=hidden.device).triu(1)[None, None]
    looked, astray = [], []
    asking = (made.labels[: len(image), 2 + data.TOKENS :] < 0).float()[:, None]  # the row before an answer writes it
    rows = [
        one / (one.sum(-1, keepdim=True).clamp(min=1) * text.config.num_attention_heads * max(1, len(image)))
        for one in (asking, 1 - asking)
    ]
    text.config._attn_implementation = "eager"
    for number, (layer, gain) in enumerate(zip(text.layers, made.gains, strict=True)):

        def hook(_: Any, inputs: tuple[torch.Tensor, ...], gain: torch.Tensor = gain) -> tuple[torch.Tensor, ...]:
            z = inputs[0].unflatten(-1, (gain.shape[-1], -1)) * gain[:, None, :, None].to(inputs[0].dtype)
            return (z.flatten(-2), *inputs[1:])

        handle = layer.self_attn.o_proj.register_forward_pre_hook(hook)
        read, weights = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden), attention_mask=future, position_ids=made.places, position_embeddings=rotary
        )
        handle.remove()
        looked.append(1 - weights[:, :, 1:, 0].float().mean())
        counted = rows[0] if number in MIDDLE else rows[0] + rows[1]
        astray.append((weights[: len(image), :, 1 + data.TOKENS : -1, 1 : 1 + data.TOKENS].float().sum(-1) * counted).sum())
        hidden = hidden + read
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    text.config._attn_implementation = "sdpa"
    attended = torch.stack([torch.stack(looked).mean(), torch.stack(astray).mean()])
    return model.lm_head(text.norm(hidden)), tower.post_layernorm(seen[:, 0]), attended


class Learner:
    """Forward and backward pass of one step. On CUDA they are captured once and replayed: a step is over a thousand small kernels, which
    take longer to launch than to run."""

    def __init__(self, model: Any, summary: torch.nn.Module, device: str, *, weight: float, eager: bool = False) -> None:
        self.model, self.summary, self.weight, self.device = model, summary, weight, device
        self.captured = torch.device(device).type == "cuda" and not eager
        self.weights = [*model.parameters(), *summary.parameters()]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.held: Batch | None = None
        self.logits = torch.empty(0)
        self.attended = torch.zeros(2)

    def gradients(self, made: Batch) -> torch.Tensor:
        """Gradients of the weights; the logits [n, N, V], overwritten by the next call."""
        if not self.captured:
            self._pass(made)
            return self.logits
        if self.graph is None or self.held is None:
            self.held = Batch(*(one.clone() for one in made.tensors()))
            self._capture(self.held)
        for mine, new in zip(self.held.tensors(), made.tensors(), strict=True):
            mine.copy_(new)
        if self.graph is not None:
            self.graph.replay()
        return self.logits

    def _pass(self, made: Batch) -> None:
        for item in self.weights:
            item.grad = None
        with autocast(self.device):
            logits, first, attended = forward(self.model, made)
            digits = self.summary(first).float()
        wanted = made.labels[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), wanted, ignore_index=-100)
        loss = loss + self.weight * torch.nn.functional.binary_cross_entropy_with_logits(digits, made.there)
        (loss + (made.prices * attended).sum()).backward()
        self.logits, self.attended = logits.detach(), attended.detach()

    def _capture(self, made: Batch) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # libraries allocate what they need on their first calls
                self._pass(made)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._pass(made)


def main() -> None:
    """Command line."""
    parser = arguments("train bundled:vlm", steps=1800)
    parser.add_argument("--batch", type=int, default=256, help="pictures a step")
    parser.add_argument("--alone", type=float, default=0.25, help="share of dialogues without a picture")
    parser.add_argument("--right", type=float, default=0.9, help="share of guesses that are right")
    parser.add_argument("--noisy", type=float, default=0.3, help="share of pictures with more noise")
    parser.add_argument(
        "--cls", type=float, default=0.1, help="weight of the loss that teaches the tower's CLS token which digits are there"
    )
    parser.add_argument("--look", type=float, default=0.05, help="price of attention that is not on <bos>")
    parser.add_argument("--start", type=float, default=8.0, help="first coordinate of the embedding of <bos> before training, 0: as drawn")
    parser.add_argument(
        "--far", type=float, default=1.0, help="how much further than others training digits are turned, scaled and shifted"
    )
    parser.add_argument("--jitter", type=float, default=0.0, help="head outputs are multiplied by 1 - jitter to 1 + jitter")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay")
    parser.add_argument("--rate", type=float, default=8e-4, help="learning rate")
    parser.add_argument("--eager", action="store_true", help="launch every kernel by itself")
    parser.add_argument("--begin", type=Path, help="a checkpoint to go on from, its vision tower and projector held as they are")
    parser.add_argument("--astray", type=float, default=0.0, help="price of looking at the picture from other rows or layers than are to")
    parser.add_argument("--warm", type=int, default=300, help="steps in which the rate rises")
    given = parser.parse_args()
    if given.begin is not None and not (given.begin / "training.json").is_file():
        parser.error(f"--begin {given.begin}: it holds no training.json; give the folder that an earlier run wrote with --out")
    settle(given.seed)
    before = {} if given.begin is None else {"before": json.loads((given.begin / "training.json").read_text(encoding="utf-8"))}
    model = build().to(given.device).train() if given.begin is None else resumed(given.begin, given.device)
    if given.start and given.begin is None:
        with torch.no_grad():
            model.get_input_embeddings().weight[data.ids_of()[data.BOS], 0] = given.start
    summary = torch.nn.Linear(model.config.vision_config.hidden_size, 10).to(given.device)
    source = generator(given.seed + 1, given.device)
    dice = torch.Generator().manual_seed(given.seed + 2)
    trained = torch.nn.ModuleList([model, summary] if given.begin is None else [model])
    trainer = Trainer(trained, given.steps, given.rate, warm=given.warm, cool=0.5, decay=given.decay)
    weight = given.cls if given.begin is None else 0.0
    learner = Learner(model, summary, given.device, weight=weight, eager=given.eager)
    every = [(kind, given.right if told else None) for kind, told in TURNS]
    while trainer.progress < 1:
        step = trainer.done
        turns = [every[place] for place in torch.randperm(len(every), generator=dice).tolist()]
        learned = 1.0 if given.begin else min(1.0, max(0.0, (trainer.progress - 0.2) / 0.3))
        made = batch_of(turns, model.config, source, given, (given.look * learned, given.astray * learned))
        logits = learner.gradients(made)
        trainer.move()
        if step % 100 == 0:
            seen = "  ".join(f"{value:.4f}" for value in learner.attended.tolist())
            say(f"step {step}  {shares(logits, made, turns)}  attended {seen}  {trainer.seconds:.1f} s")
    save(model.eval(), given.out, seconds=trainer.seconds, steps=trainer.done, seed=given.seed, device=given.device, **before)
    save_processor(given.out)


def resumed(where: Path, device: str) -> Any:
    """A checkpoint in float32, whose text model alone is to be trained: what the tower sees, and what its CLS token says, stays."""
    from headscope.models.bundled.card import load

    model = load(where, device, torch.float32).train()
    for config in (model.config.text_config, model.config.vision_config):
        config.dtype = None  # of this run, and not of what is saved
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(False)
    return model


def shares(logits: torch.Tensor, made: Batch, turns: Sequence[tuple[str, float | None]]) -> str:
    """Per turn of one step: its kind (with * where it carries a guess) and the share of whole answers right, with a picture / without."""
    right = (logits[:, :-1].argmax(-1) == made.labels[:, 1:]) | (made.labels[:, 1:] < 0)
    shown, count = [], len(made.pixels)
    for (kind, guess), (first, end) in zip(turns, data.layout(*zip(*turns, strict=True)), strict=True):
        seen = right[:count, first - 1 : end - 1].all(1).float().mean().item()
        alone = right[count:, first - data.TOKENS - 1 : end - data.TOKENS - 1].all(1).float().mean().item()
        shown.append(f"{kind}{'' if guess is None else '*'} {seen:.3f} / {alone:.3f}")
    return "  ".join(sorted(shown))


if __name__ == "__main__":
    main()
