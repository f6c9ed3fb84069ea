"""Small tasks that a language model can pick up from examples: pairs of words, written by us.

Enough of each for examples, a training, a validation and a test part that share no pair.
"""

from __future__ import annotations

import random

from headscope.models.bundled.words import NOUNS

OPPOSITES = (
    "hot:cold big:small tall:short fast:slow early:late open:closed full:empty hard:soft heavy:light high:low long:short new:old "
    "rich:poor strong:weak sweet:bitter thick:thin wet:dry young:old clean:dirty deep:shallow loud:quiet narrow:wide right:wrong "
    "rough:smooth sharp:dull simple:complex tight:loose true:false up:down inside:outside above:below before:after begin:end "
    "buy:sell come:go day:night first:last give:take happy:sad laugh:cry left:right love:hate near:far north:south east:west "
    "push:pull remember:forget start:stop summer:winter win:lose black:white boy:girl brother:sister king:queen man:woman day:night "
    "dead:alive dark:light easy:difficult good:bad safe:dangerous same:different public:private positive:negative"
)
CAPITALS = (
    "France:Paris Italy:Rome Spain:Madrid Germany:Berlin England:London Japan:Tokyo China:Beijing Russia:Moscow Greece:Athens "
    "Egypt:Cairo Portugal:Lisbon Austria:Vienna Poland:Warsaw Norway:Oslo Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen "
    "Ireland:Dublin Belgium:Brussels Hungary:Budapest Canada:Ottawa Cuba:Havana Peru:Lima Chile:Santiago Kenya:Nairobi Iran:Tehran "
    "Iraq:Baghdad Turkey:Ankara Thailand:Bangkok Vietnam:Hanoi Syria:Damascus Lebanon:Beirut Australia:Canberra Scotland:Edinburgh "
    "Wales:Cardiff Ukraine:Kyiv Romania:Bucharest Bulgaria:Sofia Serbia:Belgrade Croatia:Zagreb Latvia:Riga Lithuania:Vilnius "
    "Estonia:Tallinn Indonesia:Jakarta Nepal:Kathmandu Ethiopia:Addis Afghanistan:Kabul Venezuela:Caracas Libya:Tripoli "
    "Morocco:Rabat"
)
PAST = (
    "go:went see:saw take:took make:made come:came give:gave find:found know:knew think:thought tell:told become:became leave:left "
    "feel:felt bring:brought begin:began keep:kept hold:held write:wrote stand:stood hear:heard mean:meant meet:met run:ran pay:paid "
    "sit:sat speak:spoke lie:lay lead:led grow:grew lose:lost fall:fell send:sent build:built draw:drew break:broke spend:spent "
    "rise:rose drive:drove buy:bought wear:wore choose:chose eat:ate win:won teach:taught catch:caught fight:fought sell:sold "
    "fly:flew sing:sang drink:drank sleep:slept"
)
PLURALS = (
    "cat:cats dog:dogs house:houses tree:trees river:rivers stone:stones bird:birds flower:flowers child:children man:men "
    "woman:women foot:feet tooth:teeth mouse:mice goose:geese city:cities story:stories baby:babies box:boxes bus:buses leaf:leaves "
    "knife:knives wolf:wolves life:lives potato:potatoes hero:heroes book:books table:tables chair:chairs window:windows door:doors "
    "road:roads bridge:bridges ship:ships train:trains letter:letters word:words number:numbers day:days night:nights week:weeks "
    "month:months year:years hand:hands eye:eyes ear:ears finger:fingers friend:friends teacher:teachers student:students"
)


def _read(text: str) -> tuple[tuple[str, str], ...]:
    pairs = dict.fromkeys(text.split())
    return tuple((question, answer) for question, _, answer in (pair.partition(":") for pair in pairs))


def _of_three(place: int) -> tuple[tuple[str, str], ...]:
    """Three nouns, and one of them by its place; no two questions are alike."""
    draw = random.Random(place)
    listed = (draw.sample(NOUNS, 3) for _ in range(len(NOUNS)))
    return tuple(dict.fromkeys((", ".join(three), three[place]) for three in listed))


ICL_TASKS: dict[str, tuple[tuple[str, str], ...]] = {
    "opposites": _read(OPPOSITES),
    "capitals": _read(CAPITALS),
    "past": _read(PAST),
    "plurals": _read(PLURALS),
    "capitalize": tuple((noun, noun.capitalize()) for noun in NOUNS),
    "first_letter": tuple((noun, noun[0]) for noun in NOUNS),
    "first_of_three": _of_three(0),
    "last_of_three": _of_three(2),
}

__all__ = ["ICL_TASKS"]
