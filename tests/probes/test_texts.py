"""The texts that probes read: how random blocks are drawn, where sentences end, what a short or wrong text is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headscope.data import bundled, natural_texts
from headscope.errors import DataError, HeadscopeError, ProbeError
from headscope.probes import Fai, Induction, PreviousToken, ProbeText, Receiver, Streaming
from headscope.probes.repetition import earlier_occurrences, second_block
from headscope.probes.text import (
    TokenPool,
    block_for,
    natural_probe_text,
    repeated_random,
    repeated_token,
    sentence_segments,
    token_pieces,
)
from headscope.topology import AttentionModule, Topology

POOL = TokenPool(np.arange(10, 60), bos=1)


@given(block=st.integers(4, 50), repeats=st.integers(2, 5), seed=st.integers(0, 2**31))
def test_random_blocks(block: int, repeats: int, seed: int) -> None:
    """BOS once, then R equal blocks of K different ordinary tokens."""
    text = repeated_random(POOL, block=block, repeats=repeats, seed=seed)
    ids = text.ids.tolist()
    assert len(ids) == 1 + block * repeats
    assert ids[0] == 1
    first = ids[1 : 1 + block]
    assert ids[1:] == first * repeats
    assert len(set(first)) == block
    assert all(10 <= number < 60 for number in first)
    assert ids == repeated_random(POOL, block=block, repeats=repeats, seed=seed).ids.tolist()


def test_another_seed_gives_another_text_and_another_checksum() -> None:
    first, second = (repeated_random(POOL, block=20, seed=seed) for seed in (0, 1))
    assert first.ids.tolist() != second.ids.tolist()
    assert first.sha256 != second.sha256
    assert first.sha256 == repeated_random(POOL, block=20, seed=0).sha256


def test_without_a_bos_the_text_begins_with_its_first_token() -> None:
    text = repeated_random(TokenPool(np.arange(30), None), block=10, repeats=2)
    assert (text.first, len(text)) == (0, 20)
    assert len(repeated_token(POOL, length=9)) == 9


def test_block_stays_inside_the_context_and_the_vocabulary() -> None:
    assert block_for(2048, 49149) == 409
    assert block_for(640, 49149) == 128
    assert block_for(2048, 90) == 90
    assert 1 + 4 * block_for(2048, 49149) <= 2048


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: repeated_random(POOL, block=51), "50 ordinary ones"),
        (lambda: repeated_random(POOL, block=3), "4 tokens or more"),
        (lambda: repeated_random(POOL, block=10, repeats=1), "2 blocks or more"),
    ],
)
def test_texts_that_cannot_be_made(make, words: str) -> None:
    with pytest.raises(ProbeError, match=words):
        make()


@given(block=st.integers(4, 9), repeats=st.integers(2, 4), bos=st.booleans())
def test_places_of_repetitions(block: int, repeats: int, bos: bool) -> None:
    """Against the definition: all pairs i > j of equal ordinary tokens, with i beyond the first block."""
    text = repeated_random(TokenPool(np.arange(10, 60), 1 if bos else None), block=block, repeats=repeats)
    ids = text.ids.tolist()
    expected = {(i, j) for i in range(text.first + block, len(ids)) for j in range(text.first, i) if ids[i] == ids[j]}
    queries, keys, last = earlier_occurrences(text, 0)
    assert len(queries) == len(expected)
    assert set(zip(queries.tolist(), keys.tolist(), strict=True)) == expected
    assert torch.equal(last, queries - keys == block)
    after, successors, _ = earlier_occurrences(text, 1)
    assert set(zip(after.tolist(), successors.tolist(), strict=True)) == {(i, j + 1) for i, j in expected}
    rows, same = second_block(text, 0)
    assert [ids[i] for i in rows] == [ids[j] for j in same]
    assert rows.tolist() == list(range(text.first + block, text.first + 2 * block))


def test_sentences() -> None:
    text = 'One two. "Three!" Four? five\n\nSix 3.5 seven'
    starts = [0, 3, 7, 8, 10, 15, 16, 17, 22, 23, 28, 30, 33, 35, 36, 37]
    pieces = ["One", " two", ".", ' "', "Three", "!", '"', " Four", "?", " five", "\n\n", "Six", " 3", ".", "5", " seven"]
    assert "".join(pieces) == text
    assert starts == list(np.cumsum([0] + [len(piece) for piece in pieces[:-1]]))
    # The line break ends sentence 2, which it follows, and belongs to it.
    assert sentence_segments(text, starts).tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 4]
    marked = sentence_segments(text, starts, special=[True] + [False] * 15)
    assert marked.tolist()[:3] == [-1, 0, 0]


def causal_topology(causal: bool = True) -> Topology:
    return Topology((AttentionModule("a", 0, "full", 2, 2, 8, causal),), "Tiny")


@pytest.mark.parametrize(
    ("probe", "text", "causal", "words"),
    [
        (Streaming(), ProbeText.natural(torch.arange(68)), True, "it needs 69"),
        (Fai(), ProbeText.natural(torch.arange(40)), True, "it needs 56"),
        (PreviousToken(), ProbeText.natural(torch.arange(1)), True, "it needs 2"),
        (Receiver(), ProbeText.natural(torch.arange(90)), True, "none marked"),
        (Receiver(), ProbeText.natural(torch.arange(90), torch.arange(90) // 12), True, "text of 8 sentences"),
        (Induction(), ProbeText.natural(torch.arange(90)), True, "repeated_random text"),
        (Streaming(), ProbeText.natural(torch.arange(90)), False, "looks both ways"),
    ],
)
def test_a_probe_says_what_its_text_lacks(probe, text: ProbeText, causal: bool, words: str) -> None:
    with pytest.raises(ProbeError, match=words) as caught:
        probe.check(text, causal_topology(causal))
    assert "\n" not in str(caught.value)
    assert probe.name in str(caught.value)


def test_a_text_that_does_not_say_how_it_repeats() -> None:
    with pytest.raises(ProbeError, match="does not say how it repeats"):
        Induction().needs(ProbeText("repeated_random", torch.arange(30)), causal_topology())


# ---- natural text -----------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of words, slow or fast, that may put a special token in front."""

    def __init__(self, bos: bool = False, fast: bool = True) -> None:
        self.is_fast, self.bos, self.words = fast, bos, {}
        self.all_special_ids = [0]

    def __call__(self, text: str, truncation: bool, max_length: int, return_offsets_mapping: bool) -> dict[str, list]:
        import re

        spans = [(match.start(), match.end()) for match in re.finditer(r"\s*\S+", text)]
        ids = [1 + self.words.setdefault(text[a:b], len(self.words)) for a, b in spans]
        if self.bos:
            spans, ids = [(0, 0), *spans], [0, *ids]
        out: dict[str, list] = {"input_ids": ids[:max_length]}
        if return_offsets_mapping:
            out["offset_mapping"] = spans[:max_length]
        return out

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        names = {1 + number: word for word, number in self.words.items()} | ({} if skip_special_tokens else {0: "<s>"})
        return "".join(names.get(number, "") for number in ids)


def test_bundled_essays_are_long_enough_and_deterministic() -> None:
    essays = bundled()
    assert list(essays) == sorted(essays)
    assert len(essays) == 8
    assert sum(len(text.split()) for text in essays.values()) >= 7500
    first, second = (natural_texts(Words(), 500, texts=2) for _ in range(2))
    assert [text.ids.tolist() for text in first] == [text.ids.tolist() for text in second]
    assert first[0].text.startswith(essays["01_tides"][:200])
    assert first[1].text.startswith(essays["02_bread"][:200])
    assert [len(text.ids) for text in first] == [500, 500]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_text_ends_with_its_last_token(bos: bool, fast: bool) -> None:
    tokenizer = Words(bos, fast)
    (text,) = natural_texts(tokenizer, 5, data="One two three. Four five six seven.")
    assert len(text.ids) == 5
    assert text.text == ("One two three. Four" if bos else "One two three. Four five")
    found = natural_probe_text(text, tokenizer)
    assert found.first == int(bos)
    assert found.segments.tolist() == ([-1, 0, 0, 0, 1] if bos else [0, 0, 0, 1, 1])
    assert found.strings == (("<s>",) if bos else ()) + ("One", " two", " three.", " Four", " five")[: 4 if bos else 5]


def test_pieces_without_offsets_join_to_the_text() -> None:
    tokenizer = Words(bos=True, fast=False)
    (text,) = natural_texts(tokenizer, 6, data="One two. Three four five six")
    found = natural_probe_text(text, tokenizer)
    assert found.strings == ("<s>", "One", " two.", " Three", " four", " five")
    assert token_pieces(tokenizer, text.ids.tolist()) == found.strings
    assert found.segments.tolist() == [-1, 0, 0, 1, 1, 1]


def test_windows_of_one_long_text_follow_one_another(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    words = [f"w{number}" for number in range(40)]
    path.write_text("  " + " \n ".join(words))
    for data in (path, str(path)):
        texts = natural_texts(Words(), 12, texts=3, data=data)
        assert [text.text.split() for text in texts] == [words[:12], words[12:24], words[24:36]]
    with pytest.raises(DataError, match="window 3 has 4 tokens"):
        natural_texts(Words(), 12, texts=4, data=path)


def test_documents_that_are_long_enough_are_taken_in_order(tmp_path: Path) -> None:
    documents = ["a b", "c d e f", "", "g h i", "j k l m n"]
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    for data in (path, documents):
        texts = natural_texts(Words(), 3, texts=3, data=data)
        assert [text.text for text in texts] == ["c d e", "g h i", "j k l"]
    with pytest.raises(DataError, match="1 of them have 5 tokens and 2 are needed"):
        natural_texts(Words(), 5, texts=2, data=path)


def test_ids_are_taken_as_they_are() -> None:
    ids = torch.arange(20).reshape(2, 10)
    texts = natural_texts(None, 8, texts=2, data=ids)
    assert [text.ids.tolist() for text in texts] == [list(range(8)), list(range(10, 18))]
    assert natural_probe_text(texts[0], None).segments is None


@pytest.mark.parametrize(
    ("data", "content", "words"),
    [
        ("x.txt", None, "cannot be read"),
        ("x.txt", b"  \n ", "no text in it"),
        ("x.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{nope}', "line 2"),
        ("x.jsonl", b'{"body": "a"}', "no 'text' string"),
        ("x.csv", b"a,b", "neither .txt nor .jsonl"),
        ("x.txt", b"too short", "window 0 has 2 tokens"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, data: str, content: bytes | None, words: str) -> None:
    path = tmp_path / data
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        natural_texts(Words(), 3, data=path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tokens": 0}, "at least 1"),
        ({"tokens": 3, "texts": 9}, "8 different texts"),
        ({"tokens": 10**6}, "bundled essays are"),
        ({"tokens": 3, "data": []}, "no text"),
        ({"tokens": 3, "data": "   "}, "no text"),
        ({"tokens": 3, "data": ["a b c", 4]}, "a list with int"),
        ({"tokens": 3, "data": torch.zeros(5)}, "integers"),
        ({"tokens": 3, "data": torch.zeros(2, dtype=torch.long)}, "1 sequences of 3 tokens"),
    ],
)
def test_data_that_cannot_be_used(arguments: dict, words: str) -> None:
    with pytest.raises(HeadscopeError, match=words):
        natural_texts(Words(), **arguments)
    with pytest.raises(DataError, match="without a tokenizer"):
        natural_texts(None, 3)
