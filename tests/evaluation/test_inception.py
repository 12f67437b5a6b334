"""Inception's figures against torch-fidelity's own, with random weights in its format: the original ones have no copy
that a test could load.
"""

import json
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from hf_vq.evaluation import inception
from hf_vq.evaluation.evaluate_pipeline import draw_images, evaluate_model
from hf_vq.evaluation.generation import kernel_distance
from hf_vq.evaluation.inception import InceptionFeatures, InceptionLogits, ReferenceBatch, inception_class
from hf_vq.images import to_pil
from tests.pipelines import latent_diffusion_parts


# torch-fidelity imports torchvision before anything else; of it, it uses this much on a folder of images
TORCHVISION = {
    "torchvision/__init__.py": "from . import datasets, transforms\n",
    "torchvision/datasets.py": "class CIFAR10: pass\nclass CIFAR100: pass\nclass STL10: pass\n",
    "torchvision/transforms/__init__.py": """
from . import functional
class Compose:
    def __init__(self, steps): self.steps = steps
    def __call__(self, image):
        for step in self.steps: image = step(image)
        return image
""",
    "torchvision/transforms/functional.py": """
import numpy, torch
def pil_to_tensor(image): return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)
""",
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights whose activations neither vanish nor explode, in torch-fidelity's file format."""
    torch.manual_seed(0)
    with mock.patch("torch.load", return_value={}), mock.patch.object(nn.Module, "load_state_dict"):
        network = inception_class()("random", ["2048"], feature_extractor_weights_path="none")
    state = network.state_dict()
    for name, tensor in state.items():
        if name.endswith("conv.weight"):
            tensor.mul_(6**0.5)  # from torch's variance of 1/(3 fan-in) to He's of 2/fan-in
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


def test_features_are_those_of_torch_fidelity(weights, monkeypatch):
    network = InceptionFeatures(weights)
    images = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in to_pil(images)])
    layers = ["2048", "logits_unbiased"]
    features, logits = inception_class()("it", layers, feature_extractor_weights_path=str(weights))(pixels)
    assert torch.equal(network.pooled(images), features) and torch.equal(InceptionLogits(network)(images), logits)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008) and features.std() > 0.01
    digits = network.name.removeprefix("inception:")
    assert network.name == f"inception:{digits}" and len(digits) == 8  # not the published weights
    monkeypatch.setattr(inception, "ORIGINAL", digits)
    assert InceptionFeatures(weights).name == "inception"


def test_what_is_no_file_of_its_weights(tmp_path):
    class Danger:
        def __reduce__(self):
            return os.system, ("true",)

    other = {"a": torch.zeros(1)}
    for content, message in (
        (other, "must fit Inception v3"),
        ({"a": torch.tensor(torch.nan)}, r"must be finite, got NaN or infinity in \['a'\]"),
        (Danger(), "must hold tensors by name and nothing else"),
        ([1], "got a list"),
    ):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=message):
            InceptionFeatures(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="`weights` must be a file of Inception's weights, got '.*none'"):
        InceptionFeatures(tmp_path / "none")


def test_reference_batches(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (5, 4, 6, 3), np.uint8)
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=images, mu=np.zeros(8), sigma=np.eye(8))
    reference = ReferenceBatch.from_npz(path)
    batches = list(reference.batches(2))
    assert [len(batch) for batch in batches] == [2, 2, 1] and batches[0].shape == (2, 3, 4, 6)
    np.testing.assert_array_equal(np.array(to_pil(batches[1])[0]), images[2])
    assert reference.name == "reference.npz" and reference.covariance.dtype == torch.float64
    for arrays, message in (
        ({"mu": np.zeros(8)}, "must hold `arr_0`, or `mu` and `sigma`, got"),
        ({"arr_0": images.astype(np.float32)}, r"must be uint8 \(N, H, W, 3\), got float32"),
        ({"mu": np.zeros(8), "sigma": np.eye(7)}, r"must be \(D,\) and \(D, D\)"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message):
            ReferenceBatch.from_npz(path)
    path.write_bytes(b"none")
    with pytest.raises(ValueError, match="`reference` must be an .npz file"):
        ReferenceBatch.from_npz(path)


class Images(torch.utils.data.Dataset):
    """Twenty images of 8×8."""

    def __init__(self):
        self.pixel_values = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(3)) ** 2 * 2 - 1

    def __len__(self):
        return len(self.pixel_values)

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index]}


class Channels:
    """Means and deviations of channels and quarters, under the name of the original Inception."""

    name = "inception"

    def pooled(self, images):
        return torch.cat([images.mean((2, 3)), images.std((2, 3)), images[..., :4, :4].mean((2, 3))], 1)


def test_a_reference_takes_the_place_of_the_data(tmp_path):
    """Its images for every distance; its mean and covariance, where it has them, for the Fréchet distance."""
    dataset, pipeline = Images(), latent_diffusion_parts.make_pipeline()
    options = {"num_inference_steps": 1, "progress": False, "batch_size": 8, "extractor": Channels()}
    pixels = np.stack([np.array(image) for image in to_pil(dataset.pixel_values)])
    eight_bits = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    features = Channels().pooled(eight_bits).double().numpy()
    plain = evaluate_model(pipeline, dataset, ["generation"], **options)["distances"]
    assert [one["label"] for one in plain] == ["FID", "KID", "precision[inception]", "recall[inception]"]
    found = {}
    statistics = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
    for name, arrays in (("images", {"arr_0": pixels}), ("both", {"arr_0": pixels, "mu": features.mean(0) + 1,
                         "sigma": statistics["sigma"]}), ("statistics", statistics)):  # fmt: skip
        np.savez(tmp_path / "reference.npz", **arrays)
        reference = ReferenceBatch.from_npz(tmp_path / "reference.npz")
        figures = evaluate_model(pipeline, Images(), ["generation"], reference=reference, **options)["distances"]
        found[name] = {one["label"]: one["value"] for one in figures}
    assert found["images"] == pytest.approx({one["label"]: one["value"] for one in plain}, rel=0.05)
    assert found["statistics"] == {"FID": pytest.approx(found["images"]["FID"], rel=1e-6)}
    # the mean is 1 away in each of 9 features
    real, drawn = features.mean(0), Channels()
    drawn = torch.cat([drawn.pooled(batch) for batch in draw_images(pipeline, dataset, 20, 8, progress=False,
                       num_inference_steps=1)]).double().numpy().mean(0)  # fmt: skip
    moved = found["images"]["FID"] - ((real - drawn) ** 2).sum() + ((real + 1 - drawn) ** 2).sum()
    assert found["both"]["FID"] == pytest.approx(moved, rel=1e-6) and found["both"]["KID"] == found["images"]["KID"]
    options["extractor"].name = "other"
    with pytest.raises(ValueError, match="which do not compare with 'other'"):
        evaluate_model(pipeline, Images(), ["generation"], reference=reference, **options)


@pytest.mark.slow
def test_the_figures_of_torch_fidelitys_command(weights, tmp_path):
    """FID, KID, Inception Score, precision and recall of the same images in two folders."""
    dataset, pipeline = Images(), latent_diffusion_parts.make_pipeline()
    options = {"num_inference_steps": 1, "progress": False, "batch_size": 10}
    network = InceptionFeatures(weights)
    figures = evaluate_model(
        pipeline, dataset, ["generation"], extractor=network, classifier=InceptionLogits(network), **options
    )
    drawn = torch.cat(list(draw_images(pipeline, dataset, 20, 10, progress=False, num_inference_steps=1)))
    for name, images in (("drawn", drawn), ("real", dataset.pixel_values)):
        (tmp_path / name).mkdir()
        for number, image in enumerate(to_pil(images)):
            image.save(tmp_path / name / f"{number:02d}.png")
    for name, code in TORCHVISION.items():
        (tmp_path / "stand-in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stand-in" / name).write_text(code)
    command = [sys.executable, "-m", "torch_fidelity.fidelity", "--cpu", "--json", "--silent", "--no-cache"]
    command += ["--isc", "--fid", "--kid", "--prc", "--kid-subset-size", "20", "--kid-subsets", "1"]
    command += ["--no-samples-shuffle", "--feature-extractor", "inception-v3-compat"]
    command += ["--feature-extractor-weights-path", weights, "--batch-size", "10"]
    command += ["--input1", tmp_path / "drawn", "--input2", tmp_path / "real"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "stand-in")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout)
    found = {one["metric"]: one["value"] for one in figures["distances"]}
    assert found["frechet_distance"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert found["kernel_distance"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert found["precision"] == expected["precision"] and found["recall"] == expected["recall"]
    assert figures["classifier_score"] == pytest.approx(expected["inception_score_mean"], rel=1e-5)
    assert figures["classifier_score_deviation"] == pytest.approx(expected["inception_score_std"], rel=1e-3)
    assert kernel_distance(*[network.pooled(images) for images in (dataset.pixel_values, drawn)])[0] == pytest.approx(
        found["kernel_distance"]
    )
