"""A prompt becomes a run: captured by the live model, written beside the other runs, opened like any of them.

The prompt reaches the profiler as token ids. A text would do for a caller in Python, but there a text may also be the path of a file, and
what comes from a browser must never open one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from headscope.app.live.watch import watching
from headscope.errors import DataError, ProbeError, refusal

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.app.live.owner import Job
    from headscope.interventions import Stack
    from headscope.probes.active import AnyProbe
    from headscope.scope import Scope

LONGEST = 32_768
KEPT_BYTES = 256 << 20
"""Keys and queries of all layers are kept, for exact windows, up to this size; above it none are."""


def capture_prompt(prompt: str, root: Path, stack: Stack | None = None) -> Callable[[Scope, Job], str]:
    """Work that profiles `prompt` (the passive probes that it is long enough for) and gives the id of the new run in `root`; under the
    interventions of `stack`, which the run's card then names.
    """

    def work(scope: Scope, job: Job) -> str:
        ids = scope.encode(prompt)
        tokens = int(ids.shape[1])
        if tokens > LONGEST:
            raise refusal(
                DataError, f"a prompt of {tokens} tokens", f"the page captures up to {LONGEST}", "use headscope profile --data FILE"
            )
        job.note = f"{tokens} tokens"
        path = free_place(root)
        keep = "all" if kept_bytes(scope, tokens) <= KEPT_BYTES else None
        edit: AbstractContextManager[object] = nullcontext()
        if stack is not None:
            stack.check(scope)
            edit = scope.intervene(*stack)
        with watching(scope, job, passes=2), edit:
            scope.profile(fitting(scope, ids[0].cpu()), context=tokens, data=ids[0].cpu(), keep=keep, out=path, progress=False)
        return path.name

    return work


def fitting(scope: Scope, ids: Tensor) -> list[AnyProbe]:
    """The passive probes of natural text that can say something about a text this short. DataError when there is none."""
    from headscope.probes import Probe, resolve
    from headscope.probes.text import REPEATS
    from headscope.profile.texts import build_texts

    text = build_texts(scope, "natural", context=len(ids), data=ids, texts=1, seed=0, repeats=REPEATS, beyond_context=False)[0]
    out: list[AnyProbe] = []
    for probe in resolve("passive"):
        if isinstance(probe, Probe) and probe.data == "natural" and probe.unfit(scope.topology) is None:
            try:
                probe.check(text, scope.topology)
            except ProbeError:
                continue
            out.append(probe)
    if not out:
        raise refusal(
            DataError, f"a prompt of {len(ids)} tokens", "no probe can say anything about a text this short", "write a longer one"
        )
    return out


def kept_bytes(scope: Scope, tokens: int) -> int:
    """Bytes of q and k of the main stack at a length."""
    size = scope.dtype.itemsize
    return sum((module.heads + module.kv_heads) * module.head_dim * tokens * size for module in scope.topology.main)


def free_place(root: Path) -> Path:
    """root/live-DATE-TIME, with a number where that is taken."""
    base = f"live-{time.strftime('%Y%m%d-%H%M%S')}"
    number, path = 1, root / base
    while path.exists():
        number += 1
        path = root / f"{base}-{number}"
    return path
