"""The bound of mask-and-replace diffusion, against sums over every state of a small chain."""

import itertools
import math

import pytest
import torch
from torch import nn

from hf_vq.evaluation.diffusion_likelihood import DiffusionLikelihood
from hf_vq.evaluation.evaluate import evaluate_prior
from hf_vq.models.priors.transformer_vq_diffusion import VQDiffusionTransformerOutput
from hf_vq.schedulers.scheduling_mask_replace import MaskReplaceScheduler


K, T, POSITIONS = 3, 4, 2
ENDS = {
    "alpha_cumprod_start": 0.9,
    "alpha_cumprod_end": 0.2,
    "gamma_cumprod_start": 0.02,
    "gamma_cumprod_end": 0.7,
}
DATA = list(itertools.product(range(K), repeat=POSITIONS))
STATES = list(itertools.product(range(K + 1), repeat=POSITIONS))  # K is the mask
EXPONENTS = torch.tensor([(K + 1) ** i for i in reversed(range(POSITIONS))])


class Chain:
    """The chain by (K+1)×(K+1) matrices, with the best denoiser of a known distribution of the data, in float64."""

    def __init__(self, seed=0):
        probabilities = torch.rand(len(DATA), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) ** 3
        self.data = probabilities / probabilities.sum()
        alpha = torch.linspace(ENDS["alpha_cumprod_start"], ENDS["alpha_cumprod_end"], T, dtype=torch.float64)
        gamma = torch.linspace(ENDS["gamma_cumprod_start"], ENDS["gamma_cumprod_end"], T, dtype=torch.float64)
        self.cumulative = [torch.eye(K + 1, dtype=torch.float64)]  # of the data, then of each timestep
        for t in range(T):
            matrix = torch.full((K + 1, K + 1), float(1 - alpha[t] - gamma[t]) / K, dtype=torch.float64)
            matrix += alpha[t] * torch.eye(K + 1)
            matrix[:, K] = gamma[t]
            matrix[K] = torch.eye(K + 1)[K]
            self.cumulative.append(matrix)
        self.prior = self.cumulative[T][:K].mean(dim=0)

    def noised(self, x0, t):
        """q(x_t | x_0) of every state; t = -1 is the data."""
        rows = [self.cumulative[t + 1][code] for code in x0]
        return torch.stack([math.prod(row[code] for row, code in zip(rows, xt, strict=True)) for xt in STATES])

    def posterior(self, code, original, s, t):
        """q(x_s | x_t, x_0) of one position, `(K + 1,)`."""
        step = torch.linalg.solve(self.cumulative[s + 1], self.cumulative[t + 1])
        joint = self.cumulative[s + 1][original] * step[:, code]
        return joint / joint.sum()

    def denoiser(self, t):
        """p(x_0 | x_t) of each position given all of x_t: `(states, positions, K)`."""
        likelihood = torch.stack([self.noised(x0, t) for x0 in DATA], dim=1)  # (states, data)
        joint = likelihood * self.data
        one_hot = nn.functional.one_hot(torch.tensor(DATA), K).double()
        marginals = torch.einsum("sd,dpk->spk", joint, one_hot)
        return marginals / marginals.sum(dim=-1, keepdim=True)

    def reverse(self, s, t):
        """p(x_s | x_t): `(states, states)`."""
        rows = []
        for state, predicted in zip(STATES, self.denoiser(t), strict=True):
            positions = [
                sum(p[k] * self.posterior(code, k, s, t) for k in range(K))
                for code, p in zip(state, predicted, strict=True)
            ]
            rows.append([math.prod(p[x] for p, x in zip(positions, other, strict=True)) for other in STATES])
        return torch.tensor(rows, dtype=torch.float64)

    def bounds(self, timesteps=range(T)):
        """The bound of each of DATA in the chain of these timesteps, and its true log-likelihood."""
        steps = list(zip((-1, *timesteps), timesteps, strict=False))
        reverse = {t: self.reverse(s, t) for s, t in steps}
        start = torch.tensor([math.prod(self.prior[x] for x in s) for s in STATES], dtype=torch.float64)
        marginal = start
        for t in reversed(timesteps):
            marginal = marginal @ reverse[t]
        bounds = []
        for x0 in DATA:
            last = self.noised(x0, T - 1)
            bound = -torch.xlogy(last, last / start).sum()
            for s, t in steps:
                weights = self.noised(x0, t)
                for i, state in enumerate(STATES):
                    if weights[i] == 0:
                        continue
                    pairs = zip(state, x0, strict=True)
                    positions = [self.posterior(code, original, s, t) for code, original in pairs]
                    true = torch.stack(
                        [math.prod(p[x] for p, x in zip(positions, other, strict=True)) for other in STATES]
                    )
                    bound -= weights[i] * torch.where(true > 0, torch.xlogy(true, true / reverse[t][i]), 0.0).sum()
            bounds.append(bound)
        places = [STATES.index(x0) for x0 in DATA]
        return torch.stack(bounds), marginal[places].log()


class Oracle(nn.Module):
    def __init__(self, chain):
        super().__init__()
        self.register_parameter("logits", nn.Parameter(torch.stack([chain.denoiser(t) for t in range(T)]).log()))

    def forward(self, indices, timestep):
        return VQDiffusionTransformerOutput(sample=self.logits[timestep, (indices * EXPONENTS).sum(dim=1)].float())


@pytest.fixture(scope="module")
def chain():
    return Chain()


@pytest.fixture(scope="module")
def expected(chain):
    return chain.bounds()


def likelihood_of(chain, **options):
    scheduler = MaskReplaceScheduler(K, T, **ENDS)
    return DiffusionLikelihood(Oracle(chain), scheduler, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("num_timesteps", [None, 1, 3])
def test_the_mean_is_the_bound(chain, expected, num_timesteps):
    likelihood = likelihood_of(chain, num_timesteps=num_timesteps)
    copies = 40000
    for x0, bound in zip(DATA, expected[0], strict=True):
        values = likelihood.log_likelihood(torch.tensor(x0).repeat(copies, 1)).double()
        error = values.std() / copies**0.5
        assert error < 0.025  # of a bound of which the term at the last timestep alone is 0.25
        assert abs(values.mean() - bound) < 5 * error, (x0, values.mean(), bound)


@pytest.mark.parametrize(("steps", "timesteps"), [(1, (3,)), (2, (1, 3)), (3, (0, 1, 3)), (4, (0, 1, 2, 3))])
def test_the_bound_of_fewer_steps(chain, steps, timesteps):
    likelihood = likelihood_of(chain, num_inference_steps=steps)
    assert likelihood.chain == [*reversed(timesteps), -1]
    bounds, true = chain.bounds(timesteps)
    assert (bounds < true + 1e-9).all()
    copies = 20000
    for x0, bound in zip(DATA, bounds, strict=True):
        values = likelihood.log_likelihood(torch.tensor(x0).repeat(copies, 1)).double()
        assert abs(values.mean() - bound) < 5 * values.std() / copies**0.5, (x0, values.mean(), bound)


@pytest.mark.parametrize(("previous", "message"), [(2, "must be below `timesteps`"), (-2, "must lie in -1…3")])
def test_a_previous_timestep_that_is_none(chain, previous, message):
    codes = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"`prev_timesteps` {message}"):
        likelihood_of(chain).scheduler.vlb_terms(torch.zeros(1, 2, K), codes, codes, 2, prev_timesteps=previous)


def test_steps_and_timesteps_exclude_each_other(chain):
    with pytest.raises(ValueError, match="Only one of `num_timesteps` and `num_inference_steps`"):
        likelihood_of(chain, num_timesteps=2, num_inference_steps=2)


def test_the_bound_lies_below_the_likelihood(chain, expected):
    bounds, true = expected
    assert true.exp().sum() == pytest.approx(1)
    gap = true - bounds
    assert (gap > 0).all() and (gap < 1).all()
    # the best denoiser of a chain of few steps comes near to the data, whose entropy none can pass
    cross_entropy = -(chain.data * true).sum()
    entropy = -(chain.data * chain.data.log()).sum()
    assert entropy < cross_entropy < entropy + 0.2


def test_bits_per_index_of_a_data_set(chain, expected):
    likelihood = likelihood_of(chain)
    draws = torch.multinomial(chain.data, 20000, replacement=True, generator=torch.Generator().manual_seed(1))
    batches = [{"indices": torch.tensor(DATA)[rows]} for rows in draws.split(5000)]
    figures = evaluate_prior(likelihood, batches, progress=False)
    bits = -expected[0][draws].mean() / math.log(2)
    assert figures["bits_per_index"] == pytest.approx(float(bits) / POSITIONS, abs=0.01)
    assert figures["uniform_bits_per_index"] == pytest.approx(math.log2(3)) and figures["num_images"] == 20000


class Conditional(nn.Module):
    """Predicts nothing, and remembers its condition."""

    def forward(self, indices, timestep, **condition):
        self.seen = condition
        return VQDiffusionTransformerOutput(sample=torch.zeros(*indices.shape, K))


def test_conditions_reach_the_transformer():
    transformer, scheduler = Conditional(), MaskReplaceScheduler(K, T)
    indices, labels = torch.zeros(2, 2, 2, dtype=torch.int64), torch.tensor([5, 6])
    assert DiffusionLikelihood(transformer, scheduler).log_likelihood(indices, labels).shape == (2,)
    assert list(transformer.seen) == ["class_labels"] and torch.equal(transformer.seen["class_labels"], labels)
    likelihood = DiffusionLikelihood(transformer, scheduler, lambda texts: {"texts": [t.upper() for t in texts]})
    likelihood.log_likelihood(indices, ["a", "b"])
    assert transformer.seen == {"texts": ["A", "B"]}


def test_a_uniform_prediction_costs_log_k():
    # with nothing replaced and nothing known, each code is revealed once, at a cost of log K
    scheduler = MaskReplaceScheduler(K, 50, schedule="mask_only", alpha_cumprod_start=1 - 1e-9, alpha_cumprod_end=1e-9)
    indices = torch.randint(K, (500, 4), generator=torch.Generator().manual_seed(0))
    likelihood = DiffusionLikelihood(Conditional(), scheduler, generator=torch.Generator().manual_seed(0))
    values = likelihood.log_likelihood(indices).double() / 4
    assert values.mean() == pytest.approx(-math.log(K), abs=5 * float(values.std()) / 500**0.5)


@pytest.mark.parametrize("number", [0, 5, 2.5])
def test_the_number_of_timesteps_must_be_among_those_of_the_chain(chain, number):
    with pytest.raises(ValueError, match=rf"`num_timesteps` must be an int in 1…4, got {number}"):
        likelihood_of(chain, num_timesteps=number)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.zeros(0, 2, dtype=torch.int64), r"`indices` must hold at least one index, got shape \(0, 2\)"),
        (torch.zeros(1, 2), "`indices` must be an int64 tensor"),
        (torch.full((1, 2), K), "`indices` must hold indices in 0…2, got 3 to 3"),
    ],
)
def test_what_are_no_codes(chain, indices, message):
    with pytest.raises(ValueError, match=message):
        likelihood_of(chain).log_likelihood(indices)
