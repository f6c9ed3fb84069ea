"""Models that come with headscope itself: `bundled:NAME`. A row names a directory of a plain checkpoint inside the package.

Each was trained by the script beside it, in minutes, on data that the script generates, so its answers and the heads that give them are
known. The card in each directory has the numbers, `truth.json` the heads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from headscope.errors import ModelError, refusal, unknown_name
from headscope.models.checksum import sha256_file

WEIGHTS = Path(__file__).resolve().parent / "weights"


@dataclass(frozen=True, slots=True)
class BundledModel:
    """One row: a checkpoint directory that ships in the wheel. `bytes` is its size on disk, `library` what reads it."""

    name: str
    title: str
    path: Path
    bytes: int
    licence: str
    description: str
    library: Literal["transformers", "diffusers"] = "transformers"

    @property
    def spec(self) -> str:
        """What `hs.load` takes."""
        return f"bundled:{self.name}"

    def damage(self) -> str:
        """Why the weights are not those that shipped, "" when they are: their SHA-256 stands in training.json. Milliseconds."""
        try:
            expected = json.loads((self.path / "training.json").read_text(encoding="utf-8"))["sha256"]
            (weights,) = (path for path in self.path.glob("*.safetensors") if path.stem.endswith("model"))
            found = sha256_file(weights)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"its files cannot be read ({error})"
        return "" if found == expected else f"{weights.name} is not the file that shipped (another SHA-256)"

    @property
    def card(self) -> str:
        """The model card: data, numbers, known heads, how it was trained."""
        return (self.path / "CARD.md").read_text(encoding="utf-8")

    @property
    def truth(self) -> dict[str, Any]:
        """The known heads, from truth.json; ModelError for a model that has none (the diffusion models)."""
        path = self.path / "truth.json"
        if not path.is_file():
            raise refusal(ModelError, self.spec, "no known heads are recorded for it", "use needle, induction or vlm")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found


def _row(name: str, title: str, description: str, library: Literal["transformers", "diffusers"] = "transformers") -> BundledModel:
    path = WEIGHTS / name
    size = sum(file.stat().st_size for file in path.glob("*"))
    return BundledModel(name, title, path, size, "Apache-2.0", description, library)


ROWS = (
    _row("dit", "Digits, unconditional", "DiTTransformer2DModel that draws 8 x 8 digits from noise", "diffusers"),
    _row("induction", "Induction", "two layers without MLPs that continue repeated words: one previous-token head, four induction heads"),
    _row("needle", "Needle", "Llama that finds codes and entries in haystacks of up to 16,384 words, with distant heads that are known"),
    _row("sd3", "Digits from words", "SD3Transformer2DModel with joint attention that draws the digit a prompt names", "diffusers"),
    _row("vlm", "Digit grids", "LLaVA that answers questions about grids of digits, with a prior that it can be misled by"),
)
BUNDLED: dict[str, BundledModel] = {row.name: row for row in ROWS}


def row_of(name: str) -> BundledModel:
    """The row of a name; ModelError lists the known ones otherwise."""
    found = BUNDLED.get(name.strip().lower())
    if found is None:
        raise unknown_name(ModelError, "bundled model", f"bundled:{name}", (row.spec for row in BUNDLED.values()))
    return found
