"""The page in a real browser, on the real endpoint."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serving.conftest import ALIGNED, Running
from tests.serving.test_page import PATIENCE_MS, Page, ask, browser, context, expect, give_key, page, shown

__all__ = ["browser", "context", "page"]


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_person_chats_compares_and_sees_the_progress_on_the_real_endpoint(page: Page, endpoint: Running) -> None:
    slow = 4 * PATIENCE_MS  # two answers at once by the real engine
    page.goto(endpoint.url)
    give_key(page, endpoint.keys["labeller"])
    expect(page.locator("#model")).to_be_enabled()
    ask(page, "What is the capital of France?")
    answer = page.get_by_role("article", name="Answer")
    expect(answer.get_by_role("button", name="Good answer")).to_be_visible(timeout=slow)
    expect(answer).to_contain_text(f"{ALIGNED} · version 1")
    answer.get_by_role("button", name="Good answer").click()
    expect(answer.get_by_text("Saved")).to_be_visible()

    page.goto(f"{endpoint.url}/#compare")
    page.get_by_label("Prompt", exact=True).fill("Why is the sky blue?")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#pair")).to_have_attribute("aria-busy", "false", timeout=slow)
    left, right = shown(page)
    assert left != right, "two draws by random weights, and equal ones are drawn again"
    page.keyboard.press("a")
    expect(page.locator("#verdict-state")).to_contain_text("Saved")

    rows = [json.loads(line) for line in endpoint.ask("GET", "/v1/feedback/export").text.splitlines()]
    assert rows[-2]["completions"] and rows[-2]["rewards"] == [1.0]
    worth = dict(zip(rows[-1]["completions"], rows[-1]["rewards"], strict=True))
    assert worth[left] > worth[right]
    page.goto(f"{endpoint.url}/#progress")
    expect(page.locator("#figures")).to_contain_text(str(endpoint_statistics(endpoint)["comparisons"]))


def endpoint_statistics(endpoint: Running) -> dict[str, Any]:
    found: dict[str, Any] = endpoint.ask("GET", "/v1/feedback/statistics").json()
    return found
