import numpy as np
import PIL.Image
import pytest
import torch

from hf_vq.images import to_pixel_values


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(PIXELS).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.mark.parametrize(
    "image",
    [
        PIL.Image.fromarray(PIXELS),
        [PIL.Image.fromarray(PIXELS)],
        PIXELS,
        PIXELS[None],
        [PIXELS],
        PIXELS.astype(np.float32) / 255,
        (PIXELS.astype(np.float64) / 255)[None],
        EXPECTED,
        EXPECTED[0].double(),
    ],
)
def test_every_form_of_an_image_gives_the_same_pixel_values(image):
    values = to_pixel_values(image, 3)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, EXPECTED, rtol=0, atol=1e-6)


def test_greyscale_from_colour_is_pillows():
    expected = np.asarray(PIL.Image.fromarray(PIXELS).convert("L"), np.float32) / 127.5 - 1
    for image in (PIL.Image.fromarray(PIXELS), PIXELS, PIXELS.astype(np.float32) / 255):
        values = to_pixel_values(image, 1)
        assert values.shape == (1, 1, 6, 5)
        np.testing.assert_allclose(values[0, 0], expected, rtol=0, atol=1 / 127.5)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1)])
def test_colour_from_greyscale_repeats_it(shape):
    for image in (PIXELS[..., 0].reshape(shape), PIXELS[..., 0].reshape(shape).astype(np.float32) / 255):
        values = to_pixel_values(image, 3)
        torch.testing.assert_close(values, EXPECTED[:, :1].expand(1, 3, 6, 5), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "image, message",
    [
        ("face.png", "PIL image, an array, a list of either, or a tensor in .*, got str"),
        ([], "got an empty list"),
        ([PIXELS, PIXELS[:5]], r"images of one size, got \[\(5, 5\), \(5, 6\)\]"),
        (PIXELS.astype(np.float32), "must lie in"),
        (PIXELS.astype(np.int32), "uint8 or floating-point"),
        (np.zeros((6, 5, 7), np.uint8), "cannot be read"),
        (np.full((6, 5, 3), np.nan), "must lie in"),
        (torch.zeros(3, 6, 5, dtype=torch.uint8), "float tensor"),
        (torch.full((3, 6, 5), 9.0), "got values from 9 to 9"),
        (torch.full((3, 6, 5), float("nan")), "finite"),
    ],
)
def test_what_is_no_image_is_refused_by_the_arguments_name(image, message):
    with pytest.raises(ValueError, match=f"`mask_image`.*{message}"):
        to_pixel_values(image, 3, name="mask_image")
