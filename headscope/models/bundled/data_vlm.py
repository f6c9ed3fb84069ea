"""Pictures of digits on a grid, and questions about them in words.

A picture is 48 x 48: three rows of three cells, each empty, holding a digit of scikit-learn's, or holding clutter (a digit whose quarters
changed places), under light strokes and noise. Digits of a picture go together: in seven of ten the digits come from two pairs out of
(0 6), (1 7), (2 5), (3 8), (4 9), so a model can answer from what usually goes together instead of from the picture. That prior is what
hallucination is measured with: uniform pictures, and questions about the absent partner of a digit that is there.

Digits are split once: every fifth is held out. Nothing is read from a network; scikit-learn carries the digits.
"""

from __future__ import annotations

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
WORDS = (*GLUE, *DIGITS, *PLURALS, *ROWS, *COLUMNS)
PARTNER = (6, 7, 5, 8, 9, 2, 0, 1, 3, 4)
PAIRS = ((0, 6), (1, 7), (2, 5), (3, 8), (4, 9))
EMPTY, CLUTTER = 10, 11
KINDS = ("position", "count", "presence", "read")


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
    pairs = torch.tensor(PAIRS, device=device)[_rand(source, count, 5).argsort(1)[:, :2]].flatten(1)
    theme = pairs.gather(1, (_rand(source, count, 9) * 4).long())
    free = (_rand(source, count, 9) * 10).long()
    chosen = torch.where(_rand(source, count, 1) < themed, theme, free)
    what = _rand(source, count, 9)
    full = 0.35 + 0.5 * _rand(source, count, 1)
    return torch.where(what < full, chosen, torch.where(what < full + 0.12, CLUTTER, EMPTY))


def scenes(
    count: int, source: torch.Generator, *, held_out: bool = False, themed: float = 0.7, noise: float = 0.05, hide: int = 0
) -> Scene:
    """Random pictures. `noise`: standard deviation of the pixel noise; `hide`: so many digits are covered by gray blocks.

    A covered digit stays in `cells`: naming it would be right, and naming another one is not.
    """
    device = source.device
    pictures, labels = digits(held_out, str(device))
    cells = _cells(count, themed, source)
    wanted = torch.where(cells < 10, cells, (_rand(source, count, 9) * 10).long())
    # A random picture of the wanted digit: sorted by label, then an offset within the label.
    order = labels.argsort()
    sizes = labels.bincount(minlength=10)
    firsts = sizes.cumsum(0) - sizes

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
    drawn = _place(glyphs.flatten(0, 1), source).unflatten(0, (count, 9))
    if hide:
        spots = (_rand(source, count, 9) + (cells >= 10)).argsort(1)[:, :hide]
        block = 0.5 * (_rand(source, count, hide, CELL, CELL) < 0.9)
        drawn = drawn.scatter(1, spots[..., None, None].expand(-1, -1, CELL, CELL), block.to(drawn.dtype))
    whole = drawn.unflatten(1, (3, 3)).permute(0, 1, 3, 2, 4).reshape(count, 3 * CELL, 3 * CELL)
    whole = torch.maximum(whole, _strokes(count, 2, source))
    whole = whole + noise * torch.randn(count, SIZE, SIZE, generator=source, device=device)
    return Scene(whole.clamp(0, 1), cells)


def _place(glyphs: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """8 x 8 digits [n, 8, 8], turned, scaled, sheared and shifted a little, in cells [n, 16, 16]."""
    count = len(glyphs)

    def spread(width: float) -> torch.Tensor:
        return width * (2 * _rand(source, count) - 1)

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


def turn(kind: str, scene: Scene, source: torch.Generator, *, adversarial: bool = False) -> Turn:
    """A question of a kind about each picture. `adversarial`: presence questions about the partner of a digit, half of them absent."""
    table, cells = ids_of(), scene.cells
    count, device = len(cells), cells.device
    zero, plural = table[DIGITS[0]], table[PLURALS[0]]
    seen = torch.where(cells < 10, cells + zero, table["none"])
    if kind == "read":
        words = ["question", ":", "read", "the", "grid", "?", "answer", ":", *seen.unbind(1), EOS]
        return Turn(_line(count, words, device), tuple(range(8, 18)))
    if kind == "position":
        lucky = _rand(source, count, 9) + 0.6 * ((cells < 10) & (_rand(source, count, 1) < 0.6))
        spot = lucky.argmax(1)
        answer = seen.gather(1, spot[:, None])[:, 0]
        row, column = table["top"] + spot // 3, table["left"] + spot % 3
        words = ["question", ":", "which", "digit", "is", "at", "the", row, column, "?", "answer", ":", answer, EOS]
        return Turn(_line(count, words, device), (12, 13), spot)
    counts = scene.counts()
    there = (counts > 0).float()
    want = (_rand(source, count) < (0.5 if kind == "presence" else 0.7))[:, None]
    chance = torch.where(want, there, 1 - there)
    if adversarial:
        near = there[:, torch.tensor(PARTNER, device=device)]
        chance = torch.where(want, chance, chance * near + 1e-6 * chance)
    digit = (chance * _rand(source, count, 10) + 1e-9 * _rand(source, count, 10)).argmax(1)
    number = counts.gather(1, digit[:, None])[:, 0]
    if kind == "count":
        words = ["question", ":", "how", "many", plural + digit, "are", "there", "?", "answer", ":", zero + number, EOS]
        return Turn(_line(count, words, device), (10, 11), digit)
    truth = torch.where(number > 0, table["yes"], table["no"])
    words = ["question", ":", "is", "there", "a", zero + digit, "?", "answer", ":", truth, EOS]
    return Turn(_line(count, words, device), (9, 10), digit)


def dialogue(kinds: list[str], scene: Scene, source: torch.Generator, *, adversarial: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels) int64 [n, length]: <bos>, 36 image tokens, then one turn per kind. Labels are -100 except on answers."""
    count, device = len(scene.cells), scene.cells.device
    table = ids_of()
    head = torch.full((count, 1 + TOKENS), table[IMAGE], device=device)
    head[:, 0] = table[BOS]
    ids, labels = [head], [torch.full_like(head, -100)]
    for kind in kinds:
        made = turn(kind, scene, source, adversarial=adversarial)
        label = torch.full_like(made.ids, -100)
        label[:, list(made.answers)] = made.ids[:, list(made.answers)]
        ids.append(made.ids)
        labels.append(label)
    return torch.cat(ids, 1), torch.cat(labels, 1)


def pixel_values(pixels: torch.Tensor) -> torch.Tensor:
    """[n, 48, 48] in [0, 1] -> [n, 3, 48, 48] in [-1, 1], what the image processor makes of the same picture."""
    return (2 * pixels - 1)[:, None].expand(-1, 3, -1, -1)
