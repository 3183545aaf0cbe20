"""Rules give the rewards that a person would work out by hand, on made-up texts and on real rows."""

from __future__ import annotations

import random
import re
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.data.shapes import to_group
from alignment.data.sources import read_rows
from alignment.errors import RewardError
from alignment.groups import Completion, Group
from alignment.rewards import BuildableScorer, Rewards
from alignment.rewards.ifeval import CHECKS, UNSUPPORTED_KINDS, sentences
from alignment.rewards.numbers import number_in
from alignment.rewards.rules import contains_keyword, overlong_penalty, repeated_share
from alignment.rewards.sentiment import NEGATIVE, POSITIVE
from alignment.settings.data import SourceConfig
from alignment.settings.plugins import scorer_class
from tests.conftest import read_data


def reward(text: str, columns: dict[str, Any] | None = None, tokens: tuple[int, ...] = (), **settings: Any) -> float:
    """What one rule gives one completion, through the whole way from its settings."""
    rewards = Rewards((scorer_class(settings["name"]).model_validate(settings),), torch.device("cpu"))
    group = Group(id="rows:7", prompt="p", completions=(Completion(text=text, tokens=tokens),), columns=columns or {})
    ((completion,),) = (each.completions for each in rewards.score([group]))
    assert completion.reward is not None
    return completion.reward


def rule(name: str, **settings: Any) -> BuildableScorer:
    """A rule by itself."""
    return scorer_class(name).model_validate({"name": name, **settings})


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("I am sorry.", {"pattern": "sorry"}, 1),
        ("I am sorry.", {"pattern": "sorry", "forbid": True}, 0),
        ("Fine.", {"pattern": "sorry", "forbid": True}, 1),
        ("I am sorry.", {"pattern": "sorry", "match": "full"}, 0),
        ("SORRY", {"pattern": "(?i)sorry", "match": "full"}, 1),
        ("<think>a\nb</think>c", {"pattern": "(?s)<think>.*</think>.+", "match": "full"}, 1),
    ],
)
def test_a_pattern_is_searched_or_matched_or_forbidden(text: str, settings: Any, expected: float) -> None:
    assert reward(text, name="regex", **settings) == expected


@pytest.mark.parametrize(
    ("words", "settings", "expected"),
    [
        (10, {"target": 10}, 1),
        (15, {"target": 10}, 0.5),
        (5, {"target": 10}, 0.5),
        (30, {"target": 10}, 0),
        (13, {"target": 10, "tolerance": 3}, 1),
        (14, {"target": 10, "tolerance": 3}, 0.9),
        (15, {"target": 10, "shape": "quadratic"}, 0.75),
        (11, {"target": 10, "shape": "step"}, 0),
        (10, {"target": 10, "shape": "step"}, 1),
        (10, {"max_length": 10}, 0),
        (11, {"max_length": 10}, -1),
        (6, {"max_length": 10, "buffer": 4}, 0),
        (7, {"max_length": 10, "buffer": 4}, -0.25),
        (10, {"max_length": 10, "buffer": 4}, -1),
        (99, {"max_length": 10, "buffer": 4}, -1),
        (10, {"target": 8, "max_length": 12, "buffer": 4}, 0.75 - 0.5),
    ],
)
def test_length_is_judged_by_target_and_by_limit(words: int, settings: Any, expected: float) -> None:
    assert reward("word " * words, name="length", **settings) == pytest.approx(expected)


def test_length_counts_tokens_words_or_characters() -> None:
    for unit, length in (("tokens", 5), ("words", 2), ("characters", 9)):
        assert reward("good  day", tokens=(1, 2, 3, 4, 5), name="length", unit=unit, target=length, shape="step") == 1
    with pytest.raises(RewardError, match="group rows:7: a length in tokens needs completions with tokens"):
        reward("good day", name="length", unit="tokens", target=2)


def test_the_overlong_penalty_never_rises_with_length() -> None:
    penalties = [overlong_penalty(length, max_length=50, buffer=20) for length in range(80)]
    assert penalties == sorted(penalties, reverse=True)
    assert penalties[:31] == [0] * 31 and penalties[50:] == [-1] * 30


@pytest.mark.parametrize(
    ("need", "text", "expected"),
    [
        ("any", "It is PARIS.", 1),
        ("any", "Comparisons", 0),
        ("all", "Paris and Lyon", 0),
        ("all", "Paris, Lyon, Nice", 1),
        ("share", "Paris, Nice", 2 / 3),
    ],
)
def test_keywords_count_as_whole_words(need: str, text: str, expected: float) -> None:
    columns = {"keywords": ["Paris", "lyon", "Nice"]}
    assert reward(text, columns, name="keywords", need=need) == pytest.approx(expected)


def test_a_single_keyword_and_another_column_are_read_too() -> None:
    assert reward("C++ is one", {"word": "C++"}, name="keywords", column="word") == 1


@pytest.mark.parametrize("value", [[], [1], 3, {}, "", [" "]])
def test_keywords_that_are_no_words_are_an_error(value: Any) -> None:
    with pytest.raises(RewardError, match="scorer keywords: group rows:7: column 'keywords' holds"):
        reward("x", {"keywords": value}, name="keywords")
    with pytest.raises(RewardError, match="column 'keywords' holds"):
        rule("keywords").check_row({"keywords": value})


@pytest.mark.parametrize("name", ["keywords", "exact_number", "ifeval"])
def test_a_rule_without_its_column_says_what_to_keep(name: str) -> None:
    with pytest.raises(RewardError, match=r"group rows:7, completion 1 of 1: .*the row has no column .* data\.keep"):
        reward("x", {"other": 1}, name=name)


@pytest.mark.parametrize("name", ["keywords", "exact_number", "ifeval"])
def test_a_rule_abstains_where_the_row_has_no_column_for_it(name: str) -> None:
    settings = [{"name": name}, {"name": "length", "target": 1}]
    rewards = Rewards([scorer_class(each["name"]).model_validate(each) for each in settings], torch.device("cpu"))
    for columns in ({"other": 1}, dict.fromkeys(rule(name).columns)):
        rule(name).check_row(columns)
        group = Group(id="rows:7", prompt="p", completions=(Completion(text="x"),), columns=columns)
        ((completion,),) = (each.completions for each in rewards.score([group]))
        assert completion.reward == 1 and completion.scores == {"length": 1}


def test_the_demos_answers_are_rewarded_by_their_own_keywords() -> None:
    path = Path(__file__).parents[2] / "configs" / "data" / "short_answers.eval.jsonl"
    source = SourceConfig(path=str(path), keep=("keywords",))
    groups = [to_group(row, origin, source) for origin, row in read_rows(source) if isinstance(row, dict)]
    rated = Rewards((scorer_class("keywords").model_validate({"name": "keywords"}),), torch.device("cpu")).score(groups)
    assert len(rated) > 50
    assert all(group.completions[0].reward == 1 for group in rated)


def test_repetition_is_the_share_of_ngrams_seen_before() -> None:
    assert reward("a b c d e f", name="repetition") == 0
    assert reward("", name="repetition") == 0
    assert reward("a b", name="repetition") == 0
    assert reward("so so so so so", name="repetition") == pytest.approx(-2 / 3)
    assert reward("The cat. the CAT.", name="repetition", n=2) == pytest.approx(-1 / 3)
    assert reward("ab", tokens=(1, 1, 1), name="repetition", unit="tokens", n=1) == pytest.approx(-2 / 3)


def test_repetition_agrees_with_counting_every_pair() -> None:
    chance = random.Random(0)
    for _ in range(200):
        parts = [chance.randrange(3) for _ in range(chance.randrange(12))]
        n = chance.randrange(1, 4)
        ngrams = [parts[i : i + n] for i in range(len(parts) - n + 1)]
        repeated = sum(any(ngrams[j] == ngram for j in range(i)) for i, ngram in enumerate(ngrams))
        assert repeated_share(parts, n=n) == pytest.approx(repeated / len(ngrams) if ngrams else 0)


@pytest.mark.parametrize(
    ("text", "balance"),
    [
        ("What a lovely, wonderful day!", 2),
        ("This is terrible.", -1),
        ("not good", -1),
        ("It isn't bad", 1),
        ("It isn’t bad", 1),
        ("No. After three more words good comes.", 1),
        ("a table", 0),
        ("", 0),
        ("goodness badly", 0),
    ],
)
def test_a_friendly_tone_is_the_balance_of_words(text: str, balance: int) -> None:
    assert reward(text, name="sentiment") == pytest.approx(balance / (balance**2 + 15) ** 0.5)
    assert reward(text, name="sentiment", softness=1) == pytest.approx(balance / (balance**2 + 1) ** 0.5)


def test_the_word_lists_are_long_enough_and_do_not_overlap() -> None:
    assert len(POSITIVE) >= 60 and len(NEGATIVE) >= 60
    assert not POSITIVE & NEGATIVE
    assert all(re.fullmatch("[a-z]+", word) for word in POSITIVE | NEGATIVE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 42.", "42"),
        ("48/2 = 24 clips, so 48 + 24 = 72", "72"),
        ("from 10-5 we get", "5"),
        ("x = -5", "-5"),
        ("−4", "-4"),
        ("(-3)", "-3"),
        ("- 5 apples", "5"),
        ("- -5 apples", "-5"),
        ("between 3–5", "5"),
        ("1,234,567.50", "1234567.5"),
        ("$1,500", "1500"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("\\$18", "18"),
        ("€ 7", "7"),
        ("1, 2, 3", "3"),
        (".5", "1/2"),
        ("It costs 100,000.", "100000"),
        ("3/4", "3/4"),
        ("1 1/2 cups", "3/2"),
        ("\\frac{3}{4}", "3/4"),
        ("-\\dfrac{3}{4}", "-3/4"),
        ("1\\frac{1}{2}", "3/2"),
        ("1{,}000", "1000"),
        ("1\\,000", "1000"),
        ("1e3", "1000"),
        ("2.5e-3", "1/400"),
        ("**42**", "42"),
        ("5kg of H2O", "5"),
        ("#### 72 clips in 2 months", "72"),
        ("#### 7\n#### 8", "8"),
        ("first 5. \\boxed{6} and then 7", "6"),
        ("\\boxed{\\frac{3}{4}}", "3/4"),
        ("\\boxed{12 \\text{ m}^2}", "12"),
        ("\\boxed{f(2) = 7}", "7"),
        ("\\boxed{5", "5"),
        ("\\boxed{1} #### 2", "2"),
        ("#### Answer\nit is 9", "9"),
        ("", None),
        ("none", None),
        ("1/0", None),
        ("9" * 51, None),
        ("9" * 5000, None),
        ("\\boxed{none} 3", None),
    ],
)
def test_the_number_of_a_text_is_read_as_people_write_it(text: str, expected: str | None) -> None:
    assert number_in(text) == (frozenset() if expected is None else {Fraction(expected)})


def test_a_huge_exponent_costs_nothing_and_is_not_followed() -> None:
    for text in ("1e999999999", "1e400", "It is 12e345.", "-1.5E+400", "1e-400", "0x1F4", "0b101"):
        assert number_in(text) == frozenset(), text
    assert [reward(text, {"answer": "1e400"}, name="exact_number") for text in ("1", "so 1e400", "1e401")] == [0, 1, 0]


@pytest.mark.parametrize(
    ("text", "answer", "settings", "expected"),
    [
        ("It is 20%", "20", {}, 1),
        ("It is 20 %", 0.2, {}, 1),
        ("0.2", "20%", {}, 1),
        ("0.5", "1/2", {}, 1),
        ("0.333", "1/3", {}, 0),
        ("0.333", "1/3", {"tolerance": 0.01}, 1),
        ("-5", "5", {}, 0),
        ("1,000.00", 1000, {}, 1),
        ("I cannot say", "5", {}, 0),
        ("so 5", "5", {"marked": True}, 0),
        ("so #### 5", "5", {"marked": True}, 1),
        ("5", "a long solution with 7\n#### 5", {}, 1),
    ],
)
def test_numbers_are_compared_by_value(text: str, answer: Any, settings: Any, expected: float) -> None:
    assert reward(text, {"answer": answer}, name="exact_number", **settings) == expected


NO_ANSWERS = ["none", True, [], ["12", "13"], {"ground_truth": "5"}, "1/0", float("nan"), float("-inf"), 10**5000]


@pytest.mark.parametrize(
    "answer", [*NO_ANSWERS, Decimal("Infinity"), "NaN", "inf"], ids=lambda value: type(value).__name__
)
def test_an_answer_column_without_a_number_is_an_error(answer: Any) -> None:
    with pytest.raises(RewardError, match="scorer exact_number: group rows:7: column 'answer' holds no number"):
        reward("5", {"answer": answer}, name="exact_number")
    with pytest.raises(RewardError, match="column 'answer' holds no number"):
        rule("exact_number").check_row({"answer": answer})


@pytest.mark.parametrize("answer", [5, 5.0, "5", Decimal("5.0"), Fraction(5)])
def test_an_answer_column_may_hold_a_number_of_any_kind(answer: Any) -> None:
    assert reward("5", {"nested.answer": answer}, name="exact_number", column="nested.answer") == 1
    rule("exact_number").check_row({"answer": answer})


def test_every_solution_of_gsm8k_is_right_and_a_changed_one_is_wrong() -> None:
    rows = read_data("gsm8k")
    assert len(rows) == 40
    for row in rows:
        written = row["answer"].rpartition("####")[2].strip()
        value = Fraction(written.replace(",", ""))
        assert number_in(row["answer"]) == {value}, written
        assert number_in(f"Let me think. 7 of 3.\nThe answer is ${written}.") == {value}, written
        assert number_in(f"so \\boxed{{{written}}}, as 1 = 1") == {value}, written
    right = {"answer": rows[0]["answer"]}
    assert reward(rows[0]["answer"], right, name="exact_number") == 1
    assert reward(rows[1]["answer"], right, name="exact_number") == 0


def followed(kind: str, text: str, **arguments: Any) -> bool:
    share = reward(text, {"instruction_id_list": [kind], "kwargs": [arguments]}, name="ifeval")
    assert share in (0, 1)
    return bool(share)


@pytest.mark.parametrize(
    ("kind", "arguments", "right", "wrong"),
    [
        ("keywords:existence", {"keywords": ["Mom", "a+b"]}, ["my moms: a+b"], ["mom", "aab mom", ""]),
        ("keywords:frequency", {"relation": "at least", "keyword": "war", "frequency": 2}, ["War, warfare"], ["war"]),
        ("keywords:frequency", {"relation": "less than", "keyword": "war", "frequency": 2}, ["war"], ["War, warfare"]),
        ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, ["rocks"], ["Rock!"]),
        ("keywords:letter_frequency", {"let_relation": "less than", "letter": "t", "let_frequency": 2}, ["To"], ["tT"]),
        ("keywords:letter_frequency", {"let_relation": "at least", "letter": "!", "let_frequency": 2}, ["!!"], ["!"]),
        (
            "length_constraints:number_sentences",
            {"relation": "less than", "num_sentences": 3},
            ["Mr. Lee paid 3.50 today. Good!", "one", "Is it? Yes..."],
            ["A b. C d. E f."],
        ),
        ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, ["don't go"], ["two words"]),
        (
            "length_constraints:number_paragraphs",
            {"num_paragraphs": 2},
            ["a\n***\nb", "***\na\n***\nb"],
            ["a", "a***b***c", "a***\n***b"],
        ),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Week"},
            ['one\n\n"Week\'s" end', "one\n\nweek, two"],
            ["one\n\nweekend", "week\n\none", "a\n\nweek\n\nc", "week"],
        ),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b c]"], ["[a]", "[a\nb] [c]"]),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye\nP. S. one"], ["Bye", "PS one"]),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["Bye P.P.S. two"], ["Bye P.S. one"]),
        (
            "detectable_format:number_bullet_lists",
            {"num_bullets": 2},
            ["* a\n- b"],
            ["* a", "* a\n* b\n* c", "**a**\n**b**"],
        ),
        ("detectable_format:constrained_response", {}, ["My answer is no."], ["No.", "my answer is no."]),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* and **b**"], ["*a*", "* * *b*"]),
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "SECTION", "num_sections": 2},
            ["SECTION 1 a SECTION 2 b"],
            ["SECTION 1 a", "Section 1 Section 2"],
        ),
        (
            "detectable_format:json_format",
            {},
            ['{"a": [1]}', '```json\n{"a": 1}\n```', "```\n[]\n```"],
            ["{a: 1}", "Here: {}", "[" * 100_000],
        ),
        ("detectable_format:title", {}, ["<<poem of joy>>\nx"], ["<poem>", "<< >>", "<<a\nb>>"]),
        (
            "combination:two_responses",
            {},
            ["a\n******\nb", "******\na\n******\nb"],
            ["a", "a******a", "a******b******c", "a************b"],
        ),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say it. "}, ["say it. Now."], ["Now: say it."]),
        ("startend:end_checker", {"end_phrase": "Any help?"}, ['Yes. any HELP?"', "Any help? \n"], ["Any help? Yes"]),
        ("startend:quotation", {}, ['"a"', ' "a" \n'], ['"', '"a', "a"]),
        ("change_case:english_capital", {}, ["HELLO, 3!"], ["HELLO a", "3", "ПРИВЕТ"]),
        ("change_case:english_lowercase", {}, ["hello, 3!"], ["Hello", "3", "привет"]),
        (
            "change_case:capital_word_frequency",
            {"capital_relation": "at least", "capital_frequency": 2},
            ["I said NO!"],
            ["Yes, I do"],
        ),
        ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
    ],
)
def test_an_instruction_is_followed_or_not(kind: str, arguments: Any, right: list[str], wrong: list[str]) -> None:
    for text in right:
        assert followed(kind, text, **arguments), text
    for text in wrong:
        assert not followed(kind, text, **arguments), text


def test_the_reward_is_the_share_of_instructions_that_are_followed() -> None:
    columns = {
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation", "detectable_format:title"],
        "kwargs": [{}, {"num_words": None}, None],
    }
    assert reward('"a"', columns, name="ifeval") == pytest.approx(2 / 3)
    assert reward("  ", columns, name="ifeval") == 0


def test_the_kind_that_cannot_be_checked_is_refused_or_left_out() -> None:
    columns = {"instruction_id_list": ["language:response_language", "punctuation:no_comma"], "kwargs": [{}, {}]}
    with pytest.raises(RewardError, match="'language:response_language' cannot be checked here"):
        reward("a", columns, name="ifeval")
    assert reward("a", columns, name="ifeval", unsupported="ignore") == 1
    columns = {"instruction_id_list": ["language:response_language"], "kwargs": [{}]}
    with pytest.raises(RewardError, match="leave the row out"):
        reward("a", columns, name="ifeval", unsupported="ignore")


@pytest.mark.parametrize(
    ("kinds", "arguments", "problem"),
    [
        (["no:such"], [{}], "the instruction 'no:such' cannot be checked here"),
        ("punctuation:no_comma", [{}], "are not lists of equal length"),
        (["punctuation:no_comma"], [], "are not lists of equal length"),
        (["keywords:existence"], [{"keywords": None}], "the arguments .* of keywords:existence are not those it needs"),
        (["keywords:frequency"], [{"keyword": "a", "relation": "about", "frequency": 1}], "are not those it needs"),
        (["keywords:frequency"], [{"keyword": "a", "relation": "at most", "frequency": 1}], "and is 'at most'"),
        (["keywords:frequency"], [{"keyword": "a", "relation": ["at least"], "frequency": 1}], "relation must be"),
        (["keywords:frequency"], [{"keyword": "a", "relation": "at least"}], "frequency must be a number, and is None"),
        (["keywords:existence"], [{"keywords": ["a", 3]}], "keywords must be a list of texts"),
        (["length_constraints:number_words"], [{"relation": "at least", "num_words": "3"}], "must be a number"),
        (["length_constraints:number_words"], [{"relation": "at least", "num_words": float("nan")}], "must be a num"),
        (["length_constraints:nth_paragraph_first_word"], [{"num_paragraphs": 9, "nth_paragraph": 9}], "first_word"),
        (["punctuation:no_comma"], ["none"], "are no mapping"),
        ([["punctuation:no_comma"]], [{}], "cannot be checked here"),
        (["keywords:frequency"], [{"keyword": 3, "relation": "at least", "frequency": 1}], "are not those it needs"),
    ],
)
def test_a_row_with_wrong_instructions_is_an_error(kinds: Any, arguments: Any, problem: str) -> None:
    columns = {"instruction_id_list": kinds, "kwargs": arguments}
    with pytest.raises(RewardError, match=problem):
        reward("a", columns, name="ifeval")
    with pytest.raises(RewardError, match=problem):
        rule("ifeval").check_row(columns)


def test_every_row_of_ifeval_is_judged_except_those_of_the_one_unknown_kind() -> None:
    rows = read_data("ifeval")
    kinds = {kind for row in rows for kind in row["instruction_id_list"]}
    assert len(kinds) == 25
    assert kinds - CHECKS.keys() == UNSUPPORTED_KINDS
    assert CHECKS.keys() <= kinds
    judged = [row for row in rows if not UNSUPPORTED_KINDS & set(row["instruction_id_list"])]
    assert len(judged) == 70
    for row in judged:
        rule("ifeval").check_row(row)
    shares = [reward(row["prompt"], row, name="ifeval") for row in judged]
    assert all(0 <= share <= 1 for share in shares)
    repeats = [row for row in judged if row["instruction_id_list"] == ["combination:repeat_prompt"]]
    assert repeats
    for row in repeats:
        assert reward(row["kwargs"][0]["prompt_to_repeat"] + " Done.", row, name="ifeval") == 1


def test_a_hand_written_answer_to_a_real_row_follows_all_of_it() -> None:
    row = {
        "instruction_id_list": [
            "punctuation:no_comma",
            "detectable_format:number_highlighted_sections",
            "length_constraints:number_words",
        ],
        "kwargs": [{}, {"num_highlights": 3}, {"relation": "at least", "num_words": 300}],
    }
    real = next(each for each in read_data("ifeval") if each["instruction_id_list"] == row["instruction_id_list"])
    assert [{k: v for k, v in each.items() if v is not None} for each in real["kwargs"]] == row["kwargs"]
    text = "*one* **two** *three* " + "word " * 300
    assert reward(text, real, name="ifeval") == 1
    assert reward(text[:-1] + ", x", real, name="ifeval") == pytest.approx(2 / 3)
    assert reward("*one* *two* none", real, name="ifeval") == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("One", 1),
        ("One. Two! Three? Four…", 4),
        ('He said "no." Then he left.', 2),
        ("Dr. Who costs 3.50 e.g. at J. Smith's.", 1),
        ("It is I. Yes.", 2),
        ("Wait... what?!", 2),
        ("See raylign.org today", 1),
    ],
)
def test_sentences_end_where_a_reader_pauses(text: str, count: int) -> None:
    assert len(sentences(text)) == count


HOSTILE = [
    "[",
    "[\n",
    "<<",
    "<",
    "<<>",
    "\n",
    " \n",
    "* ",
    "*",
    "**a",
    "***",
    "...",
    "e.g. ",
    ".'",
    "a.",
    "{",
    "[[",
    "```",
    "p. ",
]


def test_no_text_makes_an_instruction_take_long() -> None:
    instructions = {
        "keywords:frequency": {"keyword": "aa", "relation": "at least", "frequency": 1},
        "length_constraints:number_sentences": {"relation": "at least", "num_sentences": 3},
        "length_constraints:number_paragraphs": {"num_paragraphs": 3},
        "detectable_content:number_placeholders": {"num_placeholders": 3},
        "detectable_content:postscript": {"postscript_marker": "P.P.S"},
        "detectable_format:number_bullet_lists": {"num_bullets": 3},
        "detectable_format:number_highlighted_sections": {"num_highlights": 3},
        "detectable_format:multiple_sections": {"section_spliter": "S", "num_sections": 3},
        "detectable_format:json_format": {},
        "detectable_format:title": {},
    }
    for piece in HOSTILE:
        text = (piece * 64_000)[:64_000] + "x"
        for kind, arguments in instructions.items():
            started = time.perf_counter()
            followed(kind, text, **arguments)
            assert time.perf_counter() - started < 1, (kind, piece)
        for name in ("sentiment", "repetition"):
            started = time.perf_counter()
            reward(text, name=name)
            assert time.perf_counter() - started < 1, (name, piece)


def test_placeholders_bullets_and_titles_are_counted_as_the_benchmarks_patterns_count_them() -> None:
    chance = random.Random(0)
    for _ in range(3000):
        text = "".join(chance.choice("[]<>*-. \na") for _ in range(chance.randrange(20)))
        if not text.strip():
            continue
        placeholders = len(re.findall(r"\[[^\n\]]*\]", text))
        bullets = len(re.findall(r"^\s*(?:\*[^*\n]|-)", text, re.MULTILINE))
        titles = re.findall(r"<<[^\n]+>>", text)
        assert followed("detectable_content:number_placeholders", text, num_placeholders=placeholders)
        assert not followed("detectable_content:number_placeholders", text, num_placeholders=placeholders + 1)
        assert followed("detectable_format:number_bullet_lists", text, num_bullets=bullets), text
        is_titled = any(title.lstrip("<").rstrip(">").strip() for title in titles)
        assert followed("detectable_format:title", text) == is_titled, text


def test_a_pattern_that_takes_for_ever_is_stopped_and_the_text_counts_as_unreadable() -> None:
    started = time.perf_counter()
    settings = {"name": "regex", "pattern": "(a|aa)+$", "timeout_s": 0.1}
    assert reward("a" * 60 + "b", **settings, on_unreadable=-1) == -1
    assert reward("a" * 60, **settings) == 1
    with pytest.raises(RewardError, match=r"the pattern was not done with a text of 61 characters after 0\.1 s"):
        reward("a" * 60 + "b", **settings, on_unreadable="fail")
    assert time.perf_counter() - started < 5


def test_a_keyword_of_punctuation_is_found() -> None:
    assert contains_keyword("in C++.", ["c++"])
    assert not contains_keyword("in C++11", ["c++"])
