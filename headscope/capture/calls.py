"""From the arguments of a transformers attention function to an AttentionCall.

One function per question: which family of kernel is this, how far do the keys reach, which mask rule does that family apply, which of the
keyword arguments change the attention. Arguments that change it in a way that an AttentionCall cannot say are refused by name; arguments
nobody has heard of are let through, because the output of the first calls is checked against our reading of them (`verify`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from headscope.call import AttentionCall, MaskFacts
from headscope.capture.masks import Place, from_block_mask, from_tensor, plain, recognise
from headscope.errors import CaptureError, refusal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from headscope.capture.forward import ForwardState, ModuleRun
    from headscope.capture.seam import HostFunction

Family = Literal["eager", "dense", "flash", "flex"]

UNREADABLE = {
    "indices": "it attends to a chosen few keys per query (sparse attention with an indexer)",
    "block_indices": "it attends to chosen blocks of keys per query",
    "sinks": "it has a sink logit per query instead of one per head",
    "cache": "its keys lie in a paged cache (continuous batching)",
    "block_table": "its keys lie in a paged cache (continuous batching)",
}


@dataclass(slots=True, eq=False)
class HostCall:
    """The arguments of one call of a host's attention function, by name; `ran`: the host's function made the output, not an executor."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    kwargs: dict[str, Any]
    ran: bool = True

    @classmethod
    def bind(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HostCall:
        """Positional or by keyword: the four names are the contract of transformers' interface."""
        names = ("query", "key", "value", "attention_mask")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v = (given.pop(name) for name in names[:3])
        return cls(q, k, v, given.pop("attention_mask", None), given)


def family_of(function: HostFunction, name: str, mask: Any) -> Family:
    """How a function reads its mask: by what it is, not only by what it is called."""
    known = getattr(function, "__name__", "")
    if type(mask).__name__ == "BlockMask" or known == "flex_attention_forward":
        return "flex"
    if "flash" in name or known == "flash_attention_forward":
        return "flash"
    return "eager" if name == "eager" else "dense"


def build_call(host: HostCall, module: nn.Module, run: ModuleRun, state: ForwardState, function: HostFunction, name: str) -> AttentionCall:
    """The AttentionCall of a host call. Raises CaptureError for what cannot be read exactly."""
    record = run.record
    _refuse_unreadable(host, record.name, function)
    family = family_of(function, name, host.mask)
    q, k, v = host.query, host.key, host.value
    batch, heads, rows, width = q.shape
    if heads % k.shape[1] or k.shape[0] != batch:
        raise refusal(
            CaptureError,
            f"{record.name}: q {list(q.shape)} with k {list(k.shape)}",
            "query heads are no multiple of key heads, or the batches differ",
            "this attention cannot be read head by head",
        )
    flag = host.kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if flag is None else flag) and not run.cross
    query_offset, key_offset = _offsets(run, state, rows, k, causal)
    reach = query_offset + rows - key_offset
    if causal and k.shape[2] > reach:  # unused room of a static cache
        k, v = k[:, :, :reach], v[:, :, :reach]
    told = host.mask is not None or family == "flash"  # without a mask nothing asks for packed sequences, and looking waits for a GPU
    segments = _packed(host.kwargs, batch, rows, q.device, state) if told and k.shape[2] == rows and not run.cross else None
    keys = k.shape[2]
    padding = state.encoder_padding(batch, keys) if run.cross else state.padding(batch, key_offset + keys)
    known = state.known_valid.get(run.cache) if run.cache is not None and not run.cross else None
    if padding is not None:  # layers may lie on other devices than the inputs
        padding = padding.to(q.device)
    place = Place(
        batch,
        rows,
        keys,
        query_offset,
        key_offset,
        causal,
        run.cross,
        _windows(host.kwargs, record.window, causal),
        padding if not run.calls else None,
        None if known is None else known.to(q.device),
        segments,
        q.device,
        state.unpadded.get(run.cache, 0) if run.cache is not None and not run.cross else 0,
    )
    mask = _mask(host, place, family, state, record.name, name, function)
    bias = _position_bias(host.kwargs.get("position_bias"), keys, state)
    if bias is not None:
        mask = _with_bias(mask, bias)
    mask, first = _rows_and_start(mask, place, run, state)
    scale = host.kwargs.get("scaling")
    softcap = host.kwargs.get("softcap")
    sinks = host.kwargs.get("s_aux")
    return AttentionCall(
        module=record.name,
        layer=record.layer,
        q=q,
        k=k,
        v=v,
        scale=float(scale) if scale is not None else 1.0 / math.sqrt(width),
        mask=mask,
        softcap=float(softcap) if softcap is not None else None,
        sink_logits=None if sinks is None else sinks.detach().reshape(-1),
        query_offset=query_offset,
        key_offset=key_offset,
        first_token=first,
        kernel=name,
        facts={"cross": True} if run.cross else {},
    )


def _refuse_unreadable(host: HostCall, module: str, function: HostFunction) -> None:
    for name, why in UNREADABLE.items():
        if host.kwargs.get(name) is not None:
            raise refusal(CaptureError, f"{module} (called with {name}=)", why, "this model cannot be measured yet")
    if float(host.kwargs.get("dropout") or 0.0) > 0.0:
        raise refusal(
            CaptureError, f"{module} with dropout {host.kwargs['dropout']}", "the weights would be random", "call model.eval() first"
        )
    if getattr(function, "__name__", "") == "sdpa_attention_forward":
        for name, what in (("softcap", "soft cap"), ("s_aux", "sink logits")):
            if host.kwargs.get(name) is not None:
                raise refusal(
                    CaptureError,
                    f"{module} under sdpa",
                    f"this model has a {what}, which sdpa drops without a word, so that its outputs are not this model's",
                    "call model.set_attn_implementation('eager') or use flex or flash attention",
                )


def _offsets(run: ModuleRun, state: ForwardState, rows: int, k: Tensor, causal: bool) -> tuple[int, int]:
    """Absolute positions of the first query and the first key."""
    keys = k.shape[2]
    if run.cross or run.cache is None:
        return run.query_offset, 0
    start = run.query_offset
    if run.static and run.key_offset is not None:
        state.shared_keys[k.data_ptr()] = run.key_offset
        return start, run.key_offset
    if keys > start + rows:  # keys shared with an earlier layer's static cache, or queries that are not the newest tokens
        if k.data_ptr() in state.shared_keys:
            return start, state.shared_keys[k.data_ptr()]
        raise refusal(
            CaptureError,
            f"{run.record.name}: {keys} keys for {rows} queries at position {start}",
            "there are more keys than tokens so far, so their positions are unknown",
            "run the model with a DynamicCache or StaticCache of transformers",
        )
    return start, (start + rows - keys if causal else 0)


def _windows(kwargs: dict[str, Any], window: int | None, causal: bool) -> tuple[int, ...]:
    """Window widths that may explain a mask: the one the call names, and the module's own."""
    named = kwargs.get("sliding_window")
    if isinstance(named, int) and not isinstance(named, bool) and named > 0:
        return (named,) if causal else (named + 1, named)
    return () if window is None else (window,)


def _packed(kwargs: dict[str, Any], batch: int, rows: int, device: torch.device, state: ForwardState) -> Tensor | None:
    """[B, N] number of the packed sequence each token belongs to, from cu_seq_lens or restarting position ids; None for one sequence."""
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is not None:
        where = torch.arange(rows, device=device)
        return torch.bucketize(where, bounds[1:].to(device).long(), right=True).expand(batch, rows)
    ids = kwargs.get("position_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != rows or ids.shape[0] not in (1, batch):
        return None
    key = ("packed", id(ids))
    if key not in state.masks:  # every layer gets the same ids, and looking at them waits for a GPU
        restarts = (torch.diff(ids, dim=1, prepend=ids[:, :1] - 1) != 1).cumsum(1)
        state.masks[key] = (ids, restarts if bool(restarts.any()) else None)
    found = state.masks[key][1]
    return found.expand(batch, rows).to(device) if isinstance(found, torch.Tensor) else None


def _mask(host: HostCall, place: Place, family: Family, state: ForwardState, module: str, name: str, function: HostFunction) -> MaskFacts:
    """The mask rule of each family."""
    mask = host.mask
    if mask is None:
        return _no_mask(host, place, family, module, name, function)
    if family == "flash" or (isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape == (place.batch, host.key.shape[2])):
        valid = _key_mask(mask, place, module)
        return plain(place, place.causal, _flash_window(host) if family == "flash" else None, valid)
    key = (id(mask), place.query_offset, place.key_offset, place.rows, place.keys, place.causal, place.windows, place.cross)
    found = state.masks.get(key)
    if found is None:
        if family == "flex" and not isinstance(mask, torch.Tensor):
            dense = from_block_mask(mask, place.rows, place.keys, place.device)
        elif isinstance(mask, torch.Tensor):
            dense = from_tensor(mask, place.rows, place.keys)
        else:
            raise refusal(
                CaptureError, f"{module}: a mask of type {type(mask).__name__}", "its meaning is unknown", "pass a tensor or a BlockMask"
            )
        found = state.masks[key] = (mask, recognise(dense, place))  # the mask is held so that its id stays its own
    return cast("MaskFacts", found[1])


def _no_mask(host: HostCall, place: Place, family: Family, module: str, name: str, function: HostFunction) -> MaskFacts:
    """What None means: to eager and flex, that everything is visible; to the others, what the causal flag says."""
    builtin = getattr(function, "__module__", "").startswith("transformers.")
    if place.padding is not None and not bool(place.padding[:, place.key_offset : place.end].all()) and not builtin:
        raise refusal(
            CaptureError,
            f"{module}: a padded batch under attention {name!r}",
            "the function got no mask, so the model attends to padding (transformers makes none for a name without a mask function)",
            f"register one: AttentionMaskInterface.register({name!r}, sdpa_mask)",
        )
    if family == "flash":
        facts = plain(place, place.causal, _flash_window(host))
        if place.segments is not None and (place.batch == 1 or host.kwargs.get("cu_seq_lens_q") is not None):
            facts = MaskFacts(
                facts.causal, facts.window, None, facts.query_valid, query_segments=place.segments, key_segments=place.segments
            )
        return facts
    causal = place.causal and (family == "dense" or place.rows == 1)
    return plain(place, causal)


def _flash_window(host: HostCall) -> int | None:
    """The window that flash attention applies by itself: |t - s| < w on the sides that are visible."""
    window = host.kwargs.get("sliding_window")
    return window if isinstance(window, int) and not isinstance(window, bool) and window > 0 else None


def _key_mask(mask: Any, place: Place, module: str) -> Tensor:
    """[B, Nk] bool from the two-dimensional mask of flash attention (shorter than the keys of a static cache, which it cuts off)."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[1] < place.keys:
        shape = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise refusal(
            CaptureError, f"{module}: a flash attention mask {shape}", f"[B, {place.keys}] was expected", "pass a [B, N] padding mask"
        )
    return mask[:, : place.keys].bool()


def _position_bias(bias: Tensor | None, keys: int, state: ForwardState) -> Tensor | None:
    """[B or 1, H, Nq, Nk] additive bias (T5 and its kin), None when there is none or it is all zero."""
    if bias is None:
        return None
    key = ("bias", id(bias), keys)
    if key not in state.masks:
        cut = bias[..., :keys]
        state.masks[key] = (bias, cut if bool((cut != 0).any()) else None)
    found = state.masks[key][1]
    return found if isinstance(found, torch.Tensor) else None


def _with_bias(facts: MaskFacts, bias: Tensor) -> MaskFacts:
    return replace(facts, bias=bias if facts.bias is None else facts.bias + bias)


def _rows_and_start(facts: MaskFacts, place: Place, run: ModuleRun, state: ForwardState) -> tuple[MaskFacts, Tensor | None]:
    """Which rows are padding (for cross-attention: as the self-attention before it found), and where each sequence really starts."""
    if run.cross:
        valid = state.main_valid
        if valid is not None and valid.shape == (place.batch, place.rows):
            facts = replace(facts, query_valid=valid.to(place.device))
        return facts, _first(facts.key_valid)
    if run.cache is not None:
        _remember(facts, place, run, state)
    if run.record.layer is not None:
        state.main_offset, state.main_valid = place.query_offset, facts.query_valid
    known = state.known_valid.get(run.cache) if run.cache is not None else None
    if known is not None:
        return facts, _first(known.to(place.device))
    return facts, _first(facts.query_valid)


def _remember(facts: MaskFacts, place: Place, run: ModuleRun, state: ForwardState) -> None:
    """Keep which positions of a cached sequence are real, for later steps that are told nothing about them."""
    old = state.known_valid.get(run.cache)
    end = place.query_offset + place.rows
    if old is None and facts.query_valid is None and facts.key_valid is None:
        if place.query_offset <= state.unpadded.get(run.cache, 0):
            state.unpadded[run.cache] = end
        return
    if old is not None and old.shape == (place.batch, end):
        return  # an earlier layer of the same step
    valid = torch.ones(place.batch, end, dtype=torch.bool, device=place.device)
    if place.padding is not None and place.padding.shape[1] >= end:
        valid = place.padding[:, :end].clone()
    else:
        if facts.key_valid is not None:
            valid[:, place.key_offset : place.end] = facts.key_valid
        if old is not None and old.shape[0] == place.batch:
            length = min(old.shape[1], place.query_offset)
            valid[:, :length] = old[:, :length]
        if facts.query_valid is not None:
            valid[:, place.query_offset :] = facts.query_valid
    state.known_valid[run.cache] = valid


def _first(valid: Tensor | None) -> Tensor | None:
    """[B] int64: first real token; None when that is 0 everywhere."""
    if valid is None:
        return None
    first = valid.int().argmax(1)
    return None if not bool(first.any()) else first
