"""Runs about pictures: where each head of a vision-language model looks while it answers, and of a diffusion transformer at every step.

`answer_profile` asks one question about one picture, lets the model answer, and reads the rows that wrote the answer in one teacher-forced
pass. `step_profile` runs a diffusion transformer over the inputs of its steps. Both keep, beside the weights on the picture, what any run
keeps of a text (statistics, block maps, q and k), so that the same head can be looked at token by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from headscope.errors import ProbeError, refusal
from headscope.profile.card import RunCard, intervention_facts, machine_facts, model_facts, now, version_facts
from headscope.profile.head_profile import HeadProfile
from headscope.profile.maps import block_size, kept_layer, stacked
from headscope.profile.result import head_table
from headscope.profile.roles import assign_roles
from headscope.statistics import PASSIVE, definition
from headscope.store.content import PLANES, MapInfo, RunContent, Tokens
from headscope.store.files import canonical_heads
from headscope.store.pictures import LARGEST, MOST_BETWEEN, PictureFacts, Pictures
from headscope.store.pyramid import build_pyramid, pyramid_sizes

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.scope import Scope
    from headscope.statistics import HeadStatistics

ANSWER = "vision_mass, arXiv:2503.03321, arXiv:2403.06764"
STEP = "headscope"


def answer_profile(scope: Scope, data: Any = None, *, answer_tokens: int = 8, seed: int = 0) -> HeadProfile:
    """One question about one picture, answered by the model.

    `data`: (picture, question), model inputs, or None for a digit grid of bundled:vlm. The profile has `vision_mass` (share of the answer's
    rows that lies on the picture) and `vision_focus` (largest share on one patch), and keeps `pictures` of kind "answer". ProbeError for a
    model that reads no pictures as tokens, and for a picture whose tokens are no grid.
    """
    from headscope.probes.pictures import extended, facts_of, samples_of, unseeing
    from headscope.probes.text import token_pieces
    from headscope.probes.vision_mass import greedy

    why = unseeing(scope)
    if why is not None:
        raise refusal(ProbeError, f"a picture for {scope.name}", why, "use a vision-language model")
    sample = samples_of(scope, None if data is None else [data], count=1, seed=seed)[0]
    if sample.grid is None:
        found = f"its {int(sample.image.sum())} image tokens are no plain grid"
        raise refusal(ProbeError, "this picture", found, "pass one picture that becomes a grid of tokens")
    written = greedy(scope, sample, answer_tokens)
    whole = extended(sample, written[:-1])
    length, last = len(whole.ids), len(sample.ids) - 1
    stats = scope.capture(whole.inputs, **_request(length))
    rows, keys = torch.arange(last, length), sample.image.nonzero().flatten()
    weights = _gather(scope, stats, rows, keys)
    tokenizer = scope.text_tokenizer
    pieces = token_pieces(tokenizer, written.tolist())
    facts = PictureFacts("answer", pieces, sample.grid, sample.question, str(tokenizer.decode(written.tolist())))
    scores = {"vision_mass": weights.sum(-1).mean(-1), "vision_focus": weights.max(-1).mean(-1)}
    metrics = {
        "vision_mass": ("looks at the picture while it answers", "probability", "share of the answer's rows on image tokens"),
        "vision_focus": ("rests on one patch", "probability", "largest share of an answer's row on one patch, mean over the answer"),
    }
    strings = token_pieces(tokenizer, whole.ids.tolist())
    content = _content(scope, stats, Tokens("".join(strings), tuple(whole.ids.tolist()), strings))
    content.pictures = Pictures(facts, _shown(scope, sample.picture, sample.inputs), weights)
    return _profile(scope, scores, metrics, ("answer", ANSWER), [facts_of([sample], data)], content, stats)


def step_profile(
    scope: Scope, inputs: Sequence[Mapping[str, Any]], labels: Sequence[str], pictures: np.ndarray, *, grid: tuple[int, int], note: str = ""
) -> HeadProfile:
    """A diffusion transformer over its steps: `inputs` are the arguments of its forward, one mapping a step, batch 1.

    `pictures` uint8 [S, h, w, 3]: what each step works on, or one for all. `grid`: rows and columns of the image tokens, which are the
    first tokens of each layer's attention. The profile has `focus` (largest mean weight that a patch receives), `reach` (mean distance of
    query and key in patches) and `reach_change` (the last step's less the first's), and keeps `pictures` of kind "step". ProbeError where
    the model has fewer tokens than the grid, or steps and labels differ in number.
    """
    if not inputs or len(inputs) != len(labels):
        raise refusal(ProbeError, f"{len(inputs)} steps and {len(labels)} labels", "each step has one label", "pass as many")
    count = grid[0] * grid[1]
    place = torch.arange(count)
    at = torch.stack([place // grid[1], place % grid[1]], 1).double()
    distance = torch.cdist(at, at).numpy()
    received, reach, between = [], [], []
    stats: HeadStatistics | None = None
    for one in inputs:
        stats = scope.capture(dict(one), **_request(count))
        found = _gather(scope, stats, place, place)
        received.append(found.mean(-2))
        reach.append((found.astype(np.float64) * distance).sum(-1).mean(-1))
        if count <= MOST_BETWEEN:
            between.append(found)
    assert stats is not None
    weights = np.stack(received, 2)
    along = np.stack(reach, 2)
    scores = {"focus": weights.max(-1).mean(-1), "reach": along.mean(-1), "reach_change": along[..., -1] - along[..., 0]}
    metrics = {
        "focus": ("many patches look at one patch", "probability", "largest mean weight that a patch receives, mean over steps"),
        "reach": ("looks across the picture", "patches", "mean distance between query and key patch"),
        "reach_change": ("looks further at the last step than at the first", "patches", "reach at the last step less that at the first"),
    }
    facts = PictureFacts("step", tuple(labels), grid, note=note)
    names = tuple(f"({row}, {column})" for row in range(grid[0]) for column in range(grid[1]))
    total = next(iter(stats["lse"].values())).shape[-1]
    words = (*names, *(f"[{number}]" for number in range(count, total)))
    content = _content(scope, stats, Tokens("", tuple(range(total)), words))
    content.pictures = Pictures(facts, fitted(pictures), weights.astype(np.float32), np.stack(between, 2) if between else None)
    data = [{"name": note or "denoising steps", "kind": "steps", "sha256": "", "sequences": len(inputs), "tokens": total}]
    return _profile(scope, scores, metrics, ("steps", STEP), data, content, stats)


def bundled_steps(scope: Scope, steps: int = 8, seed: int = 0) -> HeadProfile:
    """`step_profile` of bundled:dit on one of its own pictures, from noise to digit in Euler steps."""
    from headscope.models.bundled.data_dit import SIZE
    from headscope.models.bundled.flow import velocity

    if scope.source != "bundled:dit":
        raise refusal(ProbeError, f"{scope.name}", "only bundled:dit brings its own sampler", "call step_profile with your steps")
    x = torch.randn(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(scope.device)
    times = torch.linspace(1, 0, steps + 1)
    inputs, shown = [], []
    label = torch.zeros(1, dtype=torch.long, device=scope.device)
    with torch.no_grad():
        for number in range(steps):
            now_, then = times[number], times[number + 1]
            inputs.append({"hidden_states": x.clone(), "timestep": 1000 * now_.expand(1), "class_labels": label})
            shown.append(((x[0, 0].clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy())
            x = x + (then - now_).item() * velocity(scope.model, x, now_.expand(1).to(scope.device))
    pictures = np.repeat(np.stack(shown)[..., None], 3, axis=-1)
    labels = [f"t = {float(time):.3f}" for time in times[:-1]]
    return step_profile(scope, inputs, labels, pictures, grid=(SIZE, SIZE), note="noise to digit; each picture is what the step is given")


def fitted(pictures: np.ndarray) -> np.ndarray:
    """uint8 [S, h, w, 3] no larger than a run keeps: shrunk by averaging whole pixels."""
    step = -(-max(pictures.shape[1:3]) // LARGEST)
    if step > 1:
        rows, columns = (size // step * step for size in pictures.shape[1:3])
        cut = pictures[:, :rows, :columns].astype(np.float32).reshape(len(pictures), rows // step, step, columns // step, step, 3)
        pictures = cut.mean((2, 4)).round().astype(np.uint8)
    return np.ascontiguousarray(pictures, dtype=np.uint8)


def _request(tokens: int) -> dict[str, Any]:
    names = [name for name in PASSIVE if definition(name).kind in ("row", "column")]
    return {"statistics": [*names, *PLANES, "lse"], "block": block_size(tokens), "keep": "all"}


def _gather(scope: Scope, stats: HeadStatistics, rows: Tensor, keys: Tensor) -> np.ndarray:
    """[L, H, rows, keys] float32, NaN where a layer has fewer heads."""
    main = scope.topology.main
    out = np.full((len(main), max(module.heads for module in main), len(rows), len(keys)), np.nan, dtype=np.float32)
    for place, module in enumerate(main):
        for head in range(module.heads):
            out[place, head] = stats.weights(module.layer if module.layer is not None else module.name, head, rows, keys)[0].numpy()
    return out


def _content(scope: Scope, stats: HeadStatistics, tokens: Tokens) -> RunContent:
    layers, length = scope.topology.layers, len(tokens)
    names = [name for name in PASSIVE if definition(name).kind in ("row", "column")]
    arrays = {f"{definition(name).kind}/{name}": stacked(stats, name, layers) for name in names}
    block = block_size(length)
    causal = all(module.causal for module in scope.topology.main)
    pyramids = {plane: build_pyramid(stacked(stats, plane, layers), plane) for plane in PLANES}
    info = MapInfo(block, length, causal, PLANES, pyramid_sizes(-(-length // block)))
    kept = {layer: kept_layer(stats.kept(layer)) for layer in layers}
    return RunContent(layers, tokens, arrays, pyramids, info, kept)


def _shown(scope: Scope, picture: Any, inputs: Mapping[str, Any]) -> np.ndarray:
    """uint8 [1, h, w, 3]: the user's picture, or the pixels that the model was given, stretched to what a screen shows."""
    if picture is not None:
        array = np.asarray(picture.convert("RGB") if hasattr(picture, "convert") else picture)
        if array.dtype != np.uint8:
            array = (255 * np.clip(array, 0, 1)).round().astype(np.uint8)
        array = array if array.ndim == 3 else np.repeat(array[..., None], 3, -1)
        return fitted(array[None, ..., :3])
    pixels = inputs["pixel_values"].detach().float().cpu()
    while pixels.dim() > 3:
        pixels = pixels[0]
    if pixels.dim() != 3 or pixels.shape[0] not in (1, 3):
        raise refusal(ProbeError, f"pixel_values {list(pixels.shape)}", "they are no picture to show", "pass (picture, question)")
    low, high = float(pixels.min()), float(pixels.max())
    shown = ((pixels - low) / max(high - low, 1e-9) * 255).round().byte().permute(1, 2, 0).numpy()
    return fitted(np.repeat(shown, 3, -1)[None] if shown.shape[-1] == 1 else shown[None])


def _profile(
    scope: Scope,
    scores: dict[str, np.ndarray],
    metrics: dict[str, tuple[str, str, str]],
    probe: tuple[str, str],
    data: list[dict[str, Any]],
    content: RunContent,
    stats: HeadStatistics,
) -> HeadProfile:
    from headscope import __version__

    table = head_table(scope.topology, {name: torch.from_numpy(np.asarray(values, dtype=np.float64)) for name, values in scores.items()})
    table["roles"], table["reasons"] = assign_roles(table)
    described = {
        name: {"probe": probe[0], "unit": unit, "higher_is": high, "title": title, "range": [None, None], "per": "head", "data": "pictures"}
        for name, (high, unit, title) in metrics.items()
    }
    card = RunCard(
        model=model_facts(scope),
        data=data,
        probes=[{"name": probe[0], "parameters": {}, "source": probe[1]}],
        metrics=described,
        numbers={},
        attention_kernels=sorted(set(stats.kernels)),
        statistics_kernel=stats.backend,
        parameters={"map_block": content.maps.block if content.maps is not None else 0},
        seeds={},
        versions=version_facts(),
        machine=machine_facts(str(scope.device)),
        headscope_version=__version__,
        created=now(),
        interventions=intervention_facts(scope),
    )
    return HeadProfile(canonical_heads(table), card, content)


__all__ = ["answer_profile", "bundled_steps", "fitted", "step_profile"]
