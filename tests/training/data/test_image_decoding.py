import io
import os
import zipfile

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from hf_vq.images import covering_size, pixels_to_tensor
from hf_vq.training.data.image_decoding import (
    BrokenImageError,
    PathRules,
    crop_and_flip,
    decode_image,
    shrink,
)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(image, kind="PNG", **options):
    result = decode_image({"bytes": encoded(image, kind, **options), "path": None})
    assert result.mode == "RGB"
    return np.asarray(result)


def test_transparency_is_laid_on_white():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = (0, 128, 255)  # black: transparent, half, opaque
    assert decoded(Image.fromarray(pixels))[0].tolist() == [[255] * 3, [127] * 3, [0] * 3]
    grey = np.zeros((1, 2, 2), np.uint8)
    grey[0, :, 1] = (0, 255)
    assert decoded(Image.fromarray(grey, "LA"))[0].tolist() == [[255] * 3, [0] * 3]


def test_palettes():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert decoded(image)[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert decoded(image, transparency=1)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_16_bit_greyscale_is_scaled_not_clipped():
    values = np.array([[0, 257, 25700, 65535]], np.uint16)
    assert decoded(Image.fromarray(values))[0, :, 0].tolist() == [0, 1, 100, 255]
    assert decoded(Image.fromarray(values.astype(np.int32)), "TIFF")[0, :, 1].tolist() == [0, 1, 100, 255]
    with pytest.raises(BrokenImageError, match="do not fit in 16 bits"):
        decoded(Image.fromarray(np.array([[-1]], np.int32)), "TIFF")
    with pytest.raises(BrokenImageError, match="floating-point"):
        decoded(Image.fromarray(np.array([[0.5]], np.float32)), "TIFF")


def test_greyscale_bilevel_and_cmyk():
    assert decoded(Image.new("L", (1, 1), 77))[0, 0].tolist() == [77] * 3
    assert decoded(Image.new("1", (1, 1), 1))[0, 0].tolist() == [255] * 3
    assert decoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")[0, 0].tolist() == [255] * 3


def test_exif_orientation():
    image = Image.new("RGB", (16, 8), "black")
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise: the left half is the top
    upright = decoded(image, "JPEG", exif=exif, quality=100)
    assert upright.shape == (16, 8, 3)
    assert upright[3, 4, 0] > 240 and upright[12, 4, 0] < 15


def test_sources(tmp_path):
    image = Image.new("RGB", (3, 2), (1, 2, 3))
    image.save(tmp_path / "a.png")
    for source in (
        image,
        encoded(image),
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        {"bytes": None, "path": str(tmp_path / "a.png")},
    ):
        assert np.asarray(decode_image(source)).tolist() == np.asarray(image).tolist()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_every_damage_is_one_error(kind):
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)), kind)
    for broken in (whole[: len(whole) // 2], whole[:10], b"", b"no image at all"):
        with pytest.raises(BrokenImageError):
            decode_image(broken)


def test_missing_images_are_broken():
    for source in (None, {"bytes": None, "path": None}, {"bytes": None, "path": "/nowhere/x.png"}):
        with pytest.raises(BrokenImageError):
            decode_image(source)


def test_scaling_keeps_the_shape_and_is_antialiased():
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    small = shrink(Image.fromarray(stripes), (16, 16))
    assert small.shape == (16, 32, 3) and small.dtype == np.uint8
    assert abs(small[:, 4:-4].astype(int) - 127).max() <= 3  # without antialiasing: black or white
    assert shrink(Image.new("RGB", (7, 3)), (5, 5)).shape == (5, 12, 3)
    same = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    assert np.array_equal(crop_and_flip(Image.fromarray(same), (16, 16)), same)
    assert [covering_size((20, 30), size) for size in ((10, 10), (10, 30), (40, 10))] == [(10, 15), (20, 30), (40, 60)]


def test_crops_and_flip():
    pixels = np.arange(4 * 8, dtype=np.uint8).reshape(4, 8, 1).repeat(3, 2)
    image = Image.fromarray(pixels)
    assert np.array_equal(crop_and_flip(image, (4, 4)), pixels[:, 2:6])
    assert np.array_equal(crop_and_flip(image, (3, 8)), pixels[:3])
    lefts, flips = set(), 0
    for seed in range(200):
        cut = crop_and_flip(image, (4, 4), "random", True, np.random.default_rng(seed))[0, :, 0].tolist()
        flipped = cut[0] > cut[1]
        flips += flipped
        lefts.add(min(cut))
        assert sorted(cut) == list(range(min(cut), min(cut) + 4))
    assert lefts == {0, 1, 2, 3, 4} and 60 < flips < 140


@pytest.mark.parametrize("kind", [2, 60000])
def test_a_shrunk_image_gives_the_same_crops(kind):
    """Also an elongated one, of which nothing is resized but what is seen."""
    pixels = np.random.default_rng(0).integers(0, 255, (kind, 30, 3), np.uint8)
    small = shrink(Image.fromarray(pixels), (8, 8))
    assert np.asarray(small).size <= max(pixels.size, 16 * 8 * 8 * 3)
    for seed in range(5):
        cuts = [
            crop_and_flip(image, (8, 8), "random", True, np.random.default_rng(seed))
            for image in (Image.fromarray(pixels), small, pixels)
        ]
        assert cuts[0].shape == (8, 8, 3) and np.array_equal(cuts[0], cuts[1]) and np.array_equal(cuts[0], cuts[2])


def test_an_elongated_image_is_cut_out_of_the_right_place():
    rows = (np.arange(2000) // 8).astype(np.uint8)
    image = Image.fromarray(np.repeat(rows[:, None, None], 2, 1).repeat(3, 2))  # resized whole: 128000 rows
    cut = crop_and_flip(image, (128, 128))
    assert abs(cut.astype(int) - 125).max() <= 1
    assert abs(cut[0].astype(int) - 124).max() <= 1 and abs(cut[-1].astype(int) - 125).max() <= 1


def test_grey_and_transparent_images():
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 5, 4), np.uint8), "RGBA")
    assert np.array_equal(decode_image(colours, 4), colours)
    assert np.asarray(decode_image(colours, 1)).tolist() == np.asarray(decode_image(colours).convert("L")).tolist()
    assert np.asarray(decode_image(colours.convert("RGB"), 4))[..., 3].min() == 255
    values = np.array([[0, 257, 25700, 65535]], np.uint16)
    assert np.asarray(decode_image(Image.fromarray(values), 1)).tolist() == [[0, 1, 100, 255]]
    with pytest.raises(BrokenImageError, match="`channels` must be 1, 3 or 4"):
        decode_image(colours, 7)


def test_arrays_of_any_channels():
    pixels = np.random.default_rng(0).integers(0, 255, (16, 24, 7), np.uint8)
    for source in (pixels, pixels.tolist(), pixels / 255, pixels.transpose(2, 0, 1)):
        assert np.array_equal(decode_image(source, 7), pixels)
    whole = Image.fromarray(pixels[..., 4]).resize((12, 8), Image.BICUBIC)
    assert np.array_equal(crop_and_flip(pixels, (8, 8))[..., 4], np.asarray(whole)[:, 2:10])
    for wrong in (pixels[..., :5], pixels * 2.0, pixels.astype(np.int64) - 1):
        with pytest.raises(BrokenImageError, match="`images`"):
            decode_image(wrong, 7)


def test_addresses_are_read(tmp_path):
    data = encoded(Image.new("RGB", (3, 2), (1, 2, 3)))
    with fsspec.open("memory://pictures/a.png", "wb") as file:
        file.write(data)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("cat/1.png", data)
    (tmp_path / "b.png").write_bytes(data)
    rules = PathRules(("memory",), root=str(tmp_path))
    for path in (
        "memory://pictures/a.png",
        f"zip://cat/1.png::{tmp_path}/all.zip",
        "b.png",
        f"file://{tmp_path}/b.png",
    ):
        assert decode_image({"bytes": None, "path": path}, rules=rules).size == (3, 2)
    for path, message in (
        ("zip://cat/2.png::all.zip", "cat/2.png"),
        ("https://nowhere/a.png", "not an address of this data set"),
        ("exec://a::memory://pictures/a.png", "exec:// is not read"),
        ("zip://cat/1.png", "names no archive"),
    ):
        with pytest.raises(BrokenImageError, match=message):
            decode_image({"bytes": None, "path": path}, rules=rules)


def test_hostile_paths_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    (tmp_path / "long.png").write_bytes(bytes(1001))
    for path in ("/dev/zero", "/dev/stdin", str(tmp_path / "pipe"), str(tmp_path / "link.png"), str(tmp_path)):
        with pytest.raises(BrokenImageError, match="not a regular file"):
            decode_image({"bytes": None, "path": path})
    with pytest.raises(BrokenImageError, match="longer than 1000 bytes"):
        decode_image(tmp_path / "long.png", rules=PathRules(max_bytes=1000))
    inside = PathRules(("hf",), folders=(str(tmp_path / "cache"),))
    (tmp_path / "cache").mkdir()
    picture = Image.new("RGB", (3, 2))
    picture.save(tmp_path / "secret.png")
    picture.save(tmp_path / "cache" / "own.png")
    (tmp_path / "cache" / "link.png").symlink_to(tmp_path / "secret.png")
    assert decode_image(tmp_path / "cache" / "own.png", rules=inside).size == (3, 2)
    for path in (tmp_path / "secret.png", tmp_path / "cache" / "link.png", tmp_path / "cache" / ".." / "secret.png"):
        with pytest.raises(BrokenImageError, match="may not name"):
            decode_image(path, rules=inside)


def test_pixel_values():
    values = pixels_to_tensor(np.array([[[0, 127, 255]]], np.uint8))
    assert values.shape == (3, 1, 1) and values.dtype == torch.float32
    assert values.flatten().tolist() == pytest.approx([-1.0, 127 / 127.5 - 1, 1.0])
