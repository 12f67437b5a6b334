"""The entropy of the mean choice is of all processes' vectors, so that a loss does not depend on their number."""

import pytest
import torch
import torch.distributed as dist

from hf_vq.models.quantizers.build import build_quantizer
from tests.models.quantizers.brute_force import randn
from tests.process_groups import in_processes


CASES = {
    "lfq": (16, 4, {}),
    "bsq": (16, 4, {"bits_per_group": 2}),
    "vq": (6, 3, {"entropy_weight": 0.5, "entropy_temperature": 1.0}),
    "cosine": (6, 3, {"entropy_weight": 0.5, "entropy_temperature": 1.0}),
    "ibq": (6, 3, {"entropy_weight": 0.5, "entropy_temperature": 1.0}),
}


def loss_and_gradient(name, latents):
    """Of a linear layer before the quantizer, as the mean over the processes that there are."""
    torch.manual_seed(0)
    num_codes, dim, options = CASES[name]
    quantizer = build_quantizer(name, num_codes, dim, **options).train()
    weight = torch.eye(dim).requires_grad_()
    loss = quantizer(torch.einsum("ij,bjhw->bihw", weight, latents)).loss
    loss.backward()
    values = torch.cat([loss.detach().view(1), weight.grad.flatten()])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def of_my_half(name, latents):
    return loss_and_gradient(name, latents.chunk(2)[dist.get_rank()])


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_loss_and_gradient_of_one(name, tmp_path):
    latents = randn(4, CASES[name][1], 3, 3)
    expected = loss_and_gradient(name, latents)
    for values in in_processes(2, tmp_path, of_my_half, name, latents):
        torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-5)
