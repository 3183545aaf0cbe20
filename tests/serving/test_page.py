"""The page in a real browser, against a small service that speaks the endpoint's HTTP API without a model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from serving.http.page import HEADERS, INDEX, page_files
from tests.conftest import free_port

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Page, Browser, BrowserContext = playwright.Page, playwright.Browser, playwright.BrowserContext
expect = playwright.expect

CHROMIUM = Path(os.environ.get("RAYLIGN_CHROMIUM", "/usr/bin/chromium"))
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--process-per-site",  # all tabs of one context in one process, which then starts once
]
PATIENCE_MS = 30_000  # a pass never waits that long; a starved machine may
expect.set_options(timeout=PATIENCE_MS)

HOSTILE = (
    '<img src=x onerror="document.title=\'broken into\'"><script>document.title="broken into"</script>'
    f"\n{'W' * 4000}\nשלום עולם, قالت الآلة\n\u202eevil\u202c 👩‍👩‍👧‍👦 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!͖̬̰̙̗̿̋ͥͥ̂ͣ̐́́͜͞"
)
STATISTICS = {
    "answers": 1318,
    "comparisons": 412,
    "judged": 387,
    "by_kind": {"choice": 451, "thumb": 203, "correction": 38},
    "by_labeller": {"anna": 402, "<b>bo</b>": 290},
    "agreement": {"pairs": 64, "agreed": 51, "rate": 51 / 64},
    "wins_by_version": {
        "1": {"wins": 61, "losses": 118, "ties": 22},
        "2": {"wins": 104, "losses": 97, "ties": 31},
        "3": {"wins": 132, "losses": 82, "ties": 27},
    },
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request that reached the service."""

    route: str
    body: dict[str, Any]
    key: str | None
    mark: str | None
    """Its Idempotency-Key."""
    query: str = ""
    """What follows the question mark of its address."""


@dataclass(kw_only=True)
class Service:
    """The endpoint's HTTP API, answering what a test puts into these fields."""

    url: str = ""
    key: str | None = None
    """The key it wants."""
    parents: dict[str, str | None] = field(
        default_factory=lambda: {"assistant": "smollm2-135m-instruct", "smollm2-135m-instruct": None}
    )
    """Its models, each with its base model."""
    pieces: list[str] = field(default_factory=lambda: ["The sky ", "is ", "blue."])
    piece_s: float = 0.0
    ends: bool = True
    """Whether a stream says that it is complete."""
    answers: Callable[[str], list[str]] = lambda prompt: [f"First to: {prompt}", f"Second to: {prompt}"]
    troubles: dict[str, list[Response]] = field(default_factory=dict)
    """What a route answers next, instead of what it should."""
    held: dict[str, threading.Event] = field(default_factory=dict)
    """A route answers when its event is set; so does what follows the first piece of a stream, as `rest`."""
    asked: list[Asked] = field(default_factory=list)
    left: int = 0
    """Streams that the browser did not read to their end."""
    number: int = 0

    def bodies(self, route: str) -> list[dict[str, Any]]:
        """What was asked on a route and not refused for its key."""
        return [asked.body for asked in self.asked if asked.route == route]

    def app(self) -> Starlette:
        posts = {
            "chat/completions": self.chat,
            "comparisons": self.comparison,
            "feedback": self.feedback,
        }
        gets = {"models": self.models, "feedback/statistics": self.statistics}
        return Starlette(
            routes=[
                Route("/", lambda _: page_response(INDEX)),
                Route("/page/{name}", lambda request: page_response(request.path_params["name"])),
                *(Route(f"/v1/{name}", self.route(name, answer), methods=["POST"]) for name, answer in posts.items()),
                *(Route(f"/v1/{name}", self.route(name, answer)) for name, answer in gets.items()),
            ]
        )

    def route(self, name: str, answer: Callable[[dict[str, Any]], Response]) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            authorization = request.headers.get("authorization")
            if self.key is not None and authorization != f"Bearer {self.key}":
                return trouble(401, "Give a key.")
            body = json.loads(await request.body() or b"{}")
            mark = request.headers.get("idempotency-key")
            self.asked.append(Asked(route=name, body=body, key=authorization, mark=mark, query=request.url.query))
            await self.release(name)
            waiting = self.troubles.get(name)
            return waiting.pop(0) if waiting else answer(body)

        return handle

    async def release(self, name: str) -> None:
        while name in self.held and not self.held[name].is_set():
            await asyncio.sleep(0.01)

    def models(self, _: dict[str, Any]) -> Response:
        cards = [{"id": name, "object": "model", "parent": parent} for name, parent in self.parents.items()]
        return JSONResponse({"object": "list", "data": cards})

    def chat(self, body: dict[str, Any]) -> Response:
        self.number += 1
        parts = self.stream(f"chatcmpl-{self.number}")
        return StreamingResponse(parts, media_type="text/event-stream", headers={"x-model-version": "3"})

    async def stream(self, name: str) -> AsyncIterator[str]:
        complete = False
        try:
            for index, piece in enumerate(self.pieces):
                last = index + 1 == len(self.pieces)
                choice = {"index": 0, "delta": {"content": piece}, "finish_reason": "stop" if last else None}
                yield f"data: {json.dumps({'id': name, 'choices': [choice]})}\n\n"
                await asyncio.sleep(self.piece_s)
                await self.release("rest")
            if self.ends:
                yield "data: [DONE]\n\n"
            complete = True
        finally:
            self.left += not complete

    def comparison(self, body: dict[str, Any]) -> Response:
        self.number += 1
        name = f"cmp-{self.number}"
        texts = self.answers(body["messages"][-1]["content"])
        answers = [{"id": f"{name}-{1 - place}", "text": text} for place, text in enumerate(texts)]
        return JSONResponse({"id": name, "object": "comparison", "answers": answers})

    def feedback(self, body: dict[str, Any]) -> Response:
        self.number += 1
        receipt = {"id": f"jdg-{self.number}", "object": "feedback", "kind": body["kind"], "target": body["id"]}
        return JSONResponse({**receipt, "created": time.time(), "replaces": None})

    def statistics(self, _: dict[str, Any]) -> Response:
        return JSONResponse(STATISTICS)


def page_response(name: str) -> Response:
    if name not in page_files():
        return trouble(404, "There is no such file.")
    file = page_files()[name]
    return Response(file.body, media_type=file.media_type, headers=dict(HEADERS))


def trouble(status: int, message: str = "Not now.", *, code: str | None = None, **headers: str) -> Response:
    error = {"message": message, "type": "server_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


@pytest.fixture
def service() -> Iterator[Service]:
    service, port = Service(), free_port()
    server = uvicorn.Server(
        uvicorn.Config(service.app(), host="127.0.0.1", port=port, lifespan="off", log_level="error")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    service.url = f"http://127.0.0.1:{port}"
    yield service
    server.force_exit = server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"there is no Chromium at {CHROMIUM}; RAYLIGN_CHROMIUM can name another")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=str(CHROMIUM), args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A context whose tabs have one process, which a tab of its own keeps. Every test has a tab and an origin, the
    port of its service, of its own, and nothing is stored for more than both."""
    with browser.new_context(viewport={"width": 1280, "height": 860}) as context:
        keeper = context.new_page()
        keeper.route("**", lambda route: route.fulfill(body=""))
        keeper.goto("http://127.0.0.1/")
        yield context


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A new tab. In the end nothing may have gone wrong in it, nor been stopped by the content security policy."""
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    wrong: list[str] = []
    page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.add_init_script(
        "addEventListener('securitypolicyviolation', (e) => console.error('CSP', e.violatedDirective))"
    )
    yield page
    page.close()
    context.set_offline(False)
    assert context.cookies() == []
    # The browser reports every refused request by itself; several tests refuse some on purpose.
    assert [text for text in wrong if not text.startswith("Failed to load resource")] == []


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def lose_network(page: Page) -> None:
    """Returns when the browser cannot reach the service any more, which takes it a moment."""
    page.context.set_offline(True)
    page.evaluate("async () => { for (;;) try { await fetch('/', {cache: 'no-store'}) } catch { return } }")


def ask(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")


def give_key(page: Page, key: str) -> None:
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_label("Key", exact=True).press("Enter")


def start_comparing(page: Page, service: Service, *prompts: str) -> None:
    page.goto(f"{service.url}/#compare")
    expect(page.locator("#model")).to_be_enabled()
    page.get_by_label("Prompt", exact=True).fill("\n".join(prompts))
    if len(prompts) > 1:
        page.get_by_label("Every line is a prompt of its own").check()
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#asked")).to_have_text(prompts[0])
    expect(page.locator("#pair")).to_have_attribute("aria-busy", "false")


def shown(page: Page) -> list[str]:
    return list(page.locator("#pair .text").all_text_contents())


def in_the_page(page: Page) -> bool:
    """Nothing is wider than the window."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


# The files


def test_every_file_that_the_page_names_is_there() -> None:
    texts = {name: file.body.decode() for name, file in page_files().items()}
    named = set(re.findall(r'(?:src|href)="page/([^"]+)"', texts[INDEX]))
    for text in texts.values():
        named |= set(re.findall(r'from "\./([^"]+)"', text))
    assert named == set(texts) - {INDEX}


def test_nothing_is_loaded_from_elsewhere_and_nothing_is_markup_from_text() -> None:
    for name, file in page_files().items():
        text = file.body.decode().replace("http://www.w3.org/2000/svg", "")
        for never in (
            "http://",
            "https://",
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "eval(",
            " style=",
            "onclick=",
        ):
            assert never not in text, (name, never)


# Chat


def test_an_answer_comes_in_pieces_and_names_its_version(page: Page, service: Service) -> None:
    service.held["rest"] = threading.Event()
    page.goto(service.url)
    ask(page, "Why is the sky blue?")
    answer = page.get_by_role("article", name="Answer")
    expect(answer.locator(".text")).to_have_text("The sky ")
    service.held["rest"].set()
    expect(answer.locator(".text")).to_have_text("The sky is blue.")
    expect(answer).to_contain_text("assistant · version 3")
    assert service.bodies("chat/completions") == [
        {"model": "assistant", "messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": True}
    ]


def test_the_next_question_carries_what_was_said_before_to_the_chosen_model(page: Page, service: Service) -> None:
    page.goto(service.url)
    ask(page, "One?")
    expect(page.get_by_role("button", name="Good answer")).to_be_visible()
    page.get_by_label("Model").select_option("smollm2-135m-instruct")
    ask(page, "Two?")
    expect(page.get_by_role("button", name="Good answer")).to_have_count(2)
    asked = service.bodies("chat/completions")[-1]
    assert [said["content"] for said in asked["messages"]] == ["One?", "The sky is blue.", "Two?"]
    assert asked["model"] == "smollm2-135m-instruct"


def test_stop_ends_the_answer_on_both_sides(page: Page, service: Service) -> None:
    service.pieces, service.piece_s = ["word "] * 1000, 0.02
    page.goto(service.url)
    ask(page, "Talk.")
    expect(page.locator(".answered .text")).to_contain_text("word word")
    page.get_by_role("button", name="Stop").click()
    wait_until(lambda: service.left == 1)
    expect(page.locator(".answered")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.get_by_role("button", name="Good answer")).to_have_count(0)


def test_an_answer_that_breaks_off_is_said_to_and_can_be_asked_for_again(page: Page, service: Service) -> None:
    service.ends = False
    page.goto(service.url)
    ask(page, "Why?")
    expect(page.locator(".answered")).to_contain_text("broke off")
    service.ends = True
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("button", name="Good answer")).to_be_visible()
    expect(page.locator(".answered")).to_have_count(1)


def test_a_refused_question_counts_down_and_is_asked_again(page: Page, service: Service) -> None:
    service.troubles["chat/completions"] = [trouble(429, **{"retry-after": "3"})]
    page.goto(service.url)
    ask(page, "Why?")
    again = page.get_by_role("button", name="Try again")
    expect(again).to_have_text(re.compile(r"Try again in [123] s"))
    expect(again).to_be_disabled()
    expect(again).to_be_enabled()
    again.click()
    expect(page.locator(".answered .text")).to_have_text("The sky is blue.")
    assert len(service.bodies("chat/completions")) == 2


def test_what_went_wrong_is_told_in_words(page: Page, service: Service) -> None:
    told = {403: "not allowed", 404: "There is no model 'x'.", 418: "Tea.", 503: "not ready", 507: "disk is full"}
    said = {404: "There is no model 'x'.", 418: "Tea."}
    service.troubles["chat/completions"] = [trouble(status, said.get(status, "internal words")) for status in told]
    page.goto(service.url)
    for words in told.values():
        ask(page, "Why?")
        expect(page.get_by_role("alert").filter(has_text=words)).to_be_visible()
    expect(page.get_by_text("internal words")).to_have_count(0)


def test_a_lost_network_is_told_in_words(page: Page, service: Service) -> None:
    page.goto(service.url)
    expect(page.locator("#model")).to_be_enabled()
    lose_network(page)
    ask(page, "Why?")
    expect(page.get_by_role("alert").filter(has_text="cannot be reached")).to_be_visible()
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".answered .text")).to_have_text("The sky is blue.")


def test_a_thumb_and_a_better_answer_go_to_the_answer_they_are_under(page: Page, service: Service) -> None:
    page.goto(service.url)
    ask(page, "One?")
    expect(page.get_by_role("button", name="Good answer")).to_have_count(1)
    ask(page, "Two?")
    expect(page.get_by_role("button", name="Good answer")).to_have_count(2)
    second = page.get_by_role("article", name="Answer").last
    second.get_by_role("button", name="Bad answer").click()
    expect(second.get_by_text("Saved")).to_be_visible()
    second.get_by_role("button", name="Better answer", exact=True).click()
    second.get_by_label("How should the answer have been?").fill("Because of Rayleigh scattering.")
    second.get_by_role("button", name="Save better answer").click()
    expect(second.get_by_text("Saved")).to_have_count(2)
    name = f"chatcmpl-{2}-0"
    assert service.bodies("feedback") == [
        {"kind": "thumb", "id": name, "up": False},
        {"kind": "correction", "id": name, "text": "Because of Rayleigh scattering."},
    ]
    assert second.get_by_role("button", name="Bad answer").get_attribute("aria-pressed") == "true"


# Compare


@pytest.mark.parametrize(
    ("key", "winner"),
    [
        ("a", "cmp-1-1"),
        ("ArrowLeft", "cmp-1-1"),
        ("b", "cmp-1-0"),
        ("ArrowRight", "cmp-1-0"),
        ("t", "tie"),
        ("x", "both_bad"),
    ],
)
def test_a_key_names_the_winner(page: Page, service: Service, key: str, winner: str) -> None:
    start_comparing(page, service, "Why?")
    page.keyboard.press(key)
    expect(page.locator("#verdict-state")).to_contain_text("Saved")
    assert service.bodies("feedback") == [{"kind": "choice", "id": "cmp-1", "winner": winner}]
    assert service.asked[-1].mark is not None and len(service.asked[-1].mark) == 32


def test_so_does_a_button(page: Page, service: Service) -> None:
    winners = {"A is better": "cmp-1-1", "Tie": "tie", "Both bad": "both_bad", "B is better": "cmp-1-0"}
    start_comparing(page, service, "Why?")
    for button in winners:
        page.get_by_role("button", name=button).click()
        expect(page.locator("#verdict-state")).to_contain_text("Saved")
        page.get_by_role("button", name="Judge again").click()
    assert [body["winner"] for body in service.bodies("feedback")] == list(winners.values())


def test_the_answers_stand_in_the_order_that_the_service_gave(page: Page, service: Service) -> None:
    service.answers = lambda prompt: [f"zebra {prompt}", f"ape {prompt}"]
    start_comparing(page, service, "one", "two")
    assert shown(page) == ["zebra one", "ape one"]
    page.keyboard.press("n")
    expect(page.locator("#pair .text").first).to_have_text("zebra two")
    assert shown(page) == ["zebra two", "ape two"]


def test_the_next_prompt_is_asked_while_the_person_reads_and_no_further(page: Page, service: Service) -> None:
    start_comparing(page, service, "one", "two", "three")
    wait_until(lambda: len(service.bodies("comparisons")) == 2)
    page.wait_for_timeout(300)
    asked = service.bodies("comparisons")
    assert [body["messages"][0]["content"] for body in asked] == ["one", "two"]
    assert asked[0] == {"model": "assistant", "messages": [{"role": "user", "content": "one"}], "max_tokens": 256}
    assert service.bodies("feedback") == []


def test_a_list_goes_on_by_itself_to_its_end(page: Page, service: Service) -> None:
    start_comparing(page, service, "one", "two", "three")
    page.keyboard.press("a")
    expect(page.locator("#asked")).to_have_text("two")
    page.keyboard.press("n")
    expect(page.locator("#asked")).to_have_text("three")
    expect(page.locator("#pair")).to_have_attribute("aria-busy", "false")
    page.keyboard.press("t")
    expect(page.locator("#verdict-state")).to_contain_text("Saved")
    page.keyboard.press("n")
    expect(page.locator("#done-text")).to_have_text("2 judged, 1 skipped.")
    page.keyboard.press("a")  # there is nothing to judge here
    page.wait_for_timeout(200)
    assert [body["winner"] for body in service.bodies("feedback")] == ["cmp-1-1", "tie"]


def test_undo_goes_back_and_another_verdict_is_sent(page: Page, service: Service) -> None:
    start_comparing(page, service, "one", "two")
    page.keyboard.press("a")
    expect(page.locator("#asked")).to_have_text("two")
    page.keyboard.press("u")
    expect(page.locator("#asked")).to_have_text("one")
    expect(page.locator("#verdict-state")).to_have_text("A is better. Saved Choose again.")
    page.keyboard.press("b")
    wait_until(lambda: len(service.bodies("feedback")) == 2)
    first, second = service.bodies("feedback")
    assert (first["winner"], second["winner"]) == ("cmp-1-1", "cmp-1-0")
    assert first["id"] == second["id"] == "cmp-1"
    assert len({asked.mark for asked in service.asked if asked.route == "feedback"}) == 2


def test_a_second_press_is_not_a_second_verdict(page: Page, service: Service) -> None:
    start_comparing(page, service, "one")
    page.keyboard.press("a")
    page.keyboard.press("b")
    expect(page.locator("#verdict-state")).to_contain_text("Saved")
    assert len(service.bodies("feedback")) == 1


def test_a_verdict_is_not_called_saved_before_the_service_has_said_so(page: Page, service: Service) -> None:
    service.held["feedback"] = threading.Event()
    start_comparing(page, service, "one")
    page.keyboard.press("a")
    wait_until(lambda: len(service.bodies("feedback")) == 1)
    page.wait_for_timeout(200)
    assert page.locator("#verdict-state").text_content() == "A is better. Saving…"
    service.held["feedback"].set()
    expect(page.locator("#verdict-state")).to_have_text("A is better. Saved")


def test_a_verdict_that_failed_is_said_to_be_unsaved_and_sent_again_under_the_same_mark(
    page: Page, service: Service
) -> None:
    service.troubles["feedback"] = [trouble(503, **{"retry-after": "60"})]
    start_comparing(page, service, "one", "two")
    page.keyboard.press("a")
    expect(page.locator("#unsaved")).to_contain_text("1 judgement is not saved. The service's database is away.")
    expect(page.locator("#unsaved")).to_contain_text(re.compile(r"Next attempt in (60|5\d) s"))
    expect(page.locator("#asked")).to_have_text("two")  # work goes on meanwhile
    page.keyboard.press("b")
    expect(page.locator("#unsaved")).to_contain_text("2 judgements are not saved.")
    expect(page.locator("#verdict-state")).to_contain_text("Not saved")
    assert len(service.bodies("feedback")) == 1
    page.get_by_role("button", name="Try now").click()
    expect(page.locator("#unsaved")).to_be_hidden()
    expect(page.locator("#verdict-state")).to_have_text("B is better. Saved")
    asked = [asked for asked in service.asked if asked.route == "feedback"]
    assert [one.body["id"] for one in asked] == ["cmp-1", "cmp-1", "cmp-2"]
    assert asked[0].mark == asked[1].mark != asked[2].mark


def test_unsaved_verdicts_go_out_by_themselves_when_the_network_is_back(page: Page, service: Service) -> None:
    start_comparing(page, service, "one")
    lose_network(page)
    page.keyboard.press("x")
    expect(page.locator("#verdict-state")).to_contain_text("Not saved. The service cannot be reached.")
    page.context.set_offline(False)
    expect(page.locator("#verdict-state")).to_have_text("Both are bad. Saved")


def test_unsaved_verdicts_outlive_a_reload(page: Page, service: Service) -> None:
    service.troubles["feedback"] = [trouble(503, **{"retry-after": "60"})]
    start_comparing(page, service, "one")
    page.keyboard.press("a")
    expect(page.locator("#unsaved")).to_be_visible()
    page.on("dialog", lambda dialog: dialog.accept())
    page.reload()
    wait_until(lambda: len(service.bodies("feedback")) == 2)
    assert len({(asked.mark, asked.body["winner"]) for asked in service.asked if asked.route == "feedback"}) == 1
    expect(page.locator("#unsaved")).to_be_hidden()


def test_an_answer_that_is_no_receipt_saves_nothing(page: Page, service: Service) -> None:
    service.troubles["feedback"] = [Response("<h1>Welcome to the hotel's network</h1>", media_type="text/html")]
    start_comparing(page, service, "one")
    page.keyboard.press("a")
    expect(page.locator("#verdict-state")).to_contain_text("Not saved")


def test_a_refused_verdict_waits_for_the_person(page: Page, service: Service) -> None:
    service.troubles["feedback"] = [trouble(404)]
    start_comparing(page, service, "one")
    page.keyboard.press("a")
    expect(page.locator("#unsaved")).to_contain_text("It may have been deleted.")
    page.get_by_role("button", name="Discard").click()
    expect(page.locator("#unsaved")).to_be_hidden()
    assert len(service.bodies("feedback")) == 1


def test_letters_in_a_text_field_are_letters(page: Page, service: Service) -> None:
    start_comparing(page, service, "one")
    page.keyboard.press("Control+a")
    page.get_by_role("link", name="Chat").click()
    expect(page.get_by_label("Your message")).to_be_visible()
    page.get_by_label("Your message").press_sequentially("abtxnu")
    expect(page.get_by_label("Your message")).to_have_value("abtxnu")
    assert service.bodies("feedback") == []


def test_the_keys_can_be_switched_off(page: Page, service: Service) -> None:
    page.goto(f"{service.url}/#compare")
    page.get_by_label("Judge with the keys").uncheck()
    start_comparing(page, service, "one")
    page.keyboard.press("a")
    page.get_by_role("button", name="B is better").click()
    expect(page.locator("#verdict-state")).to_have_text("B is better. Saved")
    assert len(service.bodies("feedback")) == 1


def test_without_recording_the_page_says_why_it_cannot_compare(page: Page, service: Service) -> None:
    service.troubles["comparisons"] = [trouble(409, code="not_recorded")]
    page.goto(f"{service.url}/#compare")
    page.get_by_role("button", name="What is the difference between weather and climate?").click()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("alert").filter(has_text="feedback.record")).to_be_visible()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#pair .text").first).to_contain_text("First to: What is the difference")


def test_a_comparison_during_a_swap_is_not_taken_for_one_without_recording(page: Page, service: Service) -> None:
    service.troubles["comparisons"] = [trouble(409, "Version 1 is not loaded any more.")]
    page.goto(f"{service.url}/#compare")
    page.get_by_label("Prompt", exact=True).fill("one")
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("alert").filter(has_text="changing to another version")).to_be_visible()
    expect(page.get_by_text("feedback.record")).to_have_count(0)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#pair")).to_have_attribute("aria-busy", "false")


def test_a_thumb_that_comes_before_its_answer_is_stored_is_sent_again(page: Page, service: Service) -> None:
    early = trouble(503, "Send this again.", code="not_stored_yet", **{"retry-after": "1"})
    service.troubles["feedback"] = [early]
    page.goto(service.url)
    ask(page, "Why?")
    page.get_by_role("button", name="Good answer").click()
    expect(page.locator("#unsaved")).to_contain_text("still on its way into the service's database")
    expect(page.get_by_role("article", name="Answer").get_by_text("Saved")).to_be_visible()  # by itself
    expect(page.locator("#unsaved")).to_be_hidden()
    assert len({asked.mark for asked in service.asked if asked.route == "feedback"}) == 1


def test_a_judgement_from_which_nothing_is_learned_says_why(page: Page, service: Service) -> None:
    note = "Nothing is learned from this: the texts were not kept, since feedback.record is off."
    receipt = {"id": "jdg-1", "kind": "thumb", "target": "chatcmpl-1-0", "created": 1.0, "note": note}
    service.troubles["feedback"] = [JSONResponse(receipt)]
    page.goto(service.url)
    ask(page, "Why?")
    page.get_by_role("button", name="Good answer").click()
    expect(page.get_by_role("article", name="Answer")).to_contain_text(f"Saved. {note}")


# Progress


def test_progress_shows_the_figures_and_refreshes(page: Page, service: Service) -> None:
    page.goto(f"{service.url}/#progress")
    figures = page.locator("#figures")
    for text in ("1,318", "387", "of 412 shown", "80 %", "in 51 of 64 pairs of verdicts"):
        expect(figures).to_contain_text(text)
    rows = page.locator("#wins tbody tr")
    assert [row.split() for row in rows.all_inner_texts()] == [
        ["3", "132", "27", "82"],
        ["2", "104", "31", "97"],
        ["1", "61", "22", "118"],
    ]
    widths = [box["width"] for bar in ("wins", "losses") if (box := rows.first.locator(f"i.{bar}").bounding_box())]
    assert widths[0] / widths[1] == pytest.approx(132 / 82, rel=0.02)
    expect(page.locator("#labellers")).to_contain_text("<b>bo</b>")
    page.get_by_role("button", name="Refresh").click()
    wait_until(lambda: len(service.bodies("feedback/statistics")) == 2)


def test_progress_is_that_of_the_chosen_model_where_there_are_several(page: Page, service: Service) -> None:
    def queries() -> list[str]:
        return [asked.query for asked in service.asked if asked.route == "feedback/statistics"]

    page.goto(f"{service.url}/#progress")
    expect(page.locator("#figures")).to_contain_text("1,318")
    expect(page.locator("#model")).to_be_enabled()
    assert queries() == [""], "an adapter and its base are one model"
    service.parents |= {"team/coder": None}
    page.reload()
    wait_until(lambda: queries()[-1] == "model=assistant")
    page.locator("#model").select_option("team/coder")
    wait_until(lambda: queries()[-1] == "model=team%2Fcoder")


def test_progress_of_nothing_is_told_in_words(page: Page, service: Service) -> None:
    none = {"answers": 0, "comparisons": 0, "judged": 0, "by_kind": {}, "by_labeller": {}, "wins_by_version": {}}
    service.troubles["feedback/statistics"] = [
        JSONResponse({**none, "agreement": {"pairs": 0, "agreed": 0, "rate": None}})
    ]
    page.goto(f"{service.url}/#progress")
    expect(page.locator("#figures")).to_contain_text("nothing was judged by two people yet")
    expect(page.get_by_text("No version has been compared")).to_be_visible()


# The key


def test_a_key_is_asked_for_once_and_work_goes_on(page: Page, service: Service) -> None:
    service.key = "rk_1_secret"
    page.goto(f"{service.url}/#progress")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("needs a key")
    give_key(page, "rk_1_wrong")
    expect(dialog).to_contain_text("does not accept this key")
    give_key(page, "rk_1_secret")
    expect(page.locator("#figures")).to_contain_text("1,318")
    expect(page.locator("#model")).to_be_enabled()
    expect(dialog).to_be_hidden()
    assert {asked.key for asked in service.asked} == {"Bearer rk_1_secret"}


def test_a_key_lasts_in_its_tab_until_signing_out(page: Page, service: Service) -> None:
    service.key = "rk_1_secret"
    page.goto(service.url)
    give_key(page, "rk_1_secret")
    expect(page.locator("#model")).to_be_enabled()
    page.reload()
    expect(page.locator("#model")).to_be_enabled()
    assert page.evaluate("localStorage.length") == 0 and page.context.cookies() == []
    ask(page, "A secret question?")
    expect(page.get_by_role("button", name="Good answer")).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.get_by_text("A secret question?")).to_have_count(0)
    assert page.evaluate("sessionStorage.length") == 0


def test_who_has_no_key_now_can_sign_in_later(page: Page, service: Service) -> None:
    service.key = "rk_1_secret"
    page.goto(service.url)
    page.get_by_role("button", name="Not now").click()
    expect(page.get_by_role("alert").filter(has_text="asks for a key")).to_be_visible()
    page.get_by_role("button", name="Sign in").click()
    give_key(page, "rk_1_secret")
    expect(page.locator("#model")).to_be_enabled()
    expect(page.get_by_role("button", name="Sign out")).to_be_visible()


def test_a_key_that_ends_in_the_middle_is_asked_for_again_and_the_verdict_is_kept(page: Page, service: Service) -> None:
    start_comparing(page, service, "one")
    service.key = "rk_2_secret"
    page.keyboard.press("a")
    give_key(page, "rk_2_secret")
    expect(page.locator("#verdict-state")).to_have_text("A is better. Saved")


# Whatever people and models write, and wherever it is read


@pytest.mark.parametrize("width", [1280, 390])
def test_hostile_text_is_text_and_breaks_no_layout(page: Page, service: Service, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    service.pieces = [HOSTILE]
    service.answers = lambda prompt: [HOSTILE, prompt]
    page.goto(service.url)
    ask(page, HOSTILE)
    expect(page.get_by_role("button", name="Good answer")).to_be_visible()
    assert page.locator(".answered .text").text_content() == HOSTILE
    assert page.locator(".asked .text").text_content() == HOSTILE
    assert in_the_page(page)
    page.get_by_role("link", name="Compare").click()
    page.get_by_label("Prompt", exact=True).fill(HOSTILE)
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#pair")).to_have_attribute("aria-busy", "false")
    assert shown(page) == [HOSTILE, HOSTILE]
    assert in_the_page(page)
    assert page.locator("main img, main script").count() == 0
    assert page.title() == "Compare · raylign"


def test_everything_is_within_reach_on_a_phone(page: Page, service: Service) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    service.answers = lambda prompt: ["A long answer. " * 200, "Another long answer. " * 200]
    start_comparing(page, service, "one")
    assert in_the_page(page)
    for button in page.locator("#verdicts button").all():  # they stay in sight while the answers are read
        box = button.bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844
        assert box["height"] >= 40
    for name in ("Chat", "Progress"):
        page.get_by_role("link", name=name).click()
        assert in_the_page(page)


def test_nothing_moves_for_people_who_want_no_movement(page: Page, service: Service) -> None:
    page.emulate_media(reduced_motion="reduce")
    service.held["comparisons"] = threading.Event()
    page.goto(f"{service.url}/#compare")
    page.get_by_label("Prompt", exact=True).fill("one")
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_text("The model is answering…")).to_be_visible()
    assert page.evaluate("document.getAnimations().length") == 0
    service.held["comparisons"].set()


def test_every_control_has_a_name_and_a_place_in_the_order_of_the_keyboard(page: Page, service: Service) -> None:
    start_comparing(page, service, "one")
    page.keyboard.press("a")
    expect(page.locator("#verdict-state")).to_contain_text("Saved")
    for view in ("chat", "compare", "progress"):
        page.goto(f"{service.url}/#{view}")
        for control in page.locator("button:visible, select:visible, textarea:visible, input:visible").all():
            name = control.evaluate("e => e.labels?.length ? e.labels[0].textContent : e.textContent || e.ariaLabel")
            assert name.strip(), control.evaluate("e => e.outerHTML")
    assert page.locator("[tabindex]:not([tabindex='-1'], [tabindex='0'])").count() == 0
