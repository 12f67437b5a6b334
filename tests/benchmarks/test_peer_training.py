"""The peers' training steps compute what they stand for."""

import pytest
import torch

from benchmarks.peer_training import (
    DenseChain,
    PlainPixelSNAIL,
    TamingQuantizer,
    pixelsnail_steps,
    quantizer_steps,
    vq_diffusion_steps,
    vqgan_steps,
)
from hf_vq import MaskReplaceScheduler, PixelSNAILConfig, VectorQuantizer
from hf_vq.training.objectives.mask_replace_objective import MaskReplaceObjective


@pytest.mark.parametrize("timestep", [0, 1, 20, 50, 98, 99])
def test_the_dense_chain_has_the_loss_of_the_objective(timestep):
    torch.manual_seed(0)
    chain, scheduler = DenseChain(7), MaskReplaceScheduler(7)
    codes, logits = torch.randint(7, (6, 2, 3)), torch.randn(6, 2, 3, 7)
    timesteps = torch.full((6,), timestep)
    noised = scheduler.add_noise(codes, timesteps)
    expected = MaskReplaceObjective(scheduler)(logits, codes, noised, timesteps, torch.full((6,), 0.01)).loss
    log_prediction = logits.flatten(1, 2).log_softmax(-1).transpose(1, 2)
    loss = chain.loss(log_prediction, codes.flatten(1), noised.flatten(1), timesteps)
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-4)


def test_the_dense_chain_draws_as_the_scheduler():
    torch.manual_seed(0)
    chain, scheduler = DenseChain(3), MaskReplaceScheduler(3)
    codes, timesteps = torch.randint(3, (1, 1)).expand(20000, 1), torch.full((20000,), 60)
    shares = [
        torch.bincount(drawn.flatten(), minlength=4) / 20000
        for drawn in (chain.noised(codes, timesteps), scheduler.add_noise(codes, timesteps))
    ]
    torch.testing.assert_close(*shares, atol=0.02, rtol=0)


def test_the_plain_pixelsnail_sees_what_came_before():
    config = PixelSNAILConfig(
        codebook_size=5, grid_size=4, hidden_size=16, res_channels=8, num_blocks=2, num_res_blocks=1, dropout=0.0
    )
    torch.manual_seed(0)
    network = PlainPixelSNAIL(config).eval()
    codes = torch.randint(5, (1, 4, 4))
    before = network(codes).flatten(2)
    for position in range(16):
        changed = codes.flatten(1).clone()
        changed[0, position] = (changed[0, position] + 1) % 5
        moved = (network(changed.view(1, 4, 4)).flatten(2) - before).abs().amax(1)[0] > 1e-5
        # the features at a position know the codes before it only, so attention reaches one code less
        assert not moved[: position + 1].any() and moved[position + 2 :].all()


@pytest.mark.parametrize("steps", [pixelsnail_steps, vq_diffusion_steps, vqgan_steps])
def test_both_sides_take_a_step(steps):
    ours, theirs = steps(True, 2)
    ours()
    theirs()


@pytest.mark.parametrize("peer", ["taming", "diffusers"])
def test_the_quantizers_choose_the_same_codes(peer):
    torch.manual_seed(0)
    ours, theirs = quantizer_steps(peer, num_codes=50, num_latents=256, channels=8)
    indices = ours()
    assert indices.shape == (256,) and torch.equal(indices, theirs()) and len(indices.unique()) > 20


def test_taming_arithmetic_has_our_loss():
    torch.manual_seed(0)
    ours, theirs = VectorQuantizer(20, 4), TamingQuantizer(20, 4)
    theirs.embedding.load_state_dict(ours.embedding.state_dict())
    latents = torch.randn(2, 4, 3, 3)
    quantized, loss, _ = theirs(latents)
    output = ours(latents)
    torch.testing.assert_close(quantized, output.quantized, atol=1e-6, rtol=0)
    torch.testing.assert_close(loss, output.loss)
