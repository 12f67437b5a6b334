"""Losses of the image tokenizers: reconstruction, adversarial, and their balance in VQGAN training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from ...argument_checks import check_integer, check_real
from ...distributed import all_reduced, num_processes


def l1_loss(reconstructions: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Mean absolute error, a scalar. Both arguments have the same shape."""
    _check_same_shape(reconstructions, inputs)
    return (inputs - reconstructions).abs().mean()


def l2_loss(reconstructions: torch.Tensor, inputs: torch.Tensor, data_variance: float = 1.0) -> torch.Tensor:
    """Mean squared error over the variance of the data, a scalar.

    With the variance of the training pixels as `data_variance` the value is the unexplained part of the variance,
    which puts it on one scale with the commitment loss whatever the data (van den Oord et al. 2017).
    """
    _check_same_shape(reconstructions, inputs)
    return F.mse_loss(reconstructions, inputs) / check_real("data_variance", data_variance, above=0)


RECONSTRUCTION_LOSSES = {"l1": l1_loss, "l2": l2_loss}


def hinge_discriminator_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """½ (E[max(0, 1 − D(x))] + E[max(0, 1 + D(x̂))]) (Lim & Ye 2017, https://arxiv.org/abs/1705.02894)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_discriminator_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """½ (−E[log σ(D(x))] − E[log(1 − σ(D(x̂)))]) (Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661, eq. 1)."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def linear_generator_loss(logits_fake: torch.Tensor) -> torch.Tensor:
    """−E[D(x̂)], the generator's side of the hinge game; the original VQGAN uses it with either discriminator loss."""
    return -logits_fake.mean()


def non_saturating_generator_loss(logits_fake: torch.Tensor) -> torch.Tensor:
    """−E[log σ(D(x̂))], the generator's side of the vanilla game (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-logits_fake).mean()


DISCRIMINATOR_LOSSES = {"hinge": hinge_discriminator_loss, "vanilla": vanilla_discriminator_loss}
GENERATOR_LOSSES = {"linear": linear_generator_loss, "non_saturating": non_saturating_generator_loss}


def adaptive_weight(nll_gradient: torch.Tensor, g_gradient: torch.Tensor) -> torch.Tensor:
    """Weight that gives the adversarial loss the reconstruction loss's pull on the decoder's last layer.

    λ = clamp(‖∇nll‖ / (‖∇g‖ + 1e-4), 0, 1e4) (Esser et al. 2021, https://arxiv.org/abs/2012.09841, eq. 7), with the
    gradients of the mean loss over all processes, which all call this.

    Args:
        nll_gradient: of the reconstruction (and perceptual) loss with respect to the weight of the last layer.
        g_gradient: of the generator's adversarial loss, of the same shape.

    Returns:
        A detached float32 scalar.
    """
    gradients = torch.stack([nll_gradient, g_gradient]).detach().float()
    nll_gradient, g_gradient = all_reduced(gradients) / num_processes()
    return (nll_gradient.norm() / (g_gradient.norm() + 1e-4)).clamp(0.0, 1e4)


class _LossWithGradient(torch.autograd.Function):
    """A loss whose gradient with respect to a tensor has been computed: its graph is gone, and not run again."""

    @staticmethod
    def forward(ctx, tensor, loss, gradient):
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            raise RuntimeError("`create_graph` must be False: the gradient of `generator_loss` has no gradient.")
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None


class VQGANLoss(nn.Module):
    """The two losses of VQGAN training (Esser et al. 2021, https://arxiv.org/abs/2012.09841, eq. 5 to 7).

    generator:     nll + λ · disc_weight · factor(step) · g + quantizer_weight · quantizer loss,
                   nll = reconstruction_weight · reconstruction + perceptual_weight · mean perceptual distance
    discriminator: disc_factor · hinge or vanilla loss

    Until `disc_start` nothing of the discriminator is computed. From there its own loss has full strength at once, and
    the generator feels it through `factor`, which rises linearly to `disc_factor` over `disc_warmup_steps` steps. Call
    both methods with the same batch.

    Args:
        perceptual: callable `(images, images) -> (B,)` distances, as `build_perceptual` makes it, or `None` for none.
        reconstruction: `"l1"` or `"l2"`.
        disc_weight: scales the adaptive weight λ.
        disc_factor: scales both adversarial losses; 0 turns them off for good.
        disc_loss: `"hinge"` or `"vanilla"`.
        gen_loss: `"linear"` (the original's) or `"non_saturating"`.
        disc_start: first step with the discriminator: an `int` is a step, a `float` in [0, 1] a fraction of the run.
        disc_warmup_steps: length of the warm-up; the first step has 1/n of the factor, the n-th all of it.

    Raises:
        ValueError: for an unknown loss name, a number that is negative or not finite, or a fraction outside [0, 1].
    """

    def __init__(
        self,
        perceptual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
        *,
        reconstruction: str = "l1",
        reconstruction_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        quantizer_weight: float = 1.0,
        disc_weight: float = 0.8,
        disc_factor: float = 1.0,
        disc_loss: str = "hinge",
        gen_loss: str = "linear",
        disc_start: float = 0,
        disc_warmup_steps: int = 0,
    ):
        super().__init__()
        _check_choice("reconstruction", reconstruction, RECONSTRUCTION_LOSSES)
        _check_choice("disc_loss", disc_loss, DISCRIMINATOR_LOSSES)
        _check_choice("gen_loss", gen_loss, GENERATOR_LOSSES)
        if isinstance(disc_start, float):
            disc_start = check_real("disc_start", disc_start, minimum=0, maximum=1)
        else:
            disc_start = check_integer("disc_start", disc_start, minimum=0)
        self.perceptual = perceptual
        self.reconstruction = reconstruction
        self.reconstruction_weight = check_real("reconstruction_weight", reconstruction_weight, minimum=0)
        self.perceptual_weight = check_real("perceptual_weight", perceptual_weight, minimum=0)
        self.quantizer_weight = check_real("quantizer_weight", quantizer_weight, minimum=0)
        self.disc_weight = check_real("disc_weight", disc_weight, minimum=0)
        self.disc_factor = check_real("disc_factor", disc_factor, minimum=0)
        self.disc_loss = disc_loss
        self.gen_loss = gen_loss
        self.disc_start = disc_start
        self.disc_warmup_steps = check_integer("disc_warmup_steps", disc_warmup_steps, minimum=0)

    def start_step(self, total_steps: int | None = None) -> int:
        """First step with the discriminator. A fractional start needs the run's `total_steps` and is rounded."""
        if isinstance(self.disc_start, int):
            return self.disc_start
        if total_steps is None:
            raise ValueError(f"`total_steps` is needed because `disc_start` is a fraction ({self.disc_start}).")
        return round(self.disc_start * total_steps)

    def discriminator_active(self, step: int, total_steps: int | None = None) -> bool:
        """Whether the discriminator is trained and felt at `step` (counted from 0)."""
        return self.disc_factor > 0 and step >= self.start_step(total_steps)

    def generator_factor(self, step: int, total_steps: int | None = None) -> float:
        """`disc_factor` as the generator feels it at `step`: 0 before the start, then rising over the warm-up."""
        if not self.discriminator_active(step, total_steps):
            return 0.0
        steps_on = step - self.start_step(total_steps) + 1
        return self.disc_factor * min(1.0, steps_on / max(self.disc_warmup_steps, 1))

    def nll_loss(
        self, inputs: torch.Tensor, reconstructions: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weighted reconstruction and perceptual loss, without any discriminator; for validation also.

        Args:
            inputs, reconstructions: `(B, 3, H, W)` in [-1, 1].

        Returns:
            A scalar, and detached scalars `nll_loss`, `reconstruction_loss` and, with a perceptual network,
            `perceptual_loss` (the last two unweighted).
        """
        reconstruction = RECONSTRUCTION_LOSSES[self.reconstruction](reconstructions, inputs)
        nll = self.reconstruction_weight * reconstruction
        metrics = {"reconstruction_loss": reconstruction.detach()}
        if self.perceptual is not None and self.perceptual_weight > 0:
            perceptual = self.perceptual(inputs, reconstructions).mean()
            nll = nll + self.perceptual_weight * perceptual
            metrics["perceptual_loss"] = perceptual.detach()
        return nll, {"nll_loss": nll.detach(), **metrics}

    def generator_loss(
        self,
        inputs: torch.Tensor,
        reconstructions: torch.Tensor,
        quantizer_loss: torch.Tensor,
        last_layer: torch.Tensor,
        step: int,
        total_steps: int | None = None,
        discriminator: nn.Module | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the tokenizer. Its backward pass leaves no gradient on the discriminator.

        Args:
            inputs, reconstructions: `(B, 3, H, W)` in [-1, 1].
            quantizer_loss: codebook and commitment loss; averaged if it has more than one element.
            last_layer: weight of the decoder's last layer.
            step: optimizer step, from 0.
            total_steps: length of the run, for a fractional `disc_start`.
            discriminator: `(B, 3, H, W) -> logits`; may be left out before it starts.

        Returns:
            The loss, and detached scalars: those of `nll_loss`, `loss`, `quantizer_loss`, `disc_factor`, and once the
            discriminator is on `g_loss` and `d_weight`.

        Raises:
            ValueError: if the discriminator is on and missing, gradients are off (use `nll_loss` then), or
                `reconstructions` do not depend on `last_layer`.
        """
        # what reaches a single pixel would vanish in float16, before a gradient scaler can act on it
        images = reconstructions.float() if reconstructions.dtype == torch.float16 else reconstructions
        nll, metrics = self.nll_loss(inputs, images)
        quantizer_loss = quantizer_loss.mean()
        factor = self.generator_factor(step, total_steps)
        metrics["quantizer_loss"] = quantizer_loss.detach()
        metrics["disc_factor"] = torch.tensor(factor, device=inputs.device)
        loss = nll
        if factor > 0:
            if discriminator is None:
                raise ValueError(f"`discriminator` is needed at step {step}: it is on from `disc_start`.")
            if not torch.is_grad_enabled():
                raise ValueError(
                    "`generator_loss` needs gradients for its adaptive weight; use `nll_loss` to validate."
                )
            if not reconstructions.requires_grad:
                raise ValueError("`reconstructions` must have a gradient, got a tensor with requires_grad=False.")
            with _frozen(discriminator):
                logits = discriminator(images.to(reconstructions.dtype)).float()
            g_loss = GENERATOR_LOSSES[self.gen_loss](logits)
            # Of each network one backward pass, whose end is shared by the weight and the loss. The mean over the
            # logits is taken in the end, lest a float16 discriminator's gradients vanish.
            (nll_gradient,) = torch.autograd.grad(nll, images)
            (g_gradient,) = torch.autograd.grad(g_loss * logits.numel(), images)
            g_gradient = g_gradient / logits.numel()
            of_last_layer = [_of_last_layer(images, last_layer, each) for each in (nll_gradient, g_gradient)]
            d_weight = adaptive_weight(*of_last_layer) * self.disc_weight
            loss = _LossWithGradient.apply(
                images,
                nll.detach() + d_weight * factor * g_loss.detach(),
                nll_gradient + d_weight * factor * g_gradient,
            )
            metrics["g_loss"] = g_loss.detach()
            metrics["d_weight"] = d_weight
        loss = loss + self.quantizer_weight * quantizer_loss
        return loss, {"loss": loss.detach(), **metrics}

    def discriminator_loss(
        self,
        inputs: torch.Tensor,
        reconstructions: torch.Tensor,
        step: int,
        total_steps: int | None = None,
        discriminator: nn.Module | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the discriminator. `reconstructions` are detached here: its backward pass ends at the images.

        Args:
            inputs, reconstructions: `(B, 3, H, W)` in [-1, 1], the batch that `generator_loss` had.
            step, total_steps: as in `generator_loss`.
            discriminator: `(real, fake) -> (logits, logits)`, as in `PatchDiscriminator.forward`.

        Returns:
            The loss, and detached scalars `disc_loss`, `logits_real`, `logits_fake` (means).

        Raises:
            ValueError: before the discriminator's start (ask `discriminator_active`), or if it is missing.
        """
        if not self.discriminator_active(step, total_steps):
            raise ValueError(f"the discriminator is off at step {step}: call only if `discriminator_active(step)`.")
        if discriminator is None:
            raise ValueError("`discriminator` must be a module, got None.")
        _check_same_shape(reconstructions, inputs)
        logits_real, logits_fake = discriminator(inputs.detach(), reconstructions.detach())
        logits_real, logits_fake = logits_real.float(), logits_fake.float()
        loss = self.disc_factor * DISCRIMINATOR_LOSSES[self.disc_loss](logits_real, logits_fake)
        metrics = {
            "disc_loss": loss.detach(),
            "logits_real": logits_real.detach().mean(),
            "logits_fake": logits_fake.detach().mean(),
        }
        return loss, metrics


def _of_last_layer(images: torch.Tensor, last_layer: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of a loss with respect to the last layer, from that of the images; their graph is kept.

    On its way it has a size at which a float16 layer neither loses single pixels nor overflows.
    """
    scale = (2.0**12 / gradient.float().abs().sum().clamp_min(1e-30)).log2().floor().exp2()  # without rounding
    (found,) = torch.autograd.grad(images, last_layer, gradient * scale, retain_graph=True, allow_unused=True)
    if found is None:
        raise ValueError("`last_layer` must be a weight that `reconstructions` depend on.")
    return found.float() / scale


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Freezes the parameters while a graph is built: none of them gets a gradient from it."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _check_choice(name: str, value: str, choices: dict) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {sorted(choices)}, got {value!r}.")


def _check_same_shape(reconstructions: torch.Tensor, inputs: torch.Tensor) -> None:
    if reconstructions.shape != inputs.shape:
        raise ValueError(
            "`reconstructions` and `inputs` must have the same shape, "
            f"got {tuple(reconstructions.shape)} and {tuple(inputs.shape)}."
        )
