"""A cache of bytes or arrays with a bound on their size: what was used longest ago goes first.

Tiles of a few hundred heads are gigabytes; a cache that counts entries instead of bytes fills the machine with the first large run.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V_ = TypeVar("V_")


class SizedCache(Generic[V_]):
    """Key -> value, at most `limit` bytes by `size`. Threads may use it together; a value that is missing may be made twice at once."""

    def __init__(self, limit: int, size: Callable[[V_], int]) -> None:
        self.limit = limit
        self.held = 0
        self._size = size
        self._values: OrderedDict[Hashable, V_] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], V_]) -> V_:
        """The value of a key, made if it is not there."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self.held += self._size(value)
                while self.held > self.limit and len(self._values) > 1:
                    self.held -= self._size(self._values.popitem(last=False)[1])
        return value

    def __len__(self) -> int:
        return len(self._values)
