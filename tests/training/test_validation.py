import pytest
import torch

from hf_vq import VQVAE2Config, VQVAE2Model, VQVAEConfig, VQVAEModel
from hf_vq.evaluation.evaluate import evaluate_prior, evaluate_tokenizer
from hf_vq.training.validation import validation_loader
from tests.process_groups import in_processes


SIZES = {"hidden_size": 8, "residual_hidden_size": 4, "num_residual_layers": 1, "embed_dim": 4, "num_embeddings": 8}


class Images(torch.utils.data.Dataset):
    def __init__(self, count):
        self.pixels = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "indices": (self.pixels[index, 0] * 4).long() % 8}


class UniformPrior(torch.nn.Module):
    """Not quite: each image's likelihood is its own."""

    device = torch.device("cpu")

    class config:
        codebook_size = 8

    def log_likelihood(self, indices, condition=None):
        return -indices.double().flatten(1).sum(dim=1)


class Colours:
    name = "colours"

    def pooled(self, images):
        return images.mean(dim=(2, 3))


def figures(count, hierarchical):
    torch.manual_seed(0)
    kind, config = (VQVAE2Model, VQVAE2Config) if hierarchical else (VQVAEModel, VQVAEConfig)
    tokenizer = kind(config(resolution=16, **SIZES))
    extractors = [Colours()] if count > 5 else []  # distances need some images
    loader = validation_loader(Images(count), batch_size=2)
    found = evaluate_tokenizer(tokenizer, loader, feature_extractors=extractors, progress=False)
    found |= evaluate_prior(UniformPrior(), validation_loader(Images(count), 2), progress=False)
    return {name: value for name, value in found.items() if name != "images_per_second"}


@pytest.mark.parametrize(("count", "processes", "hierarchical"), [(11, 2, False), (5, 3, True), (1, 2, True)])
def test_processes_have_the_figures_of_one(tmp_path, count, processes, hierarchical):
    """Uneven shares, and with one image and two processes an empty one."""
    alone = figures(count, hierarchical)
    assert alone["num_images"] == count
    for found in in_processes(processes, tmp_path, figures, count, hierarchical):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            if isinstance(value, float):
                assert found[name] == pytest.approx(value, rel=1e-6, nan_ok=True), name
            elif name == "distances":
                assert len(value) > 0 and len(found[name]) == len(value)
                for one, other in zip(value, found[name], strict=True):
                    assert other["value"] == pytest.approx(one["value"], rel=1e-6)
            elif name != "codebooks":
                assert found[name] == value, name
