"""StatisticsRequest: which statistics, with which parameters. Nothing that is not named here is computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from headscope.errors import StatisticError, refusal
from headscope.statistics.definitions import DEFINITIONS, PASSIVE, definition

if TYPE_CHECKING:
    from torch import Tensor

    from headscope.statistics.accumulate import Kept


class LayerCollector(Protocol):
    """Takes each layer when the row before position `length` is measured.

    Called with the module's name, its statistics (name -> tensor on the CPU, as HeadStatistics documents) and its Kept q and k, or None.
    What it returns takes the statistics' place in the HeadStatistics: those that it leaves out are gone. Rows that come later are refused.
    """

    length: int

    def __call__(self, module: str, values: dict[str, Tensor], kept: Kept | None) -> dict[str, Tensor]:
        """The statistics to go on with."""


@dataclass(frozen=True, slots=True, eq=False)
class StatisticsRequest:
    """What a capture measures.

    - `names`: statistics by name (`headscope.statistics.DEFINITIONS`), in any order; "passive" stands for all that need no extra input.
    - `sink_tokens`: k0, how many first real tokens `sink_mass` counts. `local_window`: w of `local_mass`, the row's own key included.
    - `waad_window`: W of `waad` (the paper's 10). `fai_band`: (lo, hi) of `fai`; hi None means to the end of the sequence.
    - `block`: side of a block of `block_mass` and `block_max`, a power of two from 16.
    - `labels` [N] or [B, N] int: a label per absolute key position, negative for none; `label_names` names label 0, 1, ...
      Keys beyond N (generated later) have no label.
    - `segments` [N] or [B, N] int: segment number per absolute position, negative for none, for `segment_mass`.
    - `pairs`: name -> (queries, keys), two integer tensors [P] or [B, P] of absolute positions; -1 in either skips the entry (NaN).
    - `rows` [N] or [B, N] bool: the query rows that count in column statistics, maps and diagonals (None: all); row statistics are
      given for every row all the same.
    - `layers`: layers (numbers or module names) to measure; None means all.
    - `keep`: layers whose q and k are kept (on the CPU, in the model's dtype), so that any window of A can be recomputed exactly
      by `HeadStatistics.weights`; None keeps none, "all" keeps all. Keeping implies `lse`.
    - `collect`: a LayerCollector that is handed each layer of the main stack as soon as it is complete, so that a long text's maps, q and
      k need not be in memory for all layers at once.
    """

    names: tuple[str, ...] = PASSIVE
    sink_tokens: int = 4
    local_window: int = 64
    waad_window: int = 10
    fai_band: tuple[int, int | None] = (10, 50)
    block: int = 128
    labels: Tensor | None = None
    label_names: tuple[str, ...] = ()
    segments: Tensor | None = None
    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    rows: Tensor | None = None
    layers: tuple[int | str, ...] | None = None
    keep: tuple[int | str, ...] | str | None = None
    collect: LayerCollector | None = None

    def __post_init__(self) -> None:
        names = expand_names(self.names)
        if self.keep is not None and "lse" not in names:
            names = (*names, "lse")
        object.__setattr__(self, "names", tuple(name for name in DEFINITIONS if name in names))
        _positive("sink_tokens", self.sink_tokens)
        _positive("local_window", self.local_window)
        _positive("waad_window", self.waad_window)
        if not _whole(self.block) or self.block < 16 or self.block & (self.block - 1):
            raise refusal(
                StatisticError, f"block={self.block!r}", "a map's block is a power of two, 16 or more", "use 16, 32, 64, 128 or 256"
            )
        band = self.fai_band if isinstance(self.fai_band, tuple | list) and len(self.fai_band) == 2 else (-1, None)
        lo, hi = band
        if not _whole(lo) or lo < 0 or (hi is not None and (not _whole(hi) or hi < lo)):
            raise refusal(
                StatisticError, f"fai_band={self.fai_band!r}", "the band is 0 <= lo <= hi", "use (10, 50), or (0, None) for to-the-end"
            )
        self._check_tables()
        for name, need in (("class_mass", "labels"), ("segment_mass", "segments"), ("pairs", "pairs")):
            value = getattr(self, need)
            if name in self.names and (value is None or (isinstance(value, dict) and not value)):
                raise refusal(StatisticError, f"statistic {name!r}", f"it is defined by {need}, and none were given", f"pass {need}=...")
        if isinstance(self.keep, str) and self.keep != "all":
            raise refusal(
                StatisticError, f"keep={self.keep!r}", "it is neither 'all' nor a list of layers", "pass keep='all' or keep=(0, 5)"
            )
        if self.layers is not None and not tuple(self.layers):
            raise refusal(StatisticError, "layers=()", "there is nothing to measure", "name at least one, or pass layers=None")

    def _check_tables(self) -> None:
        """Tables by position become tensors of the kind they must be; a list of row numbers is no mask of rows, and 0.7 is no label."""
        for name in ("labels", "segments", "rows"):
            given = getattr(self, name)
            if given is None:
                continue
            table = _table(name, given)
            if table.dim() not in (1, 2) or not table.numel():
                raise refusal(StatisticError, f"{name} of shape {list(table.shape)}", "it is given per position", "pass [N] or [B, N]")
            if name == "rows" and table.dtype != torch.bool:
                raise refusal(
                    StatisticError, f"rows of {table.dtype}", "it says of every position whether its row counts", "pass a bool tensor"
                )
            if name != "rows" and (table.is_floating_point() or table.dtype == torch.bool):
                raise refusal(StatisticError, f"{name} of {table.dtype}", "they are numbers 0, 1, ..., negative for none", "pass integers")
            object.__setattr__(self, name, table)
        if not isinstance(self.pairs, dict) or any(not isinstance(at, tuple | list) or len(at) != 2 for at in self.pairs.values()):
            raise refusal(StatisticError, "pairs", "they are named", "pass pairs={name: (queries, keys)}")
        places = {name: tuple(_table(f"pairs {name!r}", part) for part in at) for name, at in self.pairs.items()}
        for name, at in places.items():
            if any(part.is_floating_point() or part.dtype == torch.bool for part in at):
                raise refusal(StatisticError, f"pairs {name!r} of {at[0].dtype}", "they are positions", "pass two integer tensors")
        object.__setattr__(self, "pairs", places)

    @property
    def sweeps(self) -> frozenset[int]:
        """Which of the two sweeps the named statistics need."""
        return frozenset(definition(name).sweep for name in self.names)

    def needs(self, *names: str) -> bool:
        """True when any of these statistics is asked for."""
        return any(name in self.names for name in names)

    @property
    def classes(self) -> int:
        """Number of labels C of `class_mass`: the names given, or the largest label + 1."""
        if self.labels is None:
            return 0
        return max(len(self.label_names), int(self.labels.max()) + 1, 1)

    @property
    def segment_count(self) -> int:
        """Number of segments of `segment_mass`."""
        return 0 if self.segments is None else max(int(self.segments.max()) + 1, 1)


def expand_names(names: str | Iterable[str] | None) -> tuple[str, ...]:
    """Names as a tuple; None and "passive" give the passive set. Raises StatisticError for a name that does not exist."""
    if names is None:
        return PASSIVE
    if not isinstance(names, Iterable):
        raise refusal(StatisticError, f"statistics={names!r}", "it names no statistic", "pass names, e.g. ['entropy']")
    listed: Sequence[str] = [names] if isinstance(names, str) else list(names)
    if not listed:
        raise refusal(StatisticError, "an empty list of statistics", "there is nothing to measure", "name at least one, or pass 'passive'")
    out: list[str] = []
    for name in listed:
        out += PASSIVE if name == "passive" else [definition(name).name]
    return tuple(dict.fromkeys(out))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _table(name: str, given: Any) -> Tensor:
    try:
        table = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise refusal(StatisticError, f"{name}: a {type(given).__name__}", "it makes no tensor", "pass a tensor [N] or [B, N]") from None
    return table.long() if not table.numel() and table.is_floating_point() else table  # an empty list has no dtype of its own


def _positive(name: str, value: Any) -> None:
    if not _whole(value) or value < 1:
        raise refusal(StatisticError, f"{name}={value!r}", "it counts tokens and must be at least 1", f"pass {name}=1 or more")
