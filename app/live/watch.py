"""watching: progress of forward passes, and a place where they can be stopped.

Attention modules report when they begin. That is often enough (a layer takes milliseconds to seconds), needs nothing of the host library
but torch's own hooks, and leaves no trace: an exception at that place unwinds capture and interventions like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headscope.app.live.owner import Job
    from headscope.scope import Scope


class Watch:
    """Counts attention calls: `calls` so far, of about `expected`."""

    def __init__(self, job: Job, expected: int) -> None:
        self.job = job
        self.expected = expected
        self.calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        self.job.step(self.calls, self.expected)


@contextmanager
def watching(scope: Scope, job: Job, passes: int) -> Iterator[Watch]:
    """Within the block every attention call of the main stack moves `job` on, and raises Cancelled when it is to stop.

    `passes`: forward passes expected (the bar stops at its end when there are more).
    """
    watch = Watch(job, passes * len(scope.topology.main))
    names = [module.name for module in scope.topology.main]
    handles = [scope.model.get_submodule(name).register_forward_pre_hook(watch) for name in names]
    try:
        job.step(0, watch.expected)
        yield watch
    finally:
        for handle in handles:
            handle.remove()
