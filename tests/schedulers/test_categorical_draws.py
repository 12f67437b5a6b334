"""Draws of single rows against the probabilities of their nuclei, found by adding up in order."""

import pytest
import torch
from scipy.stats import chi2

from hf_vq.schedulers.categorical_draws import draw_rows, invert_cdf, nucleus, uniform
from hf_vq.schedulers.reverse_steps import purity


COUNT = 20_000
TIES = [0.1, 0.2, 0.2, 0.1, 0.2, 0.2]  # two probabilities; of those that are equal the lower index comes first
PROBS = {"ties": TIES, "flat": [0.125] * 8, "steep": [0.01, 0.9, 0.05, 0.04], "zeros": [0.0, 0.5, 0.0, 0.3, 0.2, 0.0]}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def kept_codes(probs: list[float], rate: float) -> list[int]:
    kept, mass = [], 0.0
    for code in sorted(range(len(probs)), key=lambda i: (-probs[i], i)):
        if mass >= rate:
            break
        kept.append(code)
        mass += probs[code]
    return kept


@pytest.mark.parametrize("rate", [0.05, 0.35, 0.55, 0.85, 0.97])
@pytest.mark.parametrize("name", list(PROBS))
def test_nucleus(name, rate):
    probs = torch.tensor(PROBS[name])
    assert nucleus(probs, rate).nonzero().squeeze(1).tolist() == sorted(kept_codes(PROBS[name], rate))


@pytest.mark.parametrize("power", [None, 2.5])
@pytest.mark.parametrize("rate", [0.05, 0.35, 0.55, 0.85, 1.0])
@pytest.mark.parametrize("name", list(PROBS))
def test_draws_follow_the_distribution_in_the_nucleus(name, rate, power):
    logits = torch.tensor(PROBS[name]).log().expand(COUNT, -1)
    powers = None if power is None else torch.full((COUNT,), power)
    drawn = draw_rows(logits, torch.arange(COUNT), torch.tensor([COUNT]), seeded(), rate, power=powers)
    kept = kept_codes(PROBS[name], rate)
    expected = torch.zeros(len(PROBS[name]), dtype=torch.float64)
    expected[kept] = torch.tensor([PROBS[name][i] for i in kept], dtype=torch.float64) ** (power or 1)
    observed, counts = drawn.bincount(minlength=len(expected)).double(), expected / expected.sum() * COUNT
    possible = counts > 0
    assert observed[~possible].sum() == 0
    statistic = ((observed[possible] - counts[possible]) ** 2 / counts[possible]).sum()
    assert chi2.sf(float(statistic), max(int(possible.sum()) - 1, 1)) > 1e-4


def test_rows_are_drawn_from_their_own_distributions():
    logits = torch.full((6, 6), -torch.inf)
    logits.fill_diagonal_(0)
    rows = torch.tensor([4, 0, 5, 2])
    assert torch.equal(draw_rows(logits, rows, torch.tensor([1, 3]), truncation_rate=0.5), rows)
    assert draw_rows(logits, rows[:0], torch.tensor([0, 0])).shape == (0,)


def test_inverse_of_the_cumulative_sum():
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]])
    u = torch.tensor([0.0, 0.2499, 0.25, 0.9, 1 - 2**-24])
    assert invert_cdf(weights.expand(5, 5), u).tolist() == [1, 1, 3, 3, 3]
    for bad in (torch.nan, 0.0):
        with pytest.raises(ValueError, match="finite"):
            invert_cdf(torch.full((2, 3), bad), torch.rand(2))


def test_many_codes_are_drawn_in_chunks():
    """More rows than a chunk holds; every code is drawn as often as its probability says."""
    logits = torch.randn(1, 4096, generator=seeded()).expand(2000, -1)
    drawn = draw_rows(logits, torch.arange(2000), torch.tensor([500, 1500]), seeded(), truncation_rate=0.5)
    kept = nucleus(logits[0].softmax(-1), 0.5)
    assert kept[drawn].all()
    # in terms of the cumulative probability, a draw is uniform
    cdf = torch.where(kept, logits[0].softmax(-1), 0.0).double().cumsum(0)
    position = (cdf[drawn] / cdf[-1]).mean()
    assert abs(float(position) - 0.5) < 4 * (1 / 12 / 2000) ** 0.5


def test_uniform_numbers_of_samples():
    counts = torch.tensor([2, 0, 3])
    together = uniform(counts, 2, [seeded(1), seeded(2), seeded(3)], "cpu")
    expected = [torch.rand(2, 2, generator=seeded(1)), torch.rand(3, 2, generator=seeded(3))]
    assert torch.equal(together, torch.cat(expected))
    assert torch.equal(uniform(counts, 1, seeded(5), "cpu"), torch.rand(5, 1, generator=seeded(5)))


def test_purity():
    logits = torch.randn(3000, 700, generator=seeded())  # more than a chunk
    torch.testing.assert_close(purity(logits, 0.5), (2 * logits).softmax(-1).max(-1).values)
