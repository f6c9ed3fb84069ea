"""Every registered intervention, bound by hand to one attention call, so that a device and a dtype can be all that differs."""

from __future__ import annotations

from dataclasses import replace

import torch

from headscope import interventions as hi
from headscope.call import AttentionCall
from headscope.interventions.head_edit import Bound
from headscope.kernels.partial import exact_attention
from headscope.plans import Streaming

from .edit_cases import calls, make_call

ROWS, IMAGE_TOKEN = 70, 7
HEADS = [(0, 4), (0, 0), (0, 3)]
KEYS = [0, 2, 5, 11]
PLAIN = ("causal", "left padding", "window", "soft cap", "sinks", "sinks, soft cap, window, padding", "chunk", "decode")
WHOLE = ("causal", "left padding", "soft cap", "sinks")
"""Calls from position 0 on, for edits that keep count from there."""
CALLS = dict(calls(ROWS))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeing(name):
    """A language model's call with a picture at positions 10..29."""
    call = CALLS[name]
    ids = torch.zeros(2, call.query_offset + call.q.shape[2], dtype=torch.int64)
    ids[:, 10:30] = IMAGE_TOKEN
    return replace(call, facts={"tokens": ids})


def joint(seed=3):
    """A diffusion transformer's call: 49 image tokens and 21 words."""
    return replace(make_call(seed, rows=ROWS, causal=False), facts={"streams": ((0, 0, 49), (1, 49, 70))})


def _cases():
    """Registered name -> [(edit, the calls it meets in order)]."""
    values, reference = drawn(3, 5, seed=1), drawn(2, 3, 5, seed=2) * 0.1
    right = torch.arange(49) % 7 > 3
    masks = torch.zeros(2, 2, ROWS, dtype=torch.bool)
    masks[0, :, 10:16], masks[1, :, 16:20] = True, True

    def each(edit, names=PLAIN):
        return [(edit, [CALLS[name]]) for name in names]

    two_sided = [[CALLS["bidirectional"]], [joint()]]
    return {
        "key_bias": [*each(hi.KeyBias(HEADS, KEYS, 0.8)), *each(hi.KeyBias(HEADS, KEYS, 0.8, positions=slice(12, 90)))],
        "set_bias": [*each(hi.SetBias(HEADS, KEYS, bias=0.8)), *each(hi.SetBias(HEADS, KEYS, mass=0.4))],
        "boost_scores": each(hi.BoostScores(HEADS, KEYS, 0.6)),
        "temperature": each(hi.Temperature(HEADS, 1.7)),
        "replace_queries": [*each(hi.ReplaceQueries(HEADS, "zero")), (hi.ReplaceQueries(HEADS, "mean"), two_sided[0])],
        "act": [
            *each(hi.ACT(HEADS, alpha=2.0), WHOLE),
            *each(hi.ACT(HEADS, alpha=2.0, target="others_not_first"), WHOLE),
            (hi.ACT(HEADS, alpha=2.0), _split(CALLS["causal"], 60)),
        ],
        "patch_heads": [*each(hi.PatchHeads(HEADS, values)), *each(hi.PatchHeads(HEADS, drawn(3, 8, seed=4), "q"))],
        "circuit_reuse": each(hi.CircuitReuse(HEADS, [1, 3]), ("causal", "left padding", "soft cap", "sinks", "chunk")),
        "entropy_abf": each(hi.EntropyABF(HEADS, 16)),
        "soft_pag": [
            *[(hi.SoftPAG(HEADS, 0.4, kind, "all"), call) for kind in ("identity", "uniform", "argmax") for call in two_sided],
            (hi.SoftPAG(HEADS, 0.4, "temperature", "all", tau=2.0), two_sided[0]),
            (hi.SoftPAG(HEADS, 0.4, "query_mean"), two_sided[1]),
            (hi.SoftPAG(HEADS, 0.4, "query_mean", sigma=0.6), two_sided[1]),
            (hi.SoftPAG(HEADS, 0.4, joint="diagonal"), two_sided[1]),
        ],
        "head_mask": [
            *each(hi.HeadMask(HEADS)),
            *each(hi.HeadMask(HEADS, "uniform")),
            *each(hi.HeadMask(HEADS, "mean", values)),
            *each(hi.HeadMask(HEADS, "noise", seed=3), WHOLE),
        ],
        "in_context_brush": [(hi.InContextBrush(HEADS, right, ~right), two_sided[1])],
        "scale": each(hi.Scale(HEADS, [0.5, 2.0, -1.0])),
        "replace": each(hi.Replace(HEADS, values)),
        "lerp": each(hi.Lerp(HEADS, values, 0.3)),
        "add": each(hi.Add(HEADS, values, 0.3)),
        "noise": each(hi.Noise(HEADS, 0.2, seed=3), WHOLE),
        "paint": [
            (hi.PAINT(HEADS, local=masks[0], summary=masks[1], lengths=(40, 36)), [CALLS[name]])
            for name in ("causal", "left padding", "sinks")
        ],
        "rettention": [(hi.Rettention(HEADS, slice(0, 30), 1, 3, drift=0.04), [joint(seed) for seed in (3, 4, 5, 6)])],
        "soft_injection": each(hi.SoftInjection(HEADS, values, [0.9, 0.1, 0.5]), ("causal", "left padding", "soft cap", "sinks", "chunk")),
        "softplus_reweighting": [
            *each(hi.SoftplusReweighting(HEADS, power=1.5, offset=0.5)),
            *each(hi.SoftplusReweighting(HEADS, "both", power=1.5, offset=0.5), ("causal", "left padding", "window", "chunk", "decode")),
        ],
        "var": [(hi.VAR(HEADS, rho=0.1, min_visual=0.05), [seeing(name)]) for name in WHOLE],
        "vhr": [(hi.VHR(HEADS, reference=reference, lengths=(70, 66), outliers=False), [CALLS["left padding"]])],
        "vision_scale": [(hi.VisionScale(HEADS, 1.5), [seeing(name)]) for name in WHOLE],
        "rectified_sparse": [(hi.RectifiedSparse(HEADS, 0.3, block=12, gains=gains), two_sided[1]) for gains in (True, False)],
        "rescaled_pattern": [
            *each(hi.RescaledPattern(HEADS, Streaming(2, 9), "exact"), WHOLE),
            *each(hi.RescaledPattern(HEADS, Streaming(2, 9), block=8), (*WHOLE, "chunk")),
        ],
        "redistribute": [
            *each(hi.Redistribute(HEADS, KEYS, keep=0.4)),
            *each(hi.Redistribute(HEADS, KEYS, keep=0.4, target=slice(12, 40), positions=slice(5, 60)), WHOLE),
        ],
        "mix": [*each(hi.Mix(HEADS, "uniform", 0.4)), *each(hi.Mix(HEADS, "identity", 1.0)), *each(hi.Mix(HEADS, "argmax", 0.4))],
        "set_rows": each(hi.SetRows(HEADS, [5, 6], [0.75, 0.25], positions=slice(12, 200)), ("causal", "left padding", "sinks", "chunk")),
        "rescale_rows": each(hi.RescaleRows(HEADS, 0.6)),
    }


def _split(call: AttentionCall, at: int) -> list[AttentionCall]:
    """A prefill, and what follows it row by row with the keys of all before."""
    first = replace(call, q=call.q[:, :, :at], k=call.k[:, :, :at], v=call.v[:, :, :at])
    rest = [
        replace(call, q=call.q[:, :, row : row + 1], k=call.k[:, :, : row + 1], v=call.v[:, :, : row + 1], query_offset=row)
        for row in range(at, at + 3)
    ]
    return [first, *rest]


CASES = _cases()


def bound(edit, call: AttentionCall, hidden: torch.Tensor | None = None):
    """The edit as it would be bound to a model of this one module."""
    heads = [head for _, head in edit.heads]
    state = {"joint": {"m"}} if edit.name == "in_context_brush" else {}
    if edit.name == "var":
        state = {"dimensions": (0, 1), "tau": 2.0, "hidden": ("m", hidden)}
    return replace(edit, _bound=Bound({call.module: heads}, {call.module: list(range(len(heads)))}, IMAGE_TOKEN, state=state))


def applied(edit, call: AttentionCall) -> torch.Tensor:
    """[B, Nq, Hq, Dv]: the call under the edit, as a host whose kernel is exact would run it."""
    call = replace(call, facts=dict(call.facts))
    edited = edit.before(call)
    return edit.after(edited, exact_attention(edited))
