"""The rhythm of a model's own responses: where it plans a phrase ahead, and which tokens the rest of the response comes back to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from headscope.errors import ProbeError, refusal, unknown_name
from headscope.probes import token_rhythm as tokens_of
from headscope.probes.active import ActiveProbe, Findings, Unit, Work
from headscope.probes.base import Metric
from headscope.probes.receiver import Receiver
from headscope.probes.responses import LEAST, MODES, Mode, Response, prompts_of, read, respond, sentences, surprise
from headscope.profile.journal import digest

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from headscope.scope import Scope
    from headscope.statistics import HeadStatistics

HORIZONS = ("end", "band")
LAYERS = ("all", "middle")
SENTENCES = 8
"""Sentences of a response from which receiver heads can be told: four more than the four neighbours that do not count."""


@dataclass(frozen=True)
class Rhythm(ActiveProbe):
    """WAAD and FAI over the rows of a response that the model wrote, and how their peaks hang together.

    Heads are sorted by their mean look-back distance over response rows (7); the nearest `share` are local, the farthest `share` global.
    Over the response's tokens, with A averaged over a set of heads (both are linear in A, so curves of heads are averaged here):

        WAAD_t = sum_s A_loc[t, s] min(t - s, `window`)  (9)      FAI_s = mean of A_glob[t, s] over t in s + lo .. s + hi, t a response row
        (10)

    A fall or rise of WAAD opens a phrase: the `top` share of tokens by Delta_t = |WAAD_t - WAAD_t+1| are *preplan* tokens (13). The `top`
    share by FAI are *anchors* (15). An anchor is *dominated* when WAAD is low there and a large Delta lies within `reach` tokens before it
    (17; both against the median of the response): a plan led to it. The table `tokens` has all of this per token, and the factors gamma
    that reinforcement learning would put on it (14, 16, 18; `token_rhythm.gamma_weights`).

    Per head: `response_distance`, `response_waad`, `response_fai` (to the end), means over response tokens. Numbers of the model:
    `anchors_dominated`; `fai_follows`, the share of WAAD peaks with an FAI peak at the same or one of the next `within` tokens, beside
    `fai_follows_blind`, the same share over all tokens; `receiver_meets` and `receiver_meets_blind`, the share of FAI peaks that are peaks
    of the 20 receiver heads' FAI too; `entropy_at_peaks` and `entropy_elsewhere`, of the distributions that tokens at WAAD peaks, and all
    others, were drawn from. The paper has 52.5 against 36.9 % for the second pair, 60.8 against 22.4 % for the third, and .361 against .239
    for the last (Qwen3-4B, GSM8K).

    The paper uses two horizons: its analysis follows each token to the end of the response, its training the band `lo`..`hi` = 10..50. Both
    curves are given; `horizon` says which one makes anchors ("end"). Its training reads five layers evenly spaced in the middle third
    (`layers="middle"`), its analysis all. `temperature`: None is greedy; the paper samples at 0.7.

    Departures: the sets of heads are made from the mean distance over all responses; the last `lo` tokens have no future to speak of and
    are no anchors in either horizon (undefined there in the paper); thresholds of (17) and the detector of peaks (local maxima among the
    `top_peaks` largest) are not given in the paper and are ours. `beyond_first` leaves the first token, which is a sink in many heads, out
    of the distance. Receiver heads are those of Thought Anchors, by the kurtosis of sentence-to-sentence attention, from responses of 8
    sentences on.
    """

    name: ClassVar[str] = "rhythm"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("response_distance", "tokens", "looks far back while the model writes", (0.0, None)),
        Metric("response_waad", "tokens", "looks beyond the nearest tokens while the model writes", (0.0, None)),
        Metric("response_fai", "probability", "tokens of the response are looked at until its end"),
    )
    data: ClassVar[str] = "responses"
    requires: ClassVar[tuple[str, ...]] = ("text", "causal", "generation", "tokenizer")
    cost: ClassVar[str] = "a response of up to 256 tokens and two forward passes a prompt; 4 prompts"
    source: ClassVar[str] = "Attention Illuminates LLM Reasoning, arXiv:2510.13554; receiver heads: Thought Anchors, arXiv:2506.19143"

    share: float = 0.3
    window: int = 10
    lo: int = 10
    hi: int = 50
    horizon: Literal["end", "band"] = "end"
    layers: Literal["all", "middle"] = "all"
    top: float = 0.4
    reach: int = 3
    gain: float = 1.5
    alpha: float = 0.5
    top_peaks: float = 0.2
    within: int = 2
    receivers: int = 20
    beyond_first: bool = False
    mode: Mode = "teacher_forced"
    new_tokens: int = 256
    temperature: float | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("horizon", self.horizon, HORIZONS), ("layers", self.layers, LAYERS), ("mode", self.mode, MODES)):
            if value not in known:
                raise unknown_name(ProbeError, name, value, known)
        if not (0 < self.share <= 0.5 and 0 < self.top < 1 and 0 < self.top_peaks < 1):
            raise refusal(
                ProbeError, f"share={self.share}, top={self.top}", "they are shares, and two sets must not overlap", "use 0.3, 0.4"
            )
        if self.mode == "decode" and self.temperature:
            raise refusal(
                ProbeError, "mode='decode' with a temperature", "sampled steps cannot be taken twice", "use mode='teacher_forced'"
            )
        if self.new_tokens < LEAST or not 0 <= self.lo <= self.hi or self.reach < 1:
            raise refusal(
                ProbeError,
                f"new_tokens={self.new_tokens}, band {self.lo}..{self.hi}",
                "they count tokens",
                f"use {LEAST} or more, and 10..50",
            )

    def measure(self, scope: Scope, data: Any, work: Work) -> Findings:
        """Writes and reads the responses; see the class. `data`: prompts, or (prompt, response) pairs."""
        import pandas as pd

        prompts = prompts_of(scope, data)
        responses, units = [], []
        for number, (prompt, given) in work.each(enumerate(prompts)):
            made = work.unit(f"response {number}", partial(self._write, scope, prompt, given, number, work))
            response = Response(made["ids"], made["first"], made["prompt"])
            responses.append(response)
            units.append(work.unit(f"statistics {number}", partial(self.statistics, scope, response)))
        scores = {
            "response_distance": torch.stack([unit["distance"] for unit in units]).mean(0),
            "response_waad": torch.stack([unit["waad"].double().nanmean(2) for unit in units]).mean(0),
            "response_fai": torch.stack([unit["end"].double().nanmean(2) for unit in units]).mean(0),
        }
        local, far = head_sets(scores["response_distance"], self.share, self._layers(scope))
        kurtosis = torch.stack([unit["kurtosis"] for unit in units])
        known = ~kurtosis.isnan().all(2).all(1)
        receiving = top_heads(kurtosis[known].nanmean(0), self.receivers) if bool(known.any()) else None
        frames = [
            self._tokens(scope, number, r, unit, local, far, receiving)
            for number, (r, unit) in enumerate(zip(responses, units, strict=True))
        ]
        notes = [] if bool(known.all()) else [f"{int((~known).sum())} responses have under {SENTENCES} sentences: no receiver heads there"]
        tables = {"tokens": pd.concat(frames, ignore_index=True), "heads": self._heads(scope, local, far, receiving)}
        written = torch.cat([response.ids for response in responses])
        facts = {
            "name": "own prompts" if data is None else "given prompts",
            "kind": "responses",
            "sha256": digest(written),
            "sequences": len(responses),
            "tokens": len(written),
        }
        return Findings(scores, coupling(frames, self.within), [facts], tables, notes)

    def _write(self, scope: Scope, prompt: Any, given: Any, number: int, work: Work) -> Unit:
        source = work.generator(number)
        made = respond(scope, prompt, given, tokens=self.new_tokens, temperature=self.temperature, source=source, limit=work.context)
        return {"ids": made.ids, "first": made.first, "prompt": made.prompt}

    def statistics(self, scope: Scope, response: Response) -> Unit:
        """Of one response of R tokens: distance [L, H]; waad, band, end [L, H, R] float32; kurtosis [L, H]; entropy [R]."""
        segments, _ = sentences(scope, response)
        enough = int(segments.max()) + 1 >= SENTENCES
        names = [
            "distance",
            "waad",
            "fai",
            "sink_importance",
            *(["segment_mass"] if enough else []),
            *(["pairs"] if self.beyond_first else []),
        ]
        request: dict[str, Any] = {"statistics": names, "waad_window": self.window, "fai_band": (self.lo, self.hi)}
        if enough:
            request["segments"] = segments
        places = torch.arange(response.first, len(response.ids))
        if self.beyond_first:
            request["pairs"] = {"first": (places, torch.zeros_like(places))}
        stats = read(scope, response, self.mode, **request)
        layers = scope.topology.layers

        def of(name: str) -> Tensor:
            return _stacked([stats[name][layer][0][:, response.first :] for layer in layers])

        end = of("sink_importance")
        end[..., max(0, end.shape[-1] - self.lo) :] = float("nan")
        away = of("distance").double()
        distance = away.mean(2)
        if self.beyond_first:
            weight = _stacked([stats.pairs("first")[layer][0] for layer in layers]).double()
            rest = (1 - weight).sum(2)
            distance = ((away - places * weight).sum(2) / rest.clamp_min(1e-9)).clamp_min(0)
        return {
            "distance": distance,
            "waad": of("waad"),
            "band": of("fai"),
            "end": end,
            "kurtosis": self._kurtosis(stats, segments) if enough else torch.full_like(distance, float("nan")),
            "entropy": surprise(scope, response),
        }

    def _kurtosis(self, stats: HeadStatistics, segments: Tensor) -> Tensor:
        sizes = torch.bincount(segments[segments >= 0]).double()
        mass = stats["segment_mass"]
        of_layer = [Receiver()._kurtosis(mass[layer].double() / (sizes[:, None] * sizes)) for layer in stats.topology.layers]
        return _stacked([one[:, None] for one in of_layer])[..., 0].double()

    def _layers(self, scope: Scope) -> Tensor:
        """Bool [L]: the layers whose heads may be local or global."""
        count = len(scope.topology.main)
        out = torch.ones(count, dtype=torch.bool)
        if self.layers == "middle":
            out[:] = False
            out[torch.linspace(count / 3, 2 * count / 3, 5).round().long().clamp_max(count - 1)] = True
        return out

    def _tokens(
        self, scope: Scope, number: int, response: Response, unit: Unit, local: Tensor, far: Tensor, receiving: Tensor | None
    ) -> pd.DataFrame:
        """One row per response token."""
        import pandas as pd

        waad = mean_curve(unit["waad"], local)
        band, end = mean_curve(unit["band"], far), mean_curve(unit["end"], far)
        fai = end if self.horizon == "end" else band
        delta = tokens_of.drops(waad)
        preplan, anchors = tokens_of.top_share(delta, self.top), tokens_of.top_share(fai, self.top)
        led = tokens_of.dominated(waad, anchors, float(waad.nanmedian()), float(delta.nanmedian()), self.reach)
        _, intro = tokens_of.introductions(delta, self.reach)
        given: dict[str, Any] = {
            "preplan": preplan,
            "anchors": anchors,
            "dominated": led,
            "introduced_by": intro,
            "gain": self.gain,
            "alpha": self.alpha,
        }
        _, pieces = sentences(scope, response)
        received = None if receiving is None else mean_curve(unit["end" if self.horizon == "end" else "band"], receiving)
        columns: dict[str, Any] = {
            "response": number,
            "position": range(response.first, len(response.ids)),
            "token": pieces,
            "waad": waad.numpy(),
            "delta": delta.numpy(),
            "fai_band": band.numpy(),
            "fai_end": end.numpy(),
            "entropy": unit["entropy"].numpy(),
            "preplan": preplan.numpy(),
            "anchor": anchors.numpy(),
            "dominated": led.numpy(),
            "introduced_by": torch.where(led & (intro >= 0), intro + response.first, -1).numpy(),
            "waad_peak": tokens_of.peaks(waad, self.top_peaks).numpy(),
            "fai_peak": tokens_of.peaks(fai, self.top_peaks).numpy(),
            **{f"gamma_{kind}": tokens_of.gamma_weights(kind, **given).numpy() for kind in tokens_of.GAMMAS},
        }
        if received is not None:
            columns["receiver_peak"] = tokens_of.peaks(received, self.top_peaks).numpy()
        return pd.DataFrame(columns)

    def _heads(self, scope: Scope, local: Tensor, far: Tensor, receiving: Tensor | None) -> pd.DataFrame:
        import pandas as pd

        rows = [
            {
                "layer": module.layer,
                "head": head,
                "set": "local" if local[place, head] else "global" if far[place, head] else "",
                "receiver": bool(receiving is not None and receiving[place, head]),
            }
            for place, module in enumerate(scope.topology.main)
            for head in range(module.heads)
        ]
        return pd.DataFrame(rows)


def head_sets(distance: Tensor, share: float, layers: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(local, global), bool [L, H]: the `share` of heads with the smallest and with the largest mean distance [L, H], at least one each."""
    used = distance if layers is None else distance.masked_fill(~layers[:, None], float("nan"))
    known = (~used.isnan()).flatten().nonzero()[:, 0]
    order = known[used.flatten()[known].argsort(stable=True)]
    count = max(1, int(share * len(order) + 1e-9))
    near, far = torch.zeros(2, used.numel(), dtype=torch.bool)
    near[order[:count]] = True
    far[order[len(order) - count :]] = True
    return near.reshape(used.shape), far.reshape(used.shape)


def top_heads(values: Tensor, count: int) -> Tensor:
    """Bool [L, H]: the `count` largest that are no NaN."""
    flat = values.flatten().nan_to_num(nan=float("-inf"))
    out = torch.zeros(len(flat), dtype=torch.bool)
    out[flat.argsort(descending=True, stable=True)[:count]] = True
    return out.reshape(values.shape) & ~values.isnan()


def mean_curve(curves: Tensor, heads: Tensor) -> Tensor:
    """[R] float64: mean over a set of heads [L, H] of their curves [L, H, R]."""
    return curves[heads].double().mean(0)


def coupling(frames: list[pd.DataFrame], within: int = 2) -> dict[str, float]:
    """How the curves hang together, over all responses (tokens pooled); numbers that no response gives are left out."""
    out: dict[str, float] = {}
    anchors = sum(int(frame["anchor"].sum()) for frame in frames)
    if anchors:
        out["anchors_dominated"] = sum(int(frame["dominated"].sum()) for frame in frames) / anchors
    pairs = {"fai_follows": ("waad_peak", "fai_peak", within), "receiver_meets": ("fai_peak", "receiver_peak", 0)}
    for name, (first, second, reach) in pairs.items():
        hits, total, blind, tokens = 0.0, 0, 0.0, 0
        for frame in frames:
            if second not in frame or not len(frame):
                continue
            mine = torch.from_numpy(frame[first].to_numpy(dtype=bool).copy())
            other = torch.from_numpy(frame[second].to_numpy(dtype=bool).copy())
            met, base = tokens_of.follows(mine, other, reach)
            hits += met * int(mine.sum()) if bool(mine.any()) else 0.0
            total += int(mine.sum())
            blind += base * len(frame)
            tokens += len(frame)
        if total:
            out[name], out[f"{name}_blind"] = hits / total, blind / tokens
    peak = torch.cat([torch.from_numpy(frame["waad_peak"].to_numpy(dtype=bool).copy()) for frame in frames])
    entropy = torch.cat([torch.from_numpy(frame["entropy"].to_numpy().copy()) for frame in frames])
    if bool(peak.any()):
        out["entropy_at_peaks"], out["entropy_elsewhere"] = float(entropy[peak].mean()), float(entropy[~peak].mean())
    return out


def _stacked(values: list[Tensor]) -> Tensor:
    """[H, n] per layer -> [L, H, n], NaN where a layer has fewer heads."""
    heads = max(len(one) for one in values)
    return torch.stack([torch.nn.functional.pad(one, (0, 0, 0, heads - len(one)), value=float("nan")) for one in values])


__all__ = ["Rhythm", "coupling", "head_sets", "mean_curve", "top_heads"]
