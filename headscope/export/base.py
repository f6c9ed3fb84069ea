"""Format: one engine's file format, written exactly and read back.

An export goes through three steps, the same for every format. `fit` rounds the plan to what the target can hold and says why, still in
headscope's patterns, so that the rounding can be measured, compared and executed like any plan. `encode` writes the fitted plan as the
target's exact bytes and decides nothing. Then the report, the README and the files appear together in one directory.

`decode` reads the target's file, ours or anybody's. On what `fit` gives it is the inverse of `encode`; tests hold that for random plans.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from headscope.errors import ExportError, refusal
from headscope.export.files import SIDECAR, check_target, read_json, write_folder
from headscope.export.fitting import Fitted, finite_scores
from headscope.export.imported import SHOWN, Found, Hints, ImportedProfile, facts_of, model_from, plan_of, profile_of, shape_of
from headscope.export.loss import HeadLoss, LossReport, head_losses
from headscope.export.readme import readme
from headscope.export.words import word
from headscope.plans.plan import Place, PlanModel, SparsePlan

if TYPE_CHECKING:
    from headscope.export.imported import Like
    from headscope.profile import HeadProfile


LOSSY = "lossy=True (--lossy)"
"""What a refusal advises; a page that has a box for it says so instead."""


@dataclass
class Export:
    """What `encode` works from: the fitted plan or the scores, and what it adds: `numbers`, `notes` and `facts` for the report."""

    model: PlanModel
    plan: SparsePlan | None = None
    scores: dict[Place, float] | None = None
    metric: str = ""
    length: int | None = None
    profile: HeadProfile | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    """What is wrong with the export as a whole: refused unless it may be lossy."""

    def patterns(self) -> SparsePlan:
        """The plan of an export that has one."""
        assert self.plan is not None
        return self.plan

    @property
    def known(self) -> int | None:
        """The length that was given, or the one that the plan was made for."""
        found = self.length or (self.plan.parameters.get("length") if self.plan is not None else None)
        return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None

    def tokens(self, target: str) -> int:
        """The length that a target's tables are made for. ExportError where none is known."""
        found = self.known
        if found is None:
            raise refusal(
                ExportError, f"{target} without a length", "its tables are made for a number of tokens", "pass length=4096 (--length)"
            )
        return found

    def values(self, *metrics: str) -> dict[Place, float]:
        """A metric of the profile by head, the first of these that it has; empty where it has none."""
        name = None if self.profile is None else next((one for one in metrics if one in self.profile.metrics), None)
        if self.profile is None or name is None:
            return {}
        return {place: self.profile.value(*place, name) for place in self.model.places if place in self.profile._rows}


class Format(ABC):
    """Base of the formats. `main`: the file that the engine opens. `plans`, `metrics`: whether it holds a plan, and the metrics whose
    scores it holds, the first one that a profile has.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    engine: ClassVar[str]
    reader: ClassVar[str]
    """The target's own code that must accept the file."""
    main: ClassVar[str]
    holds: ClassVar[tuple[str, ...]]
    lacks: ClassVar[tuple[str, ...]]
    plans: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ()
    language: ClassVar[str] = "python"

    # ---- what a format defines ----------------------------------------------------------------------------------

    def fit(self, plan: SparsePlan, export: Export) -> Fitted:
        """The plan rounded to what the target holds."""
        return Fitted.of(plan)

    def encode(self, export: Export) -> dict[str, bytes]:
        """The target's files by name, `main` first, of a fitted plan. Formats with `plans` define it."""
        raise refusal(ExportError, f"a plan as {self.name}", "that format holds scores only", "export the profile that has them")

    def encode_scores(self, export: Export) -> tuple[dict[str, bytes], dict[Place, float]]:
        """The target's files of scores, and the score written for each head. Formats with `metrics` define it."""
        raise refusal(ExportError, f"scores as {self.name}", "that format holds a plan", "make a plan first: profile.plan(...)")

    @abstractmethod
    def decode(self, path: Path, hints: Hints) -> Found:
        """What a file says. ExportError for one that is damaged or of another format."""

    @abstractmethod
    def load(self, export: Export) -> str:
        """The lines that load the export in the target engine, from its directory."""

    # ---- writing ------------------------------------------------------------------------------------------------

    def write(
        self,
        source: SparsePlan | HeadProfile,
        path: str | Path,
        *,
        lossy: bool = False,
        force: bool = False,
        length: int | None = None,
        metric: str | None = None,
        profile: HeadProfile | None = None,
    ) -> LossReport:
        """Writes a directory that the target engine loads, and returns the report.

        - `source`: a plan, an imported profile that carries one, or a profile whose scores the format holds.
        - `lossy`: allow heads that the target cannot express to be rounded. `force`: replace an export that is there.
        - `length`: tokens, where the target's tables or shares are made for a length. `metric`: which scores to write.
        - `profile`: the run whose block maps say what rounding a plan loses.

        ExportError when the target cannot hold it, when `path` exists, and when it cannot be written; then nothing is left behind.
        """
        target = Path(path)
        check_target(target, force)
        export, asked = self._resolve(source, metric, length, profile)
        if asked is None:
            content, heads = self._scores(export)
        else:
            fitted = self.fit(asked, export)
            export.plan = SparsePlan(asked.model, fitted.patterns, asked.method, asked.parameters, asked.notes)
            export.notes += [*export.obstacles, *fitted.notes]
            heads = head_losses(asked, fitted.patterns, fitted.why, export.profile)
            self._numbers(export, asked)
        refused = [one for one in heads if one.changed]
        if export.obstacles and not lossy:
            raise refusal(ExportError, f"{export.model.name} as {self.name}", export.obstacles[0], f"export it anyway with {LOSSY}")
        if refused and not lossy:
            raise self._refused(refused, len(heads))
        if asked is not None:
            content = self.encode(export)
        report = LossReport(
            self.name,
            self.title,
            "scores" if asked is None else "plan",
            export.model,
            tuple(heads),
            tuple(content),
            self.load(export),
            tuple(export.notes),
            export.numbers,
            export.length,
            export.facts,
        )
        beside = {"README.md": readme(self, report).encode(), "loss.txt": report.text().encode(), SIDECAR: report.to_json()}
        write_folder(target, {**content, **beside}, force)
        return report

    def _resolve(
        self, source: SparsePlan | HeadProfile, metric: str | None, length: int | None, profile: HeadProfile | None
    ) -> tuple[Export, SparsePlan | None]:
        """What to export, and the plan among it."""
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise refusal(ExportError, f"length={length!r}", "it counts tokens and is 1 or more", "pass length=4096")
        if isinstance(source, SparsePlan):
            if not self.plans:
                raise refusal(ExportError, f"a plan as {self.name}", "that format holds scores only", "export the profile that has them")
            if metric is not None:
                raise refusal(ExportError, f"metric {metric!r} beside a plan", "a plan has no scores", "export the profile that has them")
            return Export(source.model, source, length=length, profile=profile), source
        facts = dict(facts_of(source))
        carried = plan_of(source)
        if carried is not None and self.plans and metric is None:
            return Export(
                carried.model, carried, length=length or facts.get("length"), profile=profile or source, facts=_kept(facts)
            ), carried
        names = self.metrics if metric is None else (metric,)
        name = next((one for one in names if one in source.metrics), None)
        if not self.metrics:
            raise refusal(
                ExportError,
                f"a profile as {self.name}",
                "that format holds a plan, and this profile has measurements",
                'make a plan first: profile.plan("duo", density=0.5), or headscope plan RUN --method duo --out plan.json',
            )
        if name is None:
            raise refusal(
                ExportError,
                f"this profile as {self.name}",
                f"it has none of the metrics {', '.join(names)}",
                f"measure {self.metrics[0]}, name another metric ({', '.join(source.metrics[:8])}), or export a plan",
            )
        model = PlanModel.of(source)
        scores = {place: source.value(*place, name) for place in model.places}
        finite_scores(scores, name, model)
        return Export(model, None, scores, name, length, source, _kept(facts)), None

    def _scores(self, export: Export) -> tuple[dict[str, bytes], list[HeadLoss]]:
        content, written = self.encode_scores(export)
        assert export.scores is not None
        heads = []
        for place, asked in export.scores.items():
            changed = written[place] != asked
            why = (
                export.facts.get("why_scores", f"{self.engine} has one score per key head: the largest of its query heads")
                if changed
                else ""
            )
            heads.append(HeadLoss(*place, repr(asked), repr(written[place]), changed, why, None if changed else 0.0))
        export.facts.pop("why_scores", None)
        export.facts["metric"] = export.metric
        return content, heads

    def _numbers(self, export: Export, asked: SparsePlan) -> None:
        length = export.length or asked.parameters.get("length") or SHOWN
        if isinstance(length, int):
            export.numbers = {
                f"density_asked_at_{length}": asked.density(length),
                f"density_written_at_{length}": export.patterns().density(length),
                **export.numbers,
            }

    def _refused(self, changed: list[HeadLoss], count: int) -> ExportError:
        first = changed[0]
        others = f", and {len(changed) - 1} more of {count} heads differ" if len(changed) > 1 else ""
        return refusal(
            ExportError,
            f"head {first.layer}.{first.head} with {first.asked} as {self.name}",
            f"it would become {first.written} ({first.why}{others})",
            f"round it with {LOSSY}, or choose another format (headscope formats)",
        )

    # ---- reading ------------------------------------------------------------------------------------------------

    def read(self, path: str | Path, *, like: Like | None = None, length: int | None = None) -> ImportedProfile:
        """Opens an export of headscope or a published file: the directory, or its main file.

        `like`: a model, profile or plan that says what the file does not (key heads, head_dim); headscope's own exports need none.
        `length`: tokens that shares refer to. ExportError for a file that is missing, damaged or of another format.
        """
        place = Path(path)
        hints = self._hints(place, like, length)
        main = self._main(place)
        found = self.decode(main, hints)
        for metric, values in found.scores.items():
            if self.checked(metric):
                finite_scores(values, metric, found.model)
        return profile_of(found, self.name, place, hints.length)

    def checked(self, metric: str) -> bool:
        """Whether every head must have this score."""
        return True

    def _main(self, place: Path) -> Path:
        try:
            return place / self.main if place.is_dir() else place
        except (OSError, ValueError) as error:
            raise refusal(ExportError, repr(str(place)), str(error), "check the path") from None

    def _hints(self, place: Path, like: Like | None, length: int | None) -> Hints:
        name = (place.name if place.is_dir() else place.stem) or "imported"
        folder = place if place.is_dir() else place.parent
        known: Mapping[str, Any] = {}
        if (folder / SIDECAR).is_file():
            beside = read_json(folder / SIDECAR)
            known = beside if isinstance(beside, dict) and beside.get("format") == self.name else {}
        model = shape_of(like)
        if model is None and known:
            model = model_from(known.get("model"), folder / SIDECAR)
        return Hints(model, name, length or known.get("length"), known.get("facts", {}))

    def describe(self) -> dict[str, Any]:
        """This format as plain data."""
        return {
            "name": self.name,
            "title": self.title,
            "engine": self.engine,
            "reader": self.reader,
            "file": self.main,
            "plans": self.plans,
            "metrics": list(self.metrics),
            "holds": list(self.holds),
            "lacks": list(self.lacks),
            "page": " ".join((type(self).__doc__ or "").split()),
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r})"


def _kept(facts: dict[str, Any]) -> dict[str, Any]:
    """An import's facts without its plan."""
    return {key: value for key, value in facts.items() if key not in ("plan", "format", "metric")}


def table_of(value: Any, path: Path, what: str, *, numbers: bool = True) -> list[list[float]]:
    """A rectangular table of finite numbers from plain data. ExportError that names the row that is not."""
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
        raise refusal(ExportError, str(path), f"{what} is no table of rows", "check that the file is of this format")
    width = len(value[0])
    for number, row in enumerate(value):
        if len(row) != width or not row:
            raise refusal(
                ExportError, str(path), f"{what} is ragged: row {number} has {len(row)} entries, row 0 has {width}", "copy the file again"
            )
        bad = next(
            (one for one in row if isinstance(one, bool) or not isinstance(one, int | float) or one != one or abs(one) == float("inf")),
            None,
        )
        if numbers and bad is not None:
            raise refusal(ExportError, str(path), f"{what} of row {number} holds {bad!r}, which is no score", "copy the file again")
    return value


__all__ = ["Export", "Format", "table_of", "word"]
