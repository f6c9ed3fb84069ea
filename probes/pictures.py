"""Questions about pictures: what the probes of vision-language models are run on, with and without the picture.

A picture becomes a run of tokens that all carry one id (`image_token_id` of the config), whatever the model's family; where they stand is
read from the ids, never counted from a patch size. The text-only run takes these tokens out, and the marks that frame them (Qwen's
vision_start and vision_end), since no text-only prompt would hold them.

The silent failure this avoids: text that moves. Without its picture a question starts hundreds of positions earlier, rotary embeddings
turn differently, and every head would look as if it saw the picture. So the positions of the run with the picture are read where the text
stack gets them (for Qwen: three coordinates each) and may be held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import ProbeError, refusal
from headscope.interventions.running import outputs_of
from headscope.interventions.where import image_token_of
from headscope.profile.journal import digest

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope

BUNDLED = "bundled:vlm"
BUNDLED_KINDS = ("position", "presence", "count")
GENERAL = "Write a general description of the image."
"""CARVE's general instruction."""
BUNDLED_GENERAL = "question : is there a ? answer :"
"""The same for bundled:vlm, in the words that it knows: a question that names nothing."""
MARKS = ("vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True, eq=False)
class Sample:
    """One question about one picture, ready for the model.

    `inputs`: the model's arguments, batch 1, on the CPU. `image` bool [N]: image tokens. `frame` bool [N]: these and the marks around them,
    what a text-only prompt lacks. `question`: its words. `picture`: what the user gave, None where inputs were given ready. `grid`: (rows,
    columns) of the image tokens, None where they are no plain grid. `wanted`: id of the right answer's first token, where it is known.
    """

    inputs: dict[str, Any]
    image: Tensor
    frame: Tensor
    question: str = ""
    picture: Any = None
    grid: tuple[int, int] | None = None
    wanted: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ids(self) -> Tensor:
        """[N] int64."""
        ids: Tensor = self.inputs["input_ids"][0]
        return ids

    @property
    def end(self) -> int:
        """First position behind the picture and its marks."""
        return int(self.frame.nonzero().max()) + 1

    def __repr__(self) -> str:
        return f"Sample({self.question[:60]!r}, {len(self.ids)} tokens, {int(self.image.sum())} of the picture)"


def unseeing(scope: Scope) -> str | None:
    """Why a model gets no pictures as tokens, or None."""
    kind = scope.topology.model_class
    if getattr(getattr(scope.model, "config", None), "vision_config", None) is None:
        return f"{kind} reads no images"
    if any(module.kind == "cross" for module in scope.topology.modules):
        return f"{kind} reads its pictures by cross-attention, so none of its tokens are image tokens"
    if image_token_of(scope) is None:
        return f"the config of {kind} names no image token (image_token_id)"
    return None


def samples_of(scope: Scope, data: Any, *, count: int, seed: int) -> list[Sample]:
    """Samples from `data`: a list of (picture, question), of model inputs (dicts with input_ids), or of Samples. None: the digit grids of
    bundled:vlm, for that model only.

    Pictures are what the model's processor takes, or paths. Questions go through its chat template where it has one. ProbeError for
    anything else, for a prompt in which no image token stands, and where nothing follows the picture.
    """
    if data is None:
        if scope.source != BUNDLED:
            raise refusal(
                ProbeError,
                f"no data for {scope.name}",
                "only bundled:vlm brings pictures and questions of its own",
                "pass data=[(picture, question), ...]",
            )
        return bundled_samples(count, seed)
    if isinstance(data, Mapping | str) or not isinstance(data, Sequence) or not data:
        raise refusal(ProbeError, f"data: a {type(data).__name__}", "it is no list of questions", "pass data=[(picture, question), ...]")
    return [_sample(scope, one, f"data[{number}]") for number, one in enumerate(data)]


def _sample(scope: Scope, given: Any, what: str) -> Sample:
    if isinstance(given, Sample):
        return given
    if isinstance(given, Mapping):
        if not isinstance(given.get("input_ids"), torch.Tensor):
            raise refusal(ProbeError, what, "model inputs hold input_ids", "pass what the processor returned")
        return _read(scope, dict(given), what, question=_words(scope, given["input_ids"]))
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2 and isinstance(given[1], str):
        return asked(scope, given[0], given[1], what)
    raise refusal(
        ProbeError, f"{what}: {str(given)[:60]}", "it is no (picture, question)", "pass (picture, 'What is this?') or model inputs"
    )


def asked(scope: Scope, picture: Any, question: str, what: str = "a question") -> Sample:
    """A question about a picture, through the model's processor."""
    processor = scope.tokenizer
    if getattr(processor, "image_processor", None) is None:
        raise refusal(
            ProbeError, what, f"{scope.name} was scoped without a processor, so no picture can be read", "pass Scope(model, processor)"
        )
    if isinstance(picture, str | Path):
        from PIL import Image

        try:
            picture = Image.open(picture).convert("RGB")
        except OSError as error:
            raise refusal(ProbeError, f"{what}: {picture}", f"it cannot be read as a picture ({error})", "pass a picture") from None
    given = processor(images=[picture], text=[_prompt(scope, question)], return_tensors="pt")
    return _read(scope, dict(given), what, question=question, picture=picture)


def _prompt(scope: Scope, question: str) -> str:
    """The question with the place of its picture, as the model's template wants it."""
    processor: Any = scope.tokenizer
    mark = getattr(processor, "image_token", None) or scope.text_tokenizer.decode([image_token_of(scope)])
    if mark in question:
        return question
    if getattr(processor, "chat_template", None):
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        return str(processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False))
    return f"{mark} {question}"


def _read(scope: Scope, inputs: dict[str, Any], what: str, *, question: str, picture: Any = None) -> Sample:
    """Finds the picture in model inputs."""
    ids = inputs["input_ids"]
    if ids.dim() != 2 or len(ids) != 1:
        raise refusal(ProbeError, f"{what}: ids {list(ids.shape)}", "each question is run by itself", "pass inputs of batch 1")
    token = image_token_of(scope)
    image = ids[0] == token
    if not bool(image.any()):
        raise refusal(ProbeError, what, f"no image token ({token}) is in its {ids.shape[1]} ids, so there is no picture", "add a picture")
    config = scope.model.config
    marks = [value for value in (getattr(config, name, None) for name in MARKS) if isinstance(value, int)]
    frame = image | torch.isin(ids[0], torch.tensor(marks, dtype=ids.dtype))
    if bool(frame[-1]):
        raise refusal(ProbeError, what, "nothing follows the picture, so no text can look at it", "ask something after the picture")
    inputs = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    return Sample(inputs, image.cpu(), frame.cpu(), question, picture, _grid(scope, inputs, int(image.sum())))


def _grid(scope: Scope, inputs: dict[str, Any], count: int) -> tuple[int, int] | None:
    """(rows, columns) of one picture's tokens: Qwen says it, a square number is a square, anything else is unknown."""
    table = inputs.get("image_grid_thw")
    if isinstance(table, torch.Tensor):
        merge = int(getattr(scope.model.config.vision_config, "spatial_merge_size", 1))
        frames, rows, columns = table[0].tolist()
        shape = (rows // merge, columns // merge)
        return shape if len(table) == 1 and frames == 1 and shape[0] * shape[1] == count else None
    side = round(count**0.5)
    return (side, side) if side * side == count else None


def _words(scope: Scope, ids: Tensor) -> str:
    """The text of ids, without image tokens; empty without a tokenizer."""
    if scope.tokenizer is None:
        return ""
    token = image_token_of(scope)
    return str(scope.text_tokenizer.decode([one for one in ids[0].tolist() if one != token], skip_special_tokens=True))


def bundled_samples(
    count: int, seed: int = 0, kinds: Sequence[str] = BUNDLED_KINDS, *, guess: float | None = None, **scene: Any
) -> list[Sample]:
    """Questions about held-out digit grids for bundled:vlm, of the kinds in turns. `scene`: options of `data_vlm.scenes`.

    `guess`: every question carries a guess at its answer, right in this share of them, wrong in the others; None: none does.

    `wanted` is the answer's first word; `facts` has the kind, the cells, and for position questions the cell that is asked for.
    """
    from headscope.models.bundled import data_vlm as source

    if count < 1:
        raise refusal(ProbeError, f"samples={count}", "there is nothing to measure", "pass at least 1")
    dice = torch.Generator().manual_seed(seed)
    drawn = source.scenes(count, dice, held_out=True, **scene)
    words = {number: word for word, number in source.ids_of().items()}
    token = source.ids_of()[source.IMAGE]
    out = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        one = source.Scene(drawn.pixels[number : number + 1], drawn.cells[number : number + 1])
        made = source.turn(kind, one, dice, guess=guess)
        head = torch.full((1, 1 + source.TOKENS), token)
        head[0, 0] = source.ids_of()["<bos>"]
        first = made.answers[0]
        ids = torch.cat([head, made.ids[:, :first]], 1)
        image = ids[0] == token
        facts = {"kind": kind, "cells": one.cells[0].tolist(), "asked": int(made.asked[0]) if kind == "position" else None}
        out.append(
            Sample(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": source.pixel_values(one.pixels).contiguous()},
                image,
                image,
                " ".join(words[number] for number in made.ids[0, :first].tolist()),
                grid=(source.SIZE // source.PATCH,) * 2,
                wanted=int(made.ids[0, first]),
                facts=facts,
            )
        )
    return out


def other_question(scope: Scope, sample: Sample, question: str) -> Sample:
    """Another question about the sample's picture. Where the inputs were given ready, the text behind the picture is replaced by it."""
    if sample.picture is not None:
        return asked(scope, sample.picture, question)
    more = torch.tensor([list(scope.text_tokenizer(question, add_special_tokens=False)["input_ids"])], dtype=torch.int64)
    if not more.numel():
        raise refusal(ProbeError, f"the question {question!r}", "its tokenizer gave no token for it", "pass another one")
    end, length = sample.end, len(sample.ids)
    inputs = {name: _cut(value, length, end) for name, value in sample.inputs.items()}
    kept = replace(sample, inputs=inputs, image=sample.image[:end], frame=sample.frame[:end])
    return replace(extended(kept, more[0]), question=question, wanted=None)


def _cut(value: Any, length: int, end: int) -> Any:
    return value[:, :end] if _per_token(value, length) else value


def _per_token(value: Any, length: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and tuple(value.shape) == (1, length)


def extended(sample: Sample, more: Tensor) -> Sample:
    """The sample with text ids [n] behind it: its mask grows by ones, other tables by token (kinds of tokens) by zeros, which is text."""
    count, length = len(more), len(sample.ids)
    inputs = dict(sample.inputs)
    for name, value in inputs.items():
        if name == "input_ids":
            inputs[name] = torch.cat([value, more[None].to(value)], 1)
        elif _per_token(value, length):
            inputs[name] = torch.nn.functional.pad(value, (0, count), value=1 if name == "attention_mask" else 0)
    nothing = torch.zeros(count, dtype=torch.bool)
    return replace(sample, inputs=inputs, image=torch.cat([sample.image, nothing]), frame=torch.cat([sample.frame, nothing]))


def last_row(scope: Scope) -> dict[str, Any]:
    """The argument that keeps logits to the last row, where the model has it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in scope._forward_parameters else {}


def first_word(scope: Scope, inputs: dict[str, Any]) -> Tensor:
    """[V] float64 on the CPU: probabilities of the token behind a prompt."""
    return outputs_of(scope, {**inputs, **last_row(scope)})[0, -1].double().softmax(-1).cpu()


def facts_of(samples: Sequence[Sample], given: Any) -> dict[str, Any]:
    """The run card's entry: what the model was shown."""
    return {
        "name": "given pictures" if given is not None else "bundled digit grids",
        "kind": "pictures",
        "sha256": digest([sample.inputs for sample in samples]),
        "sequences": len(samples),
        "tokens": sum(len(sample.ids) for sample in samples),
    }


__all__ = [
    "BUNDLED_GENERAL",
    "GENERAL",
    "Sample",
    "asked",
    "bundled_samples",
    "extended",
    "facts_of",
    "first_word",
    "last_row",
    "other_question",
    "samples_of",
    "unseeing",
]
