"""From a GPU to ordinary memory while the GPU goes on: what a layer gave is on its way to the CPU when the next layer runs.

A plain `.to("cpu")` waits for everything queued on the device and then copies through a small buffer of the driver's. At 131,072 tokens a
layer brings half a gigabyte of statistics, and waiting for it costs as much as measuring it. Page-locked results would copy fast,
but would take memory from the whole machine for as long as somebody keeps them. So a few threads each own one page-locked buffer and
a stream: they copy a piece into it, wait for that piece only, and move it on into ordinary memory, where first touching the pages is the
slow part and is shared among the threads. Little is left waiting on the device until it makes a batch: threads that wake for every
small layer of a short text would take the interpreter from the thread that drives the model.

The silent failure this avoids: a result read before its bytes have arrived. `Arriving.result` is the only way to one, and it waits.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

THREADS = max(2, min(8, (os.cpu_count() or 2) // 2))
BUFFER = 16 << 20
"""Bytes of a thread's page-locked buffer."""
BATCH = 64 << 20
"""Bytes that wait on the device before they start."""
LEAST = 1 << 20
"""Bytes worth a task of their own."""
AHEAD = 512 << 20
"""Bytes on their way beyond which `fetch` waits for the first of them: Python is many layers ahead of the device, and what waits to be
copied is memory that the model's next layers need."""

_lock = threading.RLock()
_pools: dict[torch.device, ThreadPoolExecutor] = {}
_mine = threading.local()


@dataclass(slots=True, eq=False)
class _Waiting:
    """A tensor that has not started: its bytes on the device, the event after which they are there, and where they will be."""

    source: Tensor
    filled: torch.cuda.Event
    arriving: Arriving


_waiting: dict[torch.device, list[_Waiting]] = {}
_flying: dict[torch.device, deque[tuple[int, Future[None]]]] = {}


@dataclass(slots=True, eq=False)
class Arriving:
    """A tensor on its way to the CPU, or already there. `device`: where it still waits to start."""

    value: Tensor
    device: torch.device | None = None
    parts: list[Future[None]] = field(default_factory=list)

    def result(self) -> Tensor:
        """The tensor on the CPU, complete."""
        if self.device is not None:
            _start(self.device)
        for part in self.parts:
            part.result()
        self.parts.clear()
        return self.value


def fetch(tensors: Sequence[Tensor]) -> list[Arriving]:
    """Send tensors to the CPU; those that are there already arrive at once.

    The work queued on the device's current stream so far is what fills the tensors; they are kept until they are copied.
    """
    out = []
    started: dict[torch.device, list[_Waiting]] = {}
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be written outside of inference mode
        for x in tensors:
            if not x.is_cuda or not x.numel():
                out.append(Arriving(x.to("cpu")))
                continue
            out.append(Arriving(torch.empty(x.shape, dtype=x.dtype), x.device))
            started.setdefault(x.device, []).append(_Waiting(x.contiguous().view(-1).view(torch.uint8), torch.cuda.Event(), out[-1]))
    for device, items in started.items():
        event = items[0].filled
        event.record(torch.cuda.current_stream(device))
        with _lock:
            _waiting.setdefault(device, []).extend(replace(item, filled=event) for item in items)
            if sum(item.source.numel() for item in _waiting[device]) >= BATCH:
                _start(device)
        _wait_for_room(device)
    return out


def _wait_for_room(device: torch.device) -> None:
    """Let the oldest copies finish until no more than AHEAD bytes are under way."""
    while True:
        with _lock:
            flying = _flying.get(device, deque())
            while flying and flying[0][1].done():
                flying.popleft()
            if sum(count for count, _ in flying) <= AHEAD:
                return
            oldest = flying[0][1]
        oldest.result()


def start() -> None:
    """Send everything that still waits on a device for a batch to fill."""
    for device in list(_waiting):
        _start(device)


def _start(device: torch.device) -> None:
    """Deal everything that waits on a device to the threads."""
    with _lock, torch.inference_mode(False), torch.no_grad():
        items = _waiting.pop(device, [])
        if not items:
            return
        pool = _pools.get(device)
        if pool is None:
            pool = _pools[device] = ThreadPoolExecutor(THREADS, thread_name_prefix="headscope-offload")
        share = max(LEAST, min(BUFFER, -(-sum(item.source.numel() for item in items) // THREADS)))
        task: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []
        owners: list[Arriving] = []
        room = share
        for item in items:
            target, at = item.arriving.value.view(-1).view(torch.uint8), 0
            while at < item.source.numel():
                count = min(room, item.source.numel() - at)
                task.append((item.source[at : at + count], target[at : at + count], item.filled))
                owners.append(item.arriving)
                at, room = at + count, room - count
                if not room:
                    _submit(pool, device, task, owners)
                    task, owners, room = [], [], share
        if task:
            _submit(pool, device, task, owners)
        for item in items:
            item.arriving.device = None


def _submit(
    pool: ThreadPoolExecutor, device: torch.device, task: list[tuple[Tensor, Tensor, torch.cuda.Event]], owners: list[Arriving]
) -> None:
    future = pool.submit(_move, device, task)
    _flying.setdefault(device, deque()).append((sum(source.numel() for source, _, _ in task), future))
    for one in dict.fromkeys(owners):
        one.parts.append(future)


def _move(device: torch.device, task: list[tuple[Tensor, Tensor, torch.cuda.Event]]) -> None:
    """Copy the pieces of one task: through this thread's buffer, on this thread's stream."""
    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
        if not hasattr(_mine, "buffer"):
            _mine.buffer = _page_locked()
            _mine.stream = torch.cuda.Stream(device)
        with torch.cuda.stream(_mine.stream):
            for event in dict.fromkeys(filled for _, _, filled in task):
                _mine.stream.wait_event(event)
            at = 0
            for source, _, _ in task:
                _mine.buffer[at : at + source.numel()].copy_(source, non_blocking=True)
                at += source.numel()
            _mine.stream.synchronize()
        at = 0
        for source, target, _ in task:
            target.copy_(_mine.buffer[at : at + source.numel()])
            at += source.numel()
        task.clear()


def _page_locked() -> Tensor:
    return torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True)
