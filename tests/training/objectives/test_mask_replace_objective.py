"""The training loss of VQ-Diffusion, against the original program and by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_vq.conversion.convert_vq_diffusion import convert_model, read_model
from hf_vq.conversion.reading import load_checkpoint
from hf_vq.schedulers.scheduling_mask_replace import MaskReplaceScheduler
from hf_vq.training.objectives.mask_replace_objective import MaskReplaceObjective
from tests.conversion.golden import Golden


def original_noise(golden):
    """x_t as the original draws it: the largest of log q(x_t | x_0) with Gumbel noise from the uniforms `u`."""
    t, x0 = golden["train_t"], golden["x0"]
    alpha, beta, gamma = (golden[f"tab.log_cumprod_{name}"].exp()[t][:, None, None] for name in ("at", "bt", "ct"))
    codes = golden["u"].shape[1] - 1
    probabilities = alpha * F.one_hot(x0, codes).mT + beta
    probabilities = torch.cat([probabilities, gamma.expand(-1, 1, x0.shape[1])], dim=1)
    return (probabilities.log() - (-golden["u"].log()).log()).argmax(dim=1)


def original_model(golden):
    """The transformer, the scheduler and the weight of the auxiliary loss."""
    config = read_model(golden.folder / "config.yaml", "config")
    codec = read_model(golden.folder / "codec_config.yaml", "codec_config")
    mapping = golden.folder / "codec_mapping.pt"
    mapping = load_checkpoint(mapping) if mapping.exists() else None
    pipe, _ = convert_model(config, load_checkpoint(golden.folder / "checkpoint.ckpt"), codec, mapping)
    weight = config["params"]["diffusion_config"]["params"]["auxiliary_loss_weight"]
    return pipe.transformer, pipe.scheduler, weight


def loss_of(golden, transformer, scheduler, weight, **condition):
    side = (4, 4)
    original, noised = (x.unflatten(1, side) for x in (golden["x0"], original_noise(golden)))
    logits = transformer(noised, golden["train_t"], **condition).sample
    objective = MaskReplaceObjective(scheduler, weight)
    return objective(logits, original, noised, golden["train_t"], golden["train_pt"])


@pytest.mark.parametrize("name", ["vqdiff_uncond", "vqdiff_class", "vqdiff_text_ithq"])
def test_the_loss_and_its_gradient_are_the_original_s(name):
    golden = Golden(name)
    transformer, scheduler, weight = original_model(golden)
    condition = {"vqdiff_class": {"class_labels": "label"}, "vqdiff_text_ithq": {"encoder_hidden_states": "cond_emb"}}
    condition = {key: golden[entry] for key, entry in condition.get(name, {}).items()}
    result = loss_of(golden, transformer, scheduler, weight, **condition)
    golden.compare("train.loss_mean", result.loss)
    result.loss.backward()
    golden.compare("train.grad_to_logits_weight", transformer.out.weight.grad)
    golden.compare("train.vb_loss_noaux", result.terms / golden["train_pt"])
    assert float(result.bits_per_index) == pytest.approx(
        float(golden["train.vb_loss_noaux"].sum()) / (golden["x0"].numel() * math.log(2)), rel=1e-4
    )
    without = loss_of(golden, transformer, scheduler, 0.0, **condition)
    assert float(without.loss.detach()) == pytest.approx(
        float(golden["train.vb_loss_noaux"].sum()) / golden["x0"].numel(), rel=1e-4
    )


def test_the_learned_null_embedding_trains_as_in_the_original():
    golden = Golden("vqdiff_text_ithq")
    transformer, scheduler, weight = original_model(golden)
    dropped = golden["cf.is_empty"].bool()[:, None, None]
    assert dropped.any()
    states = torch.where(dropped, transformer.null_embedding, golden["cond_emb"])
    result = loss_of(golden, transformer, scheduler, weight, encoder_hidden_states=states)
    golden.compare("cf.loss", result.loss)
    result.loss.backward()
    golden.compare("cf.grad_empty_text_embed", transformer.null_embedding.grad)


def matrix(scheduler, t):
    """q(x_t | x_0), row by row, with the mask last; at -1 the data."""
    codes = scheduler.mask_index
    if t < 0:
        return torch.eye(codes + 1, dtype=torch.float64)
    found = torch.full((codes + 1, codes + 1), float(scheduler.betas_cumprod[t]), dtype=torch.float64)
    found = found + float(scheduler.alphas_cumprod[t]) * torch.eye(codes + 1)
    found[:, codes], found[codes, :], found[codes, codes] = float(scheduler.gammas_cumprod[t]), 0.0, 1.0
    return found


def losses_of_a_position(scheduler, logits, x0, xt, t):
    """KL of the posteriors of x_{t-1}, by Bayes' rule over matrices, and -log p(x_0)."""
    until_before, until_now = matrix(scheduler, t - 1), matrix(scheduler, t)
    one_step = torch.linalg.solve(until_before, until_now)
    joint = one_step[:, xt] * until_before[:-1] / until_now[:-1, xt, None]
    probs = logits.double().softmax(-1)
    true, model = joint[x0], (probs[:, None] * joint).sum(0)
    return torch.where(true > 0, true * (true / model).log(), 0).sum(), -probs[x0].log()


def original_loss(logits, x0, xt, t, probabilities, scheduler, weight, adaptive, mask_weights):
    """The original's `_train_loss`, position by position."""
    total = 0.0
    for i in range(len(t)):
        factor = 2 - float(t[i]) / len(scheduler.alphas_cumprod) if adaptive else 1.0
        for j in range(x0.shape[1]):
            kl, nll = losses_of_a_position(scheduler, logits[i, j], x0[i, j], xt[i, j], int(t[i]))
            by_mask = mask_weights[0] if xt[i, j] == scheduler.mask_index else mask_weights[1]
            first, second = (nll, nll) if t[i] == 0 else (by_mask * kl, by_mask * nll)
            total += (first + factor * weight * second) / probabilities[i]
    return total / x0.numel()


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("mask_weights", [(1.0, 1.0), (1.0, 0.25), (0.5, 2.0)])
def test_weights_by_mask_and_an_auxiliary_loss_that_does_not_adapt(adaptive, mask_weights):
    generator = torch.Generator().manual_seed(3)
    options = {"auxiliary_loss_weight": 0.3, "adaptive_auxiliary_loss": adaptive, "mask_loss_weights": mask_weights}
    # all but the last step, where a code can no longer be
    scheduler = MaskReplaceScheduler(5, 6, alpha_cumprod_end=0.1, gamma_cumprod_end=0.6, **options)
    t, probabilities = torch.tensor([0, 2, 4, 5]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    x0 = torch.randint(5, (4, 7), generator=generator)
    xt = scheduler.add_noise(x0, t, generator)
    assert (xt == 5).any() and (xt < 5).any()
    logits = torch.randn(4, 7, 5, generator=generator)
    result = MaskReplaceObjective(scheduler)(logits, x0, xt, t, probabilities)
    expected = original_loss(logits, x0, xt, t, probabilities, scheduler, 0.3, adaptive, mask_weights)
    torch.testing.assert_close(result.loss, expected.float(), atol=1e-5, rtol=1e-5)
    unweighted = MaskReplaceObjective(MaskReplaceScheduler(5, 6, alpha_cumprod_end=0.1, gamma_cumprod_end=0.6))
    torch.testing.assert_close(result.bits_per_index, unweighted(logits, x0, xt, t, probabilities).bits_per_index)


def test_the_expected_loss_does_not_depend_on_how_timesteps_are_drawn():
    generator = torch.Generator().manual_seed(0)
    scheduler = MaskReplaceScheduler(5, 4)
    original = torch.randint(5, (4, 3, 2), generator=generator)
    timesteps = torch.arange(4)
    noised = scheduler.add_noise(original, timesteps, generator)
    logits = torch.randn(4, 3, 2, 5, generator=generator)
    objective = MaskReplaceObjective(scheduler, 0.3)

    def parts(probabilities):
        one_by_one = [
            objective(
                logits[i : i + 1],
                original[i : i + 1],
                noised[i : i + 1],
                timesteps[i : i + 1],
                probabilities[i : i + 1],
            )
            for i in range(4)
        ]
        return torch.stack([p * one.loss for p, one in zip(probabilities, one_by_one, strict=True)])

    uniform, skewed = parts(torch.full((4,), 0.25)), parts(torch.tensor([0.1, 0.5, 0.3, 0.1]))
    torch.testing.assert_close(uniform, skewed)
    # at t = 0 both parts are -log p(x_0 | x_t), the second with the weight 0.3 · 2
    nll = F.cross_entropy(logits[0].flatten(0, 1), original[0].flatten())
    torch.testing.assert_close(uniform[0], 1.6 * nll)


def test_what_is_refused():
    scheduler = MaskReplaceScheduler(5, 4)
    with pytest.raises(ValueError, match="`auxiliary_weight` must be a finite number of at least 0, got -1"):
        MaskReplaceObjective(scheduler, -1)
    for name, value in (("auxiliary_loss_weight", math.nan), ("mask_loss_weights", (1.0, -1.0))):
        with pytest.raises(ValueError, match=f"`{name}` must be a finite number of at least 0"):
            MaskReplaceScheduler(5, 4, **{name: value})
    x0 = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"`probabilities` must have the shape of `timesteps` \(2,\), got \(1,\)"):
        MaskReplaceObjective(scheduler)(torch.zeros(2, 3, 5), x0, x0, torch.tensor([0, 1]), torch.ones(1))
    for wrong in (0.0, -0.5, torch.nan):
        with pytest.raises(ValueError, match="`probabilities` must be positive, got"):
            MaskReplaceObjective(scheduler)(
                torch.zeros(2, 3, 5), x0, x0, torch.tensor([0, 1]), torch.tensor([0.5, wrong])
            )
