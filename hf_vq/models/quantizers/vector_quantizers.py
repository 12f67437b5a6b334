"""Vector quantizers, one small class each, with one signature.

`quantizer(latents (B, D, h, w)) -> QuantizerOutput(quantized, indices, loss, ...)`, and
`quantizer.indices_to_latents(indices) -> (B, D, h, w)`.

In the comments z are the latents (encoder output), e the code vectors, K the number of codes, N = B·h·w.
"""

import inspect
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ...distributed import is_distributed
from ..modeling_outputs import QuantizerOutput
from .codebook_search import draw_vectors, kmeans, nearest_codes
from .codebook_statistics import check_indices, code_counts
from .gradient_estimators import GRADIENT_ESTIMATORS, straight_through


def _flatten(latents: torch.Tensor) -> torch.Tensor:
    """`(B, D, h, w) -> (B·h·w, D)`."""
    return latents.movedim(1, -1).reshape(-1, latents.shape[1])


def _look_up(indices: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Vectors `(B, D, h, w)` of `indices` `(B, h, w)`."""
    return F.embedding(indices, codebook).movedim(-1, 1).contiguous()


def _check_sizes(num_embeddings: int, embed_dim: int) -> None:
    if num_embeddings < 1 or embed_dim < 1:
        raise ValueError(f"`num_embeddings` and `embed_dim` must be positive, got {num_embeddings} and {embed_dim}.")


def _check_latents(latents: torch.Tensor, embed_dim: int) -> None:
    if latents.ndim != 4 or latents.shape[1] != embed_dim:
        raise ValueError(f"`latents` must have shape (B, {embed_dim}, h, w), got {tuple(latents.shape)}.")


# ---------------------------------------------------------------------------------------------------------------------
# Codebooks
# ---------------------------------------------------------------------------------------------------------------------


class VectorQuantizer(nn.Module):
    """A codebook trained by its own gradient (van den Oord et al. 2017, equation 3).

    loss = mean |sg[z] - e|² + β · mean |z - sg[e]|²: the codes move to the latents, and β weights how strongly the
    encoder commits to the codes.

    Args:
        num_embeddings: K. embed_dim: D.
        commitment_cost: β.
        legacy_beta: weight the other term, mean |z - sg[e]|² + β · mean |sg[z] - e|², as the original VQGAN code does;
            for checkpoints and recipes that come from there.
        gradient_estimator: "straight_through" or "rotation".
        kmeans_init: set the codes by k-means of the first training batch (of all processes).
        kmeans_iterations: Lloyd iterations of that.
    """

    def __init__(
        self,
        num_embeddings: int,
        embed_dim: int,
        commitment_cost: float = 0.25,
        legacy_beta: bool = False,
        gradient_estimator: str = "straight_through",
        kmeans_init: bool = False,
        kmeans_iterations: int = 10,
    ):
        super().__init__()
        _check_sizes(num_embeddings, embed_dim)
        if gradient_estimator not in GRADIENT_ESTIMATORS:
            raise ValueError(
                f"`gradient_estimator` must be one of {sorted(GRADIENT_ESTIMATORS)}, got {gradient_estimator!r}."
            )
        self.num_embeddings, self.embed_dim = num_embeddings, embed_dim
        self.commitment_cost, self.legacy_beta = commitment_cost, legacy_beta
        self.estimator = GRADIENT_ESTIMATORS[gradient_estimator]
        self.kmeans_iterations = kmeans_iterations if kmeans_init else 0
        self._build_codebook()
        if kmeans_init:
            self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self.reset_parameters()

    def _build_codebook(self) -> None:
        self.embedding = nn.Embedding(self.num_embeddings, self.embed_dim)

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors `(K, D)`."""
        return self.embedding.weight

    def reset_parameters(self) -> None:
        init.uniform_(self.embedding.weight, -1 / self.num_embeddings, 1 / self.num_embeddings)
        if self.kmeans_iterations:
            init.zeros_(self.initialized)

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        """Quantize `latents` `(B, D, h, w)`. In training mode a codebook with statistics updates them."""
        _check_latents(latents, self.embed_dim)
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float()
            flat = _flatten(z.detach())
            if self.training and self.kmeans_iterations and not self.initialized:
                self.set_codebook(kmeans(flat, self.num_embeddings, self.kmeans_iterations))
            flat_indices = nearest_codes(flat, self.codebook)
            indices = flat_indices.reshape(latents.shape[0], *latents.shape[2:])
            output = self._losses(z, _look_up(indices, self.codebook.float()), indices)
            if self.training:
                self._update_codebook(flat, flat_indices)
        output.quantized = output.quantized.to(latents.dtype)
        return output

    def _losses(self, z: torch.Tensor, codes: torch.Tensor, indices: torch.Tensor) -> QuantizerOutput:
        codebook_loss = F.mse_loss(codes, z.detach())
        commitment_loss = F.mse_loss(z, codes.detach())
        if self.legacy_beta:
            loss = commitment_loss + self.commitment_cost * codebook_loss
        else:
            loss = codebook_loss + self.commitment_cost * commitment_loss
        return QuantizerOutput(
            quantized=self.estimator(z, codes.detach()),
            indices=indices,
            loss=loss,
            codebook_loss=codebook_loss.detach(),
            commitment_loss=commitment_loss.detach(),
        )

    def _update_codebook(self, flat: torch.Tensor, flat_indices: torch.Tensor) -> None:
        """A codebook with a gradient has nothing to update in the forward pass."""

    @torch.no_grad()
    def set_codebook(self, codes: torch.Tensor) -> None:
        """Replace the code vectors by `codes` `(K, D)`; they are not initialised by k-means any more."""
        if codes.shape != self.codebook.shape:
            raise ValueError(f"`codes` must have shape {tuple(self.codebook.shape)}, got {tuple(codes.shape)}.")
        self._write_codes(codes)
        if self.kmeans_iterations:
            self.initialized.fill_(True)

    def _write_codes(self, codes: torch.Tensor) -> None:
        self.codebook.copy_(codes)

    def indices_to_latents(self, indices: torch.Tensor) -> torch.Tensor:
        """Code vectors `(B, D, h, w)` of `indices` `(B, h, w)`, in the codebook's dtype."""
        check_indices(indices, self.num_embeddings)
        return _look_up(indices.long(), self.codebook)


class EMAVectorQuantizer(VectorQuantizer):
    """A codebook of moving averages of the latents (van den Oord et al. 2017, appendix A.1).

    N ← γN + (1-γ)n, m ← γm + (1-γ)Σz, e = m / N, over the latents of all processes. Only the commitment term has a
    gradient: loss = β · mean |z - sg[e]|².

    Zero-debiased (`zero_debias`): the rate is (1-γ)/(1-γᵗ) at update t, so the averages are exact weighted means of
    the data from the first update on, and hold nothing of the initial values (Kingma & Ba 2015, section 3). Counts
    start at 1 and m at e. A code that is not used in an update keeps its vector to the bit (with smoothing: while its
    count is 0), so that it never shrinks or blows up.

    A code whose count falls under `restart_threshold` times the mean count is dead: it restarts at a random latent of
    the batch, the same one on every process, with the mean count (as in Dhariwal et al. 2020, section 3.1).

    Args:
        decay: γ. restart_threshold: 0 turns restarts off.
        count_smoothing: `None`; "laplace", dividing by (N+ε)/(ΣN+Kε)·ΣN as Sonnet does; or "laplace_stored", which
            also writes the smoothed counts back (as some ports of it do), for parity with them.
        epsilon: ε.

    The other arguments are those of `VectorQuantizer`, without `legacy_beta` (there is only one term).
    """

    def __init__(
        self,
        num_embeddings: int,
        embed_dim: int,
        commitment_cost: float = 0.25,
        decay: float = 0.99,
        zero_debias: bool = True,
        restart_threshold: float = 0.02,
        count_smoothing: str | None = None,
        epsilon: float = 1e-5,
        gradient_estimator: str = "straight_through",
        kmeans_init: bool = False,
        kmeans_iterations: int = 10,
    ):
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must lie in [0, 1), got {decay}.")
        if not 0 <= restart_threshold < 1:
            raise ValueError(f"`restart_threshold` must lie in [0, 1), got {restart_threshold}.")
        if count_smoothing not in (None, "laplace", "laplace_stored"):
            raise ValueError(
                f"`count_smoothing` must be None, 'laplace' or 'laplace_stored', got {count_smoothing!r}."
            )
        super().__init__(
            num_embeddings,
            embed_dim,
            commitment_cost,
            gradient_estimator=gradient_estimator,
            kmeans_init=kmeans_init,
            kmeans_iterations=kmeans_iterations,
        )
        self.decay, self.zero_debias, self.restart_threshold = decay, zero_debias, restart_threshold
        self.count_smoothing, self.epsilon = count_smoothing, epsilon

    def _build_codebook(self) -> None:
        self.register_buffer("embedding", torch.empty(self.num_embeddings, self.embed_dim))
        self.register_buffer("embed_avg", torch.empty(self.num_embeddings, self.embed_dim))
        self.register_buffer("cluster_size", torch.empty(self.num_embeddings))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors `(K, D)`."""
        return self.embedding

    def reset_parameters(self) -> None:
        init.normal_(self.embedding)
        init.copy_(self.embed_avg, self.embedding)
        init.ones_(self.cluster_size)
        init.zeros_(self.num_updates)
        if self.kmeans_iterations:
            init.zeros_(self.initialized)

    def _losses(self, z: torch.Tensor, codes: torch.Tensor, indices: torch.Tensor) -> QuantizerOutput:
        commitment_loss = F.mse_loss(z, codes)
        return QuantizerOutput(
            quantized=self.estimator(z, codes),
            indices=indices,
            loss=self.commitment_cost * commitment_loss,
            commitment_loss=commitment_loss.detach(),
        )

    @torch.no_grad()
    def _update_codebook(self, flat: torch.Tensor, flat_indices: torch.Tensor) -> None:
        counts = code_counts(flat_indices, self.num_embeddings)
        sums = torch.zeros_like(self.codebook, dtype=torch.float32).index_add_(0, flat_indices, flat)
        if is_distributed():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.num_updates += 1
        rate = 1 - self.decay
        if self.zero_debias and self.decay > 0:
            # 1 - γᵗ without cancellation, and without float64, which not every device has
            rate = rate / -torch.expm1(self.num_updates.float() * math.log(self.decay))
        self.cluster_size.lerp_(counts.to(self.cluster_size), torch.as_tensor(rate).to(self.cluster_size))
        self.embed_avg.lerp_(sums.to(self.embed_avg), torch.as_tensor(rate).to(self.embed_avg))
        divisor, moved = self.cluster_size, counts > 0
        if self.count_smoothing is not None:
            # smoothing changes the quotient of unused codes also; without a count it would send them to m/ε
            moved = self.cluster_size > 0
            total = self.cluster_size.sum()
            divisor = (self.cluster_size + self.epsilon) / (total + self.num_embeddings * self.epsilon) * total
            if self.count_smoothing == "laplace_stored":
                self.cluster_size.copy_(divisor)
        self.codebook.copy_(torch.where(moved.unsqueeze(1), self.embed_avg / divisor.unsqueeze(1), self.codebook))
        if self.restart_threshold > 0:
            self._restart_dead_codes(flat)

    def _restart_dead_codes(self, flat: torch.Tensor) -> None:
        mean_count = self.cluster_size.mean()
        dead = self.cluster_size < self.restart_threshold * mean_count
        # one candidate a code whether or not it is dead: fixed shapes, and no wait for the device
        candidates = draw_vectors(flat, self.num_embeddings, seed=self.num_updates).to(self.codebook.dtype)
        self.codebook.copy_(torch.where(dead.unsqueeze(1), candidates, self.codebook))
        self.cluster_size.copy_(torch.where(dead, mean_count, self.cluster_size))
        self.embed_avg.copy_(
            torch.where(dead.unsqueeze(1), self.codebook * self.cluster_size.unsqueeze(1), self.embed_avg)
        )

    def _write_codes(self, codes: torch.Tensor) -> None:
        # the averages start again from them
        self.codebook.copy_(codes)
        self.embed_avg.copy_(codes)
        self.cluster_size.fill_(1)
        self.num_updates.zero_()


class CosineVectorQuantizer(VectorQuantizer):
    """Nearest code by angle: latents and codes are scaled to length 1 (Yu et al. 2022, ViT-VQGAN, section 3.2).

    Arguments are those of `VectorQuantizer`; losses are between the unit vectors, and `quantized` has length 1.
    """

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # only the direction counts; any isotropic distribution is uniform on the sphere, the uniform cube is not
        init.normal_(self.embedding.weight)

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        _check_latents(latents, self.embed_dim)
        output = super().forward(F.normalize(latents.float(), dim=1))
        output.quantized = output.quantized.to(latents.dtype)
        return output

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors `(K, D)`, of length 1."""
        return F.normalize(self.embedding.weight, dim=1)

    def _write_codes(self, codes: torch.Tensor) -> None:
        # their lengths do not matter
        self.embedding.weight.copy_(codes)


class GumbelQuantizer(nn.Module):
    """Codes drawn from a categorical whose logits are a 1×1 convolution of z (Jang et al. 2017; Ramesh et al. 2021).

    Training relaxes the draw at `temperature` (a schedule sets this attribute; it is not saved) and adds
    `kl_weight` · KL(q(code | z) ‖ uniform), the mean over positions. Evaluation takes the most likely code.

    Args:
        hard: in training, use the one-hot in the forward pass and the relaxed gradient (straight-through).
    """

    def __init__(
        self,
        num_embeddings: int,
        embed_dim: int,
        kl_weight: float = 5e-4,
        temperature: float = 1.0,
        hard: bool = True,
    ):
        super().__init__()
        _check_sizes(num_embeddings, embed_dim)
        self.num_embeddings, self.embed_dim = num_embeddings, embed_dim
        self.kl_weight, self.temperature, self.hard = kl_weight, temperature, hard
        self.proj = nn.Conv2d(embed_dim, num_embeddings, 1)
        self.embed = nn.Embedding(num_embeddings, embed_dim)

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors `(K, D)`."""
        return self.embed.weight

    def reset_parameters(self) -> None:
        init.normal_(self.embed.weight)

    def forward(self, latents: torch.Tensor, noise: torch.Tensor | None = None) -> QuantizerOutput:
        """Quantize `latents` `(B, D, h, w)`.

        Args:
            noise: Gumbel(0, 1) noise `(B, K, h, w)`. Given, it is used, in evaluation also; otherwise it is drawn in
                training and there is none in evaluation.
        """
        _check_latents(latents, self.embed_dim)
        if self.temperature <= 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}.")
        with torch.autocast(latents.device.type, enabled=False):
            logits = F.conv2d(latents.float(), self.proj.weight.float(), self.proj.bias.float())
            if noise is None and self.training:
                # -log of an exponential draw is Gumbel(0, 1); the floor keeps a draw of exactly 0 finite
                noise = -torch.empty_like(logits).exponential_().clamp_min(torch.finfo(torch.float32).tiny).log()
            perturbed = logits if noise is None else logits + noise
            indices = perturbed.argmax(dim=1)
            if self.training:
                weights = (perturbed / self.temperature).softmax(dim=1)
                if self.hard:
                    one_hot = torch.zeros_like(weights).scatter_(1, indices.unsqueeze(1), 1.0)
                    weights = straight_through(weights, one_hot)
                quantized = torch.einsum("bkhw,kd->bdhw", weights, self.embed.weight.float()).contiguous()
            else:
                quantized = _look_up(indices, self.embed.weight.float())
            log_q = logits.log_softmax(dim=1)
            kl = (log_q.exp() * (log_q + math.log(self.num_embeddings))).sum(dim=1).mean()
        return QuantizerOutput(quantized=quantized.to(latents.dtype), indices=indices, loss=self.kl_weight * kl)

    def indices_to_latents(self, indices: torch.Tensor) -> torch.Tensor:
        """Code vectors `(B, D, h, w)` of `indices` `(B, h, w)`."""
        check_indices(indices, self.num_embeddings)
        return _look_up(indices.long(), self.embed.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Without a codebook
# ---------------------------------------------------------------------------------------------------------------------


class FSQuantizer(nn.Module):
    """Finite scalar quantization: each channel is bounded and rounded to a few levels (Mentzer et al. 2023).

    There is no codebook, no extra loss and no collapse. Channel i takes `levels[i]` values in [-1, 1]; K is their
    product, and an index is the mixed-radix number of the digits, the first channel the fastest.

    Args:
        num_embeddings: must equal the product of `levels`. embed_dim: must equal their number.
        levels: for instance (8, 5, 5, 5) for K = 1000; each from 2 to 1000.
    """

    def __init__(self, num_embeddings: int, embed_dim: int, levels: Sequence[int] = (8, 5, 5, 5)):
        super().__init__()
        # beyond 1000 levels the margin of 1e-3 in `forward` would be a whole level
        in_range = all(2 <= level <= 1000 for level in levels)
        if len(levels) != embed_dim or math.prod(levels) != num_embeddings or not in_range:
            raise ValueError(
                f"`levels` {tuple(levels)} must be {embed_dim} numbers (`embed_dim`) from 2 to 1000 with product "
                f"{num_embeddings} (`num_embeddings`); their product is {math.prod(levels)}."
            )
        self.num_embeddings, self.embed_dim, self.levels = num_embeddings, embed_dim, tuple(levels)
        self.basis = tuple(math.prod(levels[:i]) for i in range(len(levels)))
        # bounded to just under L/2 either side (section 3.1); an even L is moved by half a level
        self.half_width = tuple((level - 1) * (1 + 1e-3) / 2 for level in levels)
        self.offset = tuple((level % 2 == 0) / 2 for level in levels)
        self.shift = tuple(math.atanh(o / h) for o, h in zip(self.offset, self.half_width, strict=True))

    @staticmethod
    def _per_channel(values: tuple[float, ...], like: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=like.device).view(1, -1, 1, 1)

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        """Quantize `latents` `(B, D, h, w)`; the loss is 0."""
        _check_latents(latents, self.embed_dim)
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float()
            half_width, offset, shift = (self._per_channel(v, z) for v in (self.half_width, self.offset, self.shift))
            bounded = torch.tanh(z + shift) * half_width - offset
            lowest = self._per_channel(tuple(level // 2 for level in self.levels), z)
            digits = straight_through(bounded, bounded.round()) + lowest
            quantized = self._digits_to_values(digits)
            indices = (digits.detach().long() * self._per_channel(self.basis, z, torch.int64)).sum(dim=1)
        return QuantizerOutput(
            quantized=quantized.to(latents.dtype), indices=indices, loss=torch.zeros((), device=z.device)
        )

    def _digits_to_values(self, digits: torch.Tensor) -> torch.Tensor:
        """Digits 0 … L-1 to values in [-1, 1], evenly spaced."""
        return 2 * digits / (self._per_channel(self.levels, digits) - 1) - 1

    def indices_to_latents(self, indices: torch.Tensor) -> torch.Tensor:
        """Code vectors `(B, D, h, w)` of `indices` `(B, h, w)`, float32."""
        check_indices(indices, self.num_embeddings)
        basis = self._per_channel(self.basis, indices, torch.int64)
        levels = self._per_channel(self.levels, indices, torch.int64)
        return self._digits_to_values((indices.long().unsqueeze(1) // basis % levels).float())

    @property
    def codebook(self) -> torch.Tensor:
        """All code vectors `(K, D)`, computed."""
        return self.indices_to_latents(torch.arange(self.num_embeddings).view(1, 1, -1))[0, :, 0].t()


class LFQuantizer(nn.Module):
    """Lookup-free quantization: the signs of D channels are the bits of the code, K = 2ᴰ (Yu et al. 2024, MAGVIT-v2).

    loss = β · mean |z - sg[e]|² + w · (E H[p(code | z)] - H[E p(code | z)]), equations 5 and 6: each choice certain, all
    codes used. p(code | z) ∝ exp(-|z - e|² · inverse_temperature), which is a product over bits. The entropy of the
    mean is exact for up to `bits_per_group` bits, and the sum over groups of bits beyond (as in Open-MAGVIT2).

    Args:
        num_embeddings: must be 2 ** embed_dim.
        entropy_weight: w. diversity_weight: a factor on the second entropy.
    """

    def __init__(
        self,
        num_embeddings: int,
        embed_dim: int,
        commitment_cost: float = 0.25,
        entropy_weight: float = 0.1,
        diversity_weight: float = 1.0,
        inverse_temperature: float = 1.0,
        bits_per_group: int = 9,
    ):
        super().__init__()
        _check_sizes(num_embeddings, embed_dim)
        if bits_per_group < 1:
            raise ValueError(f"`bits_per_group` must be at least 1, got {bits_per_group}.")
        if num_embeddings != 2**embed_dim:
            raise ValueError(
                f"`num_embeddings` must be 2 ** embed_dim = {2**embed_dim} for lookup-free quantization, got {num_embeddings}."
            )
        self.num_embeddings, self.embed_dim = num_embeddings, embed_dim
        self.commitment_cost, self.entropy_weight = commitment_cost, entropy_weight
        self.diversity_weight, self.inverse_temperature = diversity_weight, inverse_temperature
        self.bits_per_group = bits_per_group

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        """Quantize `latents` `(B, D, h, w)` to ±1."""
        _check_latents(latents, self.embed_dim)
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float()
            bits = z > 0
            codes = bits.float() * 2 - 1
            powers = 2 ** torch.arange(self.embed_dim, device=z.device)
            indices = (bits.long() * powers.view(1, -1, 1, 1)).sum(dim=1)
            commitment_loss = F.mse_loss(z, codes)
            sample_entropy, mean_entropy = self._entropies(_flatten(z))
            loss = self.commitment_cost * commitment_loss
            loss = loss + self.entropy_weight * (sample_entropy - self.diversity_weight * mean_entropy)
        return QuantizerOutput(
            quantized=straight_through(z, codes).to(latents.dtype),
            indices=indices,
            loss=loss,
            commitment_loss=commitment_loss.detach(),
        )

    def _entropies(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """E H[p(code | z)] and H[E p(code | z)] in nats."""
        # |z+1|² - |z-1|² = 4z: the log odds of a bit
        log_odds = 4 * self.inverse_temperature * flat
        on, off = F.logsigmoid(log_odds), F.logsigmoid(-log_odds)
        sample_entropy = -(on.exp() * on + off.exp() * off).sum(dim=1).mean()
        mean_entropy = flat.new_zeros(())
        for start in range(0, self.embed_dim, self.bits_per_group):
            joint = flat.new_ones(flat.shape[0], 1)
            for bit in range(start, min(start + self.bits_per_group, self.embed_dim)):
                choices = torch.stack([off[:, bit].exp(), on[:, bit].exp()], dim=1)
                joint = (choices.unsqueeze(2) * joint.unsqueeze(1)).flatten(1)
            mean = joint.mean(dim=0)
            # a product of bits underflows to 0, where the logarithm and its gradient are not finite
            log_mean = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
            mean_entropy = mean_entropy - (mean * log_mean).sum()
        return sample_entropy, mean_entropy

    def indices_to_latents(self, indices: torch.Tensor) -> torch.Tensor:
        """Code vectors `(B, D, h, w)` of ±1, float32, of `indices` `(B, h, w)`."""
        check_indices(indices, self.num_embeddings)
        shifts = torch.arange(self.embed_dim, device=indices.device).view(1, -1, 1, 1)
        return (indices.long().unsqueeze(1) >> shifts & 1).float() * 2 - 1

    @property
    def codebook(self) -> torch.Tensor:
        """All code vectors `(K, D)`, computed."""
        return self.indices_to_latents(torch.arange(self.num_embeddings).view(1, 1, -1))[0, :, 0].t()


# ---------------------------------------------------------------------------------------------------------------------
# Several codes a position
# ---------------------------------------------------------------------------------------------------------------------


class ResidualQuantizer(nn.Module):
    """Each quantizer codes what the ones before it left over (Zeghidour et al. 2021; Lee et al. 2022, equation 3).

    `indices` have shape `(B, h, w, depth)`. Losses are sums over the depth.

    Args:
        depth: the number of quantizers. base: "vq" or "ema"; kwargs go to each of them. The gradient estimator acts
            once, on the sum of the codes.
    """

    def __init__(self, num_embeddings: int, embed_dim: int, depth: int = 4, base: str = "ema", **kwargs):
        super().__init__()
        if depth < 1:
            raise ValueError(f"`depth` must be at least 1, got {depth}.")
        if base not in ("vq", "ema"):
            raise ValueError(f"`base` must be 'vq' or 'ema', got {base!r}.")
        self.num_embeddings, self.embed_dim, self.depth = num_embeddings, embed_dim, depth
        self.layers = nn.ModuleList(build_quantizer(base, num_embeddings, embed_dim, **kwargs) for _ in range(depth))

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        """Quantize `latents` `(B, D, h, w)`."""
        _check_latents(latents, self.embed_dim)
        residual = latents.float()
        outputs = []
        for layer in self.layers:
            outputs.append(layer(residual))
            residual = residual - outputs[-1].quantized.detach()

        def total(name):
            terms = [getattr(output, name) for output in outputs]
            return None if terms[0] is None else sum(terms)

        # a sum of estimators would pass the gradient `depth` times; one estimator on the sum passes it once
        codes = sum(output.quantized.detach() for output in outputs)
        return QuantizerOutput(
            quantized=self.layers[0].estimator(latents.float(), codes).to(latents.dtype),
            indices=torch.stack([output.indices for output in outputs], dim=-1),
            loss=total("loss"),
            codebook_loss=total("codebook_loss"),
            commitment_loss=total("commitment_loss"),
        )

    def indices_to_latents(self, indices: torch.Tensor) -> torch.Tensor:
        """Sums of code vectors `(B, D, h, w)` of `indices` `(B, h, w, d)` with 1 ≤ d ≤ depth."""
        if indices.ndim != 4 or not 1 <= indices.shape[-1] <= self.depth:
            raise ValueError(
                f"`indices` must have shape (B, h, w, d) with d from 1 to {self.depth}, got {tuple(indices.shape)}."
            )
        return sum(
            layer.indices_to_latents(level) for layer, level in zip(self.layers, indices.unbind(-1), strict=False)
        )


QUANTIZERS = {
    "vq": VectorQuantizer,
    "ema": EMAVectorQuantizer,
    "gumbel": GumbelQuantizer,
    "cosine": CosineVectorQuantizer,
    "fsq": FSQuantizer,
    "lfq": LFQuantizer,
    "residual": ResidualQuantizer,
}


def build_quantizer(name: str, num_embeddings: int, embed_dim: int, **kwargs) -> nn.Module:
    """The quantizer called `name`, one of `QUANTIZERS`, with `kwargs` of its class; an unknown one is a `ValueError`."""
    if name not in QUANTIZERS:
        raise ValueError(f"`quantizer` must be one of {sorted(QUANTIZERS)}, got {name!r}.")
    known = inspect.signature(QUANTIZERS[name]).parameters
    unknown = [key for key in kwargs if key not in known]
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        raise ValueError(
            f"`quantizer_kwargs` of {name!r} have no {unknown}; known: {sorted(set(known) - {'num_embeddings', 'embed_dim'})}."
        )
    return QUANTIZERS[name](num_embeddings, embed_dim, **kwargs)


__all__ = [
    "QUANTIZERS",
    "CosineVectorQuantizer",
    "EMAVectorQuantizer",
    "FSQuantizer",
    "GumbelQuantizer",
    "LFQuantizer",
    "ResidualQuantizer",
    "VectorQuantizer",
    "build_quantizer",
]
