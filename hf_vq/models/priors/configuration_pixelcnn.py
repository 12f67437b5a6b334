"""Configuration of the PixelCNN prior of VQ-VAE."""

from huggingface_hub.dataclasses import strict

from .configuration_code_prior import CodePriorConfig


@strict
class PixelCNNConfig(CodePriorConfig):
    """
    Configuration of [`PixelCNNForCausalLM`], the gated PixelCNN (van den Oord et al., "Conditional Image Generation
    with PixelCNN Decoders", 2016). Its fields for the codes and the class are those of [`CodePriorConfig`]:
    `codebook_size`, `grid_size`, `condition_type`, `condition_vocab_size` (also spelled `num_classes`) and
    `condition_dropout`.

    Args:
        hidden_size (`int`, defaults to 128): channels of the features of either stack.
        num_hidden_layers (`int`, defaults to 12): gated layers.
        kernel_size (`int`, defaults to 5): odd side of the window whose earlier half a layer's convolutions see.
        head_hidden_size (`int`, defaults to 512): channels of the hidden layer of the head.
        dropout (`float`, defaults to 0.0): on what a layer adds to the horizontal stack.
        weight_norm (`bool`, defaults to `False`): every convolution and linear layer has its weight as length and
            direction (Salimans & Kingma, "Weight Normalization", 2016).

    Raises:
        ValueError: if the arguments contradict each other.
    """

    model_type = "hf_vq_pixelcnn"

    hidden_size: int = 128
    num_hidden_layers: int = 12
    kernel_size: int = 5
    head_hidden_size: int = 512
    dropout: float | int = 0.0
    weight_norm: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in ("hidden_size", "num_hidden_layers", "head_hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd and at least 3, got {self.kernel_size}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must lie in [0, 1), got {self.dropout}.")


__all__ = ["PixelCNNConfig"]
