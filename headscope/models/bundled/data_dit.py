"""scikit-learn's digits as training pictures for the diffusion models, and their class words as text.

One in five digits is held out (the same ones as for the vision-language model): quality is the distance to those, never to what was seen.
"""

from __future__ import annotations

import torch

from headscope.models.bundled.data_vlm import digits
from headscope.models.bundled.words import DIGITS

SIZE = 8
TEXT = 4
PROMPTS = ("a handwritten digit {}", "a {}", "the digit {}", "handwritten {}", "{}")
WORDS = ("<pad>", "a", "the", "handwritten", "digit", *DIGITS)


def pictures(held_out: bool, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """(pictures float32 [n, 1, 8, 8] in [-1, 1], labels int64 [n])."""
    found, labels = digits(held_out, device)
    return (2 * found - 1)[:, None], labels


def encode(prompts: list[str]) -> torch.Tensor:
    """Ids int64 [n, 4] of prompts made of WORDS, padded with <pad> on the right; the empty prompt is all padding.

    ValueError for a word that is not there, and for more than four words: there is no <unk> here, since it would mean nothing.
    """
    rows = []
    for prompt in prompts:
        words = prompt.lower().split()
        unknown = [word for word in words if word not in WORDS]
        if unknown or len(words) > TEXT:
            reason = f"does not know {unknown}" if unknown else f"takes at most {TEXT} words"
            raise ValueError(f"prompt {prompt!r}: the model {reason}; its words are {', '.join(WORDS[1:])}")
        rows.append([WORDS.index(word) for word in words] + [0] * (TEXT - len(words)))
    return torch.tensor(rows, dtype=torch.long)


def random_text(labels: torch.Tensor, source: torch.Generator, *, drop: float) -> torch.Tensor:
    """Ids [n, 4] of a random wording for every label, on its device; a share `drop` of them is the empty prompt."""
    device = labels.device
    table = torch.stack([encode([form.format(word) for form in PROMPTS]) for word in DIGITS]).to(device)
    form = torch.randint(0, len(PROMPTS), labels.shape, generator=source, device=device)
    keep = torch.rand(labels.shape, generator=source, device=device) >= drop
    return table[labels, form] * keep[:, None]
