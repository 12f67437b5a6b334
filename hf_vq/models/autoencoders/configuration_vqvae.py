"""Configuration of the VQ-VAE tokenizer."""

from .configuration_tokenizer import VQTokenizerConfig


class VQVAEConfig(VQTokenizerConfig):
    """VQ-VAE (van den Oord et al. 2017, section 4.1); the defaults are the paper's, at f4.

    Args:
        hidden_size: width of the networks. residual_hidden_size: width inside a residual block.
        num_residual_layers: residual blocks on either side.
        downsample_factor: a power of 2, pixels a code along each side.
        rectified_residual: the skip of a residual block carries relu(x) and its convolutions have no bias, as in the
            PyTorch port whose in-place ReLU does so; for checkpoints from there.
        kwargs: those of `VQTokenizerConfig`, with K = 512, D = 64, an EMA codebook and 32 pixels.
    """

    model_type = "hf_vq_vqvae"

    def __init__(
        self,
        hidden_size: int = 128,
        residual_hidden_size: int = 32,
        num_residual_layers: int = 2,
        downsample_factor: int = 4,
        rectified_residual: bool = False,
        resolution: int = 32,
        embed_dim: int = 64,
        num_embeddings: int = 512,
        quantizer: str = "ema",
        **kwargs,
    ):
        if downsample_factor < 2 or downsample_factor & (downsample_factor - 1):
            raise ValueError(f"`downsample_factor` must be a power of 2 and at least 2, got {downsample_factor}.")
        for name, value, least in (
            ("hidden_size", hidden_size, 2),  # the outermost layers have half of it
            ("residual_hidden_size", residual_hidden_size, 1),
            ("num_residual_layers", num_residual_layers, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an int of at least {least}, got {value}.")
        super().__init__(
            resolution=resolution, embed_dim=embed_dim, num_embeddings=num_embeddings, quantizer=quantizer, **kwargs
        )
        self.hidden_size = hidden_size
        self.residual_hidden_size = residual_hidden_size
        self.num_residual_layers = num_residual_layers
        self.downsample_factor = downsample_factor
        self.rectified_residual = rectified_residual


__all__ = ["VQVAEConfig"]
