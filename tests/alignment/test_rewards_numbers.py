"""The rule `exact_number` reads what is a single number, in a bounded time, and takes nothing else for one."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from alignment.groups import Completion, Group
from alignment.rewards.numbers import ExactNumber, number_in

MORE_THAN_A_NUMBER = [
    (r"\boxed{4√2}", "4", 0),
    (r"\boxed{4√2}", "4√2", 1),
    (r"\boxed{4\sqrt{2}}", r"4\sqrt{2}", 1),
    (r"\boxed{\sqrt{2}}", "2", 0),
    (r"\boxed{\sqrt 2}", "2", 0),
    (r"\boxed{\sqrt[3]{8}}", "3", 0),
    (r"\boxed{\sqrt[3]{8}}", "8", 0),
    (r"\boxed{2\pi}", "2", 0),
    (r"\boxed{2π}", "2", 0),
    (r"\boxed{\pi/2}", "2", 0),
    (r"\boxed{\frac{\pi}{2}}", "2", 0),
    (r"\boxed{\frac{\sqrt{3}}{2}}", "2", 0),
    (r"\boxed{3x+2}", "2", 0),
    (r"\boxed{3x}", "3", 0),
    (r"\boxed{3 x}", "3", 0),
    (r"\boxed{x+2}", "2", 0),
    (r"\boxed{2x^2}", "2", 0),
    (r"\boxed{x^2}", "2", 0),
    (r"\boxed{(1,2)}", "2", 0),
    (r"\boxed{(1,2)}", "(1, 2)", 1),
    (r"\boxed{1, 2}", "2", 0),
    (r"\boxed{1, 2}", "1,2", 1),
    (r"\boxed{2, 1}", "1, 2", 0),
    (r"\boxed{\{1,2\}}", "2", 0),
    (r"\boxed{\{1, 2\}}", r"\{1,2\}", 1),
    (r"\boxed{[1, 2)}", "1", 0),
    (r"\boxed{1 \text{ or } 2}", "2", 0),
    (r"\boxed{1 \text{ and } 2}", "1", 0),
    (r"\boxed{x=1, y=2}", "2", 0),
    (r"\boxed{2^{10}}", "2", 0),
    (r"\boxed{2^{10}}", "10", 0),
    (r"\boxed{2^{10}}", "1024", 0),
    (r"\boxed{2^10}", "2^10", 1),
    (r"\boxed{2^{-1}}", "1", 0),
    (r"\boxed{12:00}", "0", 0),
    (r"\boxed{12:00}", "1:00", 0),
    (r"\boxed{12:00}", "12:00", 1),
    (r"\boxed{\pm 3}", "3", 0),
    (r"\boxed{±2021}", "2021", 0),
    (r"\boxed{5!}", "5", 0),
    (r"\boxed{|-5|}", "-5", 0),
    (r"\boxed{12_8}", "12", 0),
    (r"\boxed{1010_2}", "1010", 0),
    (r"\boxed{2+3}", "3", 0),
    (r"\boxed{10-5}", "5", 0),
    (r"\boxed{3+4i}", "3", 0),
    (r"\boxed{2i}", "2", 0),
    (r"\boxed{2e}", "2", 0),
    (r"\boxed{2\sin 3}", "3", 0),
    (r"\boxed{\log 5}", "5", 0),
    (r"\boxed{\ln(2)}", "2", 0),
    (r"\boxed{3\log 2}", "3", 0),
    (r"\boxed{x > 5}", "5", 0),
    (r"\boxed{x \ge 5}", "5", 0),
    (r"\boxed{3:4}", "4", 0),
    (r"\boxed{0.\overline{3}}", "0", 0),
    (r"\boxed{2\times 3}", "3", 0),
    (r"\boxed{2\cdot 3}", "6", 0),
    (r"\boxed{5\alpha}", "5", 0),
    (r"\boxed{3\%\text{ of }5}", "5", 0),
    (r"\boxed{\infty}", "1", 0),
    (r"\boxed{10^3}", "10", 0),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", "2", 0),
    (r"\boxed{\frac{x}{2}}", "2", 0),
    (r"\boxed{\dfrac{3}{x}}", "3", 0),
    (r"\boxed{1.2.3}", "1.2", 0),
    (r"\boxed{5^\circ C 3}", "5", 0),
    (r"\boxed{3 \mod 7}", "3", 0),
    (r"\boxed{n=3k}", "3", 0),
    (r"\boxed{x \neq 5}", "5", 0),
]
"""Boxes that hold more than a number equal nothing but the same text: (text, column, reward)."""
BOXED = [
    (r"\boxed{4}", "4", 1),
    (r"\boxed{-4}", "-4", 1),
    (r"\boxed{- 4}", "-4", 1),
    (r"\boxed{+4}", "4", 1),
    (r"\boxed{−4}", "-4", 1),
    (r"\boxed{\frac12}", "1/2", 1),
    (r"\boxed{\frac1{2}}", "0.5", 1),
    (r"\boxed{\frac{1}2}", "0.5", 1),
    (r"\boxed{\frac{3}{-4}}", "-3/4", 1),
    (r"\boxed{-\frac{3}{4}}", "-0.75", 1),
    (r"\boxed{\frac{-3}{4}}", "-0.75", 1),
    (r"\boxed{-\frac{-3}{4}}", "0.75", 1),
    (r"\boxed{\dfrac{1,000}{3}}", "1000/3", 1),
    (r"\boxed{\tfrac{7}{8}}", "7/8", 1),
    (r"\boxed{1\frac12}", "1.5", 1),
    (r"\boxed{12\frac{1}{2}}", "12.5", 1),
    (r"\boxed{\frac{1.5}{3}}", "0.5", 1),
    (r"\boxed{1.2 \times 10^3}", "1200", 1),
    (r"\boxed{1.2 × 10³}", "1200", 1),
    (r"\boxed{1.2\cdot 10^{-3}}", "0.0012", 1),
    (r"\boxed{-2 \times 10^{3}}", "-2000", 1),
    (r"\boxed{9{,}500}", "9500", 1),
    (r"\boxed{\$9{,}500}", "9500", 1),
    (r"\boxed{9\,500}", "9500", 1),
    (r"\boxed{10 000}", "10000", 1),
    (r"\boxed{1,234,567.89}", "1234567.89", 1),
    (r"\boxed{25 \text{ cm}^2}", "25", 1),
    (r"\boxed{25\text{cm}^2}", "25", 1),
    (r"\boxed{25\,\mathrm{cm}^2}", "25", 1),
    (r"\boxed{25 cm^2}", "25", 1),
    (r"\boxed{9.8 \text{ m/s}^2}", "9.8", 1),
    (r"\boxed{9.8\ \mathrm{m\,s^{-2}}}", "9.8", 1),
    (r"\boxed{90^\circ}", "90", 1),
    (r"\boxed{90^{\circ}}", "90", 1),
    (r"\boxed{90°}", "90", 1),
    (r"\boxed{20\%}", "20", 1),
    (r"\boxed{20\%}", "0.2", 1),
    (r"\boxed{x = 5}", "5", 1),
    (r"\boxed{x=-5}", "-5", 1),
    (r"\boxed{5 = x}", "5", 1),
    (r"\boxed{f(2) = 7}", "7", 1),
    (r"\boxed{\text{5 apples}}", "5", 1),
    (r"\boxed{5 \text{ dollars}}", "5", 1),
    (r"\boxed{\text{USD } 5}", "5", 1),
    (r"\boxed{€5}", "5", 1),
    (r"\boxed{5 €}", "5", 1),
    (r"\boxed{£1,000}", "1000", 1),
    (r"\boxed{\text{(B) } 5}", "5", 1),
    (r"\boxed{(5)}", "5", 1),
    (r"\boxed{\mathbf{5}}", "5", 1),
    (r"\boxed{\textbf{5}}", "5", 1),
    (r"\boxed{5.}", "5", 1),
    (r"\boxed{\approx 5.2}", "5.2", 1),
    (r"\boxed{2+3=5}", "5", 1),
    (r"\boxed{1{,}000 + 500 = 1{,}500}", "1500", 1),
    (r"\boxed 5", "5", 1),
    (r"\boxed{\boxed{5}}", "5", 1),
    (r"\fbox{5}", "5", 1),
    (r"\boxed{½}", "0.5", 1),
    (r"\boxed{1½}", "1.5", 1),
    (r"\boxed{5 \text{ km/h}}", "5", 1),
    (r"\boxed{5\text{ kg}\cdot\text{m}}", "5", 1),
    (r"\boxed{28 percent}", "28%", 1),
    (r"\boxed{5kg}", "5", 1),
    (r"\boxed{5m}", "5", 1),
    (r"\boxed{\displaystyle 5}", "5", 1),
    (r"$\boxed{5}$", "5", 1),
    (r"\boxed{5\text{th}}", "5", 1),
    (r"\boxed{1e3}", "1000", 1),
    (r"\boxed{\left(5\right)}", "5", 1),
    (r"\boxed{3/4}", "0.75", 1),
    (r"\boxed{-3/4}", "-0.75", 1),
    (r"\boxed{5 \textrm{ units}}", "5", 1),
    (r"\boxed{72 \text{ square units}}", "72", 1),
    (r"\boxed{１２}", "12", 1),
]
"""Boxes that hold one, as people and LaTeX write it."""
WRITTEN = [
    ("The area is 25 cm^2.", "25", 1),
    ("The area is 25 cm².", "25", 1),
    ("9.8 m/s^2", "9.8", 1),
    ("It is 9.8 m/s².", "9.8", 1),
    ("The answer is 4√2.", "2", 0),
    ("The answer is 4√2.", "4", 0),
    ("The answer is 4√2.", "4√2", 1),
    ("It is 2π.", "2", 0),
    (r"It is 2 \pi.", "2", 0),
    ("So 3x+2.", "2", 0),
    ("so we get 3x + 2", "2", 0),
    ("so x^2 + 5", "5", 0),
    ("It is 2^10.", "10", 0),
    ("It is 2^10.", "2", 0),
    ("The answer is (2, 1).", "1", 0),
    ("The answer is (2, 1).", "(2, 1)", 1),
    ("The answer is (2, 1).", "(1, 2)", 0),
    ("at 12:00", "0", 0),
    ("at 12:00", "1:00", 0),
    ("at 12:00.", "12:00", 1),
    ("It is ±2021", "2021", 0),
    ("x = ±3", "3", 0),
    (r"\pm 3", "3", 0),
    ("The answer is –5.", "-5", 1),
    ("The answer is -5.", "-5", 1),
    ("between 3–5", "5", 1),
    ("pages 10-15", "15", 1),
    ("so $x = 5$.", "5", 1),
    (r"The answer is $\frac{3}{4}$.", "0.75", 1),
    (r"The answer is $\frac34$", "0.75", 1),
    ("It costs $5.", "5", 1),
    ("I paid 5 dollars and 50 cents, so 5.50", "5.5", 1),
    ("28 percent", "0.28", 1),
    ("28 per cent", "28", 1),
    ("It is 5!", "5", 1),
    ("It is **42**.", "42", 1),
    ("Total: 1,234.", "1234", 1),
    ("- 5 apples", "5", 1),
    ("= 5", "5", 1),
    ("GPT-4 says 7", "7", 1),
    ("H2O weighs 18", "18", 1),
    ("1.2 x 10^3 m", "1200", 1),
    ("3.0 × 10⁸ m/s", "300000000", 1),
    (r"The answer is $2\sqrt{3}$", "3", 0),
    (r"the answer is \(5\)", "5", 1),
    (r"The answer is \[ 12 \]", "12", 1),
    ("<answer>12</answer>", "12", 1),
    ("I ate 5 a day.", "5", 1),
    ("5 x 3 = 15", "15", 1),
    ("log_2(8)=3", "3", 1),
    ("f(2)=3", "3", 1),
    ("the 5th", "5", 1),
    ("5kg of H2O", "5", 1),
    ("25 cm^2 + 3 cm^2 = 28 cm^2", "28", 1),
    ("It is 90°", "90", 1),
    ("It is 90 degrees", "90", 1),
    ("It is 3:4", "4", 0),
    ("12/25/2020", "2020", 0),
    ("1.2.3", "3", 0),
    (r"The angle is 45^\circ.", "45", 1),
    ("answer: 12.", "12", 1),
    ("It is 12...", "12", 1),
    ("Answer: x=7", "7", 1),
    ("(5)", "5", 1),
    ("the result (12) is", "12", 1),
    ("(see 1, 2)", "2", 1),
    ("10 m/s", "10", 1),
    ("There are 3 x's", "3", 1),
    ("It is 20%.", "20", 1),
    ("5 + 2x", "5", 0),
    ("2 * 10**3", "10", 0),
    ("2**10", "2", 0),
    ("2**10", "10", 0),
    ("the set {1, 2}", "2", 1),
    ("#### 72", "72", 1),
    ("#### 72 clips in 2 months", "72", 1),
    ("#### 4√2", "4", 0),
    ("#### 3x+2", "3", 0),
    ("#### (2, 1)", "1", 0),
    ("#### $1,080", "1080", 1),
    ("#### -3", "-3", 1),
    ("#### 3 or 4", "3", 0),
    ("#### x = 5", "5", 1),
    ("#### 5 %", "5", 1),
    ("#### 1/2", "0.5", 1),
    ("#### 12:30", "12", 0),
]
"""Numbers in sentences and after `####`."""
COLUMNS = [
    ("5", "x = 5", 1),
    ("5", "$5", 1),
    ("5", "The answer is 5", 1),
    ("5", "5 apples", 1),
    ("5", r"\boxed{5}", 1),
    (r"\boxed{2}", "1, 2", 0),
    (r"\boxed{2}", "3x+2", 0),
    (r"\boxed{4}", "2 and 4", 0),
    (r"\boxed{5}", "10-5", 0),
    (r"\boxed{10-5}", "10-5", 1),
]
"""Right answers that are a number, words around one, or something else."""


def reward(text: str, right: str) -> float | None:
    group = Group(id="rows:1", prompt="p", completions=(Completion(text=text),), columns={"answer": right})
    return ExactNumber().reward(group.completions[0], group)


@pytest.mark.parametrize(
    "texts", [MORE_THAN_A_NUMBER, BOXED, WRITTEN, COLUMNS], ids=["more", "boxed", "prose", "right"]
)
def test_a_number_is_read_as_people_write_it_and_nothing_else_for_one(texts: list[tuple[str, str, int]]) -> None:
    assert len(texts) >= 10
    wrong = [
        (text, right, reward(text, right), wanted) for text, right, wanted in texts if reward(text, right) != wanted
    ]
    assert not wrong


PIECES = [
    "1,111,", "100,101,", "1,", "1 ", "1.", "9", "-", "5-", "1:", "1/", "1 1/2 ", "1 000 ", "\\frac{", "\\boxed{",
    "####",
    "^{", "^(", "1^{2", "10^{3", "{", "(1,", "a1", "1e", "1=", "x=", "\\text{", "\\", " ", "\n", "½", "²", "$1",
    "**", "%",
    "1 percent", "a'", "\u00a0",
]  # fmt: skip


@pytest.mark.parametrize("frame", ["{}", "\\boxed{{{}}}", "#### 1{}"])
def test_no_text_takes_long_or_raises(frame: str) -> None:
    """64,000 characters: what is quadratic needs 12 seconds for "1,111,…" alone."""
    for piece in PIECES:
        text = frame.format((piece * 64_000)[:64_000])
        started = time.perf_counter()
        number_in(text)
        assert time.perf_counter() - started < 2, piece


def test_a_list_of_numbers_and_an_integer_of_thousands_of_digits_are_read_without_an_error() -> None:
    assert number_in(",".join(map(str, range(100, 2500)))) == {Fraction(2499)}
    for digits in (
        "7" * 5000,
        "1" + ",111" * 1500,
        "1." + "3" * 5000,
        "1/" + "3" * 5000,
        "\\frac{" + "3" * 5000 + "}{2}",
    ):
        for text in (digits, f"\\boxed{{{digits}}}", f"#### {digits}", f"5 {digits}"):
            assert all(abs(value) < 10**60 for value in number_in(text))


def test_a_number_far_before_the_end_of_a_text_is_still_its_last() -> None:
    assert number_in("It is 42. " + "and so on " * 10_000) == {Fraction(42)}
    assert number_in("word " * 10_000 + "It is 42.") == {Fraction(42)}
