"""The quantizers for large codebooks, SimVQ, IBQ and BSQ, and the entropies of choices, against plain definitions."""

import pytest
import torch

from hf_vq.models.quantizers.code_entropies import choice_entropies
from hf_vq.models.quantizers.index_propagation_quantizer import IndexPropagationQuantizer
from hf_vq.models.quantizers.scalar_quantizers import BSQuantizer
from hf_vq.models.quantizers.vector_quantizers import (
    CosineVectorQuantizer,
    EMAVectorQuantizer,
    SimVectorQuantizer,
    VectorQuantizer,
)
from tests.models.quantizers.brute_force import brute_force, randn, rows


def entropy(probabilities):
    return -(probabilities * probabilities.log()).sum(-1)


# ------------------------------------------------------------------------------------------------ entropies of choices


@pytest.mark.parametrize("rows_of_chunk", [None, 7, 30])
def test_choice_entropies_are_their_definition(rows_of_chunk):
    vectors, codebook, bias = randn(30, 3).requires_grad_(), randn(11, 3, seed=1).requires_grad_(), randn(11, seed=2)
    probabilities = ((vectors.double() @ codebook.double().T + bias) / 0.7).softmax(1)
    expected = entropy(probabilities).mean(), entropy(probabilities.mean(0))
    actual = choice_entropies(vectors, codebook, bias, 0.7, rows_of_chunk)
    for value, exact in zip(actual, expected, strict=True):
        assert value.item() == pytest.approx(exact.item(), rel=1e-5)
        for gradient, wanted in zip(
            torch.autograd.grad(value, (vectors, codebook), retain_graph=True),
            torch.autograd.grad(exact, (vectors, codebook), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)


def test_choice_entropies_of_certain_choices_have_finite_gradients():
    vectors, codebook = (100 * randn(30, 3)).requires_grad_(), randn(50, 3, seed=1).requires_grad_()
    each, mean = choice_entropies(vectors, codebook, None, 0.01)
    (each - mean).backward()
    assert torch.isfinite(vectors.grad).all() and torch.isfinite(codebook.grad).all()


@pytest.mark.parametrize("kind", [CosineVectorQuantizer, VectorQuantizer])
def test_entropy_loss(kind):
    """LlamaGen's: the softmax of -|z - e|² / τ, and 1e-5 added in the logarithm of the mean."""
    latents = randn(2, 3, 4, 5)
    plain = kind(7, 3, commitment_cost=0.4)
    plain.embedding.weight.data.copy_(randn(7, 3, seed=1))
    quantizer = kind(7, 3, commitment_cost=0.4, entropy_weight=0.3, entropy_temperature=0.5)
    quantizer.load_state_dict(plain.state_dict())
    z, e = rows(latents).double(), plain.embedding.weight.double()
    if kind is CosineVectorQuantizer:
        z, e = (torch.nn.functional.normalize(v, dim=1) for v in (z, e))
    probabilities = (-torch.cdist(z, e).square() / 0.5).softmax(1)
    mean = probabilities.mean(0)
    entropy_of_mean = -(mean * (mean + 1e-5).log()).sum()
    expected = plain(latents).loss + 0.3 * (entropy(probabilities).mean() - entropy_of_mean)
    assert quantizer(latents).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_averages_of_latents_of_length_1():
    """VQ-Diffusion's "cosine" codebook: codes of any length in evaluation, scaled to 1 before a training search."""
    quantizer = EMAVectorQuantizer(
        5, 3, 1.0, zero_debias=False, restart_threshold=0, count_smoothing="laplace", by_angle=True
    )
    start, latents = 3 * randn(5, 3, seed=1), randn(2, 3, 4, 5)
    quantizer.set_codebook(start)
    z = torch.nn.functional.normalize(rows(latents), dim=1)
    output = quantizer.eval()(latents)
    indices = (z @ start.T).argmax(1)
    assert torch.equal(output.indices.flatten(), indices)
    assert not torch.equal(indices, brute_force(z, start))
    torch.testing.assert_close(rows(output.quantized), start[indices])
    torch.testing.assert_close(output.loss, (start[indices] - z).square().mean())
    output = quantizer.train()(latents)
    unit = torch.nn.functional.normalize(start, dim=1)
    one_hot = torch.nn.functional.one_hot((z @ unit.T).argmax(1), 5).float()
    assert torch.equal(output.indices.flatten(), one_hot.argmax(1))
    counts = 0.99 + 0.01 * one_hot.sum(0)
    sums = 0.99 * start + 0.01 * one_hot.T @ z
    smoothed = (counts + 1e-5) / (counts.sum() + 5e-5) * counts.sum()
    torch.testing.assert_close(quantizer.codebook, sums / smoothed[:, None])


# --------------------------------------------------------------------------------------------------------------- SimVQ


@pytest.mark.parametrize("legacy", [False, True])
def test_simvq_is_vector_quantization_with_a_projected_codebook(legacy):
    quantizer, latents = SimVectorQuantizer(9, 3, 0.3, legacy_beta=legacy), randn(2, 3, 4, 5).requires_grad_()
    frozen, projection = quantizer.embedding.clone(), quantizer.embedding_proj
    output = quantizer.train()(latents)
    weight, bias = (p.detach().clone().requires_grad_() for p in (projection.weight, projection.bias))
    codes = torch.stack([weight @ code + bias for code in frozen])
    z = rows(latents)
    nearest = brute_force(z.detach(), codes.detach())
    assert torch.equal(output.indices.flatten(), nearest)
    torch.testing.assert_close(rows(output.quantized), codes[nearest])
    assert torch.equal(output.quantized, quantizer.indices_to_latents(output.indices))
    squared = (z - codes[nearest]).square().mean()
    assert output.loss.item() == pytest.approx(1.3 * squared.item(), rel=1e-5)
    codebook_weight, encoder_weight = (0.3, 1.0) if legacy else (1.0, 0.3)
    output.loss.backward()
    to_layer = torch.autograd.grad(codebook_weight * squared, (weight, bias), retain_graph=True)
    torch.testing.assert_close(projection.weight.grad, to_layer[0])
    torch.testing.assert_close(projection.bias.grad, to_layer[1])
    torch.testing.assert_close(latents.grad, torch.autograd.grad(encoder_weight * squared, latents)[0])
    assert [name for name, _ in quantizer.named_parameters()] == ["embedding_proj.weight", "embedding_proj.bias"]
    assert torch.equal(quantizer.embedding, frozen)


# ----------------------------------------------------------------------------------------------------------------- IBQ


def test_ibq_is_its_definition():
    """Section 3.2 of the paper: one-hots with the gradient of the softmax, and the double quantization loss."""
    quantizer = IndexPropagationQuantizer(6, 3, 0.3).train()
    quantizer.embedding.weight.data.copy_(randn(6, 3, seed=1))
    latents, upstream = randn(2, 3, 4, 5).requires_grad_(), rows(randn(2, 3, 4, 5, seed=2))
    output = quantizer(latents)

    e, z = quantizer.embedding.weight, rows(latents)
    soft = (z @ e.T).softmax(1)
    hard = torch.nn.functional.one_hot(soft.argmax(1), 6).float()
    q, chosen = (hard + soft - soft.detach()) @ e, hard @ e
    loss = (
        (q - z).square().mean() + (chosen.detach() - z).square().mean() + 0.3 * (chosen - z.detach()).square().mean()
    )
    assert torch.equal(output.indices.flatten(), soft.argmax(1))
    assert torch.equal(output.quantized, quantizer.indices_to_latents(output.indices))
    torch.testing.assert_close(output.loss, loss)
    for actual, expected in (((rows(output.quantized) * upstream).sum(), (q * upstream).sum()), (output.loss, loss)):
        for gradient, wanted in zip(
            torch.autograd.grad(actual, (latents, e), retain_graph=True),
            torch.autograd.grad(expected, (latents, e), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(gradient, wanted)


def test_ibq_gradient_reaches_every_code_through_the_choice():
    quantizer, latents = IndexPropagationQuantizer(6, 3).train(), randn(1, 3, 1, 1).requires_grad_()
    quantizer.embedding.weight.data.copy_(randn(6, 3, seed=1))
    quantizer(latents).quantized.sum().backward()
    assert (quantizer.embedding.weight.grad != 0).any(1).all()


def test_ibq_entropies():
    latents, options = randn(2, 3, 4, 5), {"entropy_weight": 0.2, "diversity_weight": 1.5, "entropy_temperature": 0.4}
    plain, quantizer = IndexPropagationQuantizer(6, 3), IndexPropagationQuantizer(6, 3, **options)
    plain.embedding.weight.data.copy_(randn(6, 3, seed=1))
    quantizer.load_state_dict(plain.state_dict())
    probabilities = (rows(latents) @ plain.codebook.T / 0.4).double().softmax(1)
    penalty = 0.2 * (entropy(probabilities).mean() - 1.5 * entropy(probabilities.mean(0)))
    assert quantizer(latents).loss.item() == pytest.approx((plain(latents).loss + penalty).item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------- BSQ


def corners(bits):
    """Code i has the sign of bit d of i in channel d, and length 1."""
    signs = torch.tensor([[1.0 if i >> d & 1 else -1.0 for d in range(bits)] for i in range(2**bits)])
    return signs / bits**0.5


def test_bsq_codes_are_the_nearest_corners_on_the_sphere():
    quantizer, latents = BSQuantizer(32, 5), 7 * randn(2, 5, 4, 4)
    output = quantizer(latents)
    torch.testing.assert_close(quantizer.codebook, corners(5))
    assert torch.equal(output.indices.flatten(), brute_force(rows(latents) / 7, corners(5)))
    assert torch.equal(quantizer.indices_to_latents(output.indices), output.quantized)
    torch.testing.assert_close(output.quantized.norm(dim=1), torch.ones(2, 4, 4))
    assert torch.equal(quantizer(0.01 * latents).indices, output.indices)


@pytest.mark.parametrize("inverse_temperature", [0.5, 10.0])
def test_bsq_loss_over_all_codes(inverse_temperature):
    """Equations 8 to 10 of the paper, whose τ is twice the inverse temperature."""
    quantizer = BSQuantizer(
        32, 5, commitment_cost=0.2, entropy_weight=0.5, diversity_weight=1.5, inverse_temperature=inverse_temperature
    )
    latents = randn(2, 5, 4, 4)
    u, codes = torch.nn.functional.normalize(rows(latents).double(), dim=1), corners(5).double()
    probabilities = (2 * inverse_temperature * u @ codes.T).softmax(1)
    commitment = (u - codes[brute_force(u, codes)]).square().mean()
    expected = 0.2 * commitment + 0.5 * (entropy(probabilities).mean() - 1.5 * entropy(probabilities.mean(0)))
    output = quantizer(latents)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.commitment_loss.item() == pytest.approx(commitment.item(), rel=1e-5)


def test_bsq_gradient_is_that_of_the_projection():
    quantizer, latents, upstream = BSQuantizer(32, 5), randn(2, 5, 4, 4).requires_grad_(), randn(2, 5, 4, 4, seed=1)
    (gradient,) = torch.autograd.grad(quantizer(latents).quantized, latents, upstream)
    (expected,) = torch.autograd.grad(latents / latents.norm(dim=1, keepdim=True), latents, upstream)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SimVectorQuantizer(4, 3, commitment_cost=float("nan")), "`commitment_cost` must be .* got nan"),
        (lambda: SimVectorQuantizer(4, 3, gradient_estimator="none"), "`gradient_estimator` must be one of"),
        (lambda: IndexPropagationQuantizer(4, 3, entropy_temperature=0), "`entropy_temperature` must be .* above 0"),
        (lambda: CosineVectorQuantizer(4, 3, entropy_weight=-1), "`entropy_weight` must be .* at least 0, got -1"),
        (lambda: BSQuantizer(31, 5), r"must be 2 \*\* embed_dim = 32"),
        (lambda: BSQuantizer(32, 5, inverse_temperature=float("inf")), "`inverse_temperature` must be .* got inf"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
