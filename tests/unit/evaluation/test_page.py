"""The leaderboard's page in a real browser: it loads without errors, sorts, filters and shows the winner."""

import json
import shutil

import pytest

from evaluation.compare import Settings, compare
from evaluation.leaderboard import build
from evaluation.systems import Arm

playwright = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian's package)")


@pytest.fixture(scope="module")
def page(dummy, examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    settings = Settings(out=out, max_new_tokens=16, warmups=0, runs=1, resamples=20)
    compare(
        [Arm(dummy("llm", 0.95), "a"), Arm(dummy("slm", 0.4), "b"), Arm(dummy("llm_to_slm", 0.8), "c")],
        examples,
        settings,
    )
    for path in list(out.glob("*.record.json")):
        record = json.loads(path.read_text())
        record["task"]["name"] = "other"
        record["provenance"]["hardware"]["gpus"] = ["NVIDIA H200"]
        (out / f"other-{path.name}").write_text(json.dumps(record))
    address = build([out], out / "board").files["page"].as_uri()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.problems = []
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith(("file:", "data:")) or page.problems.append(request.url)
        )
        page.goto(address)
        yield page
        browser.close()


def systems(page):
    return page.eval_on_selector_all(
        "#board tbody tr:not([hidden])", "rows => rows.map(row => row.children[0].dataset.sort)"
    )


def test_loads_without_errors_or_requests(page):
    assert page.title() == "llmslm leaderboard"
    assert len(systems(page)) == 6
    assert page.locator("figure svg").count() == 4
    assert page.problems == []


def test_speeds_and_samples_can_be_read(page):
    part = page.locator("section.part").first
    part.locator("details.speeds summary").click()
    lines = part.locator("details.speeds tbody tr")
    assert lines.count() == 6
    assert lines.first.inner_text().split()[:3] == ["llm", "fixed", "1"]
    sample = part.locator(".sample").first
    assert sample.locator("h4 span").count() == 3  # each system once, those of one text together
    assert sample.locator(".answers > div").count() <= 4


def test_filters_by_task_and_hardware(page):
    page.select_option("#task", "other")
    assert len(systems(page)) == 3
    assert page.locator("section.part:visible").count() == 1
    page.select_option("#hardware", "NVIDIA H200")
    assert len(systems(page)) == 3
    page.select_option("#task", "copying")
    assert systems(page) == []
    page.select_option("#hardware", "")
    assert systems(page) == ["llm", "slm", "llm_to_slm"]


def test_sorts_both_ways_and_numbers_as_numbers(page):
    page.select_option("#task", "copying")
    column = page.locator("#board thead button", has_text="chrF").first
    column.click()
    assert systems(page) == ["llm", "llm_to_slm", "slm"]
    column.click()
    assert systems(page) == ["slm", "llm_to_slm", "llm"]
    assert page.locator("#board thead th[aria-sort=ascending]").count() == 1
    page.locator("#board thead button", has_text="system").click()
    assert systems(page) == ["llm", "llm_to_slm", "slm"]


def test_shows_the_winner(page):
    page.select_option("#task", "copying")
    best = page.eval_on_selector_all(
        "#board tr:not([hidden]) .best", "cells => cells.map(cell => cell.parentElement.children[0].dataset.sort)"
    )
    assert set(best) == {"llm"}
