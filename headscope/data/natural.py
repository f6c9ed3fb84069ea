"""Natural text of an exact number of tokens, for any tokenizer.

A head's numbers depend on the length of the text (mean distance and entropy grow with it), so a profile is made at one exact length and
never on "up to N tokens". Text that is too short is refused; it is not repeated to fill the length, since a repeated text would light up
every copying head. The bundled essays are original prose written for headscope, about 9,050 tokens of SmolLM2 in all, which is enough for
contexts up to 8,192.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headscope.errors import DataError, refusal

if TYPE_CHECKING:
    from torch import Tensor

TextData = str | Path | Sequence[str] | torch.Tensor | None
"""What a user may give as natural text: nothing (bundled essays), a .txt or .jsonl path, text, several texts, or token ids [N] or [B,
N].
"""


@dataclass(frozen=True, slots=True, eq=False)
class NaturalText:
    """One text of exactly the asked length.

    `ids` int64 [N]; `starts` the character of `text` at which each token begins (None where there is no text); `text` ends with the last
    token; `name` says where it comes from.
    """

    ids: Tensor
    text: str | None
    starts: tuple[int, ...] | None
    name: str

    def __repr__(self) -> str:
        return f"NaturalText({self.name!r}, tokens={len(self.ids)})"


def bundled() -> dict[str, str]:
    """The bundled essays by name, in their order."""
    folder = resources.files("headscope.data") / "texts"
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".txt")), key=lambda entry: entry.name)
    return {entry.name.removesuffix(".txt"): entry.read_text(encoding="utf-8").strip() for entry in files}


def natural_texts(tokenizer: Any, tokens: int, *, texts: int = 1, data: TextData = None) -> list[NaturalText]:
    """`texts` different texts of exactly `tokens` tokens each, the same ones on every call.

    Bundled: text i begins with essay i and goes on through the others in a circle. A file or one string: consecutive windows. Several
    strings or .jsonl lines: the first ones that are long enough, each cut at `tokens`. Token ids are taken as they are. Special tokens are
    those that the tokenizer adds by itself. Raises DataError when the data cannot be read or is too short.
    """
    if tokens < 1 or texts < 1:
        raise refusal(DataError, f"tokens={tokens}, texts={texts}", "both count things and must be at least 1", "pass positive numbers")
    if isinstance(data, torch.Tensor):
        return _from_ids(data, tokens, texts)
    if tokenizer is None:
        raise refusal(
            DataError,
            "a model without a tokenizer",
            "text cannot be turned into tokens",
            "pass token ids as data=, or a Scope with a tokenizer",
        )
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds its tokenizer
    if data is None:
        return _bundled_texts(tokenizer, tokens, texts)
    name, documents = read_documents(data)
    if len(documents) == 1:
        return _windows(tokenizer, documents[0], tokens, texts, name)
    found = []
    longest = 0
    for number, document in enumerate(documents):
        text = _encode(tokenizer, document.lstrip(), tokens, f"{name}[{number}]")
        longest = max(longest, len(text.ids))
        if len(text.ids) == tokens:
            found.append(text)
            if len(found) == texts:
                return found
    raise refusal(
        DataError,
        f"{name}: {len(documents)} texts",
        f"{len(found)} of them have {tokens} tokens and {texts} are needed (the longest has {longest})",
        "ask for a shorter context or fewer texts",
    )


def check_data(data: TextData) -> None:
    """Raises DataError when the user's data cannot be read or holds no text, before anything is tokenized."""
    if data is not None and not isinstance(data, torch.Tensor):
        read_documents(data)


def _bundled_texts(tokenizer: Any, tokens: int, texts: int) -> list[NaturalText]:
    essays = list(bundled().items())
    if texts > len(essays):
        raise refusal(DataError, f"texts={texts}", f"{len(essays)} different texts are bundled", "ask for fewer, or pass your own as data=")
    out = []
    for first in range(texts):
        order = essays[first:] + essays[:first]
        text = _encode(tokenizer, "\n\n".join(essay for _, essay in order), tokens, f"headscope essays from {order[0][0]}")
        if len(text.ids) < tokens:
            raise refusal(
                DataError,
                f"a context of {tokens}",
                f"the bundled essays are {len(text.ids)} tokens of this tokenizer",
                "pass a longer text as data=",
            )
        out.append(text)
    return out


def _windows(tokenizer: Any, document: str, tokens: int, texts: int, name: str) -> list[NaturalText]:
    """Consecutive windows of one document; each begins at the character where the one before it ended."""
    out: list[NaturalText] = []
    rest = document.lstrip()
    while len(out) < texts:
        text = _encode(tokenizer, rest, tokens, name if texts == 1 else f"{name} window {len(out)}")
        if len(text.ids) < tokens:
            raise refusal(
                DataError,
                name,
                f"window {len(out)} has {len(text.ids)} tokens, and {texts} of {tokens} are needed",
                "ask for a shorter context or fewer texts, or pass a longer text",
            )
        out.append(text)
        rest = rest[len(text.text or "") :].lstrip()
    return out


def _encode(tokenizer: Any, text: str, tokens: int, name: str) -> NaturalText:
    """At most `tokens` tokens of a text, special tokens included, and the text that they cover."""
    if not text:
        return NaturalText(torch.zeros(0, dtype=torch.int64), "", (), name)
    # No word is longer than this many characters a token, so that a long file is not tokenized whole.
    window = text[: tokens * 24 + 1024]
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoding = tokenizer(window, truncation=True, max_length=tokens, return_offsets_mapping=fast)
    ids = torch.tensor(list(encoding["input_ids"])[:tokens], dtype=torch.int64)
    if fast:
        spans = encoding["offset_mapping"][:tokens]
        end = max((stop for _, stop in spans), default=0)
        return NaturalText(ids, window[:end], _starts(spans), name)
    return NaturalText(ids, tokenizer.decode(ids.tolist(), skip_special_tokens=True), None, name)


def _starts(spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Where each token begins. A special token has the empty span (0, 0); it is put where its neighbour before it ended."""
    starts, end = [], 0
    for start, stop in spans:
        starts.append(start if stop > start else end)
        end = max(end, stop)
    return tuple(starts)


def _from_ids(ids: Tensor, tokens: int, texts: int) -> list[NaturalText]:
    rows = ids[None] if ids.ndim == 1 else ids
    if rows.ndim != 2 or rows.is_floating_point():
        raise refusal(
            DataError, f"ids of shape {tuple(ids.shape)}, {ids.dtype}", "token ids are integers [N] or [B, N]", "pass tokenizer output"
        )
    if rows.shape[0] < texts or rows.shape[1] < tokens:
        raise refusal(
            DataError,
            f"ids of shape {tuple(ids.shape)}",
            f"{texts} sequences of {tokens} tokens are needed",
            f"pass context={rows.shape[1]} and texts={rows.shape[0]} or less",
        )
    return [NaturalText(row[:tokens].to("cpu", torch.int64).clone(), None, None, f"token ids [{i}]") for i, row in enumerate(rows[:texts])]


def read_documents(data: str | Path | Sequence[str]) -> tuple[str, list[str]]:
    """The name of the user's data and its documents. A str that ends in .txt or .jsonl is a path, any other str is the text itself."""
    if isinstance(data, Path) or (isinstance(data, str) and "\n" not in data and data.endswith((".txt", ".jsonl"))):
        path = Path(data)
        documents = _read(path)
        name = path.name
    elif isinstance(data, str):
        name, documents = "given text", [data]
    else:
        name, documents = "given texts", list(data)
        if not all(isinstance(item, str) for item in documents):
            kinds = sorted({type(item).__name__ for item in documents if not isinstance(item, str)})
            raise refusal(
                DataError, f"a list with {', '.join(kinds)}", "a list of texts holds strings", "pass strings, or ids as one tensor"
            )
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise refusal(DataError, name, "there is no text in it", "pass at least one text that is not empty")
    return name, documents


def _read(path: Path) -> list[str]:
    if path.suffix not in {".txt", ".jsonl"}:
        raise refusal(DataError, str(path), "it is neither .txt nor .jsonl", "pass one of those, or the texts themselves as a list")
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise refusal(DataError, str(path), f"it cannot be read ({error.strerror})", "pass the path of a text file") from error
    except UnicodeDecodeError as error:
        raise refusal(DataError, str(path), f"it is not UTF-8 (byte {error.start})", "convert it to UTF-8") from error
    if path.suffix == ".txt":
        return [content]
    documents = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise refusal(DataError, f"{path}, line {number}", f"it is not JSON ({error.msg})", "write one JSON object a line") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise refusal(DataError, f"{path}, line {number}", "it has no 'text' string", 'write {"text": "..."} on each line')
        documents.append(row["text"])
    return documents
