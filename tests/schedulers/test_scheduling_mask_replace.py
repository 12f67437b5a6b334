"""The scheduler against explicit (K+1) x (K+1) matrices, and what it refuses."""

import math

import pytest
import torch
from diffusers import VQDiffusionScheduler
from scipy.stats import chi2

from hf_vq import MaskReplaceScheduler
from tests.schedulers.explicit_chain import PAPER, bayes_posterior, one_step_matrices, product


MIXED = ((0.95, 0.02), (0.02, 0.6))  # much is replaced and much is masked
CHAINS = [("linear", PAPER), ("linear", MIXED), ("cosine", PAPER), ("mask_only", PAPER), ("uniform_only", PAPER)]
IDS = ["linear", "linear-mixed", "cosine", "mask_only", "uniform_only"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(num_embeddings, num_steps, schedule="linear", ends=PAPER):
    (a, b), (c, d) = ends
    scheduler = MaskReplaceScheduler(num_embeddings, num_steps, schedule, a, b, c, d)
    return scheduler, one_step_matrices(num_embeddings, num_steps, schedule, ends)


def mixed_scheduler(num_embeddings, num_steps):
    (a, b), (c, d) = MIXED
    return MaskReplaceScheduler(num_embeddings, num_steps, "linear", a, b, c, d)


def random_case(schedule, ends, seed):
    """A scheduler, its matrices, and for a batch: logits, x_0, x_t, t and s."""
    generator = seeded(seed)

    def integer(low, high, shape=()):
        return torch.randint(low, high + 1, shape, generator=generator)

    num_embeddings, num_steps = int(integer(2, 9)), int(integer(2, 60))
    scheduler, matrices = make(num_embeddings, num_steps, schedule, ends)
    t = integer(0, num_steps - 1, (6,))
    s = (torch.rand(6, generator=generator) * (t + 1)).long() - 1
    x0 = integer(0, num_embeddings - 1, (6, 5, 3))
    xt = integer(0, num_embeddings - (schedule == "uniform_only"), (6, 5, 3))
    if schedule == "mask_only":  # a code is x_0
        xt = torch.where(xt == num_embeddings, xt, x0)
    logits = 2 * torch.randn(6, 5, 3, num_embeddings, generator=generator)
    return scheduler, matrices, logits, x0, xt, t, s


def explicit_posterior(matrices, weights, xt, t, s):
    """Σ_i weights_i q(x_s | x_t, x_0 = i), float64 `(B, h, w, K + 1)`."""
    parts = []
    for i in range(len(xt)):
        posterior = bayes_posterior(matrices, int(s[i]), int(t[i]))
        parts.append(torch.einsum("hwk,khwj->hwj", weights[i].double(), posterior[:, xt[i]]))
    return torch.stack(parts)


@pytest.mark.parametrize("schedule, ends", CHAINS, ids=IDS)
@pytest.mark.parametrize("num_embeddings, num_steps", [(2, 2), (5, 100), (7, 33)])
def test_cumulative_tables_are_products_of_steps(schedule, ends, num_embeddings, num_steps):
    scheduler, matrices = make(num_embeddings, num_steps, schedule, ends)
    tables = scheduler.alphas_cumprod, scheduler.betas_cumprod, scheduler.gammas_cumprod
    for t, (alpha, beta, gamma) in enumerate(zip(*tables, strict=True)):
        expected = product(matrices[: t + 1])
        torch.testing.assert_close(expected.sum(1), torch.ones_like(expected[0]), atol=1e-12, rtol=0)
        torch.testing.assert_close(expected[0, 0] - expected[0, 1], alpha, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(expected[0, 1], beta, atol=1e-12, rtol=0)
        torch.testing.assert_close(expected[0, -1], gamma, atol=1e-12, rtol=0)
    assert all(table.dtype == torch.float64 and table.shape == (num_steps,) for table in tables)


@pytest.mark.parametrize("schedule, ends", CHAINS, ids=IDS)
@pytest.mark.parametrize("seed", range(6))
def test_posterior_between_any_two_timesteps(schedule, ends, seed):
    scheduler, matrices, logits, _, xt, t, s = random_case(schedule, ends, seed)
    probs = scheduler.predict_original(logits)
    found = scheduler.q_posterior(probs, xt, t, s)
    torch.testing.assert_close(found.sum(-1), torch.ones(xt.shape), atol=1e-6, rtol=0)
    if schedule == "mask_only":  # only certainty about x_0 goes with a code
        certain = torch.nn.functional.one_hot(xt.clamp_max(logits.shape[-1] - 1), logits.shape[-1]).float()
        probs = torch.where((xt == logits.shape[-1])[..., None], probs, certain)
    expected = explicit_posterior(matrices, probs, xt, t, s)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("t", [1, 40, 99])
def test_posterior_of_one_timestep_is_that_of_diffusers(t):
    num_embeddings = 30
    scheduler, reference = MaskReplaceScheduler(num_embeddings), VQDiffusionScheduler(num_embeddings + 1)
    probs = torch.randn(2, 50, num_embeddings, generator=seeded()).softmax(-1)
    xt = torch.randint(0, num_embeddings + 1, (2, 50), generator=seeded())
    xt[:, :10] = num_embeddings
    expected = reference.q_posterior(probs.log().mT, xt, t).mT.exp()
    torch.testing.assert_close(
        scheduler.q_posterior(probs, xt, t, t - 1), expected, atol=1e-5, rtol=0
    )  # logarithms in float32


@pytest.mark.parametrize("schedule, ends", CHAINS, ids=IDS)
@pytest.mark.parametrize("seed", range(4))
def test_bound_terms_and_their_gradients(schedule, ends, seed):
    scheduler, matrices, logits, x0, xt, t, _ = random_case(schedule, ends, seed)
    num_embeddings = logits.shape[-1]
    logits = logits.double().requires_grad_()
    probs = logits.softmax(-1)
    one_hot = torch.nn.functional.one_hot(x0, num_embeddings).double()
    if schedule == "mask_only":
        probs = torch.where((xt == num_embeddings)[..., None], probs, one_hot)
    p = explicit_posterior(matrices, probs, xt, t, t - 1)
    q = explicit_posterior(matrices, one_hot, xt, t, t - 1)
    expected = (torch.xlogy(q, q) - q * p.clamp_min(1e-300).log()).sum(-1)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)

    single = logits.detach().float().requires_grad_()
    found = scheduler.vlb_terms(single, x0, xt, t)
    (gradient,) = torch.autograd.grad(found.sum(), single)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "mask_only"])
def test_nothing_is_left_at_the_last_timestep(schedule):
    # ᾱ = β̄ = 0 there: 0 / 0 in the posterior of a code, which must not reach the gradients of masks either
    scheduler = MaskReplaceScheduler(8, 10, schedule, alpha_cumprod_end=0.0, gamma_cumprod_end=1.0)
    x0 = torch.randint(0, 8, (2, 3), generator=seeded())
    logits = torch.randn(2, 3, 8, generator=seeded()).requires_grad_()
    xt = scheduler.add_noise(x0, 9, seeded())
    assert (xt == 8).all()
    terms = scheduler.vlb_terms(logits, x0, xt, 9)
    (gradient,) = torch.autograd.grad(terms.sum(), logits)
    # each mask at t was the code x_0 at s with the same probability as in the prediction's posterior
    step = one_step_matrices(8, 10, schedule, ((0.99999, 0.0), (9e-6, 1.0)))
    until_s = product(step[:9])[:-1]
    p = torch.einsum("bli,ij->blj", logits.detach().double().softmax(-1), until_s)
    q = until_s[x0]
    expected = (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(-1)
    torch.testing.assert_close(terms.double(), expected, atol=2e-6, rtol=1e-5)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    codes = scheduler.q_posterior(logits.detach().softmax(-1), x0, 9, 8)
    torch.testing.assert_close(codes, torch.nn.functional.one_hot(x0, 9).float())


def test_the_first_term_is_the_likelihood():
    scheduler = mixed_scheduler(6, 10)
    x0 = torch.randint(0, 6, (2, 3, 4), generator=seeded())
    xt = scheduler.add_noise(x0, 0, seeded())
    logits = torch.randn(2, 3, 4, 6, generator=seeded())
    expected = -logits.log_softmax(-1).gather(-1, x0[..., None]).squeeze(-1)
    torch.testing.assert_close(scheduler.vlb_terms(logits, x0, xt, 0), expected, atol=1e-6, rtol=0)


def test_auxiliary_loss():
    scheduler = MaskReplaceScheduler(4, 50)
    x0, t = torch.tensor([[[0, 3]], [[2, 1]]]), torch.tensor([0, 40])
    logits = torch.randn(2, 1, 2, 4, generator=seeded())
    nll = -logits.log_softmax(-1).gather(-1, x0[..., None]).squeeze(-1)
    expected = nll * torch.tensor([2.0, 1.2]).view(2, 1, 1)
    torch.testing.assert_close(scheduler.auxiliary_loss(logits, x0, t), expected)


@pytest.mark.parametrize("schedule, ends", CHAINS, ids=IDS)
def test_prior_kl(schedule, ends):
    scheduler, matrices = make(6, 20, schedule, ends)
    chain = product(matrices)
    q, p = chain[2], chain[:-1].mean(0)
    assert scheduler.prior_kl() == pytest.approx(float((torch.xlogy(q, q) - torch.xlogy(q, p)).sum()), abs=1e-12)


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_large_codebook_and_sharp_predictions_are_stable(scale):
    """Against the definition in float64, with the probabilities of a step written out for K = 300."""
    num_embeddings, t = 300, torch.tensor([1, 50, 99])
    scheduler = MaskReplaceScheduler(num_embeddings, 100)
    x0 = torch.randint(0, num_embeddings, (3, 10), generator=seeded())
    xt = scheduler.add_noise(x0, t, seeded())
    xt[:, 0] = (x0[:, 0] + 1) % num_embeddings  # replacements are rare
    logits = scale * torch.randn(3, 10, num_embeddings, generator=seeded())
    logits[:, :5] += torch.nn.functional.one_hot(x0[:, :5], num_embeddings) * scale * 5
    log_p = logits.double().log_softmax(-1)

    alphas, betas, gammas = scheduler.alphas_cumprod, scheduler.betas_cumprod, scheduler.gammas_cumprod
    expected = torch.empty(3, 10, dtype=torch.float64)
    for b, now in enumerate(t.tolist()):
        a, be, g = alphas[now - 1], betas[now - 1], gammas[now - 1]
        alpha, gamma = alphas[now] / a, (gammas[now] - g) / (1 - g)
        beta = (1 - alpha - gamma) / num_embeddings
        for i in range(10):
            prior = a * torch.eye(num_embeddings, dtype=torch.float64) + be  # x_0, x_s
            if xt[b, i] == num_embeddings:
                joint, total = prior * gamma, gammas[now].expand(num_embeddings)
                mask = g / gammas[now]
            else:
                likelihood = torch.full((num_embeddings,), float(beta), dtype=torch.float64)
                likelihood[xt[b, i]] += alpha
                joint, mask = prior * likelihood, None
                total = joint.sum(1)
            posterior = joint / total[:, None]
            p, q = log_p[b, i].exp() @ posterior, posterior[x0[b, i]]
            expected[b, i] = (torch.xlogy(q, q) - q * p.clamp_min(1e-300).log()).sum()
            assert mask is None or abs(float(q.sum() + mask) - 1) < 1e-9
    single = logits.requires_grad_()
    found = scheduler.vlb_terms(single, x0, xt, t)
    found.sum().backward()
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)
    assert single.grad.isfinite().all() and (found >= -1e-6).all()


def test_half_precision_is_computed_in_single():
    scheduler = MaskReplaceScheduler(50, 20)
    x0 = torch.randint(0, 50, (2, 6, 6), generator=seeded())
    xt = scheduler.add_noise(x0, 12, seeded())
    logits = (5 * torch.randn(2, 6, 6, 50, generator=seeded())).bfloat16()
    for method, arguments in [("vlb_terms", (x0, xt, 12)), ("auxiliary_loss", (x0, 12))]:
        assert torch.equal(
            getattr(scheduler, method)(logits, *arguments), getattr(scheduler, method)(logits.float(), *arguments)
        )
    drawn = [
        scheduler.step(x, 12, xt, seeded(), truncation_rate=0.9, prev_timestep=3).prev_sample
        for x in (logits, logits.float())
    ]
    assert torch.equal(*drawn)


def p_value(drawn: torch.Tensor, expected: torch.Tensor) -> float:
    """Of Pearson's χ² of `drawn` integers with probabilities `expected`; what should not occur must not."""
    observed = drawn.flatten().bincount(minlength=len(expected)).double()
    possible = expected > 1e-12
    assert observed[~possible].sum() == 0
    counts = expected[possible] * observed.sum()
    statistic = float(((observed[possible] - counts) ** 2 / counts).sum())
    return float(chi2.sf(statistic, max(int(possible.sum()) - 1, 1)))


@pytest.mark.parametrize("schedule, ends", CHAINS, ids=IDS)
def test_noise_is_drawn_from_the_forward_chain(schedule, ends):
    scheduler, matrices = make(4, 12, schedule, ends)
    t = torch.tensor([0, 5, 11])
    x0 = torch.tensor([0, 3, 1])[:, None].expand(3, 20_000)
    noised = scheduler.add_noise(x0, t, seeded())
    for i in range(3):
        expected = product(matrices[: t[i] + 1])[x0[i, 0]]
        rare = expected * 20_000 < 5
        assert p_value(noised[i][~rare[noised[i]]], torch.where(rare, 0, expected)) > 1e-3
        assert rare[noised[i]].sum() < 10


@pytest.mark.parametrize("truncation_rate, temperature", [(1.0, 1.0), (0.7, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("schedule", ["linear", "uniform_only"])
@pytest.mark.parametrize("t, s", [(11, 10), (9, 3), (7, -1)])
def test_a_step_draws_from_the_posterior(schedule, t, s, truncation_rate, temperature):
    num_embeddings, count = 5, 20_000
    scheduler, matrices = make(num_embeddings, 12, schedule, MIXED)
    states = num_embeddings + (schedule == "linear")
    logits = 1.5 * torch.randn(states, 1, num_embeddings, generator=seeded(1)).expand(states, count, num_embeddings)
    xt = torch.arange(states)[:, None].expand(states, count)
    drawn = scheduler.step(
        logits,
        t,
        xt,
        seeded(),
        truncation_rate=truncation_rate,
        temperature=temperature,
        prev_timestep=s,
    ).prev_sample

    probs = (logits[:, 0].double() / temperature).softmax(-1)
    for x in range(states):  # the smallest set of most probable codes
        order = probs[x].argsort(descending=True)
        kept = next(n for n in range(1, num_embeddings + 1) if probs[x, order[:n]].sum() >= truncation_rate - 1e-9)
        probs[x, order[kept:]] = 0
    probs = probs / probs.sum(-1, keepdim=True)
    posterior = bayes_posterior(matrices, s, t)
    for x in range(states):
        assert p_value(drawn[x], probs[x] @ posterior[:, x]) > 1e-4


def test_timesteps():
    scheduler = MaskReplaceScheduler(4, 100)
    assert scheduler.timesteps.tolist() == list(range(99, -1, -1))
    for n in range(1, 101):
        scheduler.set_timesteps(n)
        steps = scheduler.timesteps.tolist()
        strides = [a - b for a, b in zip(steps, [*steps[1:], -1], strict=True)]
        assert len(steps) == scheduler.num_inference_steps == n and steps[0] == 99
        assert max(strides) - min(strides) <= 1 and min(strides) >= 1
    scheduler.set_timesteps(timesteps=[99, 98, 7])
    assert scheduler.previous_timestep(torch.tensor([7, 99])).tolist() == [-1, 98]
    assert scheduler.previous_timestep(98) == 7


def test_the_first_sample():
    shape = (2, 30, 30)
    assert (MaskReplaceScheduler(4, 10).initial_sample(shape) == 4).all()
    scheduler = MaskReplaceScheduler(4, 10, "uniform_only")
    codes = scheduler.initial_sample(shape, generator=seeded())
    assert p_value(codes, torch.full((4,), 0.25)) > 1e-3


@pytest.mark.parametrize("arguments", [{}, {"prior_rule": 2, "prior_weight": 1.0}])
def test_generators_of_samples_make_them_independent_of_the_batch(arguments):
    scheduler = MaskReplaceScheduler(16, 10)
    scheduler.set_timesteps(4)
    logits = torch.randn(3, 5, 5, 16, generator=seeded())

    def run(samples):
        generators = [seeded(i) for i in samples]
        x = scheduler.initial_sample((len(samples), 5, 5))
        for t in scheduler.timesteps:
            x = scheduler.step(logits[samples], t, x, generators, truncation_rate=0.6, **arguments).prev_sample
        return x

    together = run([0, 1, 2])
    for i in range(3):
        assert torch.equal(run([i])[0], together[i])
    assert not torch.equal(together[0], together[1])


def test_samples_at_different_timesteps():
    scheduler = mixed_scheduler(6, 20)
    x = torch.randint(0, 7, (3, 4, 4), generator=seeded())
    logits = torch.randn(3, 4, 4, 6, generator=seeded())
    t, s = torch.tensor([19, 7, 2]), torch.tensor([4, 6, -1])
    together = scheduler.step(logits, t, x, [seeded(i) for i in range(3)], prev_timestep=s).prev_sample
    for i in range(3):
        alone = scheduler.step(logits[i : i + 1], int(t[i]), x[i : i + 1], seeded(i), prev_timestep=int(s[i]))
        assert torch.equal(alone.prev_sample[0], together[i])


@pytest.mark.parametrize("rule, weight", [(1, 0.0), (2, 0.0), (2, 1.0)])
@pytest.mark.parametrize("side, num_steps, steps", [(3, 100, 100), (7, 20, 6), (16, 10, 10), (5, 100, 1)])
def test_purity_prior_on_any_grid_and_any_steps(rule, weight, side, num_steps, steps):
    scheduler = MaskReplaceScheduler(12, num_steps)
    scheduler.set_timesteps(steps)
    x = scheduler.initial_sample((2, side, side))
    for t in scheduler.timesteps[:-1]:
        before = x
        logits = torch.randn(2, side, side, 12, generator=seeded())
        x = scheduler.step(logits, t, x, seeded(1), prior_rule=rule, prior_weight=weight).prev_sample
        assert torch.equal(x[before < 12], before[before < 12])
        masks = round(side * side * float(scheduler.gammas_cumprod[scheduler.previous_timestep(t)]))
        assert ((x == 12).flatten(1).sum(1) == masks).all()
    x = scheduler.step(logits if steps > 1 else torch.randn(2, side, side, 12), scheduler.timesteps[-1], x, seeded())
    assert (x.prev_sample < 12).all()


@pytest.mark.parametrize("schedule", ["linear", "uniform_only"])
def test_known_codes_are_kept_at_every_step(schedule):
    scheduler = MaskReplaceScheduler(12, 10, schedule)
    known = torch.rand(2, 4, 4, generator=seeded()) < 0.5
    codes = torch.randint(0, 12, (2, 4, 4), generator=seeded())
    x = torch.where(known, codes, scheduler.initial_sample((2, 4, 4), generator=seeded()))
    start = x
    for t in scheduler.timesteps:
        logits = torch.randn(2, 4, 4, 12, generator=seeded())
        x = scheduler.step(logits, t, x, seeded(int(t)), known_indices=start, known_mask=known).prev_sample
        assert torch.equal(x[known], codes[known])
    assert (x < 12).all() and (x != start)[~known].any()


def test_purity_prior_of_a_sample_with_known_codes():
    scheduler = MaskReplaceScheduler(12, 10)
    known = torch.zeros(1, 4, 4, dtype=torch.bool)
    known[:, :2] = True
    codes = torch.full((1, 4, 4), 3)
    x = torch.where(known, codes, 12)
    logits = torch.randn(1, 4, 4, 12, generator=seeded())
    x = scheduler.step(
        logits, 9, x, seeded(), prev_timestep=4, prior_rule=1, known_indices=codes, known_mask=known
    ).prev_sample
    assert torch.equal(x[known], codes[known])
    assert (x == 12).sum() == round(8 * float(scheduler.gammas_cumprod[4]))


def test_saving_and_loading(tmp_path):
    scheduler = MaskReplaceScheduler(10, 50, "cosine", alpha_cumprod_start=0.999)
    scheduler.save_pretrained(tmp_path)
    loaded = MaskReplaceScheduler.from_pretrained(tmp_path)
    arguments = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    assert {name: value for name, value in loaded.config.items() if not name.startswith("_")} == arguments
    for name in ("alphas_cumprod", "betas_cumprod", "gammas_cumprod"):
        assert torch.equal(getattr(loaded, name), getattr(scheduler, name))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_embeddings": 1}, "num_embeddings"),
        ({"num_train_timesteps": 1}, "num_train_timesteps"),
        ({"num_train_timesteps": 10.0}, "num_train_timesteps"),
        ({"schedule": "sigmoid"}, "schedule"),
        ({"alpha_cumprod_start": 1.2}, "alpha_cumprod_start"),
        ({"alpha_cumprod_end": -0.1}, "alpha_cumprod_end"),
        ({"alpha_cumprod_end": 0.9999999}, "falling"),
        ({"gamma_cumprod_start": 0.5}, "at most 1"),
        ({"gamma_cumprod_end": 0.0}, "rising"),
        ({"alpha_cumprod_end": math.nan}, "`alpha_cumprod_end` must be a number in"),
    ],
)
def test_bad_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskReplaceScheduler(**{"num_embeddings": 8, **arguments})


X = torch.full((2, 3, 3), 8)
LOGITS = torch.zeros(2, 3, 3, 8)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"sample": X + 1}, "`sample` must hold indices in 0…8, got 9 to 9"),
        ({"sample": -X}, "`sample` must hold"),
        ({"sample": X.float()}, "`sample` must be an int64"),
        ({"model_output": torch.zeros(2, 3, 3, 9)}, "`model_output` must be floating"),
        ({"model_output": torch.zeros(2, 3, 3, 8, dtype=torch.long)}, "`model_output` must be floating"),
        ({"model_output": torch.full((2, 3, 3, 8), math.nan), "prev_timestep": -1}, "none is NaN"),
        ({"model_output": torch.full((2, 3, 3, 8), math.inf), "prev_timestep": -1}, "none is NaN"),
        ({"model_output": LOGITS.tolist()}, "`model_output` must be a tensor"),
        ({"model_output": LOGITS[:0], "sample": X[:0]}, "`sample` must hold at least one index"),
        ({"timestep": 100}, "`timestep` must"),
        ({"timestep": -1, "prev_timestep": -1}, "`timestep` must lie in 0…99"),
        ({"timestep": 98}, "`timestep` must be in `timesteps`"),
        ({"timestep": torch.tensor([99, 99, 99]), "prev_timestep": 3}, "`timestep` must be an int or 2"),
        ({"timestep": 9.5, "prev_timestep": 3}, "`timestep` must be an int"),
        ({"prev_timestep": 99}, "`prev_timestep` must be below"),
        ({"prev_timestep": -2}, "`prev_timestep` must lie in -1…99"),
        ({"truncation_rate": 0.0}, "`truncation_rate`"),
        ({"truncation_rate": 1.1}, "`truncation_rate`"),
        ({"prior_rule": 3}, "`prior_rule` must be an int in 0…2"),
        ({"prior_weight": -1.0}, "`prior_weight`"),
        ({"prior_weight": math.inf, "prior_rule": 2}, "`prior_weight` must be a finite number of at least 0"),
        ({"prior_weight": 1.0, "prior_rule": 1}, "`prior_weight` needs `prior_rule` 2"),
        ({"prior_count": -1}, "`prior_count`"),
        ({"prior_rule": 1, "prev_timestep": torch.tensor([-1, 3])}, "last step together"),
        ({"temperature": 0.0}, "`temperature`"),
        ({"generator": [torch.Generator()]}, "`generator` must hold one torch.Generator for each of 2"),
        ({"generator": 3}, "`generator`"),
        ({"known_mask": X == 8}, "given together"),
        ({"known_indices": X, "known_mask": X == 8}, "mask index"),
        ({"known_indices": X, "known_mask": X}, "`known_mask` must be bool"),
        ({"known_indices": X[:1], "known_mask": X == 8}, "`known_indices` must have shape"),
    ],
)
def test_bad_arguments_of_a_step(changed, message):
    scheduler = MaskReplaceScheduler(8)
    scheduler.set_timesteps(4)
    arguments = {"model_output": LOGITS, "timestep": 99, "sample": X, **changed}
    with pytest.raises(ValueError, match=message):
        scheduler.step(**arguments)


def test_other_bad_arguments():
    scheduler = MaskReplaceScheduler(8)
    for arguments in (
        {"num_inference_steps": 0},
        {"timesteps": [99.7, 3.2]},
        {"num_inference_steps": 101},
        {"num_inference_steps": 5.0},
        {},
        {"num_inference_steps": 4, "timesteps": [99]},
        {"timesteps": []},
        {"timesteps": [98, 3]},
        {"timesteps": [99, 5, 5]},
        {"timesteps": [99, -1]},
    ):
        with pytest.raises(ValueError, match="timesteps|num_inference_steps"):
            scheduler.set_timesteps(**arguments)
    with pytest.raises(ValueError, match="original_samples.*0…7, got 8"):
        scheduler.add_noise(X, 3)
    with pytest.raises(ValueError, match="timesteps.*0…99"):
        scheduler.add_noise(X - 1, 100)
    with pytest.raises(ValueError, match="original_samples.*shape"):
        scheduler.vlb_terms(LOGITS, X[:1] - 1, X, 3)
    with pytest.raises(ValueError, match="original_samples"):
        scheduler.auxiliary_loss(LOGITS, X, 3)
    with pytest.raises(ValueError, match="truncation_rate"):
        scheduler.predict_original(LOGITS, 0.0)
    with pytest.raises(ValueError, match="pred_original"):
        scheduler.q_posterior(LOGITS[..., :7], X, 3, 2)
    for bad in (math.nan, math.inf):
        logits = LOGITS.clone()
        logits[1, 2, 0, 5] = bad
        for call in (
            lambda logits=logits: scheduler.vlb_terms(logits, X - 1, X, 3),
            lambda logits=logits: scheduler.auxiliary_loss(logits, X - 1, 3),
            lambda logits=logits: scheduler.predict_original(logits),
            lambda logits=logits: scheduler.predict_original(logits, 0.5),
        ):
            with pytest.raises(ValueError, match="`model_output` must hold logits of which .* none is NaN"):
                call()
    with pytest.raises(ValueError, match="`pred_original` must hold probabilities"):
        scheduler.q_posterior(logits, X, 3, 2)
    unlikely = LOGITS.clone()
    unlikely[..., 7] = -math.inf  # a certainty is no fault: the loss of the code 7 is infinite
    assert scheduler.auxiliary_loss(unlikely, X - 1, 3).isposinf().all()
    without_mask = MaskReplaceScheduler(8, schedule="uniform_only")
    with pytest.raises(ValueError, match="0…7"):
        without_mask.step(LOGITS, 99, X)
    with pytest.raises(ValueError, match="prior_rule"):
        without_mask.step(LOGITS, 99, X - 1, prior_rule=1)
