"""Samples of a toy distribution, from a denoiser that knows it, against the exact distribution of the sampler's
chain.
"""

import pytest
import torch
from scipy.stats import chi2

from hf_vq.schedulers.scheduling_mask_replace import MaskReplaceScheduler
from tests.schedulers.explicit_chain import ToyDistribution, one_step_matrices


K, POSITIONS, T, SAMPLES = 3, 4, 100, 20_000
TOYS = {
    name: ToyDistribution(K, POSITIONS, one_step_matrices(K, T, name))
    for name in ("linear", "mask_only", "uniform_only")
}


def p_value(samples: torch.Tensor, toy: ToyDistribution, theory: torch.Tensor) -> float:
    """Of Pearson's χ² of `samples` `(B, POSITIONS)` with probabilities of `toy.data`; rare outcomes count as one."""
    base = K ** torch.arange(POSITIONS - 1, -1, -1)
    observed = (samples * base).sum(-1).bincount(minlength=K**POSITIONS).double()
    expected = theory / theory.sum() * len(samples)
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None].clamp_min(1e-3)])
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return float(chi2.sf(statistic, len(expected) - 1))


def sample(scheduler, toy, seed=0, count=SAMPLES, wrong_stride=False, **arguments) -> torch.Tensor:
    """`(count, POSITIONS)` codes from the scheduler's `timesteps`."""
    generator = torch.Generator().manual_seed(seed)
    x = scheduler.initial_sample((count, 2, POSITIONS // 2), generator=generator)
    for t in scheduler.timesteps:
        logits = toy.denoise(int(t)).clamp_min(1e-30).log()[toy.index(x.flatten(1))].reshape(*x.shape, K)
        previous = max(int(t) - 1, -1) if wrong_stride and t != scheduler.timesteps[-1] else None
        x = scheduler.step(logits, t, x, generator, prev_timestep=previous, **arguments).prev_sample
    return x.flatten(1)


def propagate(toy, timesteps: list[int], kernel=None) -> torch.Tensor:
    """The exact distribution of `toy.data` after all steps, from the start; `kernel(t, s)` replaces all but the
    last.
    """
    distribution = toy.start(masked=toy is not TOYS["uniform_only"])
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        step = toy.step_kernel(t, s) if kernel is None or s < 0 else kernel(t, s)
        distribution = distribution @ step
    assert float(distribution.sum()) == pytest.approx(1, abs=1e-9)
    return toy.of_data(distribution)


@pytest.mark.parametrize("schedule", list(TOYS))
@pytest.mark.parametrize("steps", [100, 25, 10, 1])
def test_samples_follow_the_exact_distribution_of_the_chain(schedule, steps):
    toy, scheduler = TOYS[schedule], MaskReplaceScheduler(K, T, schedule)
    scheduler.set_timesteps(steps)
    theory = propagate(toy, scheduler.timesteps.tolist())
    assert p_value(sample(scheduler, toy), toy, theory) > 1e-3


def test_more_steps_come_closer_to_the_joint_distribution():
    toy, scheduler = TOYS["linear"], MaskReplaceScheduler(K, T)
    distances = []
    for steps in (1, 10, 25, 100):
        scheduler.set_timesteps(steps)
        distances.append(float((propagate(toy, scheduler.timesteps.tolist()) - toy.joint).abs().sum() / 2))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.3 and distances[-1] < 0.02
    marginals = torch.stack([(toy.data == k).double().T @ toy.joint for k in range(K)], dim=1)
    independent = marginals[torch.arange(POSITIONS), toy.data].prod(-1)
    torch.testing.assert_close(propagate(toy, [T - 1]), independent, atol=1e-3, rtol=0)


def test_the_posterior_of_one_timestep_in_place_of_ten_is_rejected():
    """What fast sampling does elsewhere; the same statistic finds it."""
    toy, scheduler = TOYS["linear"], MaskReplaceScheduler(K, T)
    scheduler.set_timesteps(10)
    theory = propagate(toy, scheduler.timesteps.tolist())
    assert p_value(sample(scheduler, toy, wrong_stride=True), toy, theory) < 1e-9


@pytest.mark.parametrize("schedule", list(TOYS))
@pytest.mark.parametrize("steps", [50, 25, 10])
def test_every_visited_timestep_has_the_marginals_of_the_forward_chain(schedule, steps):
    """Of codes and masks, at a single position, where predictions lose nothing: what the denoiser was trained on."""
    matrices = one_step_matrices(K, T, schedule)
    toy, scheduler = ToyDistribution(K, 1, matrices), MaskReplaceScheduler(K, T, schedule)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x = scheduler.initial_sample((40_000, 1), generator=generator)
    for t in scheduler.timesteps:
        logits = toy.denoise(int(t)).clamp_min(1e-30).log()[x.squeeze(1)]
        x = scheduler.step(logits, t, x, generator).prev_sample
        s = int(scheduler.previous_timestep(t))
        expected = torch.cat([toy.joint, toy.joint.new_zeros(1)])
        for matrix in matrices[: s + 1]:
            expected = expected @ matrix
        noise = (expected * (1 - expected) / len(x)).sqrt()
        found = x.flatten().bincount(minlength=K + 1) / len(x)
        assert ((found - expected).abs() <= 4.5 * noise + 5e-5).all(), s


@pytest.mark.parametrize("rule, weight", [(1, 0.0), (2, 0.0)])
def test_one_code_at_a_time_samples_the_joint_distribution(rule, weight):
    """Whatever is picked next, a denoiser without error then samples by the chain rule."""
    toy, scheduler = TOYS["mask_only"], MaskReplaceScheduler(K, T, "mask_only")
    scheduler.set_timesteps(timesteps=[99, 80, 55, 30, 0])
    samples = sample(scheduler, toy, prior_rule=rule, prior_weight=weight, prior_count=1)
    assert p_value(samples, toy, toy.joint) > 1e-3


@pytest.mark.parametrize("rule, weight", [(1, 0.0), (2, 0.0), (2, 2.0)])
@pytest.mark.parametrize("timesteps", [[99, 40], [99, 60, 20, 9]])
def test_the_purity_prior_reveals_by_its_scores(rule, weight, timesteps):
    toy, scheduler = TOYS["linear"], MaskReplaceScheduler(K, T)
    scheduler.set_timesteps(timesteps=timesteps)

    def kernel(t, s):
        left = round(POSITIONS * float(scheduler.gammas_cumprod[s]))
        return toy.reveal_kernel(t, lambda masked: max(masked - left, 0), rule, weight)

    theory = propagate(toy, timesteps, kernel)
    assert p_value(sample(scheduler, toy, prior_rule=rule, prior_weight=weight), toy, theory) > 1e-3
    other = propagate(toy, timesteps, lambda t, s: toy.reveal_kernel(t, lambda n: max(n - 1, 0), 1, 0.0))
    assert p_value(sample(scheduler, toy, prior_rule=rule, prior_weight=weight), toy, other) < 1e-3


def test_known_codes_condition_the_others():
    """With nothing replaced and one code at a time, the samples follow the joint distribution given the known
    codes.
    """
    toy, scheduler = TOYS["mask_only"], MaskReplaceScheduler(K, T, "mask_only")
    scheduler.set_timesteps(timesteps=[99, 80, 55, 30, 0])
    known = torch.tensor([[1, 0], [0, 2]]).expand(SAMPLES, 2, 2)
    mask = torch.tensor([[True, False], [False, True]]).expand(SAMPLES, 2, 2)
    generator = torch.Generator().manual_seed(0)
    x = torch.where(mask, known, scheduler.initial_sample((SAMPLES, 2, 2)))
    for t in scheduler.timesteps:
        logits = toy.denoise(int(t)).clamp_min(1e-30).log()[toy.index(x.flatten(1))].reshape(*x.shape, K)
        x = scheduler.step(
            logits, t, x, generator, prior_rule=1, prior_count=1, known_indices=known, known_mask=mask
        ).prev_sample
        assert torch.equal(x[mask], known[mask])
    conditional = torch.where((toy.data[:, 0] == 1) & (toy.data[:, 3] == 2), toy.joint, 0.0)
    assert p_value(x.flatten(1), toy, conditional / conditional.sum()) > 1e-3
