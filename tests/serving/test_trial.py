"""Forms of answers that kill or stall their compiler do so beside the replica, and are refused."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import xgrammar

from alignment.models.folders import bundled
from serving.config import LimitsConfig
from serving.http.metrics import FORM_REASONS
from serving.replica.grammar import Form, forms_of
from serving.replica.trial import Trials
from serving.schema import RequestError

FAR_S = 60.0
GOOD = Form(kind="json", text=json.dumps({"type": "object", "properties": {"a": {"type": "boolean"}}}))
DEADLY = Form(kind="json", text=json.dumps({"type": "string", "pattern": "(" * 60_000 + "a" + ")" * 60_000}))
ENDLESS = Form(
    kind="json",
    text=json.dumps(
        {
            "type": "object",
            "properties": {f"p{number}": {"type": "string"} for number in range(3000)},
            "additionalProperties": False,
        }
    ),
)


def serialized() -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled())
    return str(xgrammar.TokenizerInfo.from_huggingface(tokenizer).serialize_json())


@pytest.fixture(scope="module")
def tokenizer() -> str:
    return serialized()


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def trials(tokenizer: str, runner: asyncio.Runner) -> Iterator[Trials]:
    """With a process that is warm."""

    async def warm() -> Trials:
        each = Trials(lambda: tokenizer, LimitsConfig(form_timeout_s=1))
        await each.check([GOOD])
        return each

    each = runner.run(warm())
    yield each

    async def close() -> None:
        each.close()

    runner.run(close())


async def refusal_of(each: Trials, *forms: Form) -> str:
    with pytest.raises(RequestError) as refused:
        await each.check(forms)
    assert refused.value.reply.status == 400
    assert refused.value.reply.form_problem in FORM_REASONS
    return refused.value.reply.body


def children() -> list[psutil.Process]:
    """Those that compile at this moment."""
    beside = [child for child in psutil.Process().children() if "serving.replica.trial_process" in child.cmdline()]
    return [child for process in beside for child in process.children()]


def test_a_form_that_kills_its_compiler_is_refused_and_others_are_compiled(
    runner: asyncio.Runner, trials: Trials
) -> None:
    async def scene() -> None:
        assert "nested too deeply" in await refusal_of(trials, DEADLY)
        await trials.check([Form(kind="regex", text="[0-9]+")])

    runner.run(scene())


def test_a_form_that_takes_too_long_is_refused(runner: asyncio.Runner, trials: Trials) -> None:
    async def scene() -> None:
        assert "longer than 1 s" in await refusal_of(trials, ENDLESS)

    runner.run(scene())


def test_a_form_that_takes_too_much_memory_is_refused(tokenizer: str, runner: asyncio.Runner) -> None:
    async def scene() -> None:
        each = Trials(lambda: tokenizer, LimitsConfig(form_timeout_s=60, form_memory_mib=8))
        assert "more than 8 MiB" in await refusal_of(each, ENDLESS)
        each.close()

    runner.run(scene())


@pytest.mark.parametrize(
    "form",
    [
        Form(kind="json", text='{"type": "string", "pattern": "a{1,129}"}'),
        Form(kind="json", text='{"type": "nonsense"}'),
        Form(kind="json", text="{"),
        Form(kind="regex", text="(a"),
        Form(kind="ebnf", text="root ::= nothing"),
        Form(kind="structural_tag", text="{}"),
        Form(kind="structural_tag", text="["),
    ],
)
def test_what_is_no_form_is_refused_without_telling_where_the_compiler_says_so(
    runner: asyncio.Runner, trials: Trials, form: Form
) -> None:
    async def scene() -> None:
        assert "/project" not in await refusal_of(trials, form)

    runner.run(scene())


PASSED_OVER = [
    {"oneOf": [{"const": 1}, {"type": "integer"}]},
    {"$ref": "http://127.0.0.1:1/schema"},
    {"$ref": "#anchor", "$defs": {"a": {"$anchor": "anchor", "type": "integer"}}},
    {"type": "string", "pattern": "(?=a)b"},
    {"type": "string", "pattern": "a$b"},
    {"type": "number", "multipleOf": 7},
]


@pytest.mark.parametrize("schema", PASSED_OVER)
def test_a_form_of_which_the_compiler_passes_over_a_part_is_refused(
    runner: asyncio.Runner, trials: Trials, schema: dict[str, Any]
) -> None:
    async def scene() -> None:
        text = json.dumps(schema)
        assert "an answer may break it" in await refusal_of(trials, Form(kind="json", text=text))
        await trials.check([Form(kind="json", text=text, is_exact=False)])

    runner.run(scene())


@pytest.mark.parametrize(
    "form",
    [Form(kind="json", text='{"$ref": "#"}'), Form(kind="ebnf", text="root ::= root")],
    ids=["schema", "grammar"],
)
def test_a_form_that_no_answer_has_is_refused(runner: asyncio.Runner, trials: Trials, form: Form) -> None:
    async def scene() -> None:
        assert "no answer can have this form" in await refusal_of(trials, form)

    runner.run(scene())


def test_branches_that_exclude_each_other_are_compiled(runner: asyncio.Runner, trials: Trials) -> None:
    branches = [
        {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"], "additionalProperties": False}
        for kind in ("cat", "dog")
    ]

    async def scene() -> None:
        await trials.check([Form(kind="json", text=json.dumps({"oneOf": branches}))])
        await trials.check([Form(kind="json", text=json.dumps({"oneOf": [{"type": "integer"}, {"type": "string"}]}))])

    runner.run(scene())


def another(form: Form) -> Form:
    """The same as a form that was not seen yet."""
    return Form(kind=form.kind, text=form.text.replace("p0", f"p0-{time.monotonic_ns()}"))


def test_ordinary_forms_are_not_held_up_by_large_ones_and_cost_little_the_second_time(
    runner: asyncio.Runner, trials: Trials
) -> None:
    async def scene() -> None:
        large = [asyncio.create_task(trials.check([another(ENDLESS)])) for _ in range(4)]
        await asyncio.sleep(0.1)
        began = time.monotonic()
        for number in range(5):
            await trials.check([Form(kind="regex", text=f"[0-9]{{{number + 1}}}")])
        assert not all(each.done() for each in large)
        first = time.monotonic() - began
        began = time.monotonic()
        for _ in range(100):
            await trials.check([GOOD])
        print(f"first {first / 5 * 1e3:.1f} ms, again {(time.monotonic() - began) * 10:.3f} ms")
        for each in large:
            each.cancel()
        await asyncio.gather(*large, return_exceptions=True)

    runner.run(scene())


def test_what_a_client_that_left_had_compiled_ends(runner: asyncio.Runner, trials: Trials) -> None:
    async def become(number: int) -> None:
        deadline = time.monotonic() + FAR_S
        while len(children()) != number:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    async def scene() -> None:
        await become(0)
        form = another(ENDLESS)
        two = [asyncio.create_task(trials.check([form])) for _ in range(2)]
        await become(1)
        two[0].cancel()
        await asyncio.sleep(0.05)
        assert len(children()) == 1, "one still waits"
        two[1].cancel()
        await become(0)
        await trials.check([GOOD])

    runner.run(scene())


def test_a_process_that_is_killed_is_replaced(runner: asyncio.Runner, trials: Trials) -> None:
    async def scene() -> None:
        for process in psutil.Process().children():
            if "serving.replica.trial_process" in process.cmdline():
                process.kill()
        for number in range(20):
            try:
                await trials.check([Form(kind="regex", text=f"[a-z]{{{number}}}")])
                return
            except RequestError as refused:
                assert refused.reply.status == 503
        raise AssertionError("it was not replaced")

    runner.run(scene())


def test_the_forms_of_a_request() -> None:
    schema = {"type": "object"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    strict = [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}]
    wanted = Form(kind="json", text=json.dumps(schema))
    called = Form(kind="json", text=json.dumps(schema), is_exact=False)
    assert forms_of({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}) == [wanted]
    assert forms_of({"response_format": {"type": "json_object"}, "tools": None}) == []
    assert forms_of({"structured_outputs": {"json": schema}}) == [wanted]
    assert forms_of({"tools": tools, "tool_choice": "required"}) == [called]
    assert forms_of({"tools": tools}) == forms_of({"tools": strict, "tool_choice": "none"}) == []
    assert [form.is_needed for form in forms_of({"tools": strict})] == [False]
    assert [form.kind for form in forms_of({"structured_outputs": {"choice": ["a", "b"]}})] == ["ebnf"]
    assert [form.kind for form in forms_of({"structured_outputs": {"grammar": "start: 'a'"}})] == ["lark"]
    for odd in ({"tools": [[], {"function": 3}]}, {"structured_outputs": []}, {"response_format": {"json_schema": 1}}):
        assert forms_of({**odd, "tool_choice": "required"}) == []
