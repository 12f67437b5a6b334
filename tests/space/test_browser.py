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
import torch
from PIL import Image

from hf_vq import MaskReplaceScheduler, VQAutoregressivePipeline, VQDiffusionImagePipeline
from tests.pipelines import vq_diffusion_parts
from tests.pipelines.test_condition_images import make_conditional


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
def pipelines(tmp_path_factory):
    """The folders of a pipeline that takes prompts, and of one that takes label maps: tiny and untrained."""
    folder, steps = tmp_path_factory.mktemp("models"), 30
    transformer = vq_diffusion_parts.make_transformer("text", num_train_timesteps=steps)
    scheduler = MaskReplaceScheduler(vq_diffusion_parts.CODES, steps)
    vq_diffusion_parts.make_pipeline("text", transformer=transformer, scheduler=scheduler).save_pretrained(
        folder / "of-prompts"
    )
    make_conditional("segmentation").save_pretrained(folder / "of-maps")
    return folder


@pytest.fixture(scope="module")
def address(pipelines):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    models = [*sorted((ROOT / "examples/checkpoints").glob("*/")), *sorted(pipelines.iterdir())]
    command = [sys.executable, str(APP), *map(str, models), "--port", str(port)]
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


def change_model(page, name, summary):
    page.locator("#model input").fill(name)
    page.keyboard.press("Enter")
    page.locator("#summary").get_by_text(summary).wait_for()


def drawn(page, selector="#generated"):
    """Every picture of a gallery, without what enlarged it."""
    found = []
    for source in [image.get_attribute("src") for image in page.locator(f"{selector} .grid-wrap img").all()]:
        picture = Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")
        found.append(np.asarray(picture.resize((8, 8), Image.Resampling.NEAREST)))
    return found


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


def test_pictures_are_drawn_of_prompts(page, pipelines, shots):
    """Those that the pipeline itself draws of them, one row after the other."""
    change_model(page, "of-prompts", "conditioned on text")
    open_tab(page, "Generate")
    assert not page.locator("#generate-classes").is_visible()
    page.locator("#generate-prompts textarea").fill("a red cat\n\na blue dog\n")
    page.locator("#generate").click()
    page.get_by_text("8 pictures in").wait_for()
    page.screenshot(path=shots / "prompts.png", full_page=True)
    pipeline = VQDiffusionImagePipeline.from_pretrained(pipelines / "of-prompts")
    expected = pipeline(
        prompt=["a red cat", "a blue dog"],
        num_images_per_prompt=4,
        guidance_scale=2.0,
        num_inference_steps=25,
        generator=torch.Generator().manual_seed(0),
    ).images
    found = drawn(page)
    assert len(found) == 8
    for picture, own in zip(found, expected, strict=True):
        np.testing.assert_array_equal(picture, np.asarray(own))
    captions = page.locator("#generated .caption-label").all_inner_texts()
    assert captions == ["a red cat"] * 4 + ["a blue dog"] * 4


def test_pictures_are_drawn_of_a_label_map(page, pipelines, shots, tmp_path):
    change_model(page, "of-maps", "conditioned on image")
    open_tab(page, "Generate")
    page.locator("#generate").click()
    page.get_by_text("Upload a condition first").wait_for()
    labels = np.zeros((8, 8), np.uint8)
    labels[:, 4:], labels[5:] = 1, 2
    Image.fromarray(labels).save(tmp_path / "labels.png")
    page.locator("#generate-condition input[type=file]").set_input_files(tmp_path / "labels.png")
    page.locator("#generate-condition img").first.wait_for()
    page.locator("#generate").click()
    page.get_by_text("4 pictures in").wait_for()
    page.screenshot(path=shots / "condition.png", full_page=True)
    pipeline = VQAutoregressivePipeline.from_pretrained(pipelines / "of-maps")
    expected = pipeline(
        condition_image=Image.fromarray(labels),
        num_images_per_prompt=4,
        guidance_scale=2.0,
        top_k=100,
        generator=torch.Generator().manual_seed(0),
    ).images
    for picture, own in zip(drawn(page), expected, strict=True):
        np.testing.assert_array_equal(picture, np.asarray(own))


def test_labels_that_a_model_does_not_have_are_said_in_words(page, tmp_path):
    change_model(page, "of-maps", "conditioned on image")
    open_tab(page, "Generate")
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(tmp_path / "labels.png")
    page.locator("#generate-condition input[type=file]").set_input_files(tmp_path / "labels.png")
    page.locator("#generate-condition img").first.wait_for()
    page.locator("#generate").click()
    page.get_by_text("is no condition of kind 'segmentation'").wait_for()


def test_the_codes_of_both_levels_are_edited(page, shots):
    change_model(page, "emoji-64-vqvae2", "8×8 and 16×16 codes")
    page.locator("#codes-upload input[type=file]").set_input_files(PICTURE)
    page.get_by_text("320 codes").wait_for()
    before, maps = pixels(page, "#decoded"), pixels(page, "#index-map")
    side = len(before) // 16
    for level, (row, column, grid, code) in enumerate([(1, 6, 8, 70), (13, 2, 16, 40)]):
        page.locator("#level").get_by_text(str(level), exact=True).click()
        page.wait_for_timeout(2000)
        if level:  # the map is that of the finer level at once
            assert pixels(page, "#index-map").shape != maps.shape or (pixels(page, "#index-map") != maps).any()
        page.locator("#code input").fill(str(code))
        page.locator("#code input").press("Tab")
        click_cell(page, "#decoded", row, column, grid, grid)
        page.get_by_text(re.compile(f"Row {row}, column {column}: code \\d+ became {code}")).wait_for()
        page.wait_for_timeout(1000)
        changed = np.abs(pixels(page, "#decoded") - before).sum(axis=-1) > 60
        first = (16 // grid) * np.array([row, column]) * side
        there = changed[first[0] : first[0] + side, first[1] : first[1] + side]
        assert there.mean() > 0.1
        page.screenshot(path=shots / f"level{level}.png", full_page=True)
    for _ in range(2):
        page.locator("#undo").click()
        page.wait_for_timeout(1000)
    page.get_by_text("Edits: 0").wait_for()


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
    page.locator("#model input").fill(str(ROOT / "examples/checkpoints/emoji-32-segmentation/vqvae"))
    page.keyboard.press("Enter")
    page.get_by_text("1.0 M parameters").wait_for()
    open_tab(page, "Generate")
    page.locator("#generate").click()
    page.get_by_text("is a tokenizer without a prior").wait_for()
