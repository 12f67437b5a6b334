"""The configuration fields that every tokenizer has."""

from transformers import PreTrainedConfig


class VQTokenizerConfig(PreTrainedConfig):
    """Codebook, quantizer and image size of a tokenizer.

    Args:
        in_channels: channels of the image.
        resolution: side of the images it is trained on, in pixels; other sizes work.
        embed_dim: D, channels of a code. num_embeddings: K, codes (also `codebook_size`).
        quantizer: "vq", "ema", "gumbel", "cosine", "fsq", "lfq" or "residual", see `hf_vq.models.quantizers.vector_quantizers`.
        quantizer_kwargs: further arguments of that class.
        commitment_cost: β, the weight of the commitment term.
        legacy_beta: put β on the codebook's term, as the original VQGAN code does.
        data_variance: divide the squared error of `forward` by this variance of the pixels; None does not.
        scaling_factor: latents are multiplied by it for a continuous diffusion prior.
    """

    attribute_map = {"codebook_size": "num_embeddings"}

    def __init__(
        self,
        in_channels: int = 3,
        resolution: int = 256,
        embed_dim: int = 256,
        num_embeddings: int = 1024,
        quantizer: str = "vq",
        quantizer_kwargs: dict | None = None,
        commitment_cost: float = 0.25,
        legacy_beta: bool = False,
        data_variance: float | None = None,
        scaling_factor: float = 1.0,
        **kwargs,
    ):
        if num_embeddings < 1 or embed_dim < 1:
            raise ValueError(
                f"`num_embeddings` and `embed_dim` must be positive, got {num_embeddings} and {embed_dim}."
            )
        if commitment_cost < 0:
            raise ValueError(f"`commitment_cost` must not be negative, got {commitment_cost}.")
        if data_variance is not None and data_variance <= 0:
            raise ValueError(f"`data_variance` must be positive or None, got {data_variance}.")
        self.in_channels = in_channels
        self.resolution = resolution
        self.embed_dim = embed_dim
        self.num_embeddings = num_embeddings
        self.quantizer = quantizer
        self.quantizer_kwargs = dict(quantizer_kwargs or {})
        self.commitment_cost = commitment_cost
        self.legacy_beta = legacy_beta
        self.data_variance = data_variance
        self.scaling_factor = scaling_factor
        super().__init__(**kwargs)

    @property
    def downsample_factors(self) -> tuple[int, ...]:
        """Pixels a code along each side, of each level from top to bottom."""
        return (self.downsample_factor,)


__all__ = ["VQTokenizerConfig"]
