"""The page in a real browser: Debian's Chromium without a window, driven by selenium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.common import alone, ids_of, serving, tiny_model

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: make test-browser")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="there is no chromium here: make test-browser")
BOOK = "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little.\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with serving(model=tiny_model(window=64, anchors=8), chunk=48) as both:
        yield both


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, server: Any) -> Any:
    browser.get(server[0])
    browser.execute_script("localStorage.clear()")
    browser.get(server[0])
    wait(browser, lambda: "tiny" in text(browser, "model"))
    return browser


def wait(page: Any, until: Any) -> None:
    WebDriverWait(page, 60, poll_frequency=0.1).until(lambda _: until())


def text(page: Any, id: str) -> str:
    return str(page.find_element(By.ID, id).text)


def messages(page: Any, kind: str) -> list[str]:
    found = page.find_elements(By.CSS_SELECTOR, f".message.{kind}")
    return [each.get_attribute("textContent") for each in found]


def ask(page: Any, question: str) -> str:
    """Asks by the keyboard; the answer, once it has ended."""
    before = len(messages(page, "assistant"))
    page.find_element(By.ID, "question").send_keys(question, Keys.ENTER)
    wait(page, lambda: "tokens/s" in text(page, "note") and page.find_element(By.ID, "send").is_displayed())
    wait(page, lambda: len(messages(page, "assistant")) > before)
    return messages(page, "assistant")[-1]


def set_longest(page: Any, tokens: int) -> None:
    page.find_element(By.ID, "open-settings").click()
    field = page.find_element(By.NAME, "max_tokens")
    field.clear()
    field.send_keys(str(tokens), Keys.ESCAPE)
    wait(page, lambda: not page.find_element(By.ID, "settings").is_displayed())


def upload(page: Any, folder: Path, data: str) -> None:
    file = folder / "book.txt"
    file.write_text(data)
    page.find_element(By.ID, "file").send_keys(str(file))
    wait(page, lambda: "read once" in text(page, "reading-state"))


def test_a_document_is_read_and_answers_about_it_are_streamed(page: Any, server: Any, tmp_path: Path) -> None:
    set_longest(page, 12)
    upload(page, tmp_path, BOOK * 4)
    assert text(page, "reading-title") == "book.txt"
    assert (text(page, "size-kept")[-2:], text(page, "size-full")[-2:]) == ("kB", "kB")
    page.find_element(By.CSS_SELECTOR, "#kept summary").click()
    wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "#kept-text mark"))
    assert page.find_element(By.ID, "kept-text").get_attribute("textContent") == BOOK * 4
    answer = ask(page, "Who is he?")
    prompt = f"<user>{BOOK * 4}\n\nWho is he?</s><assistant>"
    assert answer == alone(server[1].engine.model, ids_of(prompt), 12)
    assert f"{len(ids_of(f'<user>{BOOK * 4}'))} of" in text(page, "note")
    # Another conversation about it, and back.
    page.find_element(By.ID, "new").click()
    assert messages(page, "user") == []
    ask(page, "Where?")
    page.find_elements(By.CSS_SELECTOR, "#conversations .name")[-1].click()
    assert messages(page, "user") == ["Who is he?"]
    page.refresh()  # conversations stay in the browser
    wait(page, lambda: messages(page, "user") == ["Who is he?"])


def test_an_answer_can_be_stopped_and_errors_are_told(page: Any, server: Any) -> None:
    set_longest(page, 8000)
    page.find_element(By.ID, "question").send_keys("Tell me", Keys.ENTER)
    wait(page, lambda: messages(page, "assistant")[-1:] not in ([], [""]))
    page.find_element(By.ID, "stop").click()
    wait(page, lambda: page.find_element(By.ID, "send").is_displayed())
    wait(page, lambda: server[1].engine.active == 0)
    page.execute_script("localStorage.setItem('ahn.settings', JSON.stringify({temperature: 9}))")
    page.find_element(By.ID, "question").send_keys("And now", Keys.ENTER)
    wait(page, lambda: messages(page, "error"))
    assert "temperature" in messages(page, "error")[0]


def test_everything_has_a_name_and_is_reached_by_keys(page: Any) -> None:
    kinds = "button, input, textarea, progress, [role]"

    def unnamed(within: str) -> list[str]:
        found = page.find_elements(By.CSS_SELECTOR, f"{within} :is({kinds})")
        shown = [each for each in found if each.is_displayed()]
        assert len(shown) > 4
        return [each.get_attribute("outerHTML") for each in shown if not each.accessible_name]

    assert unnamed("body") == []
    page.find_element(By.ID, "open-settings").send_keys(Keys.ENTER)
    assert unnamed("dialog") == []
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    wait(page, lambda: page.switch_to.active_element.get_attribute("id") == "open-settings")
    page.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    reached = set()
    for _ in range(30):  # round the page more than once, from wherever the browser begins
        webdriver.ActionChains(page).send_keys(Keys.TAB).perform()
        reached.add(page.switch_to.active_element.get_attribute("id"))
    assert {"open-settings", "file", "new", "question", "send"} <= reached


def test_dark_and_narrow(page: Any) -> None:
    def ground() -> str:
        return str(page.execute_script("return getComputedStyle(document.body).backgroundColor"))

    light = ground()
    media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    assert ground() != light
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    size = {"width": 340, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 340
    assert not page.find_element(By.ID, "drop").is_displayed()
    page.find_element(By.ID, "open-library").click()
    assert page.find_element(By.ID, "drop").is_displayed()
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_asks_nobody_else_and_makes_no_error(page: Any, server: Any) -> None:
    asked = page.execute_script("return performance.getEntriesByType('resource').map((each) => each.name)")
    assert asked
    assert all(address.startswith(server[0]) for address in asked)
    unforeseen = [entry for entry in page.get_log("browser") if "400" not in entry["message"]]
    assert unforeseen == []
