"""The portable observer: one attention call measured where the model runs, by a function that needs nothing but torch.

Under nnsight a model may run on another machine, which has torch and transformers but not headscope. What is sent there is the code of the
traced block and of every function it names, so the observer is one plain function: its imports are inside, its parameters are numbers
and tensors, its result is a dictionary of tensors. The matrix is never whole: a block of query rows sees all of its keys at once, which
is exact without a second sweep, and blocks are cut so that their scores stay within `cells` numbers.

It covers what one prefill of a model on transformers' interface can be asked: no cache, any mask that is a tensor, soft cap and sinks.
What it cannot read it names in the result's "refused", for an exception raised on another machine comes back without its reason.
"""

from __future__ import annotations

from typing import Any

MEASURES = (
    "lse",
    "entropy",
    "row_max",
    "argmax",
    "distance",
    "distance_sq",
    "waad",
    "sink_mass",
    "local_mass",
    "sink_logit_mass",
    "class_mass",
    "column_sum",
    "sink_importance",
    "fai",
    "block_mass",
    "block_max",
    "diagonal_sum",
)
"""The statistics that `observe_call` knows."""


def observe_call(args: Any, kwargs: Any, params: dict[str, Any]) -> dict[str, Any]:
    """Statistics of one call of a transformers attention function, from its arguments.

    `args`, `kwargs`: the call's, (module, query [B, Hq, N, D], key, value [B, Hkv, N, D], mask) and scaling, softcap, s_aux and so on.
    `params`: names (tuple), sink_tokens, local_window, waad_window, fai_band, block, labels ([N] or [B, N] int64 or None), classes,
    valid ([B, N] bool or None: real tokens), rows ([N] or [B, N] bool or None), kernel (the implementation's name), cells.

    Gives a dictionary: "rows", "columns", "counts", "maps" (name -> float32 or int64 tensors on the CPU), "diagonals" [B, Hq, R] and
    "diagonal_start", "causal", "shape" (B, Hq, N), "kernel", and "refused" ("" when all went well). Sums and values are those that
    `headscope.statistics.PartialStatistics` documents.
    """
    import math

    import torch

    given = dict(zip(("module", "query", "key", "value", "attention_mask"), args, strict=False))
    given.update(kwargs)
    module, q, k, mask = given["module"], given["query"].detach(), given["key"].detach(), given.get("attention_mask")
    names = set(params["names"])
    batch, heads, count, width = q.shape
    keys, group, device = k.shape[2], heads // k.shape[1], q.device
    out: dict[str, Any] = {"rows": {}, "columns": {}, "counts": {}, "maps": {}, "diagonals": None, "diagonal_start": 0, "refused": ""}
    kernel = params["kernel"] or str(getattr(getattr(module, "config", None), "_attn_implementation", ""))
    flag = given.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if flag is None else flag)
    out.update(shape=(batch, heads, count), kernel=kernel, causal=causal)
    unknown = [name for name in ("indices", "block_indices", "sinks", "position_bias", "block_table") if given.get(name) is not None]
    if keys != count:
        out["refused"] = f"{count} queries met {keys} keys: only a prefill without a cache can be measured in a trace"
    elif mask is not None and not isinstance(mask, torch.Tensor):
        out["refused"] = f"a mask of type {type(mask).__name__}"
    elif float(given.get("dropout") or 0.0) > 0.0:
        out["refused"] = "dropout is on"
    elif unknown:
        out["refused"] = f"the argument {unknown[0]}= changes its attention"
    if out["refused"]:
        return out

    precise = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = float(given["scaling"]) if given.get("scaling") is not None else 1.0 / math.sqrt(width)
    softcap, sinks = given.get("softcap"), given.get("s_aux")
    flash, eager = "flash" in kernel, kernel == "eager"
    window = given.get("sliding_window") if flash else None
    place = torch.arange(keys, device=device)
    valid = params["valid"]
    valid = torch.ones(batch, count, dtype=torch.bool, device=device) if valid is None else valid.to(device)
    first = valid.int().argmax(1)
    allowed_rows = params["rows"]
    counting_rows = torch.ones(batch, count, dtype=torch.bool, device=device)
    if allowed_rows is not None:
        known = allowed_rows.to(device).bool().expand(batch, allowed_rows.shape[-1])[:, :count]
        counting_rows = torch.zeros_like(counting_rows)
        counting_rows[:, : known.shape[1]] = known
    labels = params["labels"]
    if labels is not None:
        wide = torch.full((batch, keys), -1, dtype=torch.int64, device=device)
        known = labels.to(device).expand(batch, labels.shape[-1])[:, :keys]
        wide[:, : known.shape[1]] = known
        labels = wide
    key_t = k.to(precise).transpose(-2, -1)  # [B, Hkv, D, Nk]
    rows: dict[str, list[Any]] = {}
    columns: dict[str, Any] = {name: torch.zeros(batch, heads, keys, dtype=precise, device=device) for name in ("column_sum", "fai_sum")}
    counts = {name: torch.zeros(batch, keys, dtype=torch.int64, device=device) for name in ("row_count", "fai_count")}
    side = params["block"]
    cells = -(-count // side)
    maps = {name: torch.zeros(batch, heads, cells, cells, dtype=precise, device=device) for name in ("block_mass", "block_max")}
    reach = keys if causal else 2 * keys - 1
    diagonals = torch.zeros(batch, heads, reach, dtype=precise, device=device)
    real_key = valid
    step = max(1, min(count, params["cells"] // max(1, batch * heads * keys)))
    for low in range(0, count, step):
        high = min(low + step, count)
        t = torch.arange(low, high, device=device)
        gap = t[:, None] - place[None, :]
        score = q[:, :, low:high].to(precise).unflatten(1, (k.shape[1], group)) @ key_t[:, :, None]
        score = score.flatten(1, 2) * scale
        if softcap is not None:
            score = torch.tanh(score / softcap) * softcap
        seen = torch.ones(1, 1, high - low, keys, dtype=torch.bool, device=device)
        if mask is None or mask.dim() == 2:
            if causal and not (eager and count > 1):
                seen = seen & (gap >= 0)
            if window is not None:
                seen = seen & ((gap if causal else gap.abs()) < window)
            if mask is not None:
                seen = seen & mask[:, None, None, :keys].bool()
        else:
            part = mask[..., low:high, :keys] if mask.shape[-2] > 1 else mask[..., :keys]
            if part.dtype == torch.bool:
                seen = seen & part
            else:
                floor = torch.finfo(part.dtype).min / 2
                seen = seen & (part > floor)
                score = score + part.detach().masked_fill(part <= floor, 0).to(precise)
        score = score.masked_fill(~seen, float("-inf"))
        lse = torch.logsumexp(score, -1)
        if sinks is not None:
            sink = sinks.detach().to(precise).reshape(1, -1, 1).expand_as(lse)
            lse = torch.logaddexp(lse, sink)
        a = torch.exp(score - lse[..., None]).masked_fill(~seen, 0.0)
        defined = seen.any(-1).expand(batch, heads, -1) & valid[:, None, low:high]
        counted = (seen.any(-1).any(1).expand(batch, -1) & valid[:, low:high]) & counting_rows[:, low:high]
        found = {"lse": lse}
        if "entropy" in names:
            found["entropy"] = -(a * (score - lse[..., None]).masked_fill(a == 0, 0.0)).sum(-1)
        if "row_max" in names:
            found["row_max"] = a.amax(-1)
        distance = gap.abs().to(precise)
        if "distance" in names:
            found["distance"] = (a * distance).sum(-1)
        if "distance_sq" in names:
            found["distance_sq"] = (a * distance * distance).sum(-1)
        if "waad" in names:
            found["waad"] = (a * distance.clamp(max=params["waad_window"])).sum(-1)
        if "local_mass" in names:
            found["local_mass"] = (a * (distance < params["local_window"])).sum(-1)
        if "sink_mass" in names:
            inside = (place[None, :] >= first[:, None]) & (place[None, :] < first[:, None] + params["sink_tokens"])
            found["sink_mass"] = (a * inside[:, None, None, :]).sum(-1)
        if "sink_logit_mass" in names:
            found["sink_logit_mass"] = torch.zeros_like(lse) if sinks is None else torch.exp(sink - lse)
        for name, value in found.items():
            if name in names:
                rows.setdefault(name, []).append(value.masked_fill(~defined, float("nan")))
        if "argmax" in names:
            rows.setdefault("argmax", []).append(score.argmax(-1).masked_fill(~defined, -1))
        if "class_mass" in names:
            masses = [(a * (labels == one)[:, None, None, :]).sum(-1) for one in range(params["classes"])]
            rows.setdefault("class_mass", []).append(torch.stack(masses, -1).masked_fill(~defined[..., None], float("nan")))
        a = a * counted[:, None, :, None]
        later = counted[:, :, None] & ((gap >= 0) if causal else torch.ones_like(gap, dtype=torch.bool))
        columns["column_sum"] += a.sum(2)
        counts["row_count"] += later.sum(1) * real_key
        band_low, band_high = params["fai_band"]
        band = (gap >= band_low) if band_high is None else (gap >= band_low) & (gap <= band_high)
        columns["fai_sum"] += (a * band).sum(2)
        counts["fai_count"] += (counted[:, :, None] & band).sum(1) * real_key
        if names & set(maps):
            wide = torch.nn.functional.pad(a, (0, cells * side - keys)).unflatten(-1, (cells, side))
            maps["block_mass"].index_add_(2, t // side, wide.sum(-1))
            for block in range(low // side, (high - 1) // side + 1):
                top = wide[:, :, (t // side) == block].amax((-1, 2))
                maps["block_max"][:, :, block] = torch.maximum(maps["block_max"][:, :, block], top)
        if "diagonal_sum" in names:
            index = (gap if causal else gap + keys - 1).clamp(0, reach - 1).flatten()
            diagonals.index_add_(2, index, a.flatten(2))
    out["rows"] = {name: torch.cat(pieces, 2).cpu() for name, pieces in rows.items()}
    if names & {"column_sum", "sink_importance"}:
        out["columns"]["column_sum"] = columns["column_sum"].cpu()
        out["counts"]["row_count"] = counts["row_count"].cpu()
    if "fai" in names:
        out["columns"]["fai_sum"] = columns["fai_sum"].cpu()
        out["counts"]["fai_count"] = counts["fai_count"].cpu()
    out["maps"] = {name: maps[name].cpu() for name in maps if name in names}
    if "diagonal_sum" in names:
        out["diagonals"], out["diagonal_start"] = diagonals.cpu(), 0 if causal else -(keys - 1)
    return out


__all__ = ["MEASURES", "observe_call"]
