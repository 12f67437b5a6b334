"""Configuration of the PixelSNAIL priors of VQ-VAE-2."""

from huggingface_hub.dataclasses import strict

from .configuration_code_prior import CodePriorConfig, pair_of_sides


@strict
class PixelSNAILConfig(CodePriorConfig):
    """
    Configuration of [`PixelSNAILForCausalLM`]: gated residual blocks of causal convolutions, with causal
    self-attention after every few of them (Chen et al., "PixelSNAIL", 2018; Razavi, van den Oord and Vinyals,
    "VQ-VAE-2", 2019, section 3.2 and appendix A). The paper's priors for ImageNet at 256 pixels are

    - top: `grid_size=32, hidden_size=512, res_channels=2048, num_blocks=4, num_res_blocks=5,
      num_output_res_blocks=20`;
    - bottom: `grid_size=64, hidden_size=512, res_channels=1024, num_blocks=4, num_res_blocks=5, attention=False` with
      `conditioning_codebook_size=512, conditioning_grid_size=32, num_conditioning_res_blocks=20`.

    Its fields for the codes and the class are those of [`CodePriorConfig`]: `codebook_size`, `grid_size`,
    `condition_type`, `condition_vocab_size` (also spelled `num_classes`) and `condition_dropout`.

    Args:
        conditioning_codebook_size (`int`, *optional*): number of codes of the level above, where there is one.
        conditioning_grid_size (`int` or pair of `int`, *optional*): height and width of that level; `grid_size` is a
            multiple of it. It is one level: the bottom of three is conditioned on the middle one.
        num_conditioning_res_blocks (`int`, defaults to 0): gated blocks over that level's codes.
        conditioning_channels (`int`, defaults to 256): channels of what conditions every gated block, a map of the
            level above and the embedding of a class, added.
        conditioning_kernel_size (`int`, defaults to 3): odd side of the convolutions over that level's codes.
        hidden_size (`int`, defaults to 256): channels of the hidden states.
        kernel_size (`int`, defaults to 5): odd side of the causal convolutions.
        num_blocks (`int`, defaults to 4): how often residual blocks and attention are repeated.
        num_res_blocks (`int`, defaults to 4): gated residual blocks in each of them.
        res_channels (`int`, defaults to 256): channels within a gated residual block.
        attention (`bool`, defaults to `True`): whether the blocks end with self-attention, `hidden_size // 2` wide.
        num_attention_heads (`int`, defaults to 8): its heads.
        num_output_res_blocks (`int`, defaults to 0): gated blocks of 1×1 convolutions before the head.
        dropout (`float`, defaults to 0.1): within the gated blocks, and of the attention's weights.

    Raises:
        ValueError: if the arguments contradict each other.
    """

    model_type = "hf_vq_pixelsnail"
    attribute_map = {**CodePriorConfig.attribute_map, "num_hidden_layers": "num_blocks"}

    conditioning_codebook_size: int | None = None
    conditioning_grid_size: int | list[int] | tuple[int, ...] | None = None
    num_conditioning_res_blocks: int = 0
    conditioning_channels: int = 256
    conditioning_kernel_size: int = 3

    hidden_size: int = 256
    kernel_size: int = 5
    num_blocks: int = 4
    num_res_blocks: int = 4
    res_channels: int = 256
    attention: bool = True
    num_attention_heads: int = 8
    num_output_res_blocks: int = 0
    dropout: float | int = 0.1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_level_above()
        self._check_network()

    def _check_level_above(self):
        if (self.conditioning_codebook_size is None) != (self.conditioning_grid_size is None):
            raise ValueError(
                "`conditioning_codebook_size` and `conditioning_grid_size` must be given together, got "
                f"{self.conditioning_codebook_size} and {self.conditioning_grid_size}."
            )
        if self.conditioning_grid_size is None:
            if self.num_conditioning_res_blocks:
                raise ValueError(
                    "`num_conditioning_res_blocks` needs a level above, `conditioning_grid_size`; got "
                    f"{self.num_conditioning_res_blocks} without it."
                )
            return
        self.conditioning_grid_size = pair_of_sides("conditioning_grid_size", self.conditioning_grid_size)
        if any(side % above for side, above in zip(self.grid_size, self.conditioning_grid_size, strict=True)):
            raise ValueError(
                f"`grid_size` must be a multiple of `conditioning_grid_size`, got {self.grid_size} and "
                f"{self.conditioning_grid_size}."
            )

    def _check_network(self):
        sizes = ("hidden_size", "res_channels", "num_blocks", "num_attention_heads")
        for name in (*sizes, "conditioning_channels", "conditioning_codebook_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("num_res_blocks", "num_output_res_blocks", "num_conditioning_res_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd and at least 3, got {self.kernel_size}.")
        if self.conditioning_kernel_size < 1 or self.conditioning_kernel_size % 2 == 0:
            raise ValueError(
                f"`conditioning_kernel_size` must be odd and at least 1, got {self.conditioning_kernel_size}."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must lie in [0, 1), got {self.dropout}.")
        if self.attention and (self.hidden_size % 2 or self.hidden_size // 2 % self.num_attention_heads):
            raise ValueError(
                f"`hidden_size` // 2 must be a multiple of `num_attention_heads`, got {self.hidden_size} and "
                f"{self.num_attention_heads}."
            )

    @property
    def is_conditional(self) -> bool:
        """Whether anything conditions the gated blocks: a class, or the level above."""
        return self.condition_type == "class" or self.conditioning_grid_size is not None


__all__ = ["PixelSNAILConfig"]
