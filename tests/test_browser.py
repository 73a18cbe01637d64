"""The web page in a real browser: `make test-page`. Skipped where playwright or a browser is missing.

apt-get install chromium          # or set BROWSER to the path of a Chrome or Chromium
"""

import json
import os
import re
import shutil
import time

import pytest

pytest.importorskip("playwright", reason="make test-page installs playwright")
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from customize.stickers import Drawing
from customize.stickers.bench import write_references
from page import served

BROWSER = os.environ.get("BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium: apt-get install chromium, or set BROWSER")
SLOW = 120_000  # milliseconds
SIZES = {"desktop": (1440, 900), "telephone": (390, 844)}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def address(work):
    with served(work) as (address, _):
        yield address


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, address):
    """The page in a fresh browser of its own; it must leave no error in the console."""
    context = chromium.new_context(viewport={"width": 1440, "height": 900}, accept_downloads=True)
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(SLOW)
    page.goto(address)
    page.get_by_role("button", name="Draw", exact=True).wait_for()
    yield page
    context.close()
    assert errors == []


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def settings(page, steps: int = 2, number: int = 1) -> None:
    """The Draw form's steps and images."""
    page.locator("button.label-wrap", has_text=re.compile("^Settings")).click()
    for label, value in (("Images", number), ("Steps", steps)):
        field = page.get_by_role("spinbutton", name=f"number input for {label}")
        field.fill(str(value))
        field.press("Enter")


def drawn(page) -> None:
    """Waits for the images of a request."""
    expect(page.get_by_text("Done, seed")).to_be_visible(timeout=SLOW)


def draw(page) -> None:
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.get_by_text("Done, seed")).to_be_hidden(timeout=SLOW)
    drawn(page)


def test_a_first_visit_draws_with_one_click(page):
    page.get_by_role("button", name="a cartoon snail under a night sky").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a cartoon snail under a night sky")
    drawn(page)
    assert page.locator("button.thumbnail-item:visible").count() == 2


def test_images_of_a_subject_and_restoring_from_a_drawn_image(page, work):
    settings(page, 3)
    page.get_by_role("button", name="a fox shown in two images").click()
    drawn(page)
    [path] = (work / "generated").glob("a-s-fox-on-the-beach-*.png")
    seed = int(path.stem.rpartition("-")[2])
    page.reload()
    page.get_by_role("button", name="Restore the settings of an image").click()
    page.locator("input[type=file]:visible, input[type=file]").last.set_input_files(path)
    expect(page.get_by_text("Restored.")).to_be_visible()
    expect(page.get_by_text("Add the images of its subjects again")).to_be_visible()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a <s> fox on the beach")
    page.locator("button.label-wrap", has_text=re.compile("^Settings")).click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value(str(seed))
    expect(page.get_by_label("New seed each time")).not_to_be_checked()


def test_two_subjects_painted_where_they_may_be(page, work, tmp_path):
    for i, subject in enumerate((Drawing("fox", "flat"), Drawing("snail", "cartoon"))):
        if i:
            page.locator("button.label-wrap", has_text="A second subject").click()
        write_references(tmp_path / subject.word, subject, subject.word)
        page.locator("input[type=file]").nth(i).set_input_files(
            sorted((tmp_path / subject.word).glob("*.png"))[:2]
        )
        page.get_by_label("Its word in the prompt").nth(i).fill(subject.word)
        expect(page.locator("[aria-label^='Thumbnail']")).to_have_count(2 * i + 2)
    page.get_by_label("Prompt", exact=True).fill("a fox and a snail on the beach")
    page.get_by_label("painted below").check()
    page.get_by_label("Brush", exact=True).click()
    settings(page)
    _stroke(page, -70)
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.get_by_text("Paint where the second subject may be")).to_be_visible()
    page.get_by_label("Color", exact=True).click()
    page.locator("button.color:visible").nth(1).click()
    _stroke(page, 70)
    draw(page)
    [path] = (work / "generated").glob("a-s-fox-and-a-s2-snail-*.png")
    assert len(json.loads(Image.open(path).text["parameters"])["subject_images"]) == 4


def _stroke(page, right: int) -> None:
    """A vertical stroke of the brush, so many pixels right of the middle."""
    canvas = page.locator("canvas:visible").last
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2 + right, box["y"] + box["height"] / 2
    page.mouse.move(x, y - 80)
    page.mouse.down()
    page.mouse.move(x, y + 80, steps=8)
    page.mouse.up()
    page.wait_for_timeout(1000)


def test_a_mistake_is_told_and_the_page_goes_on(page):
    settings(page)
    page.get_by_label("Prompt", exact=True).fill("   ")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.get_by_text("describe the image")).to_be_visible(timeout=SLOW)
    page.get_by_label("Prompt", exact=True).fill("a bus on grass")
    page.get_by_role("button", name="Draw", exact=True).click()
    drawn(page)


def test_teaching_from_images_to_drawing_with_a_step(page, chromium, address):
    tab(page, "Teach")
    page.get_by_role("button", name="Try it with four images of a fox").click()
    expect(page.get_by_text("4 images: they look good.")).to_be_visible()
    page.get_by_role("button", name="Expert settings").click()
    steps = page.get_by_label("Max train steps")
    steps.fill("30")
    steps.press("Tab")
    page.get_by_label("Train batch size").fill("1")
    page.get_by_label("Train batch size").press("Tab")
    expect(page.get_by_text("30 steps of 1 image at")).to_be_visible()
    page.get_by_role("button", name="Teach", exact=True).click()
    expect(page.get_by_text("of 30, ")).to_be_visible(timeout=SLOW)  # live
    another = chromium.new_context().new_page()  # the page is closed meanwhile, and opened again
    another.goto(address)
    tab(another, "Teach")
    expect(another.get_by_text("of 30")).to_be_visible(timeout=SLOW)
    another.get_by_role("button", name="Pause and save").click()
    expect(another.get_by_text("paused, step").or_(another.get_by_text("done, step"))).to_be_visible(
        timeout=SLOW
    )
    if another.get_by_text("paused, step").is_visible():
        another.get_by_role("button", name="Go on").click()
    expect(another.get_by_text("done, step 30 of 30")).to_be_visible(timeout=SLOW)
    another.context.close()
    expect(page.get_by_text("done, step 30 of 30")).to_be_visible(timeout=SLOW)
    expect(page.get_by_role("row", name=re.compile("my-fox.zip"))).to_be_visible()
    slider = page.get_by_role("spinbutton", name="number input for Drawn at step 30")
    slider.fill("2")
    slider.press("Enter")
    expect(page.get_by_text("Drawn at step 12")).to_be_visible()
    page.get_by_role("button", name="Draw with this step").click()
    expect(page.get_by_label("Draw with")).to_have_value("my-fox/checkpoint-12")
    settings(page)
    page.get_by_label("Prompt", exact=True).fill("a sks fox on grass")
    page.get_by_role("button", name="Draw", exact=True).click()
    drawn(page)
    tab(page, "Runs")
    page.get_by_text("my-fox · done").click()
    expect(page.get_by_label("Chosen")).to_have_value("my-fox")
    tab(page, "Compare")
    page.get_by_label("Numbers of steps").fill("1, 2")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_text("images. The button at the image's corner")).to_be_visible(timeout=SLOW)


def test_the_keyboard_alone_reaches_everything(page):
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        found = page.evaluate(
            "() => { const e = document.activeElement; return e.innerText || e.ariaLabel || e.type || '' }"
        )
        reached.add(found.strip())
    for name in ("Draw", "Stop", "Same seed again", "a fox shown in two images"):
        assert name in reached, reached
    page.get_by_label("Prompt", exact=True).focus()
    settings(page)
    page.get_by_label("Prompt", exact=True).fill("a snail on grass")
    page.get_by_role("button", name="Draw", exact=True).focus()
    page.keyboard.press("Enter")
    drawn(page)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_fits_the_screen(size, dark, chromium, address, tmp_path):
    width, height = SIZES[size]
    context = chromium.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    page.set_default_timeout(SLOW)
    page.goto(f"{address}/?__theme={'dark' if dark else 'light'}")
    for name in ("Draw", "Teach", "Compare", "Runs"):
        page.get_by_role("tab", name=name, exact=True).click()
        page.wait_for_timeout(700)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width + 1, name
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(
                path=f"{folder}/{name.lower()}-{size}-{'dark' if dark else 'light'}.png", full_page=True
            )
    context.close()


def test_the_times_that_a_visitor_waits(chromium, address, capsys):
    """No bound: it prints them, for the benchmarks."""
    page, begin = chromium.new_context().new_page(), time.time()
    page.set_default_timeout(SLOW)
    page.goto(address)
    page.get_by_role("button", name="Draw", exact=True).wait_for()
    ready = time.time() - begin
    page.wait_for_timeout(1500)
    begin = time.time()
    page.get_by_role("button", name="a red bus and an apple on grass").click()
    page.locator("button.thumbnail-item:visible").first.wait_for()
    preview = time.time() - begin
    drawn(page)
    page.context.close()
    with capsys.disabled():
        print(json.dumps({"page ready": ready, "first preview": preview, "two images": time.time() - begin}))
