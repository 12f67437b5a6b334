import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hf_vq.training.objectives.discriminator import PatchDiscriminator
from hf_vq.training.objectives.vqgan_loss import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    VQGANLoss,
    adaptive_weight,
    l1_loss,
    l2_loss,
)


GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"


def squared_distance(images, others):
    """What stood for LPIPS when the golden data were made."""
    return (images - others).square().mean((1, 2, 3))


# ---- what the original program computed


@pytest.fixture(scope="module")
def golden():
    folder = GOLDEN / "taming_gan_loss"
    manifest = json.loads((folder / "manifest.json").read_text())
    states = torch.load(folder / "checkpoint.ckpt", weights_only=True)["state_dict_per_variant"]
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "io.safetensors"), manifest["tensors"], states, config


def golden_setup(golden, variant, mode):
    tensors, _, states, config = golden
    params = config[variant]["params"]
    loss = VQGANLoss(
        squared_distance,
        perceptual_weight=params.get("perceptual_weight", 1.0),
        quantizer_weight=params.get("codebook_weight", 1.0),
        disc_weight=params["disc_weight"],
        disc_loss=params.get("disc_loss", "hinge"),
        disc_start=params["disc_start"],
    )
    discriminator = PatchDiscriminator(base_channels=params["disc_ndf"], num_layers=params["disc_num_layers"])
    state = {key.removeprefix("discriminator."): value for key, value in states[variant].items()}
    discriminator.load_state_dict(state, strict=True)
    discriminator.train(mode == "train")
    last_layer = tensors["last_layer"].clone().requires_grad_()
    reconstructions = F.conv2d(tensors["hidden"], last_layer, padding=1)
    return loss, discriminator, last_layer, reconstructions


GOLDEN_CALLS = [
    ("hinge", "train", 0),
    ("hinge", "train", 10),
    ("hinge", "eval", 0),
    ("hinge", "eval", 10),
    ("vanilla", "train", 5),
    ("vanilla", "eval", 5),
]


@pytest.mark.parametrize("variant, mode, step", GOLDEN_CALLS)
def test_golden_generator_and_discriminator(golden, variant, mode, step):
    tensors, manifest, _, config = golden
    loss, discriminator, last_layer, reconstructions = golden_setup(golden, variant, mode)

    def check(name, value):
        key = f"{variant}.{mode}.step{step}.{name}"
        torch.testing.assert_close(value, tensors[key], atol=manifest[key]["suggested_atol"], rtol=0)

    value, metrics = loss.generator_loss(
        tensors["x"], reconstructions, tensors["codebook_loss"], last_layer, step, discriminator=discriminator
    )
    (gradient,) = torch.autograd.grad(value, last_layer)
    check("gen_loss", value.detach())
    check("gen_total_loss", metrics["loss"])
    check("gen_grad_last_layer", gradient)
    check("gen_quant_loss", metrics["quantizer_loss"])
    check("gen_nll_loss", metrics["nll_loss"])
    check("gen_p_loss", metrics["perceptual_loss"])
    check("gen_disc_factor", metrics["disc_factor"])
    if step < config[variant]["params"]["disc_start"]:
        # the original computes what it then multiplies by zero
        assert not {"g_loss", "d_weight"} & metrics.keys()
        assert tensors[f"{variant}.{mode}.step{step}.disc_loss"] == 0
        assert not loss.discriminator_active(step)
        return
    check("gen_g_loss", metrics["g_loss"])
    check("gen_d_weight", metrics["d_weight"])

    value, metrics = loss.discriminator_loss(tensors["x"], reconstructions, step, discriminator=discriminator)
    value.backward()
    check("disc_loss", value.detach())
    check("disc_disc_loss", metrics["disc_loss"])
    check("disc_logits_real", metrics["logits_real"])
    check("disc_logits_fake", metrics["logits_fake"])
    check("disc_grad_first_conv", discriminator.main[0].weight.grad)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_golden_adaptive_weight_before_the_start(golden, mode):
    """The weight that the original computed in vain agrees too."""
    tensors, manifest, _, _ = golden
    loss, discriminator, last_layer, reconstructions = golden_setup(golden, "hinge", mode)
    nll, _ = loss.nll_loss(tensors["x"], reconstructions)
    g_loss = GENERATOR_LOSSES["linear"](discriminator(reconstructions))
    gradients = [torch.autograd.grad(each, last_layer, retain_graph=True)[0] for each in (nll, g_loss)]
    weight = 0.8 * adaptive_weight(*gradients)
    key = f"hinge.{mode}.step0.gen_d_weight"
    torch.testing.assert_close(weight, tensors[key], atol=manifest[key]["suggested_atol"], rtol=0)


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_golden_discriminator_losses(golden, kind):
    tensors, manifest, _, _ = golden
    value = DISCRIMINATOR_LOSSES[kind](tensors["logits_real"], tensors["logits_fake"])
    torch.testing.assert_close(value, tensors[kind], atol=manifest[kind]["suggested_atol"], rtol=0)


# ---- closed forms


def test_reconstruction_losses():
    inputs, reconstructions = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, -1.0]])
    assert l1_loss(reconstructions, inputs).item() == pytest.approx(1.25)
    assert l2_loss(reconstructions, inputs).item() == pytest.approx(2.125)
    assert l2_loss(reconstructions, inputs, data_variance=0.25).item() == pytest.approx(8.5)


def test_discriminator_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert DISCRIMINATOR_LOSSES["hinge"](real, fake).item() == pytest.approx(0.5 * (0.25 + 0.75))
    expected = F.binary_cross_entropy_with_logits(real, torch.ones(2))
    expected = 0.5 * (expected + F.binary_cross_entropy_with_logits(fake, torch.zeros(2)))
    assert DISCRIMINATOR_LOSSES["vanilla"](real, fake).item() == pytest.approx(expected.item())


def test_generator_losses_by_hand():
    fake = torch.tensor([-3.0, 0.5])
    assert GENERATOR_LOSSES["linear"](fake).item() == pytest.approx(1.25)
    expected = F.binary_cross_entropy_with_logits(fake, torch.ones(2)).item()
    assert GENERATOR_LOSSES["non_saturating"](fake).item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", DISCRIMINATOR_LOSSES)
def test_a_right_discriminator_has_a_small_loss(kind):
    high, low = torch.full((4,), 9.0), torch.full((4,), -9.0)
    assert 0 <= DISCRIMINATOR_LOSSES[kind](high, low) < 1e-3
    assert DISCRIMINATOR_LOSSES[kind](low, high) > 8.9


@pytest.mark.parametrize("kind", GENERATOR_LOSSES)
def test_the_generator_gains_by_higher_logits(kind):
    logits = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    GENERATOR_LOSSES[kind](logits).backward()
    assert (logits.grad < 0).all()


def test_adaptive_weight_by_hand():
    weight = adaptive_weight(3 * torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]))
    assert weight.item() == pytest.approx(15.0 / 2.0001)
    gradient = torch.ones(2, requires_grad=True)
    assert not adaptive_weight(gradient, gradient).requires_grad


def test_adaptive_weight_is_clamped():
    assert adaptive_weight(torch.full((1,), 1e3), torch.zeros(1)).item() == 1e4


# ---- the schedule


def test_start_as_a_step():
    loss = VQGANLoss(None, disc_start=5)
    assert [loss.discriminator_active(step) for step in (0, 4, 5, 6)] == [False, False, True, True]
    assert [loss.generator_factor(step) for step in (4, 5, 6)] == [0.0, 1.0, 1.0]


def test_start_as_a_fraction():
    loss = VQGANLoss(None, disc_start=0.29)
    assert loss.start_step(100) == 29  # 0.29 * 100 is 28.999…
    assert not loss.discriminator_active(28, 100) and loss.discriminator_active(29, 100)
    with pytest.raises(ValueError, match="total_steps"):
        loss.discriminator_active(28)


def test_one_is_a_step_and_one_point_zero_the_whole_run():
    assert VQGANLoss(None, disc_start=1).start_step(100) == 1
    assert VQGANLoss(None, disc_start=1.0).start_step(100) == 100
    assert VQGANLoss(None, disc_start=0.0).start_step(100) == 0


def test_warm_up():
    loss = VQGANLoss(None, disc_start=10, disc_warmup_steps=4, disc_factor=2.0)
    assert [loss.generator_factor(step) for step in (9, 10, 11, 12, 13, 14)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]


def test_factor_zero_is_off_for_good():
    loss = VQGANLoss(None, disc_factor=0.0)
    assert not loss.discriminator_active(10**9)
    assert loss.generator_factor(10**9) == 0.0


# ---- the two losses together


class Tiny(torch.nn.Module):
    """A generator with one convolution, and a discriminator for it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.discriminator = PatchDiscriminator(base_channels=4, num_layers=1)
        self.inputs = torch.rand(2, 3, 16, 16) * 2 - 1

    def generator_loss(self, loss, step, **arguments):
        arguments = {"discriminator": self.discriminator, **arguments}
        fake = self.generator(self.inputs)
        return loss.generator_loss(self.inputs, fake, torch.tensor(0.25), self.generator.weight, step, **arguments)


def test_weights_enter_where_they_should():
    tiny = Tiny()
    loss = VQGANLoss(
        squared_distance,
        reconstruction="l2",
        reconstruction_weight=0.5,
        perceptual_weight=3.0,
        quantizer_weight=2.0,
        disc_weight=0.7,
        disc_warmup_steps=4,
    )
    value, metrics = tiny.generator_loss(loss, step=0)
    mse = (tiny.generator(tiny.inputs) - tiny.inputs).square().mean()
    assert metrics["nll_loss"].item() == pytest.approx((0.5 + 3.0) * mse.item(), rel=1e-5)
    expected = metrics["nll_loss"] + 2.0 * 0.25 + metrics["d_weight"] * 0.25 * metrics["g_loss"]
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    full = VQGANLoss(squared_distance, reconstruction="l2", reconstruction_weight=0.5, perceptual_weight=3.0)
    _, full_metrics = tiny.generator_loss(full, step=0)
    assert metrics["d_weight"].item() == pytest.approx(0.7 / 0.8 * full_metrics["d_weight"].item(), rel=1e-5)


def gradients_of_the_formula(tiny, loss):
    """Those of nll + λ · 0.8 · g + quantizer loss, each term and λ with a graph of its own."""
    weight = tiny.generator.weight
    fake = tiny.generator(tiny.inputs)
    nll, _ = loss.nll_loss(tiny.inputs, fake)
    g_loss = GENERATOR_LOSSES[loss.gen_loss](tiny.discriminator(fake))
    norms = [torch.autograd.grad(each, weight, retain_graph=True)[0].norm() for each in (nll, g_loss)]
    total = nll + 0.8 * norms[0] / (norms[1] + 1e-4) * g_loss
    return torch.autograd.grad(total, list(tiny.generator.parameters()))


@pytest.mark.parametrize("gen_loss", GENERATOR_LOSSES)
def test_the_gradients_are_those_of_the_formula(gen_loss):
    tiny, loss = Tiny(), VQGANLoss(squared_distance, gen_loss=gen_loss)
    expected = gradients_of_the_formula(tiny, loss)
    value, _ = tiny.generator_loss(loss, step=0)
    found = torch.autograd.grad(3 * value, list(tiny.generator.parameters()))
    torch.testing.assert_close(found, tuple(3 * each for each in expected))


def test_each_network_is_run_backwards_once():
    tiny, calls = Tiny(), []

    def perceptual(images, others):
        others.register_hook(lambda gradient: calls.append("images"))
        difference = images - others
        difference.register_hook(lambda gradient: calls.append("perceptual"))
        return difference.square().mean((1, 2, 3))

    tiny.discriminator.main[-1].register_full_backward_hook(lambda *args: calls.append("discriminator"))
    tiny.generator_loss(VQGANLoss(perceptual), step=0)[0].backward()
    assert sorted(set(calls)) == ["discriminator", "images", "perceptual"]
    assert calls.count("discriminator") == calls.count("perceptual") == 1


def test_gradients_of_a_float16_discriminator_do_not_vanish():
    """A hundred thousand logits: in float16, the mean's gradient of each would be zero."""
    tiny, loss = Tiny(), VQGANLoss(squared_distance)
    tiny.inputs = torch.rand(8, 3, 128, 128) * 2 - 1
    tiny.discriminator.eval()
    expected = gradients_of_the_formula(tiny, loss)
    half = torch.nn.Sequential(Halved(), tiny.discriminator.half())
    value, _ = tiny.generator_loss(loss, step=0, discriminator=half)
    found = torch.autograd.grad(value, list(tiny.generator.parameters()))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=2e-4)


def test_gradients_of_float16_images_survive_a_gradient_scaler():
    """65536 times the gradient of a pixel is taken in float32, as the gradient itself."""
    tiny, loss = Tiny(), VQGANLoss(squared_distance)
    tiny.inputs = torch.rand(8, 3, 128, 128) * 2 - 1
    tiny.discriminator.eval()
    expected = gradients_of_the_formula(tiny, loss)
    fake = tiny.generator(tiny.inputs).half()
    arguments = {"discriminator": torch.nn.Sequential(Widened(), tiny.discriminator)}
    value, _ = loss.generator_loss(tiny.inputs, fake, torch.tensor(0.0), tiny.generator.weight, 0, **arguments)
    found = torch.autograd.grad(2.0**16 * value, list(tiny.generator.parameters()))
    torch.testing.assert_close(tuple(each / 2**16 for each in found), expected, rtol=0.02, atol=2e-4)


def test_a_gradient_of_the_gradient_is_refused():
    tiny = Tiny()
    value, _ = tiny.generator_loss(VQGANLoss(None), step=0)
    with pytest.raises(RuntimeError, match="`create_graph` must be False"):
        torch.autograd.grad(value, tiny.generator.weight, create_graph=True)


@pytest.mark.parametrize(
    ("requires_grad", "message"),
    [(False, "`reconstructions` must have a gradient"), (True, "`last_layer` must be a weight")],
)
def test_images_that_no_layer_has_made(requires_grad, message):
    tiny = Tiny()
    fake = torch.zeros_like(tiny.inputs, requires_grad=requires_grad)
    arguments = (torch.tensor(0.0), tiny.generator.weight, 0)
    with pytest.raises(ValueError, match=message):
        VQGANLoss(None).generator_loss(tiny.inputs, fake, *arguments, discriminator=tiny.discriminator)


class Widened(torch.nn.Module):
    def forward(self, images):
        assert images.dtype == torch.float16
        return images.float()


class Halved(torch.nn.Module):
    def forward(self, images):
        return images.half()


def test_generator_loss_leaves_the_discriminator_alone():
    tiny = Tiny()
    value, metrics = tiny.generator_loss(VQGANLoss(None), step=0)
    value.backward()
    assert tiny.generator.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in tiny.discriminator.parameters())
    assert all(parameter.requires_grad for parameter in tiny.discriminator.parameters())
    assert not any(value.requires_grad for value in metrics.values())


def test_the_generator_feels_the_discriminator():
    tiny = Tiny()
    with_gan = torch.autograd.grad(tiny.generator_loss(VQGANLoss(None), step=0)[0], tiny.generator.weight)[0]
    without = torch.autograd.grad(
        tiny.generator_loss(VQGANLoss(None, disc_start=1), step=0)[0], tiny.generator.weight
    )[0]
    # the adaptive weight makes both pulls as strong, up to disc_weight and the 1e-4
    ratio = ((with_gan - without).norm() / without.norm()).item()
    assert 0.5 < ratio <= 0.8


def test_frozen_parameters_of_the_discriminator_stay_frozen():
    tiny = Tiny()
    tiny.discriminator.main[0].weight.requires_grad_(False)
    tiny.generator_loss(VQGANLoss(None), step=0)
    assert not tiny.discriminator.main[0].weight.requires_grad
    assert tiny.discriminator.main[0].bias.requires_grad


def test_discriminator_loss_does_not_reach_the_generator():
    tiny = Tiny()
    loss = VQGANLoss(None)
    value, metrics = loss.discriminator_loss(
        tiny.inputs, tiny.generator(tiny.inputs), 0, discriminator=tiny.discriminator
    )
    value.backward()
    assert tiny.generator.weight.grad is None
    assert all(parameter.grad is not None for parameter in tiny.discriminator.parameters())
    assert not any(value.requires_grad for value in metrics.values())


def test_nothing_of_the_discriminator_is_computed_before_its_start():
    tiny = Tiny()
    calls = []
    tiny.discriminator.register_forward_hook(lambda *_: calls.append(1))
    loss = VQGANLoss(None, disc_start=1)
    _, metrics = tiny.generator_loss(loss, step=0)
    assert not calls and "d_weight" not in metrics and metrics["disc_factor"] == 0
    tiny.generator_loss(loss, step=0, discriminator=None)
    with pytest.raises(ValueError, match="off at step 0"):
        loss.discriminator_loss(tiny.inputs, tiny.inputs, 0, discriminator=tiny.discriminator)
    tiny.generator_loss(loss, step=1)
    assert calls


def test_discriminator_learns_to_tell():
    tiny = Tiny()
    loss = VQGANLoss(None)
    optimizer = torch.optim.Adam(tiny.discriminator.parameters(), lr=1e-2)
    fake = tiny.inputs.flip(-1).mean(1, keepdim=True).expand_as(tiny.inputs)
    for _ in range(20):
        value, metrics = loss.discriminator_loss(tiny.inputs, fake, 0, discriminator=tiny.discriminator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert metrics["disc_loss"] < 0.2
    assert metrics["logits_real"] > 0.5 > -0.5 > metrics["logits_fake"]


def test_validation_without_gradients():
    tiny = Tiny()
    loss = VQGANLoss(squared_distance)
    with torch.no_grad():
        value, metrics = loss.nll_loss(tiny.inputs, -tiny.inputs)
        assert value == metrics["nll_loss"]
        with pytest.raises(ValueError, match="nll_loss"):
            tiny.generator_loss(loss, step=0)


def test_missing_discriminator():
    tiny = Tiny()
    with pytest.raises(ValueError, match="`discriminator`"):
        tiny.generator_loss(VQGANLoss(None), step=0, discriminator=None)
    with pytest.raises(ValueError, match="`discriminator`"):
        VQGANLoss(None).discriminator_loss(tiny.inputs, tiny.inputs, 0)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="same shape"):
        l1_loss(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="same shape"):
        l2_loss(torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="data_variance"):
        l2_loss(torch.zeros(1), torch.zeros(1), data_variance=0.0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"reconstruction": "l3"},
        {"disc_loss": "wasserstein"},
        {"gen_loss": "hinge"},
        {"disc_start": 1.5},
        {"disc_start": -1},
        {"disc_start": float("nan")},
        {"disc_start": True},
        {"disc_warmup_steps": -1},
        {"perceptual_weight": -0.1},
        {"disc_factor": -1.0},
        {"disc_factor": float("inf")},
        {"disc_weight": float("nan")},
        {"reconstruction_weight": float("inf")},
        {"quantizer_weight": "1"},
        {"disc_start": float("inf")},
        {"disc_warmup_steps": 2.5},
        {"disc_warmup_steps": float("inf")},
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        VQGANLoss(None, **arguments)


def test_distributed_wrapper_changes_nothing(tmp_path):
    def gradients(wrap):
        tiny, loss = Tiny(), VQGANLoss(None)
        discriminator = wrap(tiny.discriminator)
        for step in range(2):
            tiny.generator_loss(loss, step, discriminator=discriminator)[0].backward()
            fake = tiny.generator(tiny.inputs)
            loss.discriminator_loss(tiny.inputs, fake, step, discriminator=discriminator)[0].backward()
        return [parameter.grad for parameter in tiny.parameters()]

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = gradients(torch.nn.parallel.DistributedDataParallel)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(wrapped, gradients(lambda module: module))
