"""The likelihood of a hierarchy against sums over a table of probabilities, and what its levels hold."""

import math
import statistics

import pytest
import torch
from torch import nn

from hf_vq import VQGPTConfig, VQVAE2Config, VQVAE2Model
from hf_vq.evaluation.hierarchy import evaluate_hierarchy, reconstruct_by_levels


K = 3


class TablePrior(nn.Module):
    """p(code | class, code above) from a table; every code is independent of the others of its level."""

    def __init__(self, seed, takes_class=True):
        super().__init__()
        table = torch.rand(2, K, K, generator=torch.Generator().manual_seed(seed)) + 0.1
        self.table = nn.Parameter(table / table.sum(-1, keepdim=True))
        kind = {"condition_type": "class", "condition_vocab_size": 2} if takes_class else {}
        self.config = VQGPTConfig(codebook_size=K, grid_size=2, **kind)
        self.device = torch.device("cpu")

    def probability(self, code, label, above):
        return self.table[label, above, code].item()

    def log_likelihood(self, indices, condition=None, condition_indices=None):
        labels = torch.zeros(len(indices), dtype=torch.long) if condition is None else condition
        above = torch.zeros_like(indices)
        if condition_indices is not None:
            above = condition_indices.repeat_interleave(2, 1).repeat_interleave(2, 2)
        return self.table[labels[:, None, None], above, indices].log().sum(dim=(1, 2))


def batches(labels=(0, 1, 1, 0, 1)):
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "indices_0": torch.randint(K, (2, 2), generator=generator),
            "indices_1": torch.randint(K, (4, 4), generator=generator),
            "label": torch.tensor(label),
        }
        for label in labels
    ]
    return [{name: torch.stack([row[name] for row in part]) for name in rows[0]} for part in (rows[:2], rows[2:])]


@pytest.mark.parametrize("bottom_takes_class", [True, False])
def test_figures_are_those_of_the_table(bottom_takes_class):
    priors = [TablePrior(1).train(), TablePrior(2, bottom_takes_class).train()]
    result = evaluate_hierarchy(priors, batches(), condition_key="label", pixel_dims=48, progress=False)
    bits = [[], []]
    for batch in batches():
        for top, bottom, label in zip(batch["indices_0"], batch["indices_1"], batch["label"].tolist(), strict=True):
            in_bottom = label if bottom_takes_class else 0
            bits[0].append(-sum(math.log2(priors[0].probability(c, label, 0)) for c in top.flatten().tolist()))
            bits[1].append(
                -sum(
                    math.log2(priors[1].probability(bottom[i, j].item(), in_bottom, top[i // 2, j // 2].item()))
                    for i in range(4)
                    for j in range(4)
                )
            )
    total = [sum(pair) for pair in zip(*bits, strict=True)]
    for figures, values, codes in (
        (result["levels"][0], bits[0], 4),
        (result["levels"][1], bits[1], 16),
        (result, total, 20),
    ):
        assert figures["bits_per_image"] == pytest.approx(statistics.mean(values), rel=1e-5)
        assert figures["bits_per_image_standard_error"] == pytest.approx(statistics.stdev(values) / 5**0.5, rel=1e-4)
        assert figures["bits_per_index"] == pytest.approx(statistics.mean(values) / codes, rel=1e-5)
        assert figures["bits_per_pixel_dim"] == pytest.approx(statistics.mean(values) / 48, rel=1e-5)
        assert figures["num_images"] == 5
    assert result["levels"][1]["uniform_bits_per_index"] == pytest.approx(math.log2(K))
    assert all(prior.training for prior in priors)


def test_without_a_key_the_condition_is_none():
    priors = [TablePrior(1), TablePrior(2)]
    result = evaluate_hierarchy(priors, batches(), progress=False)
    assert result == evaluate_hierarchy(priors, batches([0] * 5), condition_key="label", progress=False)
    assert "bits_per_pixel_dim" not in result


def test_one_grid_for_each_prior_is_needed():
    with pytest.raises(ValueError, match=r"\['indices_0', 'indices_1', 'indices_2'\] for 3 priors, got \['indices_0'"):
        evaluate_hierarchy([TablePrior(1)] * 3, batches(), progress=False)


def test_levels_are_added_one_by_one():
    torch.manual_seed(0)
    config = VQVAE2Config(
        num_levels=3, downsample_factor=8, hidden_size=8, residual_hidden_size=4, embed_dim=4, num_embeddings=8
    )
    model, images = VQVAE2Model(config).eval(), torch.rand(2, 3, 16, 16) * 2 - 1
    parts = reconstruct_by_levels(model, images)
    assert len(parts) == 3 and all(part.shape == images.shape for part in parts)
    with torch.no_grad():
        encoded = model.encode(images)
        torch.testing.assert_close(parts[2], model.decode(encoded.latents).sample.clamp(-1, 1))
        torch.testing.assert_close(parts[0], model.decode_indices(encoded.indices[:1]).sample.clamp(-1, 1))
    assert not torch.equal(parts[0], parts[1])
