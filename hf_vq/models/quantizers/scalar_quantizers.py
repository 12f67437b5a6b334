"""Quantizers without a codebook to learn: finite scalar, lookup-free and binary spherical quantization."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ...argument_checks import check_integer, check_real
from ..modeling_outputs import QuantizerOutput
from .code_entropies import mean_probabilities
from .codebook_statistics import check_indices
from .gradient_estimators import straight_through
from .quantizer import Quantizer, flatten


class ComputedCodebook(Quantizer):
    """A quantizer whose `indices_to_latents` is a formula; its codebook is that formula of all indices."""

    @property
    def codebook(self) -> torch.Tensor:
        """All code vectors `(K, D)`, computed."""
        return self.indices_to_latents(torch.arange(self.num_embeddings).view(1, 1, -1))[0, :, 0].t()


class FSQuantizer(ComputedCodebook):
    """Finite scalar quantization: each channel is bounded and rounded to a few levels (Mentzer et al. 2023).

    There is no codebook, no extra loss and no collapse. Channel i takes `levels[i]` values in [-1, 1]; K is their
    product, and an index is the mixed-radix number of the digits, the first channel the fastest.

    Args:
        num_embeddings: K, which must equal the product of `levels`.
        embed_dim: D, which must equal the number of `levels`.
        levels: for instance (8, 5, 5, 5) for K = 1000; each from 2 to 1000.
    """

    def __init__(self, num_embeddings: int, embed_dim: int, levels: Sequence[int] = (8, 5, 5, 5)):
        super().__init__(num_embeddings, embed_dim)
        levels = tuple(check_integer("levels", level) for level in levels)
        # beyond 1000 levels the margin of 1e-3 in `forward` would be a whole level
        in_range = all(2 <= level <= 1000 for level in levels)
        if len(levels) != embed_dim or math.prod(levels) != num_embeddings or not in_range:
            raise ValueError(
                f"`levels` {levels} must be {embed_dim} numbers (`embed_dim`) from 2 to 1000 with product "
                f"{num_embeddings} (`num_embeddings`); their product is {math.prod(levels)}."
            )
        self.levels = levels
        self.basis = tuple(math.prod(levels[:i]) for i in range(len(levels)))
        # bounded to just under L/2 either side (section 3.1); an even L is moved by half a level
        self.half_width = tuple((level - 1) * (1 + 1e-3) / 2 for level in levels)
        self.offset = tuple((level % 2 == 0) / 2 for level in levels)
        self.shift = tuple(math.atanh(o / h) for o, h in zip(self.offset, self.half_width, strict=True))

    @staticmethod
    def _per_channel(
        values: tuple[float, ...], like: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=like.device).view(1, -1, 1, 1)

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        """Quantize `latents` `(B, D, h, w)`; the loss is 0."""
        self.check_latents(latents)
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float()
            half_width, offset, shift = (self._per_channel(v, z) for v in (self.half_width, self.offset, self.shift))
            bounded = torch.tanh(z + shift) * half_width - offset
            lowest = self._per_channel(tuple(level // 2 for level in self.levels), z)
            digits = straight_through(bounded, bounded.round()) + lowest
            quantized = self._digits_to_values(digits)
            # a NaN is no digit: it gets the index of digit 0, which is in range
            whole = digits.detach().nan_to_num(0.0).long()
            indices = (whole * self._per_channel(self.basis, z, torch.int64)).sum(dim=1)
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


class LFQuantizer(ComputedCodebook):
    """Lookup-free quantization: the signs of D channels are the bits of the code, K = 2ᴰ (Yu et al. 2024, MAGVIT-v2).

    loss = β · mean |z - sg[e]|² + w · (E H[p(code | z)] - H[E p(code | z)]), equations 5 and 6: each choice certain,
    all codes used. p(code | z) ∝ exp(-|z - e|² · inverse_temperature), which is a product over bits. The entropy of
    the mean is exact for up to `bits_per_group` bits, and the sum over groups of bits beyond (as in Open-MAGVIT2).

    Args:
        num_embeddings: K, which must be 2 ** embed_dim.
        embed_dim: D, the number of bits.
        commitment_cost: β.
        entropy_weight: w.
        diversity_weight: a factor on the second entropy.
        inverse_temperature: above 0.
        bits_per_group: at least 1.
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
        super().__init__(num_embeddings, embed_dim)
        if num_embeddings != 2**embed_dim:
            raise ValueError(
                f"`num_embeddings` must be 2 ** embed_dim = {2**embed_dim} for lookup-free quantization, "
                f"got {num_embeddings}."
            )
        self.commitment_cost = check_real("commitment_cost", commitment_cost, minimum=0)
        self.entropy_weight = check_real("entropy_weight", entropy_weight, minimum=0)
        self.diversity_weight = check_real("diversity_weight", diversity_weight, minimum=0)
        self.inverse_temperature = check_real("inverse_temperature", inverse_temperature, above=0)
        self.bits_per_group = check_integer("bits_per_group", bits_per_group, minimum=1)
        self.amplitude = 1.0

    def forward(self, latents: torch.Tensor) -> QuantizerOutput:
        """Quantize `latents` `(B, D, h, w)` to ± `amplitude`."""
        self.check_latents(latents)
        with torch.autocast(latents.device.type, enabled=False):
            z = self._project(latents.float())
            bits = z > 0
            codes = (bits.float() * 2 - 1) * self.amplitude
            powers = 2 ** torch.arange(self.embed_dim, device=z.device)
            indices = (bits.long() * powers.view(1, -1, 1, 1)).sum(dim=1)
            commitment_loss = F.mse_loss(z, codes)
            sample_entropy, mean_entropy = self._entropies(flatten(z))
            loss = self.commitment_cost * commitment_loss
            loss = loss + self.entropy_weight * (sample_entropy - self.diversity_weight * mean_entropy)
        return QuantizerOutput(
            quantized=straight_through(z, codes).to(latents.dtype),
            indices=indices,
            loss=loss,
            commitment_loss=commitment_loss.detach(),
        )

    def _project(self, z: torch.Tensor) -> torch.Tensor:
        return z

    def _entropies(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """E H[p(code | z)] and H[E p(code | z)] in nats."""
        # |z+a|² - |z-a|² = 4az: the log odds of a bit
        log_odds = 4 * self.inverse_temperature * self.amplitude * flat
        on, off = F.logsigmoid(log_odds), F.logsigmoid(-log_odds)
        sample_entropy = -(on.exp() * on + off.exp() * off).sum(dim=1).mean()
        mean_entropy = flat.new_zeros(())
        for start in range(0, self.embed_dim, self.bits_per_group):
            joint = flat.new_ones(flat.shape[0], 1)
            for bit in range(start, min(start + self.bits_per_group, self.embed_dim)):
                choices = torch.stack([off[:, bit].exp(), on[:, bit].exp()], dim=1)
                joint = (choices.unsqueeze(2) * joint.unsqueeze(1)).flatten(1)
            mean = mean_probabilities(joint.sum(dim=0), len(flat), of_all_processes=self.training)
            # a product of bits underflows to 0, where the logarithm and its gradient are not finite
            log_mean = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
            mean_entropy = mean_entropy - (mean * log_mean).sum()
        return sample_entropy, mean_entropy

    def indices_to_latents(self, indices: torch.Tensor) -> torch.Tensor:
        """Code vectors `(B, D, h, w)` of ± `amplitude`, float32, of `indices` `(B, h, w)`."""
        check_indices(indices, self.num_embeddings)
        shifts = torch.arange(self.embed_dim, device=indices.device).view(1, -1, 1, 1)
        return ((indices.long().unsqueeze(1) >> shifts & 1).float() * 2 - 1) * self.amplitude


class BSQuantizer(LFQuantizer):
    """Binary spherical quantization: the nearest corner of a cube inside the unit sphere (Zhao et al. 2024, BSQ).

    u = z / |z| and the code is sign(u) / √D, of length 1 as u is, with K = 2ᴰ. The loss is that of `LFQuantizer`
    between u and the code; p(code | z) ∝ exp(-|u - e|² · inverse_temperature) is the paper's exp(τ u·e) with τ twice
    as large, and again a product over bits (section 4.2, equations 8 to 11).

    Args:
        num_embeddings: K, which must be 2 ** embed_dim.
        embed_dim: D, the number of bits.
        commitment_cost: β.
        entropy_weight: w.
        diversity_weight: a factor on the second entropy (γ in the paper).
        inverse_temperature: above 0.
        bits_per_group: at least 1.
    """

    def __init__(
        self,
        num_embeddings: int,
        embed_dim: int,
        commitment_cost: float = 0.25,
        entropy_weight: float = 0.1,
        diversity_weight: float = 1.0,
        inverse_temperature: float = 10.0,
        bits_per_group: int = 9,
    ):
        super().__init__(
            num_embeddings,
            embed_dim,
            commitment_cost,
            entropy_weight,
            diversity_weight,
            inverse_temperature,
            bits_per_group,
        )
        self.amplitude = embed_dim**-0.5

    def _project(self, z: torch.Tensor) -> torch.Tensor:
        return F.normalize(z, dim=1)


__all__ = ["BSQuantizer", "FSQuantizer", "LFQuantizer"]
