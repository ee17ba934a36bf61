"""The page as people meet it: a real server, and Chromium without a window."""

from __future__ import annotations

import io
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from commands import limner
from serving import PROMPT, Queue, Server, serving

pytest.importorskip("gradio", reason="the page needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")

PATIENCE = 120_000  # milliseconds, on a busy machine
SIZES = {"phone": (390, 844), "desk": (1440, 900)}
LONG = "150"  # steps, so that there is time to see what happens meanwhile


@pytest.fixture(scope="module")
def queue() -> Queue:
    """One server: what the page does with the queue, the other tests of serving do in both ways."""
    return Queue(None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium."""
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(browser: Any, server: Server, size: str = "desk", **context: Any) -> Iterator[Any]:
    """The page of a server in a fresh browser; at the end nothing was wrong in it, and nobody else was asked."""
    width, height = SIZES[size]
    with browser.new_context(viewport={"width": width, "height": height}, **context) as fresh:
        page, wrong = fresh.new_page(), []
        page.set_default_timeout(PATIENCE)
        # Errors only: Gradio's uploader warns of what it did not implement itself
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        # The echo of Gradio's client when it ends what it listens to, as the page is left or loaded anew
        left = "AbortError: BodyStreamBuffer was aborted"
        page.on("pageerror", lambda error: None if str(error).startswith(left) else wrong.append(str(error)))
        own = (server.url + "/", "data:", "blob:")
        page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(own) else None)
        page.goto(server.url)
        page.wait_for_selector("#draw")
        if server.call("GET", "/v1/jobs?limit=1")[1].get("jobs"):
            page.wait_for_selector("#easel .status")  # of the newest job, which would else be taken for the next one
        yield page
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "it can be scrolled sideways"
        assert not wrong


def draw(page: Any, prompt: str = PROMPT, **settings: str) -> None:
    """Set what is to be drawn, by the labels of the page, and press Enter."""
    if set(settings) - {"Pictures", "Seed"} and not page.get_by_label("Steps").is_visible():
        page.get_by_text("More settings").click()
    for label, value in settings.items():
        page.get_by_label(label, exact=True).fill(value)
    page.locator("#prompt textarea").fill(prompt)
    page.evaluate("document.querySelector('#easel .status')?.classList.add('before')")
    page.locator("#prompt textarea").press("Enter")


def status(page: Any, state: str) -> str:
    """What the page says once the job that it shows is in that state, and not the one shown before `draw`."""
    return str(page.wait_for_selector(f"#easel .status.{state}:not(.before)").inner_text())


def pixels(server: Server, url: str) -> np.ndarray:
    """A picture of the server."""
    return np.asarray(Image.open(io.BytesIO(server.call("GET", url.removeprefix(server.url))[1])))


@pytest.mark.parametrize("size", SIZES)
def test_a_newcomer_draws_and_draws_again(server: Server, browser: Any, size: str) -> None:
    with opened(browser, server, size) as page:
        assert page.locator("#prompt textarea").input_value() == PROMPT, "there is something to draw at once"
        draw(page, f"{PROMPT[:-1]} at a {size}.", Steps=LONG, Pictures="2", Seed="7")
        page.wait_for_selector("#easel img.preview")
        page.wait_for_selector("#easel .status.running:has-text('left')")
        assert status(page, "done").startswith("Drawn in")
        assert [page.locator(button).inner_text() for button in ("#draw", "#cancel")] == ["Draw", "Cancel"]
        assert page.locator("#easel figcaption").all_inner_texts() == ["seed 7", "seed 8"]
        drawn = page.locator("#easel figure img").nth(1).get_attribute("src")

        page.wait_for_selector(f"#gallery img[src$='{drawn}']")
        page.reload()
        page.locator("#gallery .thumbnail-item img").nth(1).click()
        assert "Seed 8" in " ".join(page.locator("#facts").inner_text().split())
        page.locator("#again").click()
        page.wait_for_function("document.querySelector('#seed input, #seed textarea').value === '8'")
        assert page.locator("#prompt textarea").input_value() == f"{PROMPT[:-1]} at a {size}."
        page.locator("#draw").click()
        page.wait_for_function("document.querySelectorAll('#easel figure').length === 1")
        status(page, "done")
        again = page.locator("#easel figure img").get_attribute("src")
        assert again != drawn
        assert np.array_equal(pixels(server, again), pixels(server, drawn))


def test_the_best_of_several_with_a_lora_and_the_model_s_report(server: Server, browser: Any) -> None:
    with opened(browser, server) as page:
        page.get_by_text("More settings").click()
        page.locator("#loras input").fill("wild:0.5")
        page.locator("#loras input").press("Enter")
        draw(page, Pictures="2", Seed="3", **{"Best of": "4"})
        status(page, "done")
        job = server.call("GET", "/v1/jobs?limit=1")[1]["jobs"][0]
        assert (job["settings"]["best_of"], job["settings"]["loras"]) == (4, ["wild:0.5"])
        best = [f"seed {image['seed']}" for image in job["images"]]
        assert page.locator("#easel figcaption").all_inner_texts() == best
        first = page.locator("#easel figure img").first.get_attribute("src")

        page.wait_for_selector("#gallery img")
        page.locator("#gallery .thumbnail-item img").first.click()
        assert "LoRA wild:0.5" in " ".join(page.locator("#facts").inner_text().split())
        page.locator("#again").click()
        playwright.expect(page.get_by_label("Pictures", exact=True)).to_have_value("1", timeout=PATIENCE)
        assert "wild:0.5" in page.locator("#loras").inner_text()
        page.locator("#draw").click()
        page.wait_for_function("document.querySelectorAll('#easel figure').length === 1")
        status(page, "done")
        again = page.locator("#easel figure img").get_attribute("src")
        assert np.array_equal(pixels(server, again), pixels(server, first)), "alone it is the same"

        with page.expect_popup() as popup:
            page.get_by_text("How good tiny is").click()
        popup.value.wait_for_load_state()
        assert "draws like a tiny model" in popup.value.inner_text("body")


def test_everything_goes_by_keyboard(server: Server, browser: Any) -> None:
    with opened(browser, server) as page:
        keys = page.keyboard

        def tab_to(selector: str) -> None:
            for _ in range(60):
                if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                    return
                keys.press("Tab")
            raise AssertionError(f"Tab never comes to {selector}")

        page.wait_for_function("document.activeElement.matches('#prompt textarea')")
        keys.press("Control+a")
        keys.type("A dog by keyboard.")
        tab_to("#seed input, #seed textarea")
        keys.type("9")
        keys.press("Enter")
        status(page, "done")
        page.wait_for_selector("#gallery img[alt='A dog by keyboard.']")
        tab_to("#gallery .thumbnail-item")
        keys.press("Enter")
        page.wait_for_selector("#facts .prompt:has-text('A dog by keyboard.')")
        tab_to("#again")
        keys.press("Enter")
        page.wait_for_function("document.activeElement.matches('#prompt textarea')")
        assert page.locator("#seed input, #seed textarea").input_value() == "9"
    long = server.call("POST", "/v1/jobs", {"prompt": "A long walk.", "steps": 150, "n": 16})[1]["id"]
    with opened(browser, server) as page:
        status(page, "running")
        page.keyboard.press("Escape")
        assert status(page, "cancelled") == "Cancelled."
    assert server.ended(long)["state"] == "cancelled"


def test_a_long_job_is_cancelled(server: Server, browser: Any) -> None:
    with opened(browser, server) as page:
        assert not page.locator("#cancel").is_enabled()
        draw(page, Steps=LONG, Pictures="16")
        status(page, "running")
        page.locator("#cancel").click()
        assert status(page, "cancelled") == "Cancelled."
        job = server.call("GET", "/v1/jobs?limit=1")[1]["jobs"][0]
        assert job["state"] == "cancelled"
        assert job["step"] < job["steps"]
        page.wait_for_selector("#draw:enabled")


def test_who_opens_the_page_sees_what_is_being_drawn(server: Server, browser: Any) -> None:
    job = server.call("POST", "/v1/jobs", {"prompt": "A dog.", "steps": 150, "n": 16})[1]["id"]
    with opened(browser, server) as page:
        status(page, "running")
        page.locator("#cancel").click()
        status(page, "cancelled")
    assert server.ended(job)["state"] == "cancelled"


def test_a_picture_to_begin_with_and_what_of_it_is_new(server: Server, browser: Any, tmp_path: Path) -> None:
    Image.new("RGB", (32, 16), "red").save(tmp_path / "red.png")
    mask = Image.new("L", (32, 16))
    mask.paste(255, (16, 0, 32, 16))
    mask.save(tmp_path / "right.png")
    with opened(browser, server) as page:
        page.get_by_text("Begin with a picture").click()
        for name, file in (("image", "red.png"), ("mask", "right.png")):
            page.locator(f"#{name} input[type=file]").set_input_files(tmp_path / file)
            page.wait_for_selector(f"#{name} img")
        draw(page, Seed="5")
        status(page, "done")
        settings = server.call("GET", "/v1/jobs?limit=1")[1]["jobs"][0]["settings"]
        assert settings["image"]
        assert settings["mask"]
        drawn = page.locator("#easel figure img").get_attribute("src")
        assert pixels(server, drawn).shape[1] > pixels(server, drawn).shape[0], "it has the picture's shape"

        page.reload()
        page.locator("#gallery .thumbnail-item img").first.click()
        page.locator("#again").click()
        page.get_by_text("Begin with a picture").click()
        page.wait_for_selector("#mask img")
        draw(page)
        page.wait_for_function(
            "src => document.querySelector('#easel figure a img')?.getAttribute('src') !== src", arg=drawn
        )
        status(page, "done")
        assert np.array_equal(
            pixels(server, page.locator("#easel figure img").get_attribute("src")), pixels(server, drawn)
        )


def test_what_can_t_be_drawn_is_said(server: Server, browser: Any) -> None:
    with opened(browser, server) as page:
        draw(page, Seed="many")
        assert status(page, "failed").startswith("Seed: ")
        draw(page, "", Seed="")
        page.wait_for_selector("#easel .status.failed:has-text('prompt')")
        draw(page, PROMPT, Seed="1")
        status(page, "done")


def test_the_gallery_survives_the_server_which_ends_while_pages_are_open(
    folder: Path, browser: Any, tmp_path: Path
) -> None:
    with serving(tmp_path / "served", folder) as server, browser.new_context() as visitor:
        page = visitor.new_page()  # which complains, as it should, when the server goes
        page.set_default_timeout(PATIENCE)
        page.goto(server.url)
        draw(page, "A cat <b>& a dog.", Seed="3")
        status(page, "done")
        page.wait_for_selector("#gallery img")
        begun = time.monotonic()
        assert server.kill(signal.SIGTERM) in {0, -signal.SIGTERM}
        assert time.monotonic() - begun < 15, "an open page kept the server"
    with serving(tmp_path / "served", folder) as server, opened(browser, server) as page:
        page.wait_for_selector("#gallery img")
        assert page.locator("#gallery img").first.get_attribute("alt") == "A cat <b>& a dog."


def test_a_page_behind_tokens_asks_for_one_and_shows_its_own_pictures(
    folder: Path, browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "served"
    tokens = {}
    for name in ("ada", "bob"):
        assert limner("token", "add", name, "--data", data) == 0
        tokens[name] = capsys.readouterr().out.strip()
    with serving(data, folder, sets=("require_tokens=true",)) as server:
        with browser.new_context() as stranger:
            answer = stranger.request.get(f"{server.url}/page/")  # a browser without a window has nowhere to ask
            assert answer.status == 401
            assert answer.headers["www-authenticate"].startswith("Basic"), "what makes browsers ask"
        with opened(browser, server, http_credentials={"username": "", "password": tokens["ada"]}) as page:
            draw(page, "A cat.", Seed="3")
            status(page, "done")
            page.wait_for_selector("#gallery img")
        with opened(browser, server, http_credentials={"username": "", "password": tokens["bob"]}) as page:
            draw(page, "A dog.", Seed="3")
            status(page, "done")
            page.wait_for_selector("#gallery img")
            assert [image.get_attribute("alt") for image in page.locator("#gallery img").all()] == ["A dog."]
