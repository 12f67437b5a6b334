import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_vq.distributed import share_of_process
from hf_vq.training.objectives.discriminator import PatchDiscriminator, SyncedBatchNorm2d
from tests.process_groups import in_processes


GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden" / "taming_vqmodel_f4"


def test_original_checkpoint_loads_by_name_and_gives_its_logits():
    state = torch.load(GOLDEN / "checkpoint.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    prefix = "loss.discriminator."
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    tensors = load_file(GOLDEN / "io.safetensors")
    atol = json.loads((GOLDEN / "manifest.json").read_text())["tensors"]["disc_logits_x"]["suggested_atol"]
    discriminator = PatchDiscriminator(base_channels=8, num_layers=2).eval()
    discriminator.load_state_dict(state, strict=True)
    with torch.no_grad():
        logits = discriminator(tensors["x"])
    torch.testing.assert_close(logits, tensors["disc_logits_x"], atol=atol, rtol=0)


def test_default_sizes():
    """Isola et al. 2017, appendix 6.1.2: C64-C128-C256-C512, which sees 70x70 pixels."""
    discriminator = PatchDiscriminator()
    convolutions = [layer for layer in discriminator.main if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 128, 256, 512, 1]
    assert [layer.bias is not None for layer in convolutions] == [True, False, False, False, True]
    field = 1
    for layer in reversed(convolutions):
        field = (field - 1) * layer.stride[0] + layer.kernel_size[0]
    assert field == 70


def test_width_stops_at_eight_times():
    discriminator = PatchDiscriminator(base_channels=2, num_layers=5)
    widths = [layer.out_channels for layer in discriminator.main if isinstance(layer, torch.nn.Conv2d)]
    assert widths == [2, 4, 8, 16, 16, 16, 1]


def test_initialization():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    weight = discriminator.main[8].weight
    assert abs(weight.mean().item()) < 1e-4
    assert weight.std().item() == pytest.approx(0.02, rel=0.01)
    scale = discriminator.main[9].weight
    assert scale.mean().item() == pytest.approx(1.0, abs=0.005)
    assert 0.017 < scale.std().item() < 0.023
    assert not discriminator.main[9].bias.any()


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_two_batches_are_normalized_apart(norm):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(base_channels=4, num_layers=1, norm=norm)
    real, fake = torch.randn(3, 3, 16, 16), 2 + 3 * torch.randn(3, 3, 16, 16)
    logits_real, logits_fake = discriminator(real, fake)
    torch.testing.assert_close(logits_real, discriminator(real))
    torch.testing.assert_close(logits_fake, discriminator(fake))
    assert logits_real.shape == (3, 1, 6, 6)


@pytest.mark.parametrize("norm, independent", [("batch", False), ("group", True), ("none", True)])
def test_only_batch_norm_mixes_images(norm, independent):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(base_channels=4, num_layers=1, norm=norm)
    images = torch.randn(3, 3, 16, 16)
    alone, together = discriminator(images[:1]), discriminator(images)[:1]
    assert torch.allclose(alone, together, atol=1e-6) == independent


def test_smallest_image():
    discriminator = PatchDiscriminator(base_channels=2, num_layers=3, norm="none")
    assert discriminator(torch.zeros(1, 3, 24, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="at least 24 pixels"):
        discriminator(torch.zeros(1, 3, 24, 23))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_layers": 0},
        {"num_layers": 2.5},
        {"base_channels": 0},
        {"base_channels": float("inf")},
        {"in_channels": 0},
        {"in_channels": True},
        {"norm": "instance"},
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        PatchDiscriminator(**arguments)


def normalise(images, weights):
    """Outputs, the gradients of a loss that is the mean over processes, and the state, of this process's share."""
    norm = SyncedBatchNorm2d(3)
    norm.weight.data = torch.tensor([1.0, 2.0, 0.5])
    images = torch.as_tensor(share_of_process(images)).clone().requires_grad_()
    output = norm(images)
    (output.square() * torch.as_tensor(share_of_process(weights))).mean().backward()
    return output.detach(), images.grad, norm.weight.grad, dict(norm.state_dict())


def test_batch_statistics_are_of_all_processes(tmp_path):
    images = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7
    weights = torch.rand(6, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    plain = torch.nn.BatchNorm2d(3)
    plain.weight.data = torch.tensor([1.0, 2.0, 0.5])
    whole = images.clone().requires_grad_()
    output = plain(whole)
    (output.square() * weights).mean().backward()
    outputs, grads, weight_grads, states = zip(*in_processes(2, tmp_path, normalise, images, weights), strict=True)
    torch.testing.assert_close(torch.cat(outputs), output.detach())
    torch.testing.assert_close(torch.cat(grads) / 2, whole.grad)  # of the mean of the two losses
    torch.testing.assert_close(sum(weight_grads) / 2, plain.weight.grad)
    for state in states:
        torch.testing.assert_close(state, dict(plain.state_dict()))
    assert (normalise(images[:3], weights[:3])[0] - outputs[0]).abs().max() > 0.01
