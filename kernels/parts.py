"""Runs the parts of one call on threads of our own, each with its share of the threads torch may use.

Torch splits one operation over its threads and waits for all of them at its end. The operations here last tens of microseconds, about as
long as waking a sleeping thread, so splitting the call instead of the operation is what makes a second core count. Torch lets go of the
interpreter lock while it computes.

torch.set_num_threads acts on the calling thread, and besides is remembered as what threads started later begin with. The workers set their
own share when they start, all of them before any works, and the remembered number is then put back.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_pools: dict[tuple[int, int, int], ThreadPoolExecutor] = {}
_lock = threading.Lock()


def run_parts(run: Callable[[int, int], T], parts: int) -> list[T]:
    """[run(0, parts), ..., run(parts - 1, parts)], at the same time. The first exception of any is raised, after all have ended."""
    pool = _pool(parts)
    futures = [pool.submit(run, part, parts) for part in range(parts)]
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error
    return [future.result() for future in futures]


def _pool(parts: int) -> ThreadPoolExecutor:
    """A pool of `parts` started workers; a forked process, whose threads are gone, gets its own."""
    total = torch.get_num_threads()
    key = (os.getpid(), parts, total)
    with _lock:
        if key not in _pools:
            ready = threading.Barrier(parts)
            share = max(total // parts, 1)

            def start() -> None:
                torch.set_num_threads(share)
                ready.wait()

            pool = ThreadPoolExecutor(parts, thread_name_prefix="headscope-kernels")
            try:
                for future in [pool.submit(start) for _ in range(parts)]:
                    future.result()
            finally:
                torch.set_num_threads(total)
            _pools[key] = pool
        return _pools[key]
