"""Recording what heads compute: z before W_O, and q, k, v as attention saw them.

    with record_heads(scope, "18.6,17.3", sites=("z",)) as record:
        scope.generate("...")
    record.z(18)        # [B, N, 1, Dv]: layer 18's recorded heads, prompt and generated tokens in one row

q and k are recorded after rotary embedding and after a head's norms, k and v of key heads. A KV cache hands all earlier keys over at every
step; only the new ones are kept. The recorder stands behind the interventions of outer blocks, so it records what they made of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from headscope.errors import InterventionError, refusal, unknown_name
from headscope.interventions.base import Head, Intervention, heads_of, resolve
from headscope.interventions.running import each_input, run_once

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall
    from headscope.scope import Scope
    from headscope.topology import Topology

SITES = ("z", "q", "k", "v")


@dataclass(slots=True, eq=False)
class HeadRecord:
    """What was recorded. `heads`: module name -> its recorded query heads, `kv_heads` -> key heads. `passes`: one dict per sequence that
    ran, (site, module) -> [B, N, H, D]."""

    topology: Topology
    sites: tuple[str, ...]
    heads: dict[str, list[int]]
    kv_heads: dict[str, list[int]]
    passes: list[dict[tuple[str, str], Tensor]] = field(default_factory=list)

    def get(self, site: str, layer: int | str) -> Tensor:
        """[B, N, H, D] of a layer (number or module name): its recorded heads in ascending order.

        InterventionError for what was not recorded, and when several sequences ran (they are in `passes`).
        """
        if site not in self.sites:
            raise unknown_name(InterventionError, "recorded site", site, self.sites)
        name = self.topology[layer].name
        if name not in self.heads:
            raise unknown_name(InterventionError, "recorded layer", name, self.heads)
        if len(self.passes) != 1:
            what = f"{len(self.passes)} sequences ran" if self.passes else "nothing ran"
            raise refusal(InterventionError, f"record.{site}({layer!r})", f"{what} in the block", "run one, or read record.passes[i]")
        if (site, name) not in self.passes[0]:
            raise refusal(InterventionError, f"record.{site}({layer!r})", "that module did not run", "run the whole model in the block")
        return self.passes[0][site, name]

    def z(self, layer: int | str) -> Tensor:
        """[B, N, H, Dv]: head outputs before W_O."""
        return self.get("z", layer)

    def q(self, layer: int | str) -> Tensor:
        """[B, N, H, D]: queries."""
        return self.get("q", layer)

    def k(self, layer: int | str) -> Tensor:
        """[B, N, Hkv, D]: keys of the key heads that the recorded heads read."""
        return self.get("k", layer)

    def v(self, layer: int | str) -> Tensor:
        """[B, N, Hkv, Dv]: values."""
        return self.get("v", layer)

    def head(self, site: str, layer: int | str, head: int) -> Tensor:
        """[B, N, D] of one query head (for k and v: of the key head it reads)."""
        record = self.topology[layer]
        listed = (self.kv_heads if site in ("k", "v") else self.heads).get(record.name, [])
        index = record.kv_head(head) if site in ("k", "v") else head
        if index not in listed:
            raise refusal(InterventionError, f"head {layer}.{head}", "it was not recorded", "name it in record_heads(scope, heads)")
        return self.get(site, layer)[:, :, listed.index(index)]

    def stacked(self, site: str, heads: Sequence[Head]) -> Tensor:
        """[B, len(heads), N, D]: the layout of an intervention's values."""
        return torch.stack([self.head(site, layer, head) for layer, head in heads], 1)


@dataclass(frozen=True)
class _Recorder(Intervention):
    record: HeadRecord
    device: torch.device | None
    _open: dict[str, int] = field(default_factory=dict)
    """Module -> the number of the pass it is in, so that a module that starts anew starts a new pass."""

    def after(self, call: AttentionCall, output: Tensor) -> Tensor:
        heads = self.record.heads.get(call.module)
        if heads is None:
            return output
        into = self._pass(call)
        for site in self.record.sites:
            part = self._part(site, call, output, heads)
            if part is None:
                continue
            part = part.detach().to(self.device) if self.device is not None else part.detach().clone()
            key = (site, call.module)
            into[key] = torch.cat([into[key], part], 1) if key in into else part
        return output

    def _part(self, site: str, call: AttentionCall, output: Tensor, heads: list[int]) -> Tensor | None:
        if site == "z":
            return output[:, :, heads]
        if site == "q":
            return call.q[:, heads].transpose(1, 2)
        source = call.k if site == "k" else call.v
        if source is None or (call.is_cross and call.query_offset):
            return None
        source = source[:, self.record.kv_heads[call.module]].transpose(1, 2)
        return source if call.is_cross else source[:, call.query_offset - call.key_offset :]

    def _pass(self, call: AttentionCall) -> dict[tuple[str, str], Tensor]:
        passes = self.record.passes
        current = self._open.get(call.module, -1)
        if current < 0 or call.query_offset == 0:
            current += 1
            self._open[call.module] = current
        while len(passes) <= current:
            passes.append({})
        return passes[current]


@contextmanager
def record_heads(scope: Scope, heads: Any = None, sites: Sequence[str] = SITES, *, to_cpu: bool = False) -> Iterator[HeadRecord]:
    """Record heads while the model runs in the block. `heads`: pairs, "18.6,17.3", a HeadSet; None: every head of the main stack.

    `sites`: of "z", "q", "k", "v". Memory is O(heads N d) per site; `to_cpu` moves it off the model's device. Raises InterventionError for
    heads or sites that do not exist.
    """
    for site in sites:
        if site not in SITES:
            raise unknown_name(InterventionError, "site", site, SITES)
    if heads is None or (isinstance(heads, str) and heads == "all"):
        wanted = {module.name: list(range(module.heads)) for module in scope.topology.main if not module.capturable}
    else:
        wanted = {name: sorted(of) for name, of in resolve(heads_of(heads), scope.topology).items()}
    kv_heads = {name: sorted({scope.topology[name].kv_head(head) for head in of}) for name, of in wanted.items()}
    record = HeadRecord(scope.topology, tuple(dict.fromkeys(sites)), wanted, kv_heads)
    with scope.intervene(_Recorder(record, torch.device("cpu") if to_cpu else None)):
        yield record


def mean_outputs(scope: Scope, data: Any, heads: Sequence[Head], *, per_position: bool = False) -> Tensor:
    """Mean z of heads over data: [heads, Dv], or [heads, N, Dv] with a mean for every position (over the inputs that reach it).

    `data`: a text, ids, or a list of them; each is run by itself. Sums in float64.
    """
    total: Tensor | None = None
    counts = torch.zeros(0, dtype=torch.float64)
    inputs = each_input(data)
    for one in tqdm(inputs, desc="mean head outputs", unit="input", disable=None if len(inputs) > 1 else True, leave=False):
        with record_heads(scope, heads, sites=("z",), to_cpu=True) as record:
            run_once(scope, one)
        z = record.stacked("z", heads).double()  # [B, heads, N, Dv]
        length = z.shape[2] if total is None else max(z.shape[2], total.shape[1])
        sums = torch.nn.functional.pad(z.sum(0), (0, 0, 0, length - z.shape[2]))
        total = sums if total is None else sums + torch.nn.functional.pad(total, (0, 0, 0, length - total.shape[1]))
        counts = torch.nn.functional.pad(counts, (0, length - len(counts)))
        counts[: z.shape[2]] += len(z)
    assert total is not None
    mean = total / counts[:, None] if per_position else total.sum(1) / counts.sum()
    return mean.to(scope.dtype if scope.dtype == torch.float64 else torch.float32)


__all__ = ["SITES", "HeadRecord", "mean_outputs", "record_heads", "run_once"]
