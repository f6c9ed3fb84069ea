"""Needles and trials: the words of every span, decoded, for tokenizers of every sort; where a needle goes; what is refused."""

from __future__ import annotations

import re

import pytest
import torch

import headscope as hs
from headscope.data.needles import NEEDLES, REASONING_NEEDLES, Needle, hide, sentence_ends
from headscope.errors import DataError, ProbeError
from headscope.models.bundled import data_needle
from headscope.probes.key_values import key_value_trials
from headscope.probes.rouge import rouge1_recall, words
from headscope.probes.trials import Trial, context_of, is_synthetic, needle_trials, synthetic_trials, tokenized, trials_of

CORPUS = [needle.sentence + " " + needle.question for needle in (*NEEDLES, *REASONING_NEEDLES)]


def byte_level():
    """Byte-level BPE without any special token: no BOS (GPT-2's kind)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return fast(core)


def sentence_piece():
    """Words begin with "\u2581", and a BOS comes first (Llama's kind)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    letters = sorted({letter for text in (*CORPUS, *hs.data.bundled().values()) for letter in text if letter.strip()})
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>"], initial_alphabet=[*letters, "/", "\n", "\u2581"])
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast(core, bos_token="<s>", unk_token="<unk>")


def word_piece():
    """Lower-cased words in pieces, between [CLS] and [SEP] (BERT's kind)."""
    from tokenizers import BertWordPieceTokenizer

    core = BertWordPieceTokenizer()
    core.train_from_iterator([*CORPUS, "N/A", *hs.data.bundled().values()], vocab_size=1500, min_frequency=1, show_progress=False)
    core.post_processor = None
    from tokenizers.processors import BertProcessing

    core.post_processor = BertProcessing(("[SEP]", core.token_to_id("[SEP]")), ("[CLS]", core.token_to_id("[CLS]")))
    return fast(core._tokenizer, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")


def fast(core, **special):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


class Slow:
    """A tokenizer that cannot say where its tokens stand."""

    is_fast = False
    chat_template = None

    def __init__(self, inner):
        self.inner = inner
        self.all_special_ids = inner.all_special_ids

    def __call__(self, text, add_special_tokens=True, **options):
        return {"input_ids": self.inner(text, add_special_tokens=add_special_tokens)["input_ids"]}

    def decode(self, ids, **options):
        return self.inner.decode(ids, **options)


class Bare:
    """What trials need of a scope."""

    name = "bare"
    max_length = 4096
    vocabulary = None

    def __init__(self, tokenizer):
        self.tokenizer = self.text_tokenizer = tokenizer


def plain(text: str) -> str:
    """Letters and digits only: what all of these tokenizers give back."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


TOKENIZERS = {"byte-level": byte_level, "sentence-piece": sentence_piece, "word-piece": word_piece}


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_spans_hold_their_words_in_every_tokenizer(kind, slow):
    """Decoded, the spans are the answer, the needle and the question; nothing special stands inside the prompt, BOS or none."""
    inner = TOKENIZERS[kind]()
    tokenizer = Slow(inner) if slow else inner
    trials = needle_trials(Bare(tokenizer), lengths=(420, 700), depths=(0.0, 0.5, 1.0), needles=NEEDLES[:3])
    assert len(trials) == 6
    special = set(inner.all_special_ids) - {inner.unk_token_id}
    for number, trial in enumerate(trials):
        needle = NEEDLES[(number + number // 3) % 3]
        for span, text in ((trial.answer, needle.answer), (trial.needle, needle.sentence), (trial.question, needle.question)):
            found = plain(inner.decode(trial.ids[slice(*span)].tolist()))
            assert plain(text) in found
            assert len(found) - len(plain(text)) <= 3, "no more than what shares a token with it"
        assert trial.length - 80 < len(trial.ids) <= trial.length
        inside = [place for place, token in enumerate(trial.ids.tolist()) if token in special]
        assert set(inside) <= {0, len(trial.ids) - 1}, "a BOS in front of the needle would mark it"
        assert trial.null_ids is not None
        assert "na" in plain(inner.decode(trial.null_ids[slice(*trial.null_question)].tolist()))
        assert torch.equal(trial.null_ids[: trial.needle[1]], trial.ids[: trial.needle[1]]), (
            "the null prompt is the same up to its question"
        )


def test_the_needle_goes_between_sentences_of_the_text_itself():
    hay = "One is here. Two is there! Three (really?) is not. Four."
    for depth in (0.0, 0.1, 0.3, 0.5, 0.8, 0.999, 1.0):
        text, start = hide(hay, "NEEDLE NOW.", depth)
        assert text[start : start + 11] == "NEEDLE NOW."
        assert text.replace("NEEDLE NOW.", "").replace("  ", " ").strip() == hay
        before = text[:start].rstrip()
        assert before == "" or before[-1] in ".!)"
    assert [hide(hay, "X.", depth)[1] for depth in (0.0, 1.0)] == [0, len(hay) + 1]
    assert hay[: sentence_ends(hay)[1]] == "One is here. Two is there!"
    with pytest.raises(DataError, match=r"depth=1\.5"):
        hide(hay, "X.", 1.5)


def test_depth_is_where_the_needle_stands(smollm2):
    trials = needle_trials(smollm2, lengths=(900,), depths=(0.0, 0.25, 0.5, 0.75, 1.0))
    at = [trial.needle[0] / len(trial.ids) for trial in trials]
    assert at == sorted(at)
    for share, wanted in zip(at, (0.0, 0.25, 0.5, 0.75, 1.0), strict=True):
        assert abs(share - wanted) < 0.12  # the template in front, a sentence's length, the question behind
    assert len({trial.ids[:60].tolist().__repr__() for trial in trials}) > 1, "haystacks begin with different essays"
    assert smollm2.text_tokenizer.decode(trials[0].ids).count("<|im_start|>user") == 1


def test_no_needle_keeps_one_depth(smollm2):
    trials = needle_trials(smollm2, lengths=(300, 310, 320), depths=(0.0, 0.25, 0.5, 0.75, 1.0), chat=False)
    seen: dict[str, set[float]] = {}
    for trial in trials:
        seen.setdefault(trial.name, set()).add(trial.depth)
    assert {len(depths) for depths in seen.values()} == {3}
    assert len(seen) == 5


def test_a_haystack_that_is_too_short_is_repeated_but_never_the_needle(smollm2):
    trial = needle_trials(smollm2, lengths=(700,), depths=(0.5,), haystack="The sea is wide. The sky is high. The wind is cold.")[0]
    text = smollm2.text_tokenizer.decode(trial.ids)
    assert text.count("The sky is high.") > 20
    assert text.count(NEEDLES[0].sentence) == 1
    assert len(trial.ids) > 650


def test_a_context_that_holds_no_needle_is_refused(smollm2):
    with pytest.raises(ProbeError, match=r"a context of 60 tokens.*takes about \d+"):
        needle_trials(smollm2, lengths=(60,))
    with pytest.raises(ProbeError, match="a context of 50 tokens"):
        key_value_trials(smollm2, length=50)
    with pytest.raises(ProbeError, match="a context of 100 tokens"):
        synthetic_trials(hs.load("bundled:needle"), lengths=(100,))
    with pytest.raises(ProbeError, match="was made for 8192"):
        context_of(smollm2, 9000, 50)
    assert context_of(smollm2, 8192, 50) == 8142
    assert context_of(smollm2, None, 50) == 2048
    with pytest.raises(ProbeError, match="an empty grid"):
        needle_trials(smollm2, lengths=())


def test_what_cannot_be_a_trial_is_refused(smollm2):
    with pytest.raises(DataError, match="stands 0 times"):
        Needle("x", "The cat sat.", "Who?", "the dog")
    with pytest.raises(DataError, match="answer=\\(3, 3\\)"):
        Trial(torch.arange(5), (3, 3), (0, 4), (4, 5))
    with pytest.raises(ProbeError, match="where a needle stands"):
        trials_of(smollm2, torch.arange(5), context=500)
    with pytest.raises(ProbeError, match="no chat template"):
        needle_trials(Bare(byte_level()), lengths=(500,), chat=True)


def test_trials_come_from_needles_texts_or_trials(smollm2):
    own = Needle("own", "The red fox of Ulm sleeps in a drum.", "Where does the red fox of Ulm sleep?", "in a drum")
    one = trials_of(smollm2, own, context=400, lengths=(400,), depths=(0.5,))
    assert [trial.name for trial in one] == ["own"]
    assert smollm2.text_tokenizer.decode(one[0].ids[slice(*one[0].answer)]) == " in a drum"
    assert trials_of(smollm2, one, context=1) == one
    hay = trials_of(smollm2, ["A plain line of text stands here. " * 40], context=300, depths=(0.5,), lengths=(300,), chat=False)
    assert "A plain line of text" in smollm2.text_tokenizer.decode(hay[0].ids)
    assert smollm2.text_tokenizer.decode(hay[0].ids).endswith("\nAnswer:")
    assert [trial.length for trial in trials_of(smollm2, None, context=1600, depths=(0.0,))] == [400, 800, 1200, 1600]


def test_synthetic_trials_are_haystacks_of_the_bundled_model():
    """The prompt, read as text: one needle has the key that is asked for, and its value is the span and what is to follow."""
    scope = hs.load("bundled:needle")
    assert is_synthetic(scope)
    decode = scope.text_tokenizer.decode
    trials = synthetic_trials(scope, lengths=(200, 300), per_length=4, needles=6)
    assert [trial.name for trial in trials] == ["code", "entry"] * 4
    for trial in trials:
        text, question = decode(trial.ids), decode(trial.ids[slice(*trial.question)])
        if trial.name == "code":
            key, again = re.search(r"^question : what is the code of (\w+) \? answer : (\w+) is$", question).groups()
            told = re.findall(rf"the code of {key} is (\w+ \w+ \w+) \.", text)
        else:
            key, again = re.search(r"^question : what is the value of entry (\w+ \w+) \? answer : (\w+ \w+) :$", question).groups()
            told = re.findall(rf"entry {key} : (\d+ \d+) \.", text)
        assert key == again
        assert told == [trial.reference] == [decode(trial.follow)] == [decode(trial.ids[slice(*trial.answer)])]
        assert decode(trial.ids[slice(*trial.needle)]).endswith(trial.reference + " .")
        assert decode(trial.null_ids[slice(*trial.null_question)]).count("<unk>") == 2 * len(key.split())
        assert trial.ids[0] == data_needle.BOS_ID
        assert len(trial.ids) <= trial.length
        assert decode([trial.stop_ids[0]]) == "."
    assert torch.equal(trials[0].ids, synthetic_trials(scope, lengths=(200,), per_length=1, needles=6)[0].ids)
    assert not torch.equal(trials[0].ids[:50], synthetic_trials(scope, lengths=(200,), per_length=1, needles=6, seed=1)[0].ids[:50])


@pytest.mark.parametrize(("size", "shots", "pairs"), [(32, 3, None), (8, 0, 4), (16, 1, 9)])
def test_key_value_samples_ask_for_one_value_of_a_json_object(smollm2, size, shots, pairs):
    """The prompt's object is read with json, and the key that is asked for last gives the reference."""
    import json

    decode = smollm2.text_tokenizer.decode
    trials = key_value_trials(smollm2, length=700, samples=2, shots=shots, key_length=size, pairs=pairs)
    for trial in trials:
        text = decode(trial.ids)
        found = json.loads(text[text.index("{") : text.index("}") + 1])
        asked = re.findall(rf"Key: (\w{{{size}}})\nValue:(.*)", text)
        assert len(asked) == shots + 1
        assert len({key for key, _ in asked}) == shots + 1
        assert all(found[key] == value.strip() for key, value in asked[:-1])
        assert found[asked[-1][0]] == trial.reference
        assert len(found) == pairs if pairs else len(found) >= 6
        assert trial.reference in decode(trial.ids[slice(*trial.answer)])
        assert asked[-1][0] in decode(trial.ids[slice(*trial.needle)])
        assert asked[-1][0] in decode(trial.ids[slice(*trial.question)])
        assert text.endswith("\nValue:")
        assert len(trial.ids) <= 700
        assert 0 <= trial.depth < 1
    assert trials[0].reference != trials[1].reference


def test_rouge_1_recall_counts_words():
    recall = lambda reference, response, **options: rouge1_recall(words(reference, **options), words(response, **options))  # noqa: E731
    assert recall("a green bicycle", "The prize: a GREEN bicycle.") == 1.0
    assert recall("the cat and the dog", "the cat") == pytest.approx(2 / 5)
    assert recall("go go go", "go go") == pytest.approx(2 / 3)
    assert recall("walking dogs", "walked dog") == 1.0
    assert recall("walking dogs", "walked dog", stem=False) == 0.0
    assert recall("", "anything") == 0.0
    assert recall("\u00fcber stra\u00dfe", "\u00dcber die Stra\u00dfe") == 1.0
    assert rouge1_recall([1, 2, 2], [2, 3]) == pytest.approx(1 / 3)


def test_a_range_without_a_token_is_refused():
    with pytest.raises(DataError, match="gave no token"):
        tokenized(word_piece(), "the sea  is wide", [(7, 8)])
