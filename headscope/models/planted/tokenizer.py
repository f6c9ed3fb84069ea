"""Words for a planted model's ids, so that it runs through everything that reads text: profiles, run directories, the dashboard.

Token i is the word "ti"; words stand between spaces, and BOS comes first by itself. There is no unknown token on purpose: a word outside
the vocabulary would become some id that heads treat as content, and the closed forms would silently be those of another text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headscope.models.planted.layout import BOS, PAD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS_WORD, PAD_WORD = "<bos>", "<pad>"


def word_tokenizer(vocab: int, max_positions: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab` words: "<bos>", "<pad>", "t2", "t3", ...; encoding a word it does not have raises an error."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = {BOS_WORD: BOS, PAD_WORD: PAD} | {f"t{number}": number for number in range(PAD + 1, vocab)}
    tokenizer = Tokenizer(WordLevel(words))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS_WORD} $A", special_tokens=[(BOS_WORD, BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS_WORD, pad_token=PAD_WORD, model_max_length=max_positions)
