import json
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

import hf_vq
from hf_vq.images import pixels_to_tensor
from hf_vq.training.data.image_decoding import crop_and_flip, decode_image


def picture(width, height, mode="RGB", seed=0):
    channels = {"RGB": 3, "RGBA": 4, "LA": 2, "L": 1}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels, mode).resize((width, height))


@pytest.fixture
def processor():
    return hf_vq.VQImageProcessor(size=32)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L"])
@pytest.mark.parametrize("width,height", [(32, 32), (50, 37), (37, 101), (20, 24)])
def test_equals_the_preprocessing_of_training(processor, mode, width, height):
    image = picture(width, height, mode)
    pixels = crop_and_flip(decode_image(image), (32, 32))
    values = processor(image, return_tensors="pt").pixel_values
    assert values.shape == (1, 3, 32, 32) and values.dtype == torch.float32
    torch.testing.assert_close(values[0], pixels_to_tensor(pixels), rtol=0, atol=1e-6)


def test_black_and_white_are_minus_one_and_one(processor):
    black, white = Image.new("RGB", (40, 40)), Image.new("RGB", (40, 40), "white")
    values = processor([black, white], return_tensors="pt").pixel_values
    assert values.shape == (2, 3, 32, 32)
    torch.testing.assert_close(values.amin((1, 2, 3)), torch.tensor([-1.0, 1.0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(values.amax((1, 2, 3)), torch.tensor([-1.0, 1.0]), rtol=0, atol=1e-6)


def test_transparent_pixels_are_white(processor):
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    image.putpixel((3, 4), (0, 0, 255, 255))
    values = processor(image, return_tensors="np").pixel_values[0]
    np.testing.assert_allclose(values[:, 4, 3], [-1, -1, 1], atol=1e-6)
    np.testing.assert_allclose(values[:, 5, 5], [1, 1, 1], atol=1e-6)
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.info["transparency"] = 1
    assert processor(palette, return_tensors="np").pixel_values.min() == pytest.approx(1)


def test_sixteen_bit_greyscale_keeps_its_range(processor):
    image = Image.fromarray(np.full((32, 32), 257 * 100, dtype=np.uint16))
    np.testing.assert_allclose(processor(image, return_tensors="np").pixel_values, 100 / 127.5 - 1, atol=1e-6)


def test_exif_orientation_is_applied(processor):
    image = picture(32, 32)
    turned = image.copy()
    turned.getexif()[0x0112] = 3  # stored upside down
    expected = processor(image.rotate(180), return_tensors="np").pixel_values
    np.testing.assert_array_equal(processor(turned, return_tensors="np").pixel_values, expected)


def test_arrays_and_tensors_equal_the_image(processor):
    image = picture(48, 40)
    expected = processor(image, return_tensors="pt").pixel_values
    array = np.array(image)
    for same in (
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array),
        array.astype(np.float32) / 255,
        torch.from_numpy(array.transpose(2, 0, 1).copy()).float() / 255,
        array[None],
    ):
        assert torch.equal(processor(same, return_tensors="pt").pixel_values, expected)


def test_size_and_crop_size(processor):
    assert processor(picture(40, 60), size=16, return_tensors="np").pixel_values.shape == (1, 3, 16, 16)
    small = processor(picture(40, 60), size=20, crop_size={"height": 8, "width": 12}, return_tensors="np")
    assert small.pixel_values.shape == (1, 3, 8, 12)
    whole = processor(picture(40, 60), do_resize=False, do_center_crop=False, return_tensors="np")
    assert whole.pixel_values.shape == (1, 3, 60, 40)


def test_bad_input_is_named(processor):
    with pytest.raises(ValueError, match=r"\[0, 1\].*300"):
        processor(np.full((8, 8, 3), 300.0))
    with pytest.raises(ValueError, match=r"\[0, 1\].*nan"):
        processor(np.full((8, 8, 3), np.nan))
    with pytest.raises(ValueError, match="int32"):
        processor(np.full((8, 8, 3), 3, dtype=np.int32))
    with pytest.raises(ValueError, match="`size`"):
        hf_vq.VQImageProcessor(size={"height": 8, "longest_edge": 9})
    with pytest.raises(ValueError, match="`num_channels` must be"):
        hf_vq.VQImageProcessor(num_channels=0)
    with pytest.raises(ValueError, match=r"\(H, W, 5\).*\(8, 8, 3\)"):
        hf_vq.VQImageProcessor(num_channels=5)(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="`output_type`.*'jpg'"):
        processor.postprocess(torch.zeros(1, 3, 4, 4), "jpg")
    with pytest.raises(ValueError, match=r"\(3, 4, 4\)"):
        processor.postprocess(torch.zeros(3, 4, 4))


def test_postprocess_inverts_the_processor(processor):
    image = picture(32, 32)
    values = processor(image, return_tensors="pt").pixel_values
    (restored,) = processor.postprocess(values)
    np.testing.assert_array_equal(np.array(restored), np.array(image))
    floats = processor.postprocess(values, "np")
    assert floats.shape == (1, 32, 32, 3) and floats.dtype == np.float32
    np.testing.assert_allclose(floats[0], np.array(image) / 255, atol=1e-6)
    np.testing.assert_array_equal(processor.postprocess(values, "pt").numpy(), floats.transpose(0, 3, 1, 2))


def test_postprocess_clips_and_accepts_half_precision(processor):
    sample = torch.tensor([-7.0, 7.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    (image,) = processor.postprocess(sample.bfloat16())
    assert image.getpixel((0, 0)) == (0, 255, 128)


def test_round_trip(processor, tmp_path):
    image = picture(45, 70)
    processor.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"] == "VQImageProcessor"
    )
    for loaded in (hf_vq.VQImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is hf_vq.VQImageProcessor
        assert loaded.to_dict() == processor.to_dict()
        values = loaded(image, return_tensors="pt").pixel_values
        assert torch.equal(values, processor(image, return_tensors="pt").pixel_values)


def test_values_without_a_range_are_refused(processor):
    with pytest.raises(ValueError, match="no fixed range"):
        processor(Image.fromarray(np.full((32, 32), 0.5, np.float32)))
    with pytest.raises(ValueError, match="16 bits"):
        processor(Image.fromarray(np.full((32, 32), 65536, np.int32)))


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_any_number_of_channels(tmp_path, channels):
    processor = hf_vq.VQImageProcessor(size=(16, 24), num_channels=channels)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, channels), np.uint8)
    values = processor(pixels if channels > 1 else pixels[..., 0], return_tensors="pt").pixel_values
    torch.testing.assert_close(values[0], torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1, rtol=0, atol=1e-6)
    np.testing.assert_allclose(processor.postprocess(values, "np")[0], pixels / 255, atol=1e-6)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert loaded.num_channels == channels and loaded.to_dict() == processor.to_dict()
    if channels == 5:
        with pytest.raises(ValueError, match="`output_type` must be"):
            processor.postprocess(values)
        return
    (restored,) = processor.postprocess(values)
    np.testing.assert_array_equal(np.asarray(restored).reshape(pixels.shape), pixels)
    photo = picture(30, 20, "LA")  # pictures are converted: transparency is laid on white, unless it is a channel
    white = Image.alpha_composite(Image.new("RGBA", (30, 20), "white"), photo.convert("RGBA"))
    expected = {1: white.convert("L"), 3: white.convert("RGB"), 4: photo.convert("RGBA")}[channels]
    whole = processor(photo, do_resize=False, do_center_crop=False, return_tensors="np").pixel_values[0]
    np.testing.assert_allclose(
        whole, np.asarray(expected).reshape(20, 30, channels).transpose(2, 0, 1) / 127.5 - 1, atol=1e-6
    )


@pytest.mark.parametrize("size", [(16, 40), (40, 16)])
@pytest.mark.parametrize("width,height", [(50, 37), (37, 101), (20, 24), (200, 10)])
def test_rectangles_are_covered(size, width, height):
    """Scaled by the larger of the two ratios, then cut at the centre: the plain way by Pillow alone."""
    image = picture(width, height)
    scale = max(size[0] / height, size[1] / width)
    whole = image.resize((max(size[1], round(width * scale)), max(size[0], round(height * scale))), Image.BICUBIC)
    left, top = (whole.width - size[1]) // 2, (whole.height - size[0]) // 2
    expected = np.asarray(whole.crop((left, top, left + size[1], top + size[0]))) / 127.5 - 1
    values = hf_vq.VQImageProcessor(size=size)(image, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    np.testing.assert_allclose(values, expected, atol=1.01 / 127.5)


def test_elongated_pictures_take_no_memory():
    for size, side in (((2, 4000), 256), ((1, 60000), 64), ((60000, 1), 64)):
        image = Image.new("RGB", size, (255, 0, 0))
        processor = hf_vq.VQImageProcessor(size=side)
        tracemalloc.start()
        values = processor(image, return_tensors="np").pixel_values
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert values.shape == (1, 3, side, side) and values[0, 0].min() == 1 and values[0, 1].max() == -1
        assert peak < 2**24  # resized whole: 0.4 to 0.7 GB
