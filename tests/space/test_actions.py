"""What the web page does, without gradio: uploads, codes, drawing, completing, comparing, and their limits."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vq.images import to_pil


ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "examples/space"
PICTURE = ROOT / "examples/data/thinking_face.png"
SMILEYS = "Smileys & Emotion"


def load_actions():
    spec = importlib.util.spec_from_file_location("space_actions", SPACE / "actions.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["space_actions"] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


actions = load_actions()


@pytest.fixture(scope="module")
def shelf():
    return actions.ModelShelf(actions.find_checkpoints([ROOT / "examples/checkpoints"]))


@pytest.fixture(scope="module")
def model(shelf):
    return shelf.get("emoji-64")


def test_the_packaged_checkpoints_are_found(shelf):
    assert {"emoji-64", "emoji-64-vqvae2"} <= set(shelf.sources)
    assert actions.find_checkpoints(["/nowhere"]) == {}


def test_only_named_models_are_loaded_unless_any_is_allowed(shelf):
    with pytest.raises(ValueError, match="`model` must be one of .*emoji-64.*, got '/etc'"):
        shelf.get("/etc")
    with pytest.raises(ValueError, match="got nothing"):
        shelf.get(" ")
    with pytest.raises(ValueError, match="does not exist"):
        actions.ModelShelf({}, any_source=True).get("/nowhere/at/all")


def test_the_shelf_holds_few_models(shelf, model, monkeypatch):
    monkeypatch.setattr(actions, "load_model", lambda name, source, device: (name, source, device))
    small = actions.ModelShelf({str(i): f"folder {i}" for i in range(9)})
    for i in range(9):
        assert small.get(str(i)) == (str(i), f"folder {i}", "cpu")
    assert list(small._held) == ["5", "6", "7", "8"]


def test_what_a_model_takes(model):
    assert model.condition == "class" and model.grids == [(16, 16)]
    assert len(model.class_names) == 9 and model.class_names[0] == SMILEYS
    assert model.options == ["guidance_scale", "temperature", "top_k", "top_p"]
    assert "64×64 pixels to 16×16 codes of 1024" in model.summary


def test_a_tokenizer_alone_draws_nothing():
    model = actions.load_model("alone", str(ROOT / "examples/checkpoints/emoji-32-segmentation/vqvae"))
    assert model.pipeline is None and model.condition is None and model.class_names == []
    assert actions.encode(model, PICTURE)[0].levels[0].shape == (8, 8)
    with pytest.raises(ValueError, match="tokenizer without a prior"):
        actions.draw(model, actions.Wishes())
    with pytest.raises(ValueError, match="completes nothing"):
        actions.prepare_completion(model, PICTURE)


def test_uploads_are_upright_rgb_on_white(tmp_path):
    image = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    read = actions.read_upload(tmp_path / "a.png")
    assert read.mode == "RGB" and read.getpixel((0, 0)) == (255, 255, 255) and read.getpixel((5, 3)) == (0, 0, 255)


def test_bad_uploads_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Upload a picture first"):
        actions.read_upload(None)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(PICTURE.read_bytes()[:300])
    for name in ("text.png", "cut.png"):
        with pytest.raises(ValueError, match="must be an image file such as PNG"):
            actions.read_upload(tmp_path / name)
    Image.new("1", (5000, 4000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match="at most 16 million pixels, got 5000×4000"):
        actions.read_upload(tmp_path / "huge.png")
    monkeypatch.setattr(actions, "MAX_UPLOAD_BYTES", 2**10)
    with pytest.raises(ValueError, match="a file of at most 0 MB, got 0.0 MB"):
        actions.read_upload(PICTURE)


def test_the_codes_are_those_of_the_tokenizer(model):
    codes, text = actions.encode(model, PICTURE)
    values = model.processor(Image.open(PICTURE), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model.tokenizer.encode(values)
        picture = to_pil(model.tokenizer.decode_indices(expected.indices).sample)[0]
    assert (codes.levels[0] == expected.indices[0].numpy()).all()
    assert (np.asarray(actions.decode(model, codes.levels)) == np.asarray(picture)).all()
    different = expected.indices.unique().numel()
    assert text.startswith(f"256 codes, {different} different ones") and "320 bytes" in text  # 256 codes of 10 bits
    error = (np.asarray(picture, float) - np.asarray(codes.shown, float)) / 255
    assert float(re.search("PSNR ([\\d.]+)", text)[1]) == pytest.approx(-10 * np.log10((error**2).mean()), abs=0.1)


def test_edits_and_their_undoing(model):
    codes, _ = actions.encode(model, PICTURE)
    one = actions.edit(codes, 0, 1, 2, 77, 1024)
    two = actions.edit(one, 0, 15, 15, 5, 1024)
    assert one.levels[0][1, 2] == 77 and (one.levels[0] != codes.levels[0]).sum() == 1
    assert (actions.undo(two).levels[0] == one.levels[0]).all() and len(actions.undo(two).history) == 1
    assert (actions.undo(two, everything=True).levels[0] == codes.levels[0]).all()
    assert actions.undo(codes) is codes
    for wrong in ((0, 16, 0, 1), (0, 0, -1, 1), (0, 0, 0, 1024), (1, 0, 0, 1)):
        with pytest.raises(ValueError, match="must be"):
            actions.edit(codes, *wrong, 1024)


def test_clicks_fall_into_cells():
    assert actions.cell_of((0, 0), (384, 384), (8, 8)) == (0, 0)
    assert actions.cell_of((383, 48), (384, 384), (8, 8)) == (1, 7)
    assert actions.cell_of((384, 384), (384, 384), (8, 8)) == (7, 7)  # the border itself
    assert actions.cell_of((100, 10), (200, 50), (5, 10)) == (1, 5)


def test_the_palette_shows_each_code(model):
    picture, (rows, columns) = actions.palette(model)
    assert rows * columns >= 1024 and picture.width % columns == 0
    codes = torch.tensor([5, 300])
    with torch.no_grad():
        sample = model.tokenizer.decode_indices(codes.view(2, 1, 1).expand(2, 3, 3)).sample
    for code, tile in zip(codes.tolist(), to_pil(sample[..., 4:8, 4:8]), strict=True):
        side = picture.width // columns
        left, top = code % columns * side, code // columns * side
        shown = picture.crop((left, top, left + side, top + side)).resize((4, 4), Image.Resampling.NEAREST)
        assert np.abs(np.asarray(shown, int) - np.asarray(tile, int)).max() <= 1


def test_too_large_a_codebook_is_not_shown(model, monkeypatch):
    monkeypatch.setattr(actions, "MAX_PALETTE_CODES", 500)
    with pytest.raises(ValueError, match="at most 500 codes to be shown, got 1024"):
        actions.palette(model)


def test_drawing_is_the_pipelines_own(model):
    shares = []
    options = {"guidance_scale": 2, "top_k": 50, "top_p": 1}
    wishes = actions.Wishes([SMILEYS, "Flags"], count=2, seed=3, options=options)
    drawn = actions.draw(model, wishes, shares.append)
    expected = model.pipeline(
        class_labels=[SMILEYS, "Flags"],
        guidance_scale=2.0,
        top_k=50,
        num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(3),
    ).images
    assert [label for label, _ in drawn.rows] == [SMILEYS, "Flags"] and drawn.seconds > 0
    found = [np.asarray(picture) for _, row in drawn.rows for picture in row]
    assert all((a == np.asarray(b)).all() for a, b in zip(found, expected, strict=True))
    assert shares == sorted(shares) and len(shares) == 256 and shares[-1] == 1
    assert len(drawn.captioned) == 4 and drawn.captioned[3][1] == "Flags"


def test_without_a_class_nothing_is_guided(model):
    drawn = actions.draw(model, actions.Wishes(count=1, options={"guidance_scale": 4}))
    expected = model.pipeline(generator=torch.Generator().manual_seed(0)).images[0]
    assert (np.asarray(drawn.rows[0][1][0]) == np.asarray(expected)).all()


def test_wishes_that_cannot_be_granted(model, monkeypatch):
    for wishes, message in (
        (actions.Wishes(["Dragons"]), "must be among .* got .'Dragons'"),
        (actions.Wishes([SMILEYS, "Flags"], count=9), "At most 16 pictures .* got 9 for each of 2"),
        (actions.Wishes(count=17), "`count` must be"),
        (actions.Wishes(seed=-1), "`seed` must be"),
        (actions.Wishes(count=1, options={"top_p": 3}), "`top_p` must"),
    ):
        with pytest.raises(ValueError, match=message):
            actions.draw(model, wishes)
    monkeypatch.setattr(actions, "TIME_LIMIT_S", 0.0)
    with pytest.raises(ValueError, match="longer than 0 seconds: ask for fewer"):
        actions.draw(model, actions.Wishes(count=1))


def test_a_painted_part_is_drawn_anew_and_the_rest_stays(model):
    pixel_values, enlarged = actions.prepare_completion(model, PICTURE)
    layer = Image.new("RGBA", enlarged.size, (0, 0, 0, 0))
    layer.paste((255, 0, 0, 255), (0, enlarged.height // 2, enlarged.width, enlarged.height))
    mask = actions.mask_of_layers([layer], layer.size)
    drawn, given = actions.complete(model, pixel_values, mask, actions.Wishes([SMILEYS], count=2))
    original = np.asarray(to_pil(pixel_values)[0], int)
    assert (np.asarray(given)[32:] == 128).all() and (np.asarray(given)[:32] == original[:32]).all()
    for picture in drawn.rows[0][1]:
        assert np.abs(np.asarray(picture, int)[:32] - original[:32]).max() <= 1
        assert (np.asarray(picture, int)[32:] != original[32:]).mean() > 0.3


def test_masks_that_complete_nothing(model):
    pixel_values, enlarged = actions.prepare_completion(model, PICTURE)
    assert actions.mask_of_layers([Image.new("RGBA", (9, 9), (0, 0, 0, 0))], (9, 9)) is None
    assert actions.mask_of_layers([], (9, 9)) is None
    for mask, message in ((None, "Paint over a part"), (Image.new("L", enlarged.size, 255), "nothing or all")):
        with pytest.raises(ValueError, match=message):
            actions.complete(model, pixel_values, mask, actions.Wishes())
    with pytest.raises(ValueError, match="Upload a picture first"):
        actions.complete(model, None, Image.new("L", (9, 9), 255), actions.Wishes())


def test_models_are_compared(shelf, model):
    other = actions.PageModel("twin", model.tokenizer, model.pipeline, model.processor)
    shares = []
    sheet, table = actions.compare([model, other], actions.Wishes(["Flags"], count=2), shares.append)
    assert [row[0] for row in table] == ["emoji-64", "twin"] and [row[3] for row in table] == [2, 2]
    assert table[0][2] == pytest.approx(3.42, abs=0.01)  # 750,819 + 2,668,992, as the model card says
    assert sheet.height >= 2 * 128 and shares == sorted(shares) and shares[-1] == 1
    upper, lower = (np.asarray(sheet)[row * 132 + 4 : row * 132 + 132, -264:] for row in (0, 1))
    assert (upper == lower).all()  # the same seed and weights
    with pytest.raises(ValueError, match="Choose 2 to 4 models"):
        actions.compare([model], actions.Wishes())


def pins(path):
    lines = [line.split(";")[0].strip() for line in path.read_text().splitlines() if "==" in line]
    return dict(line.split("==") for line in lines)


def test_the_pages_versions_are_the_packages_but_for_pillow():
    package, page = pins(ROOT / "constraints.txt"), pins(SPACE / "constraints.txt")
    different = {name for name in package.keys() & page.keys() if package[name] != page[name]}
    assert different == {"pillow"} and page["pillow"].startswith("12.")
    assert {"gradio", "trackio", "playwright"} <= page.keys()


def test_the_spaces_header_names_the_gradio_that_is_tested():
    header = (SPACE / "README.md").read_text().split("---")[1]
    fields = dict(line.split(": ", 1) for line in header.strip().splitlines())
    assert fields["sdk"] == "gradio" and fields["app_file"] == "app.py"
    assert fields["sdk_version"] == pins(SPACE / "constraints.txt")["gradio"]
