"""Pictures of digits on a grid, and questions about them in words.

A picture is 48 x 48: three rows of three cells, each empty, holding a digit of scikit-learn's, or holding clutter (a digit whose quarters
changed places), under light strokes and noise. Digits of a picture go together: in seven of ten the digits come from two pairs out of
(0 6), (1 7), (2 5), (3 8), (4 9), so a model can answer from what usually goes together instead of from the picture. That prior is what
hallucination is measured with: uniform pictures, and questions about the absent partner of a digit that is there.

A question may carry a guess at its answer ("guess : seven ."). Guesses are right more often than not, so text alone says something: it is
all there is to go by without a picture, what to lean on where the picture is unclear, and what a clear picture overrules. Dialogues without
a picture are part of the training, as text is of a real model's; a model that never saw one answers them at random, and no comparison
"with and without the picture" would mean anything.

Digits are split once: every fifth is held out. Nothing is read from a network; scikit-learn carries the digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from headscope.models.bundled.words import BOS, DIGITS, EOS, SPECIAL, build_tokenizer

SIZE, PATCH, CELL = 48, 8, 16
TOKENS = (SIZE // PATCH) ** 2
IMAGE = "<image>"
PLURALS = ("zeros", "ones", "twos", "threes", "fours", "fives", "sixes", "sevens", "eights", "nines")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
GLUE = tuple("question answer : ? which digit is at the how many are there a read grid yes no none .".split())  # noqa: SIM905
WORDS = (*GLUE, *DIGITS, *PLURALS, *ROWS, *COLUMNS, "guess")
PARTNER = (6, 7, 5, 8, 9, 2, 0, 1, 3, 4)
PAIRS = ((0, 6), (1, 7), (2, 5), (3, 8), (4, 9))
EMPTY, CLUTTER = 10, 11
KINDS = ("position", "count", "presence", "read")
GUESSED = ("position", "count", "presence")
"""Kinds whose answer is one word, which can be guessed at."""
WIDTHS = {"read": 18, "position": 14, "count": 12, "presence": 11}
"""Words of a turn, <eos> included, without a guess."""
GUESS_WIDTH = 4
NOISE, NOISIEST = 0.05, 0.25
"""Standard deviation of the usual pixel noise, and the largest of training pictures."""


def tokenizer() -> Any:
    """The word-level tokenizer of the model; `<image>` is a special token."""
    return build_tokenizer(WORDS, length=512, extra=(IMAGE,))


@lru_cache(maxsize=1)
def ids_of() -> dict[str, int]:
    """Word -> id."""
    return {word: number for number, word in enumerate([*SPECIAL, IMAGE, *WORDS])}


@lru_cache(maxsize=4)
def digits(held_out: bool, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """(pictures float32 [n, 8, 8] in [0, 1], labels int64 [n]) of one part of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = torch.tensor(found.images, dtype=torch.float32) / 16
    labels = torch.tensor(found.target, dtype=torch.long)
    part = (torch.arange(len(labels)) % 5 == 4) == held_out
    return pictures[part].to(device), labels[part].to(device)


@lru_cache(maxsize=4)
def _by_label(held_out: bool, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(places of the digits in order of their labels, where each label begins among them, how many it has); asking a GPU for the counts at
    every step would wait for it."""
    labels = digits(held_out, device)[1]
    sizes = labels.bincount(minlength=10)
    return labels.argsort(), sizes.cumsum(0) - sizes, sizes


@lru_cache(maxsize=4)
def _pairs(device: str) -> torch.Tensor:
    return torch.tensor(PAIRS, device=device)


@dataclass(frozen=True, slots=True)
class Scene:
    """pixels float32 [n, 48, 48] in [0, 1]; cells int64 [n, 9] in reading order: a digit, EMPTY or CLUTTER."""

    pixels: torch.Tensor
    cells: torch.Tensor

    def counts(self) -> torch.Tensor:
        """How often each digit is there, int64 [n, 10]."""
        return torch.nn.functional.one_hot(self.cells, 12).sum(1)[:, :10]


def _rand(source: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=source, device=source.device)


def _cells(count: int, themed: float, source: torch.Generator) -> torch.Tensor:
    """What each of nine cells holds."""
    device = source.device
    pairs = _pairs(str(device))[_rand(source, count, 5).argsort(1)[:, :2]].flatten(1)
    theme = pairs.gather(1, (_rand(source, count, 9) * 4).long())
    free = (_rand(source, count, 9) * 10).long()
    chosen = torch.where(_rand(source, count, 1) < themed, theme, free)
    what = _rand(source, count, 9)
    full = 0.35 + 0.5 * _rand(source, count, 1)
    return torch.where(what < full, chosen, torch.where(what < full + 0.12, CLUTTER, EMPTY))


def scenes(
    count: int,
    source: torch.Generator,
    *,
    held_out: bool = False,
    themed: float = 0.7,
    noise: float | torch.Tensor = NOISE,
    hide: int = 0,
    far: float = 1.0,
) -> Scene:
    """Random pictures. `noise`: standard deviation of the pixel noise, one number or [n, 1, 1]; `hide`: so many digits are covered by gray
    blocks; `far`: how much further than usual digits are turned, scaled, sheared and shifted.

    A covered digit stays in `cells`: naming it would be right, and naming another one is not.
    """
    device = source.device
    pictures, _ = digits(held_out, str(device))
    cells = _cells(count, themed, source)
    wanted = torch.where(cells < 10, cells, (_rand(source, count, 9) * 10).long())
    # A random picture of the wanted digit: sorted by label, then an offset within the label.
    order, firsts, sizes = _by_label(held_out, str(device))

    def pick() -> torch.Tensor:
        return pictures[order[firsts[wanted] + (_rand(source, count, 9) * sizes[wanted]).long()]]

    glyphs = pick()
    if not held_out:  # a blend of two digits of a kind is one more digit of that kind
        blend = 0.4 * _rand(source, count, 9, 1, 1)
        glyphs = (1 - blend) * glyphs + blend * pick()
    mixed = torch.stack([glyphs[..., 4:, 4:], glyphs[..., :4, 4:], glyphs[..., 4:, :4], glyphs[..., :4, :4]], dim=2)
    mixed = mixed.unflatten(2, (2, 2)).permute(0, 1, 2, 4, 3, 5).reshape(count, 9, 8, 8)
    glyphs = torch.where((cells == CLUTTER)[..., None, None], mixed, glyphs)
    glyphs = glyphs * (cells != EMPTY)[..., None, None]
    drawn = _place(glyphs.flatten(0, 1), source, far).unflatten(0, (count, 9))
    if hide:
        spots = (_rand(source, count, 9) + (cells >= 10)).argsort(1)[:, :hide]
        block = 0.5 * (_rand(source, count, hide, CELL, CELL) < 0.9)
        drawn = drawn.scatter(1, spots[..., None, None].expand(-1, -1, CELL, CELL), block.to(drawn.dtype))
    whole = drawn.unflatten(1, (3, 3)).permute(0, 1, 3, 2, 4).reshape(count, 3 * CELL, 3 * CELL)
    whole = torch.maximum(whole, _strokes(count, 2, source))
    whole = whole + noise * torch.randn(count, SIZE, SIZE, generator=source, device=device)
    return Scene(whole.clamp(0, 1), cells)


def _place(glyphs: torch.Tensor, source: torch.Generator, far: float) -> torch.Tensor:
    """8 x 8 digits [n, 8, 8], turned, scaled, sheared and shifted a little, `far` times as much as usual, in cells [n, 16, 16]."""
    count = len(glyphs)

    def spread(width: float) -> torch.Tensor:
        return far * width * (2 * _rand(source, count) - 1)

    angle, shear = spread(0.2), spread(0.15)
    across, along = 1.12 + spread(0.12), 1.12 + spread(0.12)
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([across * cos, across * (sin + shear), spread(0.12), -along * sin, along * cos, spread(0.12)], dim=1).unflatten(
        1, (2, 3)
    )
    grid = torch.nn.functional.affine_grid(matrix, [count, 1, CELL, CELL], align_corners=False)
    drawn = torch.nn.functional.grid_sample(glyphs[:, None], grid, align_corners=False)[:, 0]
    return drawn * (0.7 + 0.3 * _rand(source, count, 1, 1))


def _strokes(count: int, number: int, source: torch.Generator) -> torch.Tensor:
    """Faint straight strokes anywhere, [n, 48, 48]."""
    axis = torch.arange(SIZE, device=source.device) + 0.5
    start = SIZE * _rand(source, count, number, 2, 1, 1)
    turn = 6.2832 * _rand(source, count, number, 1, 1)
    dy, dx = axis[:, None] - start[:, :, 0], axis[None, :] - start[:, :, 1]
    along = (dy * turn.sin() + dx * turn.cos()).clamp(-5, 5)
    distance = (dy - along * turn.sin()).square() + (dx - along * turn.cos()).square()
    return (0.35 * torch.exp(-distance)).amax(1)


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer: ids [n, length]; answers: the columns of the answer, <eos> included."""

    ids: torch.Tensor
    answers: tuple[int, ...]
    asked: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def _line(count: int, words: list[Any], device: torch.device | str) -> torch.Tensor:
    table = ids_of()
    return torch.stack([torch.full((count,), table[word], device=device) if isinstance(word, str) else word for word in words], dim=1)


def turn(kind: str, scene: Scene, source: torch.Generator, *, adversarial: bool = False, guess: float | None = None) -> Turn:
    """A question of a kind about each picture. `adversarial`: presence questions about the partner of a digit, half of them absent.

    `guess`: the share of questions whose guess is right, 0 to 1; None: the question carries none. ValueError for a guess at a whole grid.
    """
    table, cells = ids_of(), scene.cells
    count, device = len(cells), cells.device
    zero, plural = table[DIGITS[0]], table[PLURALS[0]]
    seen = torch.where(cells < 10, cells + zero, table["none"])
    if kind == "read":
        if guess is not None:
            raise ValueError(f"guess={guess}: only answers of one word are guessed at ({', '.join(GUESSED)})")
        words = ["question", ":", "read", "the", "grid", "?", "answer", ":", *seen.unbind(1), EOS]
        return Turn(_line(count, words, device), tuple(range(8, 18)))
    if kind == "position":
        lucky = _rand(source, count, 9) + 0.6 * ((cells < 10) & (_rand(source, count, 1) < 0.6))
        asked = lucky.argmax(1)
        truth = seen.gather(1, asked[:, None])[:, 0]
        row, column = table["top"] + asked // 3, table["left"] + asked % 3
        words = ["question", ":", "which", "digit", "is", "at", "the", row, column, "?"]
    else:
        counts = scene.counts()
        there = (counts > 0).float()
        want = (_rand(source, count) < (0.5 if kind == "presence" else 0.7))[:, None]
        chance = torch.where(want, there, 1 - there)
        if adversarial:
            near = there[:, torch.tensor(PARTNER, device=device)]
            chance = torch.where(want, chance, chance * near + 1e-6 * chance)
        asked = (chance * _rand(source, count, 10) + 1e-9 * _rand(source, count, 10)).argmax(1)
        number = counts.gather(1, asked[:, None])[:, 0]
        if kind == "count":
            truth = zero + number
            words = ["question", ":", "how", "many", plural + asked, "are", "there", "?"]
        else:
            truth = torch.where(number > 0, table["yes"], table["no"])
            words = ["question", ":", "is", "there", "a", zero + asked, "?"]
    if guess is not None:
        words += ["guess", ":", _guesses(kind, truth, guess, source), "."]
    place = len(words) + 2
    return Turn(_line(count, [*words, "answer", ":", truth, EOS], device), (place, place + 1), asked)


def _guesses(kind: str, truth: torch.Tensor, share: float, source: torch.Generator) -> torch.Tensor:
    """Word ids [n]: the truth in a share of cases, a wrong word that could have been right in the others (a number one off, any digit)."""
    table = ids_of()
    zero = table[DIGITS[0]]
    if kind == "presence":
        wrong = table["yes"] + table["no"] - truth
    elif kind == "count":
        number = truth - zero
        wrong = zero + torch.where((_rand(source, len(truth)) < 0.5) & (number > 0) | (number == 9), number - 1, number + 1)
    else:
        place = torch.where(truth == table["none"], 10, truth - zero)
        other = (place + 1 + (_rand(source, len(truth)) * 10).long()) % 11
        wrong = torch.where(other == 10, table["none"], other + zero)
    return torch.where(_rand(source, len(truth)) < share, truth, wrong)


def dialogue(
    kinds: Sequence[str],
    scene: Scene,
    source: torch.Generator,
    *,
    adversarial: bool = False,
    guesses: Sequence[float | None] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels) int64 [n, length]: <bos>, 36 image tokens, then one turn per kind. Labels are -100 except on answers.

    `guesses`: per turn, as `turn` takes it; none by default.
    """
    count, device = len(scene.cells), scene.cells.device
    table = ids_of()
    head = torch.full((count, 1 + TOKENS), table[IMAGE], device=device)
    head[:, 0] = table[BOS]
    ids, labels = [head], [torch.full_like(head, -100)]
    for kind, guess in zip(kinds, guesses or [None] * len(kinds), strict=True):
        made = turn(kind, scene, source, adversarial=adversarial, guess=guess)
        label = torch.full_like(made.ids, -100)
        label[:, list(made.answers)] = made.ids[:, list(made.answers)]
        ids.append(made.ids)
        labels.append(label)
    return torch.cat(ids, 1), torch.cat(labels, 1)


def without_picture(ids: torch.Tensor) -> torch.Tensor:
    """The ids of dialogues [n, length], their image tokens taken out: [n, length - 36]."""
    return torch.cat([ids[:, :1], ids[:, 1 + TOKENS :]], 1)


def layout(kinds: Sequence[str], guesses: Sequence[float | None]) -> list[tuple[int, int]]:
    """(first, end) column of each turn in a dialogue."""
    out, place = [], 1 + TOKENS
    for kind, guess in zip(kinds, guesses, strict=True):
        width = WIDTHS[kind] + (0 if guess is None else GUESS_WIDTH)
        out.append((place, place + width))
        place += width
    return out


def pixel_values(pixels: torch.Tensor) -> torch.Tensor:
    """[n, 48, 48] in [0, 1] -> [n, 3, 48, 48] in [-1, 1], what the image processor makes of the same picture."""
    return (2 * pixels - 1)[:, None].expand(-1, 3, -1, -1)
