"""Soft injection where it must work exactly: a planted model whose one head carries the task, and another the question."""

from __future__ import annotations

import math

import pytest
import torch

from headscope.bench.effects_injection import answers
from headscope.interventions import SoftInjection
from headscope.models.planted import Previous, VisionLabel, planted_llama
from headscope.scope import Scope

WORDS = 10
FIRST = 4  # <bos>, <pad>, "Q:", "A:", then questions, then the answers of the left task, then those of the right one
QUESTIONS = [f"q{number}" for number in range(WORDS)]
LEFT = [(word, f"left{number}") for number, word in enumerate(QUESTIONS)]
RIGHT = [(word, f"right{number}") for number, word in enumerate(QUESTIONS)]
QUESTION, TASK = (0, 0), (0, 1)


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    listed = ["<bos>", "<pad>", "Q:", "A:", *QUESTIONS, *(answer for _, answer in LEFT), *(answer for _, answer in RIGHT)]
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(listed)}))
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", pad_token="<pad>", model_max_length=256)


@pytest.fixture(scope="module")
def scope():
    """Head 0.0 reads the question before "A:" and votes for both its answers; 0.1 reads all answers shown and votes for all of their task.
    The two votes meet in one answer. Without examples 0.1 sees the first token, which votes for nothing. 0.2 and 0.3 write nothing."""
    begin = FIRST + WORDS
    planted = planted_llama(
        {QUESTION: Previous(), TASK: VisionLabel(tuple(range(begin, begin + 2 * WORDS)))}, layers=1, n_heads=4, vocab=begin + 2 * WORDS
    )
    torch.testing.assert_close(planted.codes[2:], torch.eye(2 + 3 * WORDS))
    model = planted.model
    with torch.no_grad():
        columns = model.lm_head.weight.abs().sum(0).nonzero()[:, 0]  # where the unembedding looks, one column a token
        width = model.config.head_dim
        for number in range(WORDS):
            left, right = begin - 2 + number, begin - 2 + WORDS + number
            for answer in (left, right):
                model.model.layers[0].self_attn.o_proj.weight[columns[answer], FIRST - 2 + number] = 1.0
            for other in range(WORDS):
                model.model.layers[0].self_attn.o_proj.weight[columns[begin - 2 + other], width + left] = 1.0
                model.model.layers[0].self_attn.o_proj.weight[columns[begin - 2 + WORDS + other], width + right] = 1.0
    return Scope(model, tokenizer(), name="planted task")


def test_the_planted_model_answers_from_examples_and_not_without(scope):
    for pairs in (LEFT, RIGHT):
        right, loss = answers(scope, pairs, pairs, shots=3)
        assert bool(right.all())
        assert float(loss.max()) < 1e-6
        _, loss = answers(scope, pairs)
        torch.testing.assert_close(loss, torch.full((WORDS,), math.log(2), dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("task", "other"), [(LEFT, RIGHT), (RIGHT, LEFT)])
def test_a_planted_task_is_injected_exactly(scope, task, other):
    """Questions that neither means nor gates saw: all right, with the loss of ten examples; the other task's answers are never given."""
    rest, held = task[:7], task[7:]
    edit = SoftInjection.prepared(scope, rest, shots=2, prompts=12, steps=100, every=20, progress=False)
    right, loss = answers(scope, held, edit=edit)
    assert bool(right.all())
    assert float(loss.max()) < 1e-5
    wrong, _ = answers(scope, other, edit=edit)
    assert not bool(wrong.any())
    gates = dict(zip([(0, head) for head in range(4)], edit.gates.tensor.tolist(), strict=True))
    assert gates[TASK] > 0.8, "the head that carries the task is replaced"
    assert gates[QUESTION] < 0.2, "the one that reads the question is let be"
    assert gates[0, 2] == gates[0, 3] == 0.5, "heads that write nothing have no gradient"
    values = edit.values.tensor[1]
    assert float(values[: len(values)].sum()) == pytest.approx(1.0, abs=1e-4), "a mean of codes of answers, and nothing else"
    share = values[FIRST - 2 + WORDS : FIRST - 2 + 3 * WORDS].view(2, WORDS).sum(1)
    assert float(share[0 if task is LEFT else 1]) == pytest.approx(1.0, abs=1e-4)
