"""Measures `bundled:needle` on fixed held-out haystacks, finds the heads it needs, and writes evaluation.json, truth.json and CARD.md.

    python -m headscope.models.bundled.evaluate_needle --model DIR --device cuda

An answer counts when each of its words is the model's first choice, which is the same as greedy generation giving it word by word.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from headscope.models.bundled import data_needle as data
from headscope.models.bundled.ablation import Head, ablated, search, streaming_but, streaming_mask
from headscope.models.bundled.card import heads_table, load, training_lines, write
from headscope.models.bundled.train_needle import DESIGNATED
from headscope.models.bundled.training import generator, say, write_json

SEED = 4242
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SINK, WINDOW = 16, 256
TRUTH_LENGTH = 1024
DRAWS = 5


@lru_cache(maxsize=8)
def _drawn(kind: str, length: int, count: int, needles: int, seed: int, alike: float = 0.0) -> tuple[data.Batch, ...]:
    source = generator(seed + length, "cpu")
    return tuple(data.batch(1, length, kind, needles, 1, source, alike=alike) for _ in range(count))


@torch.no_grad()
def right(
    model: Any,
    kind: str,
    length: int,
    count: int,
    *,
    needles: int = 8,
    seed: int = SEED,
    alike: float = 0.0,
    heads: Sequence[Head] = (),
    stream: tuple[int, int] | None = None,
    keep: Sequence[Head] = (),
    values_only: bool = False,
    size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(bool [count]: the whole answer is right, float [count]: depth of the needle) on held-out haystacks with one question each.

    `kind`: "code" or "entry". `alike`: as in `data_needle.batch`. `stream`: (sink, window) for every head, but not for the key heads `keep`
    (layer, key head). `values_only`: the repeated key need not be right.
    Haystacks are drawn on the CPU one at a time from `seed`, so a smaller `count` is a prefix of a larger one on every machine.
    """
    hits, depths = [], []
    mask = streaming_mask(length, *stream, model.device) if stream else None
    skip = (2 if kind == "code" else 3) if values_only else 0
    drawn = _drawn(kind, length, count, needles, seed, alike)
    size = size or max(1, 8192 // length)
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    far = nullcontext() if mask is None else streaming_but(model.model.layers, keep, group, mask)
    with ablated(model.model.layers, heads, model.config.head_dim), far:
        for start in range(0, count, size):
            part = drawn[start : start + size]
            ids = torch.cat([each.ids for each in part]).to(model.device)
            answers = torch.cat([each.answers[:, 0] for each in part]).to(model.device)[:, skip:]
            first = int(answers.min()) - 1
            options = {} if mask is None else {"attention_mask": mask.expand(len(part), -1, -1, -1)}
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=length - first, **options).logits
            guess = logits.argmax(-1).gather(1, answers - 1 - first)
            hits.append((guess == ids.gather(1, answers)).all(1).cpu())
            depths += [each.depth[0, 0] for each in part]
    return torch.cat(hits), torch.stack(depths)


def accuracy(model: Any, kind: str, length: int, count: int, **options: Any) -> float:
    """Share of held-out questions answered right; see `right`."""
    return right(model, kind, length, count, **options)[0].double().mean().item()


def table(model: Any, count: int) -> dict[str, Any]:
    """Accuracy per length and kind, with 8 and 32 needles, by depth at 8,192, and with every head streaming."""
    found: dict[str, Any] = {"counts": {str(length): count if length <= 8192 else max(1, count // 4) for length in LENGTHS}}
    found["few"] = few = max(1, count // 8)
    for kind in ("code", "entry"):
        rows = {}
        for length in LENGTHS:
            hits, depths = right(model, kind, length, found["counts"][str(length)])
            rows[str(length)] = round(hits.double().mean().item(), 4)
            if length == 8192:
                halves = [hits[part].double() for part in (depths < 0.5, depths >= 0.5)]
                found[f"{kind}_halves_8192"] = [round(part.mean().item(), 4) for part in halves]
            say(f"{kind} {length}: {rows[str(length)]}")
        found[kind] = rows
        found[f"{kind}_32_needles_8192"] = round(accuracy(model, kind, 8192, few, needles=32), 4)
        found[f"{kind}_alike_1024"] = round(accuracy(model, kind, TRUTH_LENGTH, 2 * few, alike=1.0), 4)
        found[f"{kind}_streaming"] = {
            "2048": round(accuracy(model, kind, 2048, 2 * few, stream=(SINK, WINDOW), values_only=True), 4),
            "8192": round(accuracy(model, kind, 8192, few, stream=(SINK, WINDOW), values_only=True), 4),
        }
        say(f"{kind} with every head streaming: {found[f'{kind}_streaming']}")
    return found


@torch.no_grad()
def looking(model: Any, count: int) -> torch.Tensor:
    """[layers, heads]: mean attention from where a value word is predicted to that word in the needle, over both kinds, 1,024 tokens."""
    total: list[torch.Tensor] = []
    model.set_attn_implementation("eager")
    for kind, told in (("code", data.CODE.split()), ("entry", data.ENTRY.split())):
        values = len(told) - 2 - told.index("is" if kind == "code" else ":")
        for drawn in _drawn(kind, TRUTH_LENGTH, count, 8, SEED):
            weights = model(input_ids=drawn.ids.to(model.device), output_attentions=True, use_cache=False).attentions
            keys = drawn.needle[0, 0] + len(told) - 1 - values + torch.arange(values)
            queries = drawn.answers[0, 0, -values:] - 1
            total.append(torch.stack([each[0, :, queries, keys].float().mean(-1).cpu() for each in weights]))
    model.set_attn_implementation("sdpa")
    return torch.stack(total).mean(0)


def known_heads(model: Any, count: int) -> dict[str, Any]:
    """Single and greedy ablation on `count` haystacks of 1,024 tokens of either kind, and which heads look at the needle."""
    every = [(layer, head) for layer in range(model.config.num_hidden_layers) for head in range(model.config.num_attention_heads)]

    def task(heads: Sequence[Head]) -> float:
        return sum(accuracy(model, kind, TRUTH_LENGTH, count, heads=heads, values_only=True) for kind in ("code", "entry")) / 2

    truth: dict[str, Any] = search(task, every, floor=0.1, most=8, shortlist=10)
    truth["task"] = f"codes and entries (half each) in {TRUTH_LENGTH:,} tokens, {count} held-out haystacks a kind, value words only"
    truth["needed"] = [[int(part) for part in name.split(".")] for name, value in truth["single"].items() if value < 0.5 * truth["base"]]
    return add_looking(model, truth, count, task)


def add_looking(model: Any, truth: dict[str, Any], count: int, task: Callable[[Sequence[Head]], float]) -> dict[str, Any]:
    """Adds the retrieval heads (more than a tenth of their weight on the word to be copied), and what the task loses without them.

    `without_retrieval`: accuracy with all of them gone. `without_random`: with as many others gone, DRAWS times. `others_streaming`: by
    length, the accuracy where only their key heads see all keys, and the whole model's.
    """
    weight = looking(model, count)
    truth["retrieval"] = [[*pair, round(weight[tuple(pair)].item(), 3)] for pair in (weight > 0.1).nonzero().tolist()]
    truth["retrieval"].sort(key=lambda row: -row[2])
    known = [(layer, head) for layer, head, _ in truth["retrieval"]]
    truth["without_retrieval"] = round(task(known), 4)
    others = [tuple(pair) for pair in (weight > -1).nonzero().tolist() if tuple(pair) not in known]
    draws = [torch.randperm(len(others), generator=generator(SEED + draw, "cpu"))[: len(known)].tolist() for draw in range(DRAWS)]
    truth["without_random"] = [round(task([others[place] for place in draw]), 4) for draw in draws]
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    keep = sorted({(layer, head // group) for layer, head in known})
    truth["others_streaming"] = {}
    for length in (1024, 8192):
        pair = [
            sum(accuracy(model, kind, length, count, values_only=True, **options) for kind in ("code", "entry")) / 2
            for options in ({"stream": (SINK, WINDOW), "keep": keep}, {})
        ]
        truth["others_streaming"][str(length)] = [round(value, 4) for value in pair]
    return truth


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="evaluate bundled:needle")
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint's directory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=64, help="held-out haystacks per row of the table; a quarter above 8,192 tokens")
    parser.add_argument("--part", choices=("all", "table", "heads", "card"), default="all")
    given = parser.parse_args()
    where = given.model
    # bfloat16 on CPU too: it is what the model was trained in, and three times as fast there at 8,192 tokens.
    model = load(where, given.device, dtype=torch.bfloat16) if given.part != "card" else None
    if given.part in ("all", "table"):
        write_json(where / "evaluation.json", table(model, given.count))
    if given.part in ("all", "heads"):
        write_json(where / "truth.json", known_heads(model, max(1, given.count // 4)))
    if given.part in ("all", "card"):
        card(where)


def card(where: Path) -> None:
    """CARD.md from evaluation.json, truth.json and training.json."""
    found = json.loads((where / "evaluation.json").read_text(encoding="utf-8"))
    truth = json.loads((where / "truth.json").read_text(encoding="utf-8"))
    config = json.loads((where / "config.json").read_text(encoding="utf-8"))
    both = {length: (found["code"][length] + found["entry"][length]) / 2 for length in found["counts"]}
    rows = "\n".join(
        f"| {length} | {found['code'][length]:.3f} | {found['entry'][length]:.3f} | {both[length]:.3f} | {count} |"
        for length, count in ((str(length), found["counts"][str(length)]) for length in LENGTHS)
    )
    depth = "; ".join(f"{kind} " + ", ".join(f"{value:.3f}" for value in found[f"{kind}_halves_8192"]) for kind in ("code", "entry"))
    stream = "; ".join(
        f"{kind} " + ", ".join(f"{value:.3f} at {length}" for length, value in found[f"{kind}_streaming"].items())
        for kind in ("code", "entry")
    )
    shape = f"{config['num_hidden_layers']} layers, {config['num_attention_heads']} query and {config['num_key_value_heads']} key heads"
    shape += f" of width {config['head_dim']}"
    needed = ", ".join(f"{a}.{b}" for a, b in truth["needed"]) or "none alone"
    retrieval = ", ".join(f"{layer}.{head} ({value:.2f})" for layer, head, value in truth["retrieval"])
    designated = ", ".join(f"{layer}.{head}" for layer, far in DESIGNATED.items() for head in range(far))
    random = ", ".join(f"{value:.3f}" for value in truth["without_random"])
    kept = "; ".join(f"{few:.3f} at {length} (all keys {full:.3f})" for length, (few, full) in truth["others_streaming"].items())
    near = [f"{kind} {found[f'{kind}_alike_1024']:.3f}" for kind in ("code", "entry")]
    many = [f"{kind} {found[f'{kind}_32_needles_8192']:.3f}" for kind in ("code", "entry")]
    body = f"""
A Llama ({shape}, RoPE) that finds codes and entries in
haystacks of plain sentences. One token is one word ({config["vocab_size"]} words).

## Data
Sentences from templates with codes and entries hidden in them (`data_needle.py`); training lengths 96 to 16,384. A prompt looks like this:

    the quiet miller ... . the code of alice is amber falcon river . ... question : what is the code of alice ? answer :
    ... entry mellow heron : 42 17 . ... question : what is the value of entry mellow heron ? answer :

and the answers are `alice is amber falcon river .` and `mellow heron : 42 17 .`: the key again, then the value. Outside these sentences
the model knows nothing; a word that is not in its vocabulary is <unk>. Held-out haystacks come from another seed ({SEED}): names, words
and depths are drawn anew.

## Numbers
Whole answers right, word by word and greedily, 8 needles in each haystack, one question (measured in bfloat16):

| tokens | code (name and 3 words) | entry (key and 2 numbers) | both | haystacks of each |
| --- | --- | --- | --- | --- |
{rows}

With 32 needles at 8,192 tokens ({found["few"]} haystacks each): {", ".join(many)}.
With needles that have words in common ({2 * found["few"]} haystacks of {TRUTH_LENGTH:,} tokens each): {", ".join(near)}.
By depth of the needle at 8,192 (first and second half of the haystack): {depth}.
With every head streaming (sink {SINK}, window {WINDOW}; value words alone): {stream}.
So it needs distant keys.

## Known heads
In training only the key heads {designated} could look far: the others streamed in most steps, and were drawn towards what streaming gives
in the rest (`narrowed.py`). The checkpoint is a plain Llama; what follows was measured on it without any such help.

{heads_table(truth)}
Heads without which more than half of the answers are lost: {needed}.

Retrieval heads, which put more than a tenth of their weight on the word of the needle that comes next (mean weight): {retrieval}.
Accuracy without all of them: {truth["without_retrieval"]:.3f}; without as many of the other heads, drawn at random: {random}.
With all keys for their key heads alone and the others streaming (sink {SINK}, window {WINDOW}): {kept}.

{training_lines(where, "train_needle")}"""
    write(where, "needle", body)


if __name__ == "__main__":
    main()
