"""ModelOwner: the one thread that touches the model, and the jobs it is given.

A model has one set of weights, one device and hooks that are fastened to it; two requests that ran it at once would capture each
other's calls. So callbacks never run it: they leave a job with the owner and ask for its state. Jobs are functions of this process, named
by 128 random bits; nothing that a client sends is ever a process id, a path or code, so that a visitor can neither see nor stop what is
not theirs.

A job that is cancelled ends at the next attention call (see `watch`), and the model is as before, since every change of it is a context.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from headscope.errors import HeadscopeError, UnavailableError, refusal

if TYPE_CHECKING:
    from headscope.scope import Scope

State = Literal["waiting", "running", "done", "failed", "cancelled"]
WAITING = 8
KEPT = 32
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")
log = logging.getLogger(__name__)


class Cancelled(BaseException):
    """Raised inside a job that somebody cancelled; no error, and nothing that code of a model would catch as one."""


@dataclass(eq=False)
class Job:
    """One piece of work on the model: its state, how far it is (0 to 1, None: unknown), and what it gave."""

    title: str
    work: Callable[[Scope, Job], Any] = field(repr=False)
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    state: State = "waiting"
    share: float | None = None
    note: str = ""
    result: Any = field(default=None, repr=False)
    error: str = ""
    seconds: float = 0.0
    _cancel: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def ended(self) -> bool:
        """True when nothing more will happen."""
        return self.state in ENDED

    def step(self, done: float, total: float, note: str = "") -> None:
        """Says how far the work is; raises Cancelled when it is to stop."""
        if self._cancel.is_set():
            raise Cancelled
        self.share = min(max(done / total, 0.0), 1.0) if total > 0 else None
        if note:
            self.note = note


class ModelOwner:
    """Owns one model: `scope`, or what `load` gives (called by the owner, so that the dashboard opens at once).

    `name`: how the model is called while it loads.
    """

    def __init__(self, scope: Scope | None = None, *, load: Callable[[], Scope] | None = None, name: str = "") -> None:
        self._load = load
        self._scope = scope
        self.name = name or getattr(scope, "name", "") or "the model"
        self.error = ""
        self._queue: queue.Queue[Job | None] = queue.Queue()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="headscope-model", daemon=True)
        self._thread.start()

    @property
    def scope(self) -> Scope | None:
        """The model, or None while it loads or when it could not be loaded (`error`). To be read, never run, by other threads."""
        return self._scope

    def submit(self, title: str, work: Callable[[Scope, Job], Any]) -> Job:
        """Queues `work(scope, job)`. UnavailableError when too many wait already, or the model could not be loaded."""
        with self._lock:
            if self.error:
                raise refusal(UnavailableError, self.name, f"it could not be loaded ({self.error})", "restart with another --model")
            waiting = sum(job.state == "waiting" for job in self._jobs.values())
            if waiting >= WAITING:
                raise refusal(
                    UnavailableError, f"a job behind {waiting} others", "the model does one at a time", "wait, or cancel one of yours"
                )
            job = Job(title, work)
            self._jobs[job.id] = job
            for known in [one.id for one in self._jobs.values() if one.ended][: max(len(self._jobs) - KEPT, 0)]:
                self._jobs.pop(known)
        self._queue.put(job)
        return job

    def job(self, name: object) -> Job | None:
        """The job of an id; None for one that is unknown or long over."""
        with self._lock:
            return self._jobs.get(name) if isinstance(name, str) else None

    def place(self, job: Job) -> int:
        """How many jobs are before this one."""
        with self._lock:
            before = 0
            for one in self._jobs.values():
                if one is job:
                    return before
                before += not one.ended
        return 0

    def cancel(self, name: object) -> bool:
        """Cancels the job of an id: at once when it waits, at the next attention call when it runs. False when there is none to cancel."""
        job = self.job(name)
        if job is None or job.ended:
            return False
        job._cancel.set()
        with self._lock:
            if job.state == "waiting":
                job.state = "cancelled"
        return True

    def close(self) -> None:
        """Cancels everything and ends the thread."""
        with self._lock:
            known = list(self._jobs)
        for name in known:
            self.cancel(name)
        self._queue.put(None)
        self._thread.join(timeout=30)

    def _serve(self) -> None:
        if self._load is not None:
            try:
                self._scope = self._load()
            except HeadscopeError as error:
                self.error = str(error)
        while (job := self._queue.get()) is not None:
            with self._lock:
                if job.state != "waiting":
                    continue
                if self._scope is None:
                    job.state, job.error = "failed", self.error
                    continue
                job.state = "running"
            self._run(job, self._scope)

    def _run(self, job: Job, scope: Scope) -> None:
        start = time.monotonic()
        try:
            job.result = job.work(scope, job)
            state: State = "done"
        except Cancelled:
            state = "cancelled"
        except HeadscopeError as error:
            state, job.error = "failed", str(error)
        except Exception as error:  # a defect must not end the thread that owns the model
            log.exception("job %r", job.title)
            state, job.error = "failed", f"{type(error).__name__}: {error}"
        with self._lock:
            job.seconds = time.monotonic() - start
            job.state = state
