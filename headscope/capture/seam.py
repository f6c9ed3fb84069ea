"""The seam: where a transformers model asks for its attention function, and headscope steps in between.

Every attention module of a current transformers model looks its function up, on each call, in `AttentionInterface`. While at least one
session is open that look-up is wrapped; the registered functions, their names, the masks made for those names and the model's config stay
as they are, so the model takes the very code path it takes without headscope. The alternatives lose something: registering a function of
one's own under a new name gets a mask of None where no mask maker has that name (silently wrong with padding), drops the branches that
models take on a name, and cannot reach `eager`, which is in no table.

The wrapper acts on a call only when the calling module belongs to a scope that has something active in this thread. Every other model, and
the same model in another thread, runs the host's function untouched. The last session to close puts the original look-up back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch import nn

    from headscope.capture.attach import Attachment

HostFunction = Callable[..., Any]

_lock = threading.RLock()
_users = 0
_original: HostFunction | None = None
_attached: WeakKeyDictionary[nn.Module, tuple[Attachment, ...]] = WeakKeyDictionary()
_sessions: dict[int, int] = {}  # open per thread, by its ident: a block may be closed from another thread than opened it
_here = threading.local()  # .busy: a call is being served


class _Wrapped:
    """A host attention function seen through the seam. Calls made while one is already being served go straight through."""

    __slots__ = ("function", "name")

    def __init__(self, function: HostFunction, name: str) -> None:
        self.function = function
        self.name = name

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        attachments = [one for one in _attached.get(module, ()) if one.active_here]
        if not attachments or getattr(_here, "busy", False):
            return self.function(module, *args, **kwargs)
        _here.busy = True
        try:
            run = self.function
            for attachment in attachments:
                run = attachment.serve(run, self.function, self.name)
            return run(module, *args, **kwargs)
        finally:
            _here.busy = False

    def __repr__(self) -> str:
        return f"<{self.name} seen through headscope: {self.function!r}>"


def open_seam(attachment: Attachment, modules: list[nn.Module]) -> None:
    """Route the attention of these modules through an attachment, wrapping the look-up if nobody had yet."""
    global _users
    with _lock:
        for module in modules:
            _attached[module] = (*_attached.get(module, ()), attachment)
        if _users == 0:
            _wrap()
        _users += 1


def close_seam(attachment: Attachment, modules: list[nn.Module]) -> None:
    """Undo `open_seam`; the last one out restores the original look-up."""
    global _users
    with _lock:
        for module in modules:
            rest = tuple(one for one in _attached.get(module, ()) if one is not attachment)
            if rest:
                _attached[module] = rest
            else:
                _attached.pop(module, None)
        _users -= 1
        if _users == 0:
            _unwrap()


def through(function: HostFunction, name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a host's attention function as if it had been looked up: for hosts whose function stands in no table."""
    return _Wrapped(function, name)(module, *args, **kwargs)


def reads(attachment: Attachment, module: nn.Module) -> bool:
    """True for the first of a module's attachments that are active in this thread: the one that brings calls to `through`, which serves
    them all. A second reader would have each call counted twice.
    """
    return next((one for one in _attached.get(module, ()) if one.active_here), None) is attachment


def is_serving() -> bool:
    """True while a call of this thread is being served, so that attention run on its behalf is not taken for the model's."""
    return bool(getattr(_here, "busy", False))


def count_session(thread: int, step: int) -> None:
    """Say that a session of a thread opened (1) or closed (-1); the look-up of a thread without sessions returns plain functions."""
    with _lock:
        left = _sessions.pop(thread, 0) + step
        if left:
            _sessions[thread] = left


def _wrap() -> None:
    from transformers import AttentionInterface

    global _original
    interface: Any = AttentionInterface
    look_up = _original = interface.get_interface
    subscript = interface.__getitem__

    def get_interface(self: Any, attn_implementation: str, default: HostFunction) -> HostFunction:
        found = look_up(self, attn_implementation, default)
        if isinstance(found, _Wrapped) or threading.get_ident() not in _sessions:
            return found
        return _Wrapped(found, attn_implementation or "eager")

    def getitem(self: Any, key: str) -> HostFunction:  # a few models index the table instead of asking it
        found = subscript(self, key)
        return _Wrapped(found, key) if threading.get_ident() in _sessions else found

    interface.get_interface = get_interface
    interface.__getitem__ = getitem


def _unwrap() -> None:
    from transformers import AttentionInterface

    global _original
    interface: Any = AttentionInterface
    interface.get_interface = _original
    del interface.__getitem__
    _original = None
