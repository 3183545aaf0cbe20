"""Which names say nothing of what they hold: bare participles, pronouns, determiners, adverbs and other small words.

A name that has a noun beside such a word (`previous_logprobs`, `accepted_rows`) is none of them.
"""

from __future__ import annotations

import re


def _words(*texts: str) -> frozenset[str]:
    return frozenset(word for text in texts for word in text.split())


PRONOUNS = """
    he she it they them we us you who whom what which whose that this these those one ones other others another each
    mine ours yours hers theirs its his her our your their itself themselves anybody anyone anything everybody everyone
    everything nobody nothing somebody someone something whatever whichever whoever
"""
DETERMINERS = """
    all any both either neither none some such same own several few fewer fewest many more most much less least enough
    half whole every
"""
ADVERBS = """
    afterwards again ago alike almost alone already also always anew anyway apart aside away back before beforehand
    below besides beyond early else elsewhere even ever far first forth further hence here how however indeed instead
    just last late later maybe meanwhile merely moreover nearly never next not now nowhere often once only otherwise out
    perhaps quite rather really since so somehow sometimes somewhere soon still then thence there thereby therefore thus
    together too twice up very well when whence whenever where wherever why yet
"""
PREPOSITIONS_AND_CONJUNCTIONS = """
    about above across after against along alongside among around as at because behind beneath beside between but by
    despite down during except for from if in inside into like near of off on onto or outside over per than though
    through throughout till to toward towards under underneath unless until upon via whereas whether while with within
    without
"""
AUXILIARIES = """
    am are be been being can could did do does had has have is may might must shall should was were will would
"""
IRREGULAR_PARTICIPLES = """
    ate became become began begun bent bit bitten blew blown born borne bought bound broke broken brought built burnt
    came caught chose chosen come cut dealt done drank drawn drew driven drove drunk dug eaten fallen fed fell felt flew
    flown forbidden forgot forgotten fought found froze frozen gave given gone got gotten grew grown heard held hid
    hidden hit hung hurt kept knew known laid lain learnt led left lent let lit lost made meant met mistaken outgrown
    overridden overtaken paid proven put ran rang read rewritten ridden risen rode rose run rung said sang sat saw seen
    sent set sewn shaken shone shot shown shrunk shut slept slid sold sought spent spoke spoken spread sprung spun
    stolen stood struck stuck sung sunk swept swollen sworn swum swung taken taught thought threw thrown told took torn
    understood undone unwound upheld withdrawn withheld woken won wore worn wound woven written wrote
"""
VAGUE_NOUNS = "part parts place places thing things stuff"

BARE = _words(
    *(PRONOUNS, DETERMINERS, ADVERBS, PREPOSITIONS_AND_CONJUNCTIONS, AUXILIARIES, IRREGULAR_PARTICIPLES, VAGUE_NOUNS)
)
NOUNS = _words(
    "bed breed deed embed exceed feed hundred indeed need proceed seed shed speed succeed weed",
    "binding docstring embedding encoding ending heading king landing listing logging mapping meaning padding ping",
    "pricing ranking rating reasoning rendering ring routing sampling scaling scheduling scoring setting sharding",
    "sibling spelling spring streaming string tiling timing training tuning typing warning wiring wording",
)
"""Words in -ed and -ing that are nouns, or verbs in their basic form."""
WORDS_OF_THE_FIELD = _words("bound chosen cost cut hit read rejected run set spread thought")
"""Nouns that look like participles: an upper bound, a run, a model's thought; and `chosen` and `rejected`, which are
what the data, the metrics and every other library call the two answers of a pair."""
BASIC_FORMS = _words("become come cut hit hurt let put read run set shut spread")
"""Verbs whose participle is their basic form: as names of functions they say what is done."""


def is_bare(name: str) -> bool:
    """Whether the name of a variable, a parameter or a field says nothing of what it holds."""
    word = name.strip("_").lower()
    if re.fullmatch("[a-z]+", word) is None or word in WORDS_OF_THE_FIELD or word in NOUNS:
        return False
    return word in BARE or (len(word) > 4 and word.endswith(("ed", "ing")))


def is_bare_for_a_function(name: str) -> bool:
    """Whether the name of a function is neither a verb nor a noun."""
    return name.strip("_") not in BASIC_FORMS and is_bare(name)
