"""`headscope profile MODEL --pictures`: a run about a picture instead of a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headscope.errors import ProbeError, refusal

if TYPE_CHECKING:
    from headscope.profile import HeadProfile
    from headscope.scope import Scope


@dataclass(frozen=True, slots=True)
class PictureRun:
    """What a picture run is made of: the user's picture and question, or the model's own where it has some."""

    picture: Path | None
    question: str | None
    answer_tokens: int
    steps: int
    seed: int

    def check(self, about_texts: Mapping[str, bool]) -> None:
        """Before the model is loaded: ProbeError for a picture without a question, and for options (name -> given) of runs about texts."""
        given = [name for name, used in about_texts.items() if used]
        if given:
            raise refusal(ProbeError, f"--pictures with {', '.join(given)}", "these say what to do with a text", "leave them out")
        if (self.picture is None) != (self.question is None):
            raise refusal(
                ProbeError, "a picture run", "a picture and a question come together", "pass --picture FILE --question 'What is this?'"
            )
        if self.picture is not None and not self.picture.is_file():
            raise refusal(ProbeError, f"--picture {self.picture}", "there is no such file", "pass a PNG or JPEG")
        if self.answer_tokens < 1 or self.steps < 1:
            raise refusal(ProbeError, "--answer-tokens and --steps", "they count from 1", "pass 1 or more")

    def profile(self, scope: Scope) -> HeadProfile:
        """The run: a question about a picture, or a diffusion transformer from noise to picture. ProbeError for a model of neither kind."""
        from headscope.probes.pictures import unseeing
        from headscope.profile.pictures import answer_profile, bundled_steps

        if self.question is None and scope.source == "bundled:dit":
            return bundled_steps(scope, self.steps, self.seed)
        why = unseeing(scope)
        if why is not None:
            what = "use a vision-language model, or headscope.profile.pictures.step_profile in Python for a diffusion transformer's steps"
            raise refusal(ProbeError, f"--pictures for {scope.name}", why, what)
        data = None if self.question is None else (str(self.picture), self.question)
        return answer_profile(scope, data, answer_tokens=self.answer_tokens, seed=self.seed)
