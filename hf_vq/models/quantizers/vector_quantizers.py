"""Quantizers with a table of code vectors: trained by gradients, by moving averages, and compared by angle."""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ...argument_checks import check_integer, check_real
from ...distributed import is_distributed
from ..modeling_outputs import QuantizerOutput
from .code_entropies import choice_entropies
from .codebook_search import draw_vectors, has_finite_vectors, kmeans, nearest_codes
from .codebook_statistics import are_finite, code_counts
from .gradient_estimators import gradient_estimator_of
from .quantizer import Quantizer, flatten, look_up


def vq_losses(
    z: torch.Tensor, codes: torch.Tensor, beta: float, legacy_beta: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weighted loss of a codebook with a gradient, and its two unweighted terms, detached."""
    codebook_loss = F.mse_loss(codes, z.detach())
    commitment_loss = F.mse_loss(z, codes.detach())
    loss = commitment_loss + beta * codebook_loss if legacy_beta else codebook_loss + beta * commitment_loss
    return loss, codebook_loss.detach(), commitment_loss.detach()


class NearestCodeQuantizer(Quantizer):
    """A quantizer that takes the nearest row of a table: the search, the gradient estimator and the start by k-means.

    A subclass builds its table, `codebook`, between `super().__init__` and `self.reset_parameters()`, and may set
    `by_angle` for the largest inner product in place of the smallest distance.

    Args:
        num_embeddings: K.
        embed_dim: D.
        gradient_estimator: "straight_through" or "rotation".
        kmeans_init: set the codes by k-means of the first training batch (of all processes).
        kmeans_iterations: Lloyd iterations of that.
    """

    by_angle = False

    def __init__(
        self,
        num_embeddings: int,
        embed_dim: int,
        gradient_estimator: str = "straight_through",
        kmeans_init: bool = False,
        kmeans_iterations: int = 10,
    ):
        super().__init__(num_embeddings, embed_dim)
        self.estimator = gradient_estimator_of(gradient_estimator)
        iterations = check_integer("kmeans_iterations", kmeans_iterations, minimum=1)
        self.kmeans_iterations = iterations if kmeans_init else 0
        self._awaits_kmeans = bool(kmeans_init)  # as `is_at_start`, remembered so that a device is asked once

    def is_at_start(self) -> bool:
        """Whether the codes await k-means, by what a checkpoint holds; asked only where k-means is to set them."""
        raise NotImplementedError(f"{type(self).__name__} must define `is_at_start`.")

    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Index `(B, h, w)` of the code nearest to each of the float32 vectors `z` `(B, D, h, w)`.

        The first training batch sets the codes first where k-means is to do so; a batch without one finite vector is
        passed over.
        """
        flat = flatten(z.detach())
        if self.training and self._awaits_kmeans:
            self._awaits_kmeans = self.is_at_start()
            if self._awaits_kmeans and has_finite_vectors(flat):
                self.set_codebook(kmeans(flat, self.num_embeddings, self.kmeans_iterations))
        return nearest_codes(flat, self.codebook, inner_product=self.by_angle).reshape(z.shape[0], *z.shape[2:])

    @torch.no_grad()
    def set_codebook(self, codes: torch.Tensor) -> None:
        """Replace the code vectors by `codes` `(K, D)`; they are not initialised by k-means any more."""
        if codes.shape != self.codebook.shape:
            raise ValueError(f"`codes` must have shape {tuple(self.codebook.shape)}, got {tuple(codes.shape)}.")
        self._write_codes(codes)
        self._awaits_kmeans = False

    def _write_codes(self, codes: torch.Tensor) -> None:
        raise NotImplementedError(f"{type(self).__name__} must define `_write_codes`.")

    def reset_parameters(self) -> None:
        self._awaits_kmeans = bool(self.kmeans_iterations)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._awaits_kmeans = bool(self.kmeans_iterations)  # ask what was loaded


class VectorQuantizer(NearestCodeQuantizer):
    """A codebook trained by its own gradient (van den Oord et al. 2017, equation 3).

    loss = mean |sg[z] - e|² + β · mean |z - sg[e]|² + w · (E H[p] - H[E p]): the codes move to the latents, β weights
    how strongly the encoder commits to the codes, and w that each choice is certain and all codes are chosen, with
    p(code | z) the softmax of -|z - e|² / τ (the entropies of LlamaGen's code).

    Args:
        num_embeddings: K.
        embed_dim: D.
        commitment_cost: β, at least 0.
        legacy_beta: weight the other term, mean |z - sg[e]|² + β · mean |sg[z] - e|², as the original VQGAN code does;
            for checkpoints and recipes that come from there.
        entropy_weight: w, at least 0.
        entropy_temperature: τ, above 0.
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
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        gradient_estimator: str = "straight_through",
        kmeans_init: bool = False,
        kmeans_iterations: int = 10,
    ):
        super().__init__(num_embeddings, embed_dim, gradient_estimator, kmeans_init, kmeans_iterations)
        self.commitment_cost = check_real("commitment_cost", commitment_cost, minimum=0)
        self.legacy_beta = legacy_beta
        self.entropy_weight = check_real("entropy_weight", entropy_weight, minimum=0)
        self.entropy_temperature = check_real("entropy_temperature", entropy_temperature, above=0)
        self.embedding = nn.Embedding(num_embeddings, embed_dim)
        if kmeans_init:
            self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self.reset_parameters()

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors `(K, D)`."""
        return self.embedding.weight

    def is_at_start(self) -> bool:
        return not self.initialized

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.uniform_(self.embedding.weight, -1 / self.num_embeddings, 1 / self.num_embeddings)
        if self.kmeans_iterations:
            init.zeros_(self.initialized)

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        """Quantize `latents` `(B, D, h, w)`."""
        self.check_latents(latents)
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float()
            indices = self.nearest(z)
            codebook = self.codebook.float()
            codes = look_up(indices, codebook)
            loss, codebook_loss, commitment_loss = vq_losses(z, codes, self.commitment_cost, self.legacy_beta)
            if self.entropy_weight > 0:
                # -|z - e|² = 2z·e - |e|² - |z|², of which the last does not change the softmax
                each, mean = choice_entropies(
                    flatten(z),
                    2 * codebook,
                    -codebook.square().sum(dim=1),
                    self.entropy_temperature,
                    epsilon=1e-5,
                    of_all_processes=self.training,
                )
                loss = loss + self.entropy_weight * (each - mean)
            quantized = self.estimator(z, codes.detach())
        return QuantizerOutput(
            quantized=quantized.to(latents.dtype),
            indices=indices,
            loss=loss,
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
        )

    def _write_codes(self, codes: torch.Tensor) -> None:
        self.embedding.weight.copy_(codes)
        if self.kmeans_iterations:
            self.initialized.fill_(True)


class EMAVectorQuantizer(NearestCodeQuantizer):
    """A codebook of moving averages of the latents (van den Oord et al. 2017, appendix A.1).

    N ← γN + (1-γ)n, m ← γm + (1-γ)Σz, e = m / N, over the latents of all processes; one that is not finite is left
    out. Only the commitment term has a gradient: loss = β · mean |z - sg[e]|².

    Zero-debiased (`zero_debias`): the rate is (1-γ)/(1-γᵗ) at update t, so the averages are exact weighted means of
    the data from the first update on, and hold nothing of the initial values (Kingma & Ba 2015, section 3). Counts
    start at 1 and m at e. A code that is not used in an update keeps its vector to the bit (with smoothing: while its
    count is 0), so that it never shrinks or blows up.

    A code whose count falls under `restart_threshold` times the mean count is dead: it restarts at a latent of the
    batch, the same one on every process, with the mean count (as in Dhariwal et al. 2020, section 3.1). A latent is
    drawn with a chance in proportion to the root of its distance from its code, and none twice while there are enough:
    where many are alike, as in the flat parts of images, one more code would stay without use. The codes begin as the
    centres that k-means finds in the first training batch; `num_updates` is -1 before it.

    Args:
        num_embeddings: K.
        embed_dim: D.
        commitment_cost: β, at least 0.
        decay: γ, in [0, 1).
        zero_debias: see above.
        restart_threshold: in [0, 1); 0 turns restarts off.
        count_smoothing: `None`; "laplace", dividing by (N+ε)/(ΣN+Kε)·ΣN as Sonnet does; or "laplace_stored", which
            also writes the smoothed counts back (as some ports of it do), for parity with them.
        epsilon: ε, above 0.
        keep_unused: False divides the average of a code without count all the same, as the original VQGAN code's EMA
            codebook does, which sends it away; for parity with that, and with `count_smoothing` only.
        by_angle: scale latents to length 1, and take the code of the largest inner product; in training, codes are
            scaled to length 1 before the search (the "cosine" of the original VQ-Diffusion's codec).
        gradient_estimator: "straight_through" or "rotation".
        kmeans_init: set the codes by k-means of the first training batch (of all processes).
        kmeans_iterations: Lloyd iterations of that.
    """

    def __init__(
        self,
        num_embeddings: int,
        embed_dim: int,
        commitment_cost: float = 0.25,
        decay: float = 0.99,
        zero_debias: bool = True,
        restart_threshold: float = 0.9,
        count_smoothing: str | None = None,
        epsilon: float = 1e-5,
        keep_unused: bool = True,
        by_angle: bool = False,
        gradient_estimator: str = "straight_through",
        kmeans_init: bool = True,
        kmeans_iterations: int = 10,
    ):
        super().__init__(num_embeddings, embed_dim, gradient_estimator, kmeans_init, kmeans_iterations)
        if count_smoothing not in (None, "laplace", "laplace_stored"):
            raise ValueError(
                f"`count_smoothing` must be None, 'laplace' or 'laplace_stored', got {count_smoothing!r}."
            )
        if not keep_unused and count_smoothing is None:
            raise ValueError(
                "`keep_unused=False` divides by counts of 0 without `count_smoothing`; set it to 'laplace'."
            )
        self.keep_unused, self.by_angle = keep_unused, by_angle
        self.commitment_cost = check_real("commitment_cost", commitment_cost, minimum=0)
        self.decay = check_real("decay", decay, minimum=0, below=1)
        self.restart_threshold = check_real("restart_threshold", restart_threshold, minimum=0, below=1)
        self.epsilon = check_real("epsilon", epsilon, above=0)
        self.zero_debias, self.count_smoothing = zero_debias, count_smoothing
        self.register_buffer("embedding", torch.empty(num_embeddings, embed_dim))
        self.register_buffer("embed_avg", torch.empty(num_embeddings, embed_dim))
        self.register_buffer("cluster_size", torch.empty(num_embeddings))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.reset_parameters()

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors `(K, D)`."""
        return self.embedding

    def is_at_start(self) -> bool:
        return bool(self.num_updates < 0)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.normal_(self.embedding)
        init.copy_(self.embed_avg, self.embedding)
        init.ones_(self.cluster_size)
        init.constant_(self.num_updates, -1 if self.kmeans_iterations else 0)

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        """Quantize `latents` `(B, D, h, w)`; in training mode the averages take them in afterwards."""
        self.check_latents(latents)
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float()
            if self.by_angle:
                z = F.normalize(z, dim=1)
                if self.training:
                    with torch.no_grad():
                        self.embedding.copy_(F.normalize(self.embedding, dim=1))
            indices = self.nearest(z)
            codes = look_up(indices, self.embedding.float())
            commitment_loss = F.mse_loss(z, codes)
            quantized = self.estimator(z, codes)
            if self.training and not self._awaits_kmeans:
                self._update_averages(flatten(z.detach()), indices.flatten())
        return QuantizerOutput(
            quantized=quantized.to(latents.dtype),
            indices=indices,
            loss=self.commitment_cost * commitment_loss,
            commitment_loss=commitment_loss.detach(),
        )

    @torch.no_grad()
    def _update_averages(self, flat: torch.Tensor, flat_indices: torch.Tensor) -> None:
        if self.restart_threshold > 0:
            distances = torch.linalg.vector_norm(flat - F.embedding(flat_indices, self.embedding.float()), dim=1)
        # latents that are not finite go to a row K, which is thrown away
        bins = torch.where(are_finite(flat), flat_indices, self.num_embeddings)
        counts = code_counts(bins, self.num_embeddings + 1)[:-1]
        sums = flat.new_zeros(self.num_embeddings + 1, self.embed_dim).index_add_(0, bins, flat)[:-1]
        if is_distributed():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.num_updates.clamp_(min=0).add_(1)  # -1 in the checkpoint of a codebook that was to start by k-means
        rate = 1 - self.decay
        if self.zero_debias and self.decay > 0:
            # 1 - γᵗ without cancellation, and without float64, which not every device has
            rate = rate / -torch.expm1(self.num_updates.float() * math.log(self.decay))
        self.cluster_size.lerp_(counts.to(self.cluster_size), torch.as_tensor(rate).to(self.cluster_size))
        self.embed_avg.lerp_(sums.to(self.embed_avg), torch.as_tensor(rate).to(self.embed_avg))
        divisor, moved = self.cluster_size, counts > 0
        if self.count_smoothing is not None:
            # smoothing changes the quotient of unused codes also; without a count it would send them to m/ε
            moved = (self.cluster_size > 0) if self.keep_unused else torch.ones_like(counts, dtype=torch.bool)
            total = self.cluster_size.sum()
            divisor = (self.cluster_size + self.epsilon) / (total + self.num_embeddings * self.epsilon) * total
            if self.count_smoothing == "laplace_stored":
                self.cluster_size.copy_(divisor)
        self.codebook.copy_(torch.where(moved.unsqueeze(1), self.embed_avg / divisor.unsqueeze(1), self.codebook))
        if self.restart_threshold > 0:
            self._restart_dead_codes(flat, distances, counts.sum() > 0)

    def _restart_dead_codes(self, flat: torch.Tensor, distances: torch.Tensor, any_latent: torch.Tensor) -> None:
        mean_count = self.cluster_size.mean()
        dead = (self.cluster_size < self.restart_threshold * mean_count) & any_latent
        # one candidate a code whether or not it is dead: fixed shapes, and no wait for the device
        candidates = draw_vectors(flat, self.num_embeddings, seed=self.num_updates, weights=distances.sqrt())
        candidates = candidates[(dead.cumsum(0) - 1).clamp_min(0)]  # the first of them, which are a draw of fewer
        self.codebook.copy_(torch.where(dead.unsqueeze(1), candidates.to(self.codebook.dtype), self.codebook))
        self.cluster_size.copy_(torch.where(dead, mean_count, self.cluster_size))
        self.embed_avg.copy_(
            torch.where(dead.unsqueeze(1), self.codebook * self.cluster_size.unsqueeze(1), self.embed_avg)
        )

    def _write_codes(self, codes: torch.Tensor) -> None:
        # the averages start again from them
        self.embedding.copy_(codes)
        self.embed_avg.copy_(codes)
        self.cluster_size.fill_(1)
        self.num_updates.zero_()


class CosineVectorQuantizer(VectorQuantizer):
    """Nearest code by angle: latents and codes are scaled to length 1 (Yu et al. 2022, ViT-VQGAN, section 3.2).

    The loss is that of `VectorQuantizer` between the unit vectors; with its arguments (Janus and LlamaGen publish
    w = 0). `quantized` has length 1.
    """

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # only the direction counts; any isotropic distribution is uniform on the sphere, the uniform cube is not
        init.normal_(self.embedding.weight)

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors `(K, D)`, of length 1."""
        return F.normalize(self.embedding.weight, dim=1)

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        """Quantize `latents` `(B, D, h, w)`, of any length."""
        self.check_latents(latents)
        output = super().forward(F.normalize(latents.float(), dim=1))
        output.quantized = output.quantized.to(latents.dtype)
        return output


class SimVectorQuantizer(Quantizer):
    """Frozen codes times one trained linear layer, SimVQ (Zhu et al. 2024, "Addressing Representation Collapse").

    The codebook is C W + b with C drawn once from N(0, 1/D): a step moves the whole space of codes and not the chosen
    ones alone, so that none is left behind. loss = mean |sg[z] - e|² + β · mean |z - sg[e]|², whose gradient goes to W
    and b.

    Args:
        num_embeddings: K.
        embed_dim: D.
        commitment_cost: β, at least 0.
        legacy_beta: β weights the codebook's term, as in `VectorQuantizer`.
        gradient_estimator: "straight_through" or "rotation".
    """

    def __init__(
        self,
        num_embeddings: int,
        embed_dim: int,
        commitment_cost: float = 0.25,
        legacy_beta: bool = False,
        gradient_estimator: str = "straight_through",
    ):
        super().__init__(num_embeddings, embed_dim)
        self.commitment_cost = check_real("commitment_cost", commitment_cost, minimum=0)
        self.legacy_beta = legacy_beta
        self.estimator = gradient_estimator_of(gradient_estimator)
        self.register_buffer("embedding", torch.empty(num_embeddings, embed_dim))
        self.embedding_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    @property
    def codebook(self) -> torch.Tensor:
        """The code vectors `(K, D)`, computed."""
        weight, bias = self.embedding_proj.weight.float(), self.embedding_proj.bias.float()
        # copied: the product's last bits depend on how the memory is aligned, which differs after loading
        return F.linear(self.embedding.float().clone(), weight.clone(), bias.clone())

    def reset_parameters(self) -> None:
        init.normal_(self.embedding, std=self.embed_dim**-0.5)

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        """Quantize `latents` `(B, D, h, w)`."""
        self.check_latents(latents)
        with torch.autocast(latents.device.type, enabled=False):
            z, codebook = latents.float(), self.codebook
            indices = nearest_codes(flatten(z.detach()), codebook.detach()).reshape(z.shape[0], *z.shape[2:])
            codes = look_up(indices, codebook)
            loss, codebook_loss, commitment_loss = vq_losses(z, codes, self.commitment_cost, self.legacy_beta)
            quantized = self.estimator(z, codes.detach())
        return QuantizerOutput(
            quantized=quantized.to(latents.dtype),
            indices=indices,
            loss=loss,
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
        )


__all__ = [
    "CosineVectorQuantizer",
    "EMAVectorQuantizer",
    "NearestCodeQuantizer",
    "SimVectorQuantizer",
    "VectorQuantizer",
]
