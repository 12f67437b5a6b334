import io

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vq.images import pixels_to_tensor
from hf_vq.training.data.image_decoding import (
    BrokenImageError,
    crop_and_flip,
    decode_image,
    resize_shorter_side,
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


def test_resize_keeps_the_shape_and_is_antialiased():
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    small = resize_shorter_side(Image.fromarray(stripes), 16)
    assert small.shape == (16, 32, 3) and small.dtype == np.uint8
    assert abs(small[:, 4:-4].astype(int) - 127).max() <= 3  # without antialiasing: black or white
    assert resize_shorter_side(Image.new("RGB", (7, 3)), 5).shape == (5, 12, 3)
    same = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    assert np.array_equal(resize_shorter_side(Image.fromarray(same), 16), same)


def test_crops_and_flip():
    pixels = np.arange(4 * 8, dtype=np.uint8).reshape(4, 8, 1).repeat(3, 2)
    assert np.array_equal(crop_and_flip(pixels, 4, "center", False, None), pixels[:, 2:6])
    lefts, flips = set(), 0
    for seed in range(200):
        cut = crop_and_flip(pixels, 4, "random", True, np.random.default_rng(seed))[0, :, 0].tolist()
        flipped = cut[0] > cut[1]
        flips += flipped
        lefts.add(min(cut))
        assert sorted(cut) == list(range(min(cut), min(cut) + 4))
    assert lefts == {0, 1, 2, 3, 4} and 60 < flips < 140


def test_pixel_values():
    values = pixels_to_tensor(np.array([[[0, 127, 255]]], np.uint8))
    assert values.shape == (3, 1, 1) and values.dtype == torch.float32
    assert values.flatten().tolist() == pytest.approx([-1.0, 127 / 127.5 - 1, 1.0])
