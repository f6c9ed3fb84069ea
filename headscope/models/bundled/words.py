"""The words that the bundled models know, and the word-level tokenizers made of them.

Every token is one lower-case word. A sub-word tokenizer would need thousands of rows in the embedding, most of a small model's size,
and would blur what a head does: here one position is one word, so a heat map of a head can be read like a sentence.
A word that is not in the vocabulary becomes <unk>; nothing is split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)

NAMES = tuple(
    """abel ada adele agnes alan alba alfred alice alma amos anna anton ariel arthur astrid basil beatrice bella benno bert bianca boris
    bruno carla carmen cecil celia chloe clara claude conrad cora cyrus dagmar daisy damian daphne david diana dinah dora edgar
    edith edwin elena elias ella elmer elsa emil emma enzo erica ernest esther ethel eva felix fiona flora frank freda fritz
    george gerda gilda gloria greta gustav hanna harald harriet hector hedwig helen henry herman hilda homer hugo ida igor ines
    ingrid irene iris isaac isidor ivan ivy jacob jana jasper jerome jonas jorge josef judith julia june karl katrin kurt lara
    laura leo leonora lewis lina linus lisa louis lucas lucia lydia mabel magnus malin marcel maria martha martin maud max melvin
    mila milo miriam monica morris nadia nathan nelly nina noah nora norbert odette olaf olga oliver oscar otto paul petra philip
    rachel ralph regina rita robert rosa rufus ruth samuel sara selma simon sofia stella sven sylvia tara thea theo tilda tobias
    ulrich una ursula vera victor viola walter wanda wilma xenia yara yvonne zelda""".split()  # noqa: SIM905 - hundreds of quotes would hide the words
)
NOUNS = tuple(
    """acorn almond amber anchor anvil apple apricot arrow badger bagel banjo barley barrel basket beacon beaver beetle berry birch bison
    blanket blossom bonnet bottle boulder bracelet bramble bridge bronze broom bucket buffalo butter button cabbage cabin cactus
    camel candle canoe canvas canyon carpet carrot castle cedar cello cherry chestnut chimney cider citrus clover cobalt cocoa
    comet copper coral cotton cradle crane crater crayon crimson crow crown crystal curtain cypress desert diamond dolphin donkey
    dragon drum eagle easel ebony elbow elm ember emerald engine falcon feather fern ferry fiddle fig flint flute fossil fountain
    fox galley garlic garnet ginger glacier glove goblet goose granite grape gravel grove hammer harbor harp hawk hazel heather
    hedge helmet heron hickory honey horizon ink iron island ivory jacket jade jasmine jersey jungle kettle kite ladder lagoon
    lantern lapis larch laurel lavender ledger lemon lentil lever lilac lily linen lion lizard locket lotus magnet mango maple
    marble meadow melon mint mirror mitten monsoon moss mountain mustard napkin needle nettle nickel nutmeg oak oasis oats ocean
    olive onion onyx opal orbit orchard orchid otter owl paddle palace panda paper parrot pasta peach pearl pebble pelican pencil
    pepper piano pigeon pillow pine planet plaster plum pocket pollen pony poplar poppy prairie prism pumpkin quail quarry quartz
    quilt rabbit radish raisin raven reed ribbon river robin rocket rope rosemary rubber ruby saddle saffron sailor salmon sandal
    sapphire satin saucer scarf seal sesame shell silver slate snail sparrow spider spinach spoon spruce squirrel stone stork
    sugar sulphur summit sunrise swallow swan tablet teapot temple thistle thunder tiger timber toffee tomato topaz torch trumpet
    tulip tundra turnip turtle umbrella valley vanilla velvet vessel violet violin volcano wagon walnut walrus whistle willow
    window winter wolf yarn zebra zinc zircon""".split()  # noqa: SIM905 - hundreds of quotes would hide the words
)
ADJECTIVES = tuple(
    """ancient bitter blue brave bright broad broken calm clever cold crooked curious dark deep distant dry dusty early empty faint
    fierce flat fragile gentle giant golden gray green heavy hidden hollow hungry humble icy jolly lazy light little lonely long
    loud lucky mellow merry mild narrow noble odd old orange pale patient plain polite proud purple quick quiet rapid rare red
    restless rough round royal rusty secretive shallow sharp short shy silent simple sleepy slow small smooth soft solid sour
    spare steady steep sticky strange strong sweet tall tender thick thin tidy tiny tired vast wild wise wooden yellow young""".split()  # noqa: SIM905 - hundreds of quotes would hide the words
)
VERBS = tuple(
    """admired borrowed bought brought built buried carried carved chased cleaned collected counted covered described drew dropped
    examined fetched finished followed forgot found gathered gave guarded held hid ignored inspected kept kicked lifted liked lost
    made mended missed moved named noticed opened ordered packed painted placed planted polished praised pulled pushed repaired
    saved sketched sold stole studied sent threw touched traded tried turned used visited washed watched weighed wrapped""".split()  # noqa: SIM905 - hundreds of quotes would hide the words
)
PLACES = tuple(
    """archive attic bakery balcony barn bazaar beach cellar chapel cottage courtyard dock farm field forest garden garage gallery gate
    hall hill hospital hotel inn kitchen lake library lighthouse market mill museum office park pier porch school shed shop square
    stable station street theatre tower town tunnel village vineyard warehouse well workshop yard""".split()  # noqa: SIM905 - hundreds of quotes would hide the words
)
TIMES = tuple(
    """today yesterday tomorrow once twice again often rarely later soon slowly quickly quietly carefully gladly suddenly finally
    together alone outside""".split()  # noqa: SIM905 - hundreds of quotes would hide the words
)
NUMBERS = tuple(str(value) for value in range(100))
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def build_tokenizer(words: Sequence[str], *, length: int, extra: Sequence[str] = ()) -> Any:
    """A PreTrainedTokenizerFast with one id per word: the special tokens first, then `extra` special ones, then `words` in order.

    Texts are lower-cased and split on blanks; `<bos>` is put in front. `length` is the longest text the model was made for, in tokens.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    table = [*SPECIAL, *extra, *words]
    vocabulary = {word: number for number, word in enumerate(table)}
    if len(vocabulary) != len(table):
        twice = sorted({word for word in table if table.count(word) > 1})
        raise ValueError(f"these words are listed twice: {', '.join(twice)}")
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    # Punctuation glued to a word is set apart, so that "river." reads as two words.
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")])
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])])
    options = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNK}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=length, clean_up_tokenization_spaces=False, additional_special_tokens=list(extra), **options
    )


def save_tokenizer(tokenizer: Any, out: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, under the class name that every transformers release knows."""
    import json

    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
