import warnings

import numpy as np
import pytest
import pytorch_msssim
import torch
from scipy.ndimage import gaussian_filter

from hf_vq.evaluation.reconstruction import MeanOverImages, l1, psnr, ssim


def images(seed=0, batch=3, size=(17, 23)):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, *size, generator=generator) * 2 - 1


def noisy(original, amount=0.2, seed=1):
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(seed))
    return (original + amount * noise).clamp(-1, 1)


def ssim_by_scipy(x, y):
    """SSIM of one channel: scipy's Gaussian filter, cropped to where an 11x11 window fits."""

    def blur(a):
        return gaussian_filter(a, 1.5, radius=5)[5:-5, 5:-5]

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return np.mean((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))


def ssim_by_definition(x, y):
    """The same by explicit windows, two-pass weighted moments."""
    axis = np.arange(11) - 5
    window = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            c1, c2 = 0.01**2, 0.03**2
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(values)


@pytest.mark.parametrize("reference", [ssim_by_scipy, ssim_by_definition])
@pytest.mark.parametrize("amount", [0.05, 0.5])
def test_ssim_agrees_with_numpy(reference, amount):
    x = images()
    y = noisy(x, amount)
    expected = [
        np.mean(
            [reference(a.double().numpy() / 2 + 0.5, b.double().numpy() / 2 + 0.5) for a, b in zip(p, q, strict=True)]
        )
        for p, q in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(ssim(x, y).numpy(), expected, atol=2e-6)
    np.testing.assert_allclose(ssim(x.double(), y.double()).numpy(), expected, atol=1e-12)


def test_ssim_of_equal_and_of_constant_images():
    x = images()
    torch.testing.assert_close(ssim(x, x), torch.ones(3))
    # Constant images have no variance: only the luminance term is left.
    a, b = torch.full((1, 1, 11, 11), -0.5), torch.full((1, 1, 11, 11), -0.25)  # 0.25 and 0.375 of [0, 1]
    c1 = 0.01**2
    expected = (2 * 0.25 * 0.375 + c1) / (0.25**2 + 0.375**2 + c1)
    torch.testing.assert_close(ssim(a, b), torch.tensor([expected]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(17, 23), (64, 64)])
def test_ssim_is_the_one_that_others_publish(size):
    x = images(size=size)
    y = noisy(x, 0.3)
    expected = pytorch_msssim.ssim(x / 2 + 0.5, y / 2 + 0.5, data_range=1.0, size_average=False)
    torch.testing.assert_close(ssim(x, y), expected, atol=1e-5, rtol=0)


def test_psnr_and_l1_closed_forms():
    x = torch.full((2, 3, 4, 4), -0.5)
    y = x.clone()
    y[0] += 0.2  # MSE 0.04: 10 log10(4 / 0.04) = 20 dB
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, float("inf")]))
    torch.testing.assert_close(l1(x, y), torch.tensor([0.2, 0.0]))
    # The same number in 8-bit terms: peak 255 and the error in grey levels.
    a = images()
    b = noisy(a)
    mse = (((a - b) * 127.5).double() ** 2).mean((1, 2, 3))
    torch.testing.assert_close(psnr(a, b).double(), 10 * torch.log10(255**2 / mse), rtol=1e-5, atol=0)


def test_half_precision_is_measured_in_float32():
    x = images().half()
    y = noisy(x.float()).half()
    torch.testing.assert_close(psnr(x, y), psnr(x.float(), y.float()), rtol=0, atol=0)
    assert ssim(x, y).dtype == torch.float32


@pytest.mark.parametrize("function", [psnr, l1, ssim])
def test_shapes_are_checked(function):
    with pytest.raises(ValueError, match="one shape"):
        function(images(), images(batch=1))
    with pytest.raises(ValueError, match="one shape"):
        function(images()[0], images()[0])


@pytest.mark.parametrize("function", [psnr, l1, ssim])
@pytest.mark.parametrize("side", ["images", "references"])
@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda x: (x * 127.5 + 127.5).to(torch.uint8), r"got torch.uint8: convert 0…255"),
        (lambda x: x * 127.5 + 127.5, "got .* to 25.*: clamp"),
        (lambda x: x * 1.5, "lie in .*: clamp"),
        (lambda x: x.where(x > 0, torch.nan), "got nan to nan"),
    ],
)
def test_images_of_another_range_are_refused(function, side, wrong, message):
    arguments = {"images": images(), "references": images(seed=1)}
    with pytest.raises(ValueError, match=f"`{side}` must .*{message}"):
        function(**arguments | {side: wrong(arguments[side])})


@pytest.mark.parametrize("function", [psnr, l1, ssim])
def test_images_without_a_value_below_0_are_warned_about(function):
    with pytest.warns(UserWarning, match=r"`references` is expected in \[-1, 1\]"):
        function(images(), images(seed=1) / 2 + 0.5)


def test_flat_images_are_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        psnr(images().abs() / 4 + 0.1, images(seed=1))


def test_ssim_arguments_are_checked():
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))
    with pytest.raises(ValueError, match="window_size"):
        ssim(images(), images(), window_size=10)


def test_mean_over_images_weights_images_not_batches():
    mean = MeanOverImages(["a", "b"])
    mean.update(a=torch.tensor([1.0, 2.0, 3.0]), b=torch.zeros(3))
    mean.update(a=torch.tensor([10.0]), b=torch.ones(1))
    assert mean.compute() == {"a": 4.0, "b": 0.25, "num_images": 4}
    assert mean.compute() == mean.compute()
    with pytest.raises(ValueError, match="must name"):
        mean.update(a=torch.zeros(1))
    with pytest.raises(ValueError, match="one shape"):
        mean.update(a=torch.zeros(1), b=torch.zeros(2))
    with pytest.raises(ValueError, match="no image"):
        MeanOverImages(["a"]).compute()
