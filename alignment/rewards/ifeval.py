"""The rule for checkable instructions, in the form of IFEval (arXiv 2311.07911): the share of them that is followed.

Two columns of a row hold the instructions: `instruction_id_list`, and `kwargs` with one mapping per instruction. 24 of
the 25 kinds are checked as in the strict score of the benchmark, with Python alone. Where the benchmark uses a package,
the rule here is our own and may differ in rare cases: `number_sentences` (a sentence ends with . ! or ? and white
space, but not after an abbreviation), `capital_word_frequency` (words are divided by white space), and the two
`english_…` of `change_case` (nine of ten letters are English). `language:response_language` needs a language detector
and is not supported; such rows are refused, or the instruction is left out with `unsupported: ignore`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from alignment.errors import RewardError
from alignment.rewards import BuildableScorer, Reward
from alignment.rewards.rules import Rule, contains_keyword, kept_column

if TYPE_CHECKING:
    from alignment.groups import Completion, Group

Arguments = Mapping[str, Any]
UNSUPPORTED_KINDS = frozenset({"language:response_language"})
CONSTRAINED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
ENGLISH_SHARE = 0.9
SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]]*+(?=\s|$)")
MAX_WORD_LENGTH = 50
"""Characters before the end of a sentence in which its last word is searched."""
ABBREVIATIONS = frozenset(
    word
    for line in ("mr mrs ms dr prof st sr jr vs etc e.g i.e cf no fig inc ltd co dept approx p.s p.p.s",)
    for word in line.split()
)


class IFEval(Rule):
    """Share of a row's instructions that the text follows, 0 to 1; an empty text follows none."""

    name: Literal["ifeval"] = "ifeval"
    """Checkable instructions, as in IFEval; `data.keep` must name `instruction_id_list` and `kwargs`."""
    unsupported: Literal["fail", "ignore"] = "fail"
    """What to do with `language:response_language`, the one kind that is not supported: stop, or leave it out. A row
    without another instruction stops the run in either case."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that hold the instructions."""
        return ("instruction_id_list", "kwargs")

    def check_row(self, columns: Mapping[str, Any]) -> None:
        """Checks that the instructions of a row can be checked.

        Raises:
            RewardError: one of them cannot, or its arguments are not those that it needs.
        """
        if columns.get("instruction_id_list") is not None:
            self._instructions(columns["instruction_id_list"], columns.get("kwargs"))

    def reward(self, completion: Completion, group: Group) -> Reward:
        """Returns the share of instructions that the text follows, 0 to 1; None if the row has no instructions.

        Raises:
            RewardError: an instruction cannot be checked.
        """
        kinds = kept_column(group, "instruction_id_list")
        if kinds is None:
            return None
        instructions = self._instructions(kinds, kept_column(group, "kwargs"))
        if not completion.text.strip():
            return 0.0
        results = [CHECKS[kind](completion.text, arguments) for kind, arguments in instructions]
        return sum(results) / len(results)

    def _instructions(self, kinds: Any, arguments: Any) -> list[tuple[str, Arguments]]:
        if not (
            isinstance(kinds, list | tuple) and isinstance(arguments, list | tuple) and len(kinds) == len(arguments)
        ):
            raise RewardError("instruction_id_list and kwargs are not lists of equal length")
        for kind in kinds:
            if not isinstance(kind, str) or (
                kind not in CHECKS and not (kind in UNSUPPORTED_KINDS and self.unsupported == "ignore")
            ):
                raise RewardError(f"the instruction {kind!r:.60} cannot be checked here; known are {', '.join(CHECKS)}")
        instructions = [
            (kind, _arguments(kind, kind_arguments))
            for kind, kind_arguments in zip(kinds, arguments, strict=True)
            if kind in CHECKS
        ]
        if not instructions:
            raise RewardError(f"none of its instructions {list(kinds)} can be checked here; leave the row out")
        return instructions


def _arguments(kind: str, arguments: Any) -> Arguments:
    """The arguments of an instruction, without those that are None.

    Raises:
        RewardError: an argument that this kind of instruction needs is missing or wrong.
    """
    if arguments is not None and not isinstance(arguments, Mapping):
        raise RewardError(f"the arguments {arguments!r:.100} of {kind} are no mapping")
    values = {name: value for name, value in (arguments or {}).items() if value is not None}
    for name, need in NEEDS.get(kind, {}).items():
        if not ARGUMENTS[need](values.get(name)):
            raise RewardError(
                f"the arguments {values!r:.100} of {kind} are not those it needs: {name} must be {need}, and is "
                f"{values.get(name)!r:.40}"
            )
    return values


def satisfies_relation(count: int, relation: str, threshold: int) -> bool:
    """True if a count is `less than` or `at least` a threshold; these are the two relations of the benchmark."""
    return {"less than": count < threshold, "at least": count >= threshold}[relation]


def sentences(text: str) -> list[str]:
    """The sentences of a text. A sentence ends with . ! ? or …, perhaps in quotes or brackets, before white space."""
    pieces: list[str] = []
    begin = 0
    for match in SENTENCE_END.finditer(text):
        preceding_words = text[max(begin, match.start() - MAX_WORD_LENGTH) : match.start()].split()
        word = preceding_words[-1].lstrip("(\"'“‘[") if preceding_words else ""
        is_abbreviation = word.lower() in ABBREVIATIONS or re.fullmatch(r"[B-HJ-Z]", word)  # the initial of a name
        if match.group() != "." or not is_abbreviation:
            pieces.append(text[begin : match.end()].strip())
            begin = match.end()
    return [piece for piece in [*pieces, text[begin:].strip()] if piece]


def paragraphs_between_stars(text: str) -> int | None:
    """Number of paragraphs between `***`; None if one of them, except the first and the last, is empty."""
    paragraphs = re.split(r"\s?\*\*\*\s?", text)
    inner = [bool(paragraph.strip()) for paragraph in paragraphs[1:-1]]
    return sum(bool(paragraph.strip()) for paragraph in paragraphs) if all(inner) else None


def _contains(text: str, phrase: str) -> bool:
    return phrase.lower() in text.lower()


def _keyword_frequency(text: str, arguments: Arguments) -> bool:
    count = len(re.findall(re.escape(arguments["keyword"].strip()), text, re.IGNORECASE))
    return satisfies_relation(count, arguments["relation"], arguments["frequency"])


def _letter_frequency(text: str, arguments: Arguments) -> bool:
    return satisfies_relation(
        text.lower().count(arguments["letter"].lower()), arguments["let_relation"], arguments["let_frequency"]
    )


def _number_paragraphs(text: str, arguments: Arguments) -> bool:
    return paragraphs_between_stars(text) == int(arguments["num_paragraphs"])


def _nth_paragraph_first_word(text: str, arguments: Arguments) -> bool:
    paragraphs, number = text.split("\n\n"), int(arguments["nth_paragraph"])
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if number > count or not paragraphs[number - 1].strip():
        return False
    word = paragraphs[number - 1].split()[0].lstrip("'").lstrip('"')
    first_word = re.split(r"[.,?!'\"]", word, maxsplit=1)[0].lower()
    return count == int(arguments["num_paragraphs"]) and first_word == str(arguments["first_word"]).lower()


def _placeholders(text: str, arguments: Arguments) -> bool:
    return sum(map(_brackets, text.split("\n"))) >= int(arguments["num_placeholders"])


def _brackets(line: str) -> int:
    """Number of `[…]` in a line. A regular expression would be slow, because it searches an end after every `[`."""
    count, position = 0, -1
    while (begin := line.find("[", position + 1)) >= 0 and (position := line.find("]", begin)) >= 0:
        count += 1
    return count


def _postscript(text: str, arguments: Arguments) -> bool:
    marker = arguments["postscript_marker"].strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(patterns.get(marker, re.escape(marker.lower())), text.lower()) is not None


def _bullets(text: str, arguments: Arguments) -> bool:
    return len(re.findall(r"^[^\S\n]*+(?:\*[^*\n]|-)", text, re.MULTILINE)) == int(arguments["num_bullets"])


def _highlights(text: str, arguments: Arguments) -> bool:
    single_star_spans = re.findall(r"\*([^\n*]*)\*", text)
    double_star_spans = re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(text_span.strip()) for text_span in single_star_spans + double_star_spans) >= int(
        arguments["num_highlights"]
    )


def _sections(text: str, arguments: Arguments) -> bool:
    splitter = re.escape(arguments["section_spliter"].strip())  # the benchmark's spelling
    return len(re.findall(rf"\s?{splitter}\s?\d+\s?", text)) >= int(arguments["num_sections"])


def _json(text: str, _: Arguments) -> bool:
    match = re.fullmatch(r"(?:```(?:json|Json|JSON)?)?(.*?)(?:```)?", text.strip(), re.DOTALL)
    assert match is not None, "everything in it is optional"
    try:
        json.loads(match.group(1).strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, _: Arguments) -> bool:
    for line in text.split("\n"):
        begin, end = line.find("<<"), line.rfind(">>")
        if 0 <= begin < end - 2 and line[begin : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def _two_responses(text: str, _: Arguments) -> bool:
    sections = [section.strip() for section in text.split("******")]
    if not all(sections[1:-1]):
        return False
    responses = [section for section in sections if section]
    return len(responses) == 2 and responses[0] != responses[1]


def _ends_with(text: str, arguments: Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(str(arguments["end_phrase"]).strip().lower())


def _is_quoted(text: str, _: Arguments) -> bool:
    text = text.strip()
    return len(text) > 1 and text.startswith('"') and text.endswith('"')


def _mostly_english(text: str) -> bool:
    letters = [letter for letter in text if letter.isalpha()]
    return sum(letter.isascii() for letter in letters) >= ENGLISH_SHARE * len(letters)


def _capital_words(text: str, arguments: Arguments) -> bool:
    count = sum(word.isupper() for word in text.split())
    return satisfies_relation(count, arguments["capital_relation"], arguments["capital_frequency"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


WORD, WORDS, NUMBER, RELATION = "a text", "a list of texts", "a number", "'less than' or 'at least'"
ARGUMENTS: dict[str, Callable[[Any], bool]] = {
    WORD: _is_text,
    WORDS: lambda value: isinstance(value, list | tuple) and all(map(_is_text, value)),
    NUMBER: _is_number,
    RELATION: lambda value: value in ("less than", "at least"),
}
"""Kinds of arguments, each with a function that checks a value."""
NEEDS: dict[str, dict[str, str]] = {
    "keywords:existence": {"keywords": WORDS},
    "keywords:frequency": {"keyword": WORD, "relation": RELATION, "frequency": NUMBER},
    "keywords:forbidden_words": {"forbidden_words": WORDS},
    "keywords:letter_frequency": {"letter": WORD, "let_relation": RELATION, "let_frequency": NUMBER},
    "length_constraints:number_sentences": {"relation": RELATION, "num_sentences": NUMBER},
    "length_constraints:number_paragraphs": {"num_paragraphs": NUMBER},
    "length_constraints:number_words": {"relation": RELATION, "num_words": NUMBER},
    "length_constraints:nth_paragraph_first_word": {
        "num_paragraphs": NUMBER,
        "nth_paragraph": NUMBER,
        "first_word": WORD,
    },
    "detectable_content:number_placeholders": {"num_placeholders": NUMBER},
    "detectable_content:postscript": {"postscript_marker": WORD},
    "detectable_format:number_bullet_lists": {"num_bullets": NUMBER},
    "detectable_format:number_highlighted_sections": {"num_highlights": NUMBER},
    "detectable_format:multiple_sections": {"section_spliter": WORD, "num_sections": NUMBER},
    "combination:repeat_prompt": {"prompt_to_repeat": WORD},
    "startend:end_checker": {"end_phrase": WORD},
    "change_case:capital_word_frequency": {"capital_relation": RELATION, "capital_frequency": NUMBER},
}
"""Arguments that each kind of instruction needs; the other kinds need none."""
CHECKS: dict[str, Callable[[str, Arguments], bool]] = {
    "keywords:existence": lambda text, arguments: all(_contains(text, keyword) for keyword in arguments["keywords"]),
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": lambda text, arguments: not contains_keyword(text, arguments["forbidden_words"]),
    "keywords:letter_frequency": _letter_frequency,
    "length_constraints:number_sentences": lambda text, arguments: satisfies_relation(
        len(sentences(text)), arguments["relation"], arguments["num_sentences"]
    ),
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": lambda text, arguments: satisfies_relation(
        len(re.findall(r"\w+", text)), arguments["relation"], arguments["num_words"]
    ),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda text, _: any(answer in text for answer in CONSTRAINED_ANSWERS),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, arguments: (
        text.strip().lower().startswith(arguments["prompt_to_repeat"].strip().lower())
    ),
    "startend:end_checker": _ends_with,
    "startend:quotation": _is_quoted,
    "change_case:english_capital": lambda text, _: text.isupper() and _mostly_english(text),
    "change_case:english_lowercase": lambda text, _: text.islower() and _mostly_english(text),
    "change_case:capital_word_frequency": _capital_words,
    "punctuation:no_comma": lambda text, _: "," not in text,
}


SCORERS: dict[str, type[BuildableScorer]] = {"ifeval": IFEval}
"""The scorers of this module, by the names that configurations have for them."""
