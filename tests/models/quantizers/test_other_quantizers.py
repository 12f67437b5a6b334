"""Gumbel-softmax, cosine, finite scalar, lookup-free and residual quantizers against plain definitions."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_vq.models.quantizers.gradient_estimators import rotation_trick
from hf_vq.models.quantizers.gumbel_quantizer import GumbelQuantizer
from hf_vq.models.quantizers.residual_quantizer import ResidualQuantizer
from hf_vq.models.quantizers.scalar_quantizers import FSQuantizer, LFQuantizer
from hf_vq.models.quantizers.vector_quantizers import CosineVectorQuantizer, VectorQuantizer
from tests.models.quantizers.brute_force import brute_force, randn, rows


GOLDEN = Path(__file__).parents[2] / "fixtures/golden"


# ------------------------------------------------------------------------------------------------------------- Gumbel


def make_gumbel(num_embeddings=5, embed_dim=3, **kwargs):
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(num_embeddings, embed_dim, **kwargs)
    quantizer.proj.weight.data.mul_(3)
    return quantizer


def logits_of(quantizer, latents):
    """`(N, K)`."""
    return rows(latents) @ quantizer.proj.weight[:, :, 0, 0].T + quantizer.proj.bias


def test_gumbel_evaluation_takes_the_most_likely_code():
    quantizer, latents = make_gumbel().eval(), randn(2, 3, 4, 5)
    output = quantizer(latents)
    assert torch.equal(output.indices.flatten(), logits_of(quantizer, latents).argmax(1))
    assert torch.equal(rows(output.quantized), quantizer.embed.weight[output.indices.flatten()])
    assert torch.equal(quantizer.indices_to_latents(output.indices), output.quantized)


@pytest.mark.parametrize("training", [True, False])
def test_gumbel_loss_is_the_divergence_from_the_uniform(training):
    quantizer, latents = make_gumbel(kl_weight=0.3).train(training), randn(2, 3, 4, 5)
    probabilities = logits_of(quantizer, latents).softmax(1)
    kl = sum(
        sum(p * math.log(p * 5) for p in row.tolist()) for row in probabilities.double()
    ) / len(probabilities)  # fmt: skip
    assert quantizer(latents).loss.item() == pytest.approx(0.3 * kl, rel=1e-5)
    # the uniform has none, a certain choice has log K
    quantizer.proj.weight.data.zero_()
    quantizer.proj.bias.data.zero_()
    assert quantizer(latents).loss.item() == pytest.approx(0, abs=1e-6)
    quantizer.proj.bias.data[2] = 1000
    assert quantizer(latents).loss.item() == pytest.approx(0.3 * math.log(5), rel=1e-5)


def test_gumbel_relaxation():
    latents, noise = randn(2, 3, 4, 5).requires_grad_(), randn(2, 5, 4, 5, seed=1)
    soft = make_gumbel(hard=False, temperature=0.7).train()
    weights = ((logits_of(soft, latents) + rows(noise)) / 0.7).softmax(1)
    expected = weights @ soft.embed.weight
    output = soft(latents, noise=noise)
    torch.testing.assert_close(rows(output.quantized), expected)
    assert torch.equal(output.indices.flatten(), weights.argmax(1))

    hard = make_gumbel(hard=True, temperature=0.7).train()
    hard_output = hard(latents, noise=noise)
    assert torch.equal(hard_output.indices, output.indices)
    codes = hard.embed.weight[hard_output.indices.flatten()]
    torch.testing.assert_close(rows(hard_output.quantized), codes, atol=0, rtol=0)
    # the gradient to the latents is that of the relaxed weights
    upstream = randn(2, 3, 4, 5, seed=2)
    (hard_gradient,) = torch.autograd.grad(hard_output.quantized, latents, upstream)
    (soft_gradient,) = torch.autograd.grad(expected, latents, rows(upstream))
    torch.testing.assert_close(hard_gradient, soft_gradient)


@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_gumbel_draws_from_the_softmax(temperature):
    quantizer = make_gumbel(temperature=temperature).train()
    latents = randn(1, 3, 1, 1).expand(4, 3, 50, 100)
    torch.manual_seed(1)
    draws = quantizer(latents).indices.flatten()
    expected = 20000 * logits_of(quantizer, latents[:1, :, :1, :1])[0].softmax(0).double()
    assert expected.min() > 20
    chi_square = ((draws.bincount(minlength=5) - expected).square() / expected).sum().item()
    # 4 degrees of freedom: 23.5 is exceeded once in 10,000 times
    assert chi_square < 23.5
    assert not torch.equal(draws, quantizer(latents).indices.flatten())


def test_gumbel_noise_is_given_in_evaluation_also():
    quantizer, latents, noise = make_gumbel().eval(), randn(2, 3, 4, 5), 5 * randn(2, 5, 4, 5, seed=1)
    indices = quantizer(latents, noise=noise).indices
    assert torch.equal(indices.flatten(), (logits_of(quantizer, latents) + rows(noise)).argmax(1))


def test_gumbel_temperature_is_the_original_schedule():
    folder = GOLDEN / "taming_gumbel"
    golden = load_file(folder / "io.safetensors")
    quantizer = make_gumbel(temperature=0.9, temperature_end=1e-6, decay_steps=1_000_001)
    temperatures = torch.tensor([quantizer.temperature_at(step, 7) for step in golden["scheduler_steps"].tolist()])
    # far below the suggested 9e-6 at the end of the schedule, where the temperature itself is 1e-6
    torch.testing.assert_close(temperatures, golden["temperatures"], atol=1e-7, rtol=1e-6)


def test_gumbel_warms_up_linearly_and_cools_along_a_cosine():
    quantizer = make_gumbel(temperature=2.0, temperature_start=1.0, temperature_end=0.5, warmup_steps=4)
    assert quantizer.temperature == 2.0
    seen = []
    for step in range(16):
        quantizer.set_training_step(step, 14)
        seen.append(quantizer.temperature)
    assert seen[:5] == pytest.approx([1, 1.25, 1.5, 1.75, 2])
    assert seen[4 + 5] == pytest.approx(1.25)
    assert seen[4 + 2] == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi / 5)))
    assert seen[14] == seen[15] == pytest.approx(0.5)
    assert seen[4:15] == sorted(seen[4:15], reverse=True)


# ------------------------------------------------------------------------------------------------------------- cosine


def test_cosine_takes_the_smallest_angle():
    quantizer = CosineVectorQuantizer(7, 3, commitment_cost=0.4)
    latents = randn(2, 3, 4, 5) * torch.rand(2, 1, 4, 5) * 10
    output = quantizer(latents)
    z, e = rows(latents), quantizer.embedding.weight.detach()
    cosines = torch.nn.functional.cosine_similarity(z[:, None], e[None], dim=2)
    assert torch.equal(output.indices.flatten(), cosines.argmax(1))
    assert torch.equal(quantizer(100 * latents).indices, output.indices)
    torch.testing.assert_close(rows(output.quantized).norm(dim=1), torch.ones(len(z)))
    assert torch.equal(quantizer.indices_to_latents(output.indices), output.quantized)
    # |ẑ - ê|² = 2 - 2 cos, over 3 channels
    squared = (2 - 2 * cosines.max(1).values).mean() / 3
    torch.testing.assert_close(output.loss, 1.4 * squared)


def test_cosine_gradients_turn_and_do_not_stretch():
    quantizer, latents = CosineVectorQuantizer(7, 3), randn(2, 3, 4, 5).requires_grad_()
    quantizer(latents).loss.backward()
    assert latents.grad.abs().max() > 1e-4
    torch.testing.assert_close((latents.grad * latents).sum(1), torch.zeros(2, 4, 5), atol=1e-7, rtol=0)
    weight = quantizer.embedding.weight
    torch.testing.assert_close((weight.grad * weight).sum(1), torch.zeros(7), atol=1e-7, rtol=0)


# ------------------------------------------------------------------------------------------------------ finite scalar


LEVELS = [(2,), (3,), (2, 3), (8, 5, 5, 5), (7, 5, 5), (4, 4, 4), (8, 6, 5), (1000,), (999, 2)]


def plain_fsq(vector, levels):
    """Equations of section 3.1 of the paper, and values evenly from -1 to 1: the values and the index."""
    values, index, basis = [], 0, 1
    for z, count in zip(vector, levels, strict=True):
        half = (count - 1) * 1.001 / 2
        offset = 0.5 if count % 2 == 0 else 0.0
        bounded = math.tanh(z + math.atanh(offset / half)) * half - offset
        digit = round(bounded) + count // 2
        values.append(2 * digit / (count - 1) - 1)
        index, basis = index + digit * basis, basis * count
    return values, index


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_is_its_definition(levels):
    quantizer, latents = FSQuantizer(math.prod(levels), len(levels), levels), 2 * randn(4, len(levels), 8, 8)
    output = quantizer(latents)
    expected = [plain_fsq(vector, levels) for vector in rows(latents).double().tolist()]
    assert output.indices.flatten().tolist() == [index for _, index in expected]
    torch.testing.assert_close(rows(output.quantized), torch.tensor([values for values, _ in expected]))
    assert output.loss == 0


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_indices_and_codes_are_a_bijection(levels):
    quantizer = FSQuantizer(math.prod(levels), len(levels), levels)
    codebook = quantizer.codebook
    assert codebook.shape == (math.prod(levels), len(levels))
    assert len(codebook.unique(dim=0)) == len(codebook)
    assert codebook.min() == -1 and codebook.max() == 1
    latents = 3 * randn(4, len(levels), 16, 16)
    output = quantizer(latents)
    assert torch.equal(quantizer.indices_to_latents(output.indices), output.quantized)
    assert torch.equal(codebook[output.indices.flatten()], rows(output.quantized))


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_reaches_every_code_and_no_other(levels):
    quantizer = FSQuantizer(math.prod(levels), len(levels), levels)
    sweep = torch.cat([torch.linspace(-9, 9, 40_000), torch.tensor([-1e6, 1e6, -40.0, 40.0])])
    for channel, count in enumerate(levels):
        latents = torch.zeros(1, len(levels), 1, len(sweep))
        latents[0, channel, 0] = sweep
        values = quantizer(latents).quantized[0, channel, 0]
        expected = torch.linspace(-1, 1, count)
        torch.testing.assert_close(values.unique(), expected, atol=1e-6, rtol=0)
        assert (values[:-4].diff() >= 0).all()


def test_fsq_gradient_is_that_of_the_bound():
    quantizer, latents = FSQuantizer(15, 2, (3, 5)), randn(1, 2, 4, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(quantizer(latents).quantized.sum(), latents)
    # the value is 2/(L-1) · tanh(z) · (L-1)/2 · 1.001 before rounding
    torch.testing.assert_close(gradient, 1.001 * (1 - latents.tanh() ** 2))


# -------------------------------------------------------------------------------------------------------- lookup-free


def all_codes(bits):
    """Code i has the sign of bit d of i in channel d."""
    return torch.tensor([[1.0 if i >> d & 1 else -1.0 for d in range(bits)] for i in range(2**bits)])


def test_lfq_codes_are_signs():
    quantizer, latents = LFQuantizer(32, 5), randn(2, 5, 4, 4)
    output = quantizer(latents)
    assert torch.equal(quantizer.codebook, all_codes(5))
    assert torch.equal(output.indices.flatten(), brute_force(rows(latents), all_codes(5)))
    assert torch.equal(rows(output.quantized), all_codes(5)[output.indices.flatten()])
    assert torch.equal(quantizer.indices_to_latents(output.indices), output.quantized)


def entropy(probabilities):
    return -(probabilities * probabilities.log()).sum(-1)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_lfq_entropies_over_all_codes(temperature):
    quantizer = LFQuantizer(
        32, 5, commitment_cost=0.2, entropy_weight=0.5, diversity_weight=1.5, inverse_temperature=temperature
    )
    latents = 0.4 * randn(2, 5, 4, 4)
    z, codes = rows(latents).double(), all_codes(5).double()
    probabilities = (-(z[:, None] - codes).square().sum(-1) * temperature).softmax(1)
    each, mean = entropy(probabilities).mean(), entropy(probabilities.mean(0))
    commitment = (z - codes[brute_force(z, codes)]).square().mean()
    expected = 0.2 * commitment + 0.5 * (each - 1.5 * mean)
    output = quantizer(latents)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.commitment_loss.item() == pytest.approx(commitment.item(), rel=1e-5)


def test_lfq_groups_of_bits():
    """Beyond a group, the entropy of the mean is the sum of those of the groups' marginals."""
    quantizer, z = LFQuantizer(32, 5, bits_per_group=2), 0.4 * randn(30, 5)
    codes = all_codes(5)
    mean = (-(z[:, None] - codes).square().sum(-1)).softmax(1).mean(0)
    expected = 0
    for group in ((0, 1), (2, 3), (4,)):
        marginal = [
            mean[(codes[:, group] == torch.tensor(signs)).all(1)].sum()
            for signs in itertools.product((-1.0, 1.0), repeat=len(group))
        ]
        expected = expected + entropy(torch.stack(marginal))
    torch.testing.assert_close(quantizer._entropies(z)[1], expected)


def test_lfq_gradients_are_finite_for_certain_choices():
    latents = (100 * randn(1, 6, 4, 4)).requires_grad_()
    LFQuantizer(64, 6)(latents).loss.backward()
    assert torch.isfinite(latents.grad).all()


# ----------------------------------------------------------------------------------------------------------- residual


def make_residual(**kwargs):
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(8, 3, **{"depth": 3, "base": "vq", **kwargs})
    for scale, layer in zip((1.0, 0.4, 0.2), quantizer.layers, strict=False):
        layer.set_codebook(scale * torch.randn(8, 3))
    return quantizer


def test_residual_codes_what_is_left():
    quantizer, latents = make_residual(commitment_cost=0.3), randn(2, 3, 4, 4)
    output = quantizer(latents)
    left, loss = rows(latents), 0
    for depth, layer in enumerate(quantizer.layers):
        nearest = brute_force(left, layer.codebook)
        assert torch.equal(output.indices[..., depth].flatten(), nearest)
        left = left - layer.codebook[nearest].detach()
        loss = loss + left.square().mean()
    torch.testing.assert_close(rows(output.quantized), rows(latents) - left)
    torch.testing.assert_close(output.loss, 1.3 * loss)
    torch.testing.assert_close(output.commitment_loss, loss)
    assert torch.equal(quantizer.indices_to_latents(output.indices), output.quantized)


def test_residual_prefixes_decode():
    quantizer, latents = make_residual(), randn(2, 3, 4, 4)
    indices = quantizer(latents).indices
    first = quantizer.layers[0].indices_to_latents(indices[..., 0])
    assert torch.equal(quantizer.indices_to_latents(indices[..., :1]), first)
    second = first + quantizer.layers[1].indices_to_latents(indices[..., 1])
    assert torch.equal(quantizer.indices_to_latents(indices[..., :2]), second)


def test_residual_gradient_passes_once():
    quantizer, latents, upstream = make_residual(), randn(2, 3, 4, 4).requires_grad_(), randn(2, 3, 4, 4, seed=1)
    (gradient,) = torch.autograd.grad(quantizer(latents).quantized, latents, upstream)
    assert torch.equal(gradient, upstream)

    rotated = make_residual(gradient_estimator="rotation")
    output = rotated(latents)
    (gradient,) = torch.autograd.grad(output.quantized, latents, upstream)
    expected = torch.autograd.grad(rotation_trick(latents, output.quantized.detach()), latents, upstream)[0]
    torch.testing.assert_close(gradient, expected)
    assert not torch.equal(gradient, upstream)


def test_residual_losses_reach_every_layer_and_the_latents():
    quantizer, latents = make_residual(commitment_cost=0.3), randn(2, 3, 4, 4).requires_grad_()
    output = quantizer(latents)
    output.loss.backward()
    left, expected = rows(latents.detach()), 0
    for depth, layer in enumerate(quantizer.layers):
        codes = layer.codebook[output.indices[..., depth].flatten()].detach()
        alone = VectorQuantizer(8, 3, 0.3)
        alone.set_codebook(layer.codebook)
        alone(left.T.reshape(1, 3, 1, -1)).loss.backward()
        torch.testing.assert_close(layer.embedding.weight.grad, alone.embedding.weight.grad)
        left = left - codes
        expected = expected + 0.3 * 2 * left / left.numel()
    torch.testing.assert_close(rows(latents.grad), expected)


def test_residual_moving_averages_see_what_is_left():
    quantizer = make_residual(base="ema", decay=0.0, restart_threshold=0)
    latents = randn(8, 3, 4, 4)
    left = rows(latents)
    before = [layer.codebook.clone() for layer in quantizer.layers]
    output = quantizer.train()(latents)
    for depth, (layer, codes) in enumerate(zip(quantizer.layers, before, strict=True)):
        nearest = output.indices[..., depth].flatten()
        for code in nearest.unique():
            torch.testing.assert_close(layer.codebook[code], left[nearest == code].mean(0), atol=1e-5, rtol=1e-5)
        left = left - codes[nearest]


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GumbelQuantizer(0, 3), "`num_embeddings` must be an int of at least 1, got 0"),
        (lambda: make_gumbel(temperature=0.0)(torch.zeros(1, 3, 2, 2)), "`temperature` must be a " "finite number above 0, got 0.0"),  # noqa: E501
        (lambda: make_gumbel(temperature=math.nan), "`temperature` must be a finite number above 0, got nan"),
        (lambda: make_gumbel(temperature_start=0), "`temperature_start` must be a finite number above 0, got 0"),
        (lambda: make_gumbel(temperature_end=-1.0), "`temperature_end` must be a finite number above 0, got -1.0"),
        (lambda: make_gumbel(warmup_steps=5, decay_steps=5), "`decay_steps` must be an int of at least 6, got 5"),
        (lambda: make_gumbel(kl_weight=math.inf), "`kl_weight` must be a finite number of at least 0, got inf"),
        (lambda: make_gumbel().set_training_step(-1, 5), "`step` must be an int of at least 0, got -1"),
        (lambda: make_gumbel().set_training_step(0, 0), "`total_steps` must be an int of at least 1, got 0"),
        (lambda: make_gumbel()(torch.zeros(1, 2, 2, 2)), r"`latents` must have shape \(B, 3, h, w\)"),
        (lambda: make_gumbel().indices_to_latents(torch.tensor([[[5]]])), r"`indices` must lie in \[0, 5\)"),
        (lambda: CosineVectorQuantizer(4, 3)(torch.zeros(1, 2, 2, 2)), r"`latents` must have shape \(B, 3, h, w\)"),
        (lambda: CosineVectorQuantizer(4, 3).set_codebook(torch.zeros(4, 2)), r"`codes` must have shape \(4, 3\)"),
        (lambda: FSQuantizer(1000, 3), r"`levels` \(8, 5, 5, 5\) must be 3 numbers"),
        (lambda: FSQuantizer(12, 2, (4, 4)), "their product is 16"),
        (lambda: FSQuantizer(3, 2, (3, 1)), "from 2 to 1000"),
        (lambda: FSQuantizer(1001, 1, (1001,)), "from 2 to 1000"),
        (lambda: FSQuantizer(9, 2, (3, 3)).indices_to_latents(torch.tensor([[[9]]])), r"`indices` must lie in \[0, 9\)"),  # noqa: E501
        (lambda: FSQuantizer(9, 2, (3, 3))(torch.zeros(1, 3, 2, 2)), r"`latents` must have shape \(B, 2, h, w\)"),
        (lambda: LFQuantizer(31, 5), r"must be 2 \*\* embed_dim = 32 .* got 31"),
        (lambda: LFQuantizer(32, 5, bits_per_group=0), "`bits_per_group` must be an int of at least 1, got 0"),
        (lambda: LFQuantizer(32, 5).indices_to_latents(torch.tensor([[[32]]])), r"`indices` must lie in \[0, 32\)"),
        (lambda: ResidualQuantizer(4, 3, depth=0), "`depth` must be an int of at least 1, got 0"),
        (lambda: ResidualQuantizer(4, 3, base="gumbel"), "`base` must be 'vq' or 'ema', got 'gumbel'"),
        (lambda: ResidualQuantizer(4, 3, base="vq", decay=0.9), r"have no \['decay'\]"),
        (lambda: make_residual().indices_to_latents(torch.zeros(1, 2, 2, 4, dtype=torch.int64)), "d from 1 to 3"),
        (lambda: make_residual().indices_to_latents(torch.zeros(2, 2, 2, dtype=torch.int64)), r"\(B, h, w, d\)"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
