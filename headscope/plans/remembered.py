"""What was made last of a call: settings of one rule are compared on the same head, and differ in what they take of it alone.

One entry a rule, held weakly: as long as the same q and k are asked about, unwritten, the second setting costs a look. Nothing is kept for
a call that is gone, and tensors made in inference mode, whose changes nobody counts, are never remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar
from weakref import ref

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.call import AttentionCall

T_ = TypeVar("T_")


class Newest(Generic[T_]):
    """The newest result of one function of a call and further hashable facts."""

    def __init__(self) -> None:
        self._of: tuple[ref[Tensor], ref[Tensor]] | None = None
        self._key: tuple[object, ...] = ()
        self._made: list[T_] = []

    def of(self, call: AttentionCall, key: tuple[object, ...], make: Callable[[], T_]) -> T_:
        """What `make` gave for this call and key, now or the last time."""
        q, k = call.q, call.k
        if q.is_inference() or k.is_inference():
            return make()
        first = None if call.first_token is None else tuple(call.first_token.tolist())
        known = (first, call.query_offset, call.key_offset, call.scale, call.softcap, q._version, k._version, *key)
        if self._of is None or self._of[0]() is not q or self._of[1]() is not k or self._key != known or not self._made:
            self._made = [make()]
            self._of, self._key = (ref(q), ref(k)), known
        return self._made[0]
