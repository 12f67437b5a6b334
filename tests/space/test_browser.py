"""The web page in a real browser: upload, click, generate, mask, compare; screenshots are left in pytest's folder."""

import importlib.util
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "examples/space/app.py"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
missing = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
missing += [] if CHROMIUM else ["chromium"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}: see examples/space/README.md"),
]
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PICTURE = ROOT / "examples/data/thinking_face.png"
TIMEOUT_MS = 60_000


@pytest.fixture(scope="module")
def address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(APP), "--port", str(port)]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if server.poll() is not None:
                pytest.fail(server.stdout.read())
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        profile = tmp_path_factory.mktemp("profile")
        context = playwright.chromium.launch_persistent_context(
            str(profile),
            executable_path=CHROMIUM,
            headless=True,
            args=FLAGS,
            viewport={"width": 1280, "height": 1000},
            accept_downloads=True,
        )
        yield context
        context.close()


@pytest.fixture
def page(browser, address):
    """The page, loaded; at the end no request has left this machine and no script has failed."""
    page, asked, failures = browser.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.set_default_timeout(TIMEOUT_MS)
    page.goto(address)
    page.get_by_text("pixels to").wait_for()
    yield page
    page.close()
    assert asked and not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not failures


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    return tmp_path_factory.mktemp("screenshots")


def pixels(page, selector):
    """What an image on the page shows, as the server sent it."""
    source = page.locator(f"{selector} img").first.get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")).astype(int)


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def choose(page, elem_id, option):
    page.locator(f"#{elem_id} input").first.click()
    page.get_by_role("option", name=option, exact=True).click()


def click_cell(page, selector, row, column, rows, columns):
    image = page.locator(f"{selector} img").first
    box = image.bounding_box()
    image.click(position={"x": (column + 0.5) * box["width"] / columns, "y": (row + 0.5) * box["height"] / rows})


def test_a_picture_is_encoded_and_its_codes_are_edited(page, shots):
    page.locator("#codes-upload input[type=file]").set_input_files(PICTURE)
    page.get_by_text("PSNR").wait_for()
    assert "64 codes" in page.locator("#codes-figures").inner_text()
    before = pixels(page, "#decoded")
    page.screenshot(path=shots / "codes.png", full_page=True)

    click_cell(page, "#palette", 2, 3, 16, 32)
    page.wait_for_function("document.querySelector('#code input').value == '67'")  # 2 · 32 + 3
    click_cell(page, "#decoded", 1, 6, 8, 8)
    page.get_by_text(re.compile("Row 1, column 6: code \\d+ became 67")).wait_for()
    page.wait_for_timeout(500)
    changed = np.abs(pixels(page, "#decoded") - before).sum(axis=-1) > 60
    side = len(before) // 8
    there = changed[side : 2 * side, 6 * side : 7 * side]
    assert there.mean() > 0.2  # what was clicked, and nothing far away
    assert changed[4 * side :, : 3 * side].mean() < 0.01
    page.screenshot(path=shots / "edited.png", full_page=True)

    page.locator("#undo").click()
    page.get_by_text("Edits: 0").wait_for()
    page.wait_for_timeout(500)
    assert (pixels(page, "#decoded") == before).all()


def test_a_code_is_picked_up(page):
    page.locator("#codes-upload input[type=file]").set_input_files(PICTURE)
    page.get_by_text("PSNR").wait_for()
    page.locator("#mode").get_by_text("pick up").click()
    click_cell(page, "#decoded", 0, 0, 8, 8)
    page.get_by_text(re.compile("Took code \\d+ of row 0, column 0")).wait_for()


def test_a_bad_upload_is_said_in_words(page, shots, tmp_path):
    (tmp_path / "broken.png").write_bytes(PICTURE.read_bytes()[:200])
    page.locator("#codes-upload input[type=file]").set_input_files(tmp_path / "broken.png")
    page.get_by_text("must be an image file such as PNG, JPEG or WebP; this one cannot be read").wait_for()
    page.screenshot(path=shots / "bad_upload.png")


def test_a_huge_upload_is_said_in_words(page, tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    page.locator("#codes-upload input[type=file]").set_input_files(tmp_path / "huge.png")
    page.get_by_text("must have at most 16 million pixels, got 9000×9000").wait_for()


def test_pictures_are_drawn_by_class(page, shots):
    open_tab(page, "Generate")
    choose(page, "generate-classes", "Smileys & Emotion")
    page.keyboard.press("Escape")
    page.locator("#generate").click()
    page.get_by_text("4 pictures in").wait_for()
    assert page.locator("#generated img").count() >= 4
    drawn = pixels(page, "#generated")
    red, green, blue = drawn.reshape(-1, 3).T
    assert ((red > 180) & (green > 120) & (blue < 120)).mean() > 0.05  # smileys are yellow
    page.screenshot(path=shots / "generate.png", full_page=True)


def paint_over(page, canvas):
    """A stroke over the lower part of the picture; again, if the editor was not ready for the first one."""
    for _ in range(10):
        page.wait_for_timeout(2000)
        box = canvas.bounding_box()
        y = box["y"] + 0.7 * box["height"]
        page.mouse.move(box["x"] + 0.4 * box["width"], y)
        page.mouse.down()
        for step in range(20):
            page.mouse.move(box["x"] + (0.4 + 0.01 * step) * box["width"], y)
            page.wait_for_timeout(30)
        page.mouse.up()
        page.wait_for_timeout(1000)
        shown = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")).astype(int)
        if (np.abs(shown - (255, 45, 120)).max(axis=-1) < 30).mean() > 0.01:  # the brush's colour
            return
    pytest.fail("the stroke cannot be seen")


def test_a_sketched_mask_is_completed(page, shots):
    open_tab(page, "Complete")
    page.locator("#complete-upload input[type=file]").set_input_files(PICTURE)
    canvas = page.locator("#mask-editor canvas").first
    canvas.wait_for()
    paint_over(page, canvas)
    page.screenshot(path=shots / "mask.png", full_page=True)
    page.locator("#complete").click()
    page.locator("#complete-figures").get_by_text("4 pictures in").wait_for()
    given, first = (
        np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")).astype(int)
        for source in [image.get_attribute("src") for image in page.locator("#completed img").all()[:2]]
    )
    top = slice(0, len(given) // 3)
    assert (given[top] == first[top]).all()  # what is not painted stays to the pixel
    grey = (np.abs(given - 128) <= 1).all(axis=-1)
    assert 0.03 < grey.mean() < 0.6 and not (np.abs(first[grey] - 128) <= 1).all()
    page.screenshot(path=shots / "completed.png", full_page=True)


def test_a_mask_is_asked_for(page):
    open_tab(page, "Complete")
    page.locator("#complete-upload input[type=file]").set_input_files(PICTURE)
    page.wait_for_timeout(2000)
    page.locator("#complete").click()
    page.get_by_text("Paint over a part of the picture first").wait_for()


def test_models_are_compared(page, shots):
    open_tab(page, "Compare")
    page.locator("#compare").click()
    page.locator("#sheet img").first.wait_for()
    page.wait_for_timeout(500)
    text = page.locator("#speeds").inner_text()
    assert text.count("Pipeline") == 2
    page.screenshot(path=shots / "compare.png", full_page=True)


def test_the_model_is_changed_to_one_of_another_folder(page):
    page.locator("#model input").fill("/nowhere/at/all")
    page.keyboard.press("Enter")
    page.get_by_text("does not exist").first.wait_for()
    page.locator("#model input").fill(str(ROOT / "examples/checkpoints/emoji-32/vqvae"))
    page.keyboard.press("Enter")
    page.get_by_text("1.0 M parameters").wait_for()
    open_tab(page, "Generate")
    page.locator("#generate").click()
    page.get_by_text("is a tokenizer without a prior").wait_for()
