"""What the tokenizers share: `encode`, `decode`, `forward`, the training loss and the weights' initialisation."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ...argument_checks import check_integer, check_tensor
from ..checked_loading import CheckedLoadingMixin
from ..modeling_outputs import QuantizerOutput, VQDecoderOutput, VQEncoderOutput, VQModelOutput
from ..quantizers.build import build_quantizer
from ..quantizers.codebook_statistics import are_finite, code_counts, codebook_statistics
from ..quantizers.index_remap import IndexRemap, RemappedQuantizer
from ..quantizers.quantizer import Quantizer
from .configuration_tokenizer import VQTokenizerConfig
from .tiling import map_tiles


def build_quantizer_of(config: VQTokenizerConfig) -> Quantizer:
    """The quantizer that a tokenizer's configuration describes."""
    kwargs = dict(config.quantizer_kwargs)
    if config.quantizer not in ("gumbel", "fsq"):
        kwargs.setdefault("commitment_cost", config.commitment_cost)
    if config.legacy_beta:
        kwargs.setdefault("legacy_beta", True)
    if config.remapped_from is None:
        return build_quantizer(config.quantizer, config.num_embeddings, config.embed_dim, **kwargs)
    num_used = config.num_embeddings - (config.unknown_code == "extra")
    quantizer = build_quantizer(config.quantizer, config.remapped_from, config.embed_dim, **kwargs)
    return RemappedQuantizer(quantizer, num_used, config.unknown_code)


class VQTokenizerModel(CheckedLoadingMixin, PreTrainedModel):
    """An image tokenizer: `encoder → quant_conv → quantize → post_quant_conv → decoder`.

    A subclass sets these five, `quantize` by `build_quantizer_of(config)`, between `super().__init__(config)` and
    `self.post_init()`. The encoder comes first: `self.dtype` is that of the first parameter, and the quantizer stays
    in float32.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # half-precision codes would move several per cent of the indices
    _keep_in_fp32_modules_strict = ["quantize.*embed", "quantize.*cluster_size", "quantize.*proj"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """torch's own defaults: transformers' would draw every convolution from N(0, 0.02²)."""
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(nn.init._calculate_fan_in_and_fan_out(module.weight)[0])
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (Quantizer, IndexRemap)):
            module.reset_parameters()

    def set_training_step(self, step: int, total_steps: int) -> None:
        """Move the schedules of the quantizers that have one (Gumbel's temperature); call it before each training
        step.

        Args:
            step: steps done so far, from 0.
            total_steps: steps of the whole run.
        """
        step, total_steps = check_integer("step", step, 0), check_integer("total_steps", total_steps, 1)
        for module in self.modules():
            if isinstance(module, Quantizer):
                module.set_training_step(step, total_steps)

    def modules_after_codes(self) -> list[nn.Module]:
        """The modules that no code depends on: training them alone leaves priors on the codes valid."""
        return [self.post_quant_conv, self.decoder]

    def _check_pixels(self, pixel_values: torch.Tensor) -> None:
        channels, factor = self.config.in_channels, self.config.downsample_factor
        check_tensor("pixel_values", pixel_values)
        if not pixel_values.is_floating_point():
            raise ValueError(f"`pixel_values` must be floating-point values in [-1, 1], got {pixel_values.dtype}.")
        # replicas of DataParallel have no parameters; what shards, quantizes or offloads weights casts by itself
        weight = next(self.parameters(), None)
        is_plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.element_size() > 1
        is_plain = is_plain and not weight.is_meta
        if is_plain and pixel_values.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
            raise ValueError(f"`pixel_values` must be {weight.dtype} as the tokenizer is, got {pixel_values.dtype}.")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(f"`pixel_values` must have shape (B, {channels}, H, W), got {tuple(pixel_values.shape)}.")
        if any(side % factor or not side for side in pixel_values.shape[2:]):
            raise ValueError(
                f"`pixel_values` must have a height and width that are multiples of {factor} (the downsample factor), "
                f"got {pixel_values.shape[2]}x{pixel_values.shape[3]}."
            )

    # set by enable_tiling and enable_slicing; neither is part of the configuration
    tile_size: int | None = None
    tile_overlap: int = 0
    use_slicing: bool = False

    def enable_tiling(self, tile_size: int | None = None, overlap: int | None = None) -> None:
        """Encode and decode images larger than `tile_size` in overlapping tiles, blended: the memory is that of a
        tile.

        Codes are still chosen from all latents at once. Tiles are not used in training mode.

        Args:
            tile_size: side in pixels, a multiple of `downsample_factor`; by default twice the training resolution.
            overlap: pixels that neighbours share, a multiple of `downsample_factor`; by default a quarter of a tile.
        """
        factor = self.config.downsample_factor
        tile_size = None if tile_size is None else check_integer("tile_size", tile_size)
        overlap = None if overlap is None else check_integer("overlap", overlap)
        tile_size = 2 * max(self.config.image_size) if tile_size is None else tile_size
        overlap = tile_size // 4 // factor * factor if overlap is None else overlap
        if tile_size < 2 * factor or tile_size % factor:
            raise ValueError(
                f"`tile_size` must be a multiple of {factor} (the downsample factor) and at least "
                f"{2 * factor}, got {tile_size}."
            )
        if not 0 <= overlap <= tile_size // 2 or overlap % factor:
            raise ValueError(
                f"`overlap` must be a multiple of {factor} (the downsample factor) from 0 to half of "
                f"tile_size={tile_size}, got {overlap}."
            )
        self.tile_size, self.tile_overlap = tile_size, overlap

    def disable_tiling(self) -> None:
        """Encode and decode images whole again."""
        self.tile_size = None

    def enable_slicing(self) -> None:
        """Encode and decode the images of a batch one after the other."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode whole batches again."""
        self.use_slicing = False

    def _in_pieces(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        inputs: torch.Tensor,
        tile: int,
        overlap: int,
        scale: float,
    ) -> torch.Tensor:
        """`function(inputs)` as slicing and tiling say; `tile` and `overlap` in positions of `inputs`."""
        if self.training:
            return function(inputs)
        if self.use_slicing and inputs.shape[0] > 1:
            slices = inputs.split(1)
            return torch.cat([self._in_pieces(function, one, tile, overlap, scale) for one in slices])
        if self.tile_size is not None and max(inputs.shape[2:]) > tile:
            return map_tiles(function, inputs, tile, overlap, scale)
        return function(inputs)

    def _encode_and_quantize(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, QuantizerOutput]:
        self._check_pixels(pixel_values)
        latents = self._in_pieces(
            lambda pixels: self.quant_conv(self.encoder(pixels)),
            pixel_values,
            self.tile_size or 0,
            self.tile_overlap,
            1 / self.config.downsample_factor,
        )
        return latents, self.quantize(latents)

    def _decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(codes))

    def _decode_quantized(self, quantized: torch.Tensor) -> torch.Tensor:
        factor = self.config.downsample_factor
        return self._in_pieces(
            self._decode_codes,
            quantized,
            (self.tile_size or 0) // factor,
            self.tile_overlap // factor,
            factor,
        )

    def _perplexity(self, indices: torch.LongTensor, latents: torch.Tensor) -> torch.Tensor:
        finite = are_finite(latents)
        # residual codes have a further axis
        finite = finite.reshape(finite.shape + (1,) * (indices.ndim - finite.ndim))
        return codebook_statistics(code_counts(indices, self.config.num_embeddings, counted=finite)).perplexity

    def encode(self, pixel_values: torch.Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple:
        """Images to codes.

        Args:
            pixel_values: `(B, C, H, W)` in [-1, 1]; H and W multiples of `config.downsample_factor`.

        Returns:
            `latents` `(B, D, h, w)` before quantization (the name that diffusers' pipelines read), `quantized` of the
            same shape and `indices` int64 `(B, h, w)`.
        """
        latents, output = self._encode_and_quantize(pixel_values)
        if not return_dict:
            return latents, output.quantized, output.indices
        return VQEncoderOutput(latents=latents, quantized=output.quantized, indices=output.indices)

    def decode(
        self,
        latents: torch.Tensor,
        quantize: bool = True,
        return_dict: bool = True,
        force_not_quantize: bool = False,
        shape: Sequence[int] | None = None,
    ) -> VQDecoderOutput | tuple[torch.Tensor]:
        """Latents to images.

        Args:
            latents: `(B, D, h, w)`.
            quantize: False takes them as already quantized.
            return_dict: whether to return a `VQDecoderOutput`.
            force_not_quantize: True is `quantize=False`, under the name that pipelines of diffusers use. Codes may
                then stand in place of latents, as aMUSEd's pipeline gives them: an integer tensor, reshaped to
                `shape[:3]`.
            shape: `(B, h, w, D)`; read where the latents are codes.

        Returns:
            `sample`, images `(B, C, H, W)`.
        """
        if force_not_quantize and not latents.is_floating_point():
            return self.decode_indices(latents if shape is None else latents.reshape(*shape[:3]), return_dict)
        if quantize and not force_not_quantize:
            latents = self.quantize(latents).quantized
        sample = self._decode_quantized(latents)
        return VQDecoderOutput(sample=sample) if return_dict else (sample,)

    def decode_indices(self, indices: torch.Tensor, return_dict: bool = True) -> VQDecoderOutput | tuple[torch.Tensor]:
        """Codes, int64 `(B, h, w)` in [0, `config.num_embeddings`), to images `(B, C, H, W)`."""
        check_tensor("indices", indices)
        if indices.ndim < 3:
            raise ValueError(f"`indices` must have shape (B, h, w), got {tuple(indices.shape)}.")
        quantized = self.quantize.indices_to_latents(indices).to(self.dtype)
        return self.decode(quantized, quantize=False, return_dict=return_dict)

    def forward(
        self,
        pixel_values: torch.Tensor,
        target_pixel_values: torch.Tensor | None = None,
        return_loss: bool = True,
        return_dict: bool | None = None,
    ) -> VQModelOutput | tuple:
        """Encode, quantize, decode, and the training loss. In training mode, statistics of the codebook are updated.

        Args:
            pixel_values: `(B, in_channels, H, W)` in [-1, 1].
            target_pixel_values: what the reconstruction is compared with, `(B, out_channels, H, W)`; by default
                `pixel_values`. A tokenizer whose `out_channels` differ from its `in_channels` needs it in training,
                and has no loss without it in evaluation mode.
            return_loss: False leaves out the losses that compare images. `transformers.Trainer` reads this argument: a
                model that has it gives an `eval_loss`.
            return_dict: whether to return a `VQModelOutput`; None for `config.return_dict`.
        """
        latents, quantizer_output = self._encode_and_quantize(pixel_values)
        sample = self._decode_quantized(quantizer_output.quantized)
        loss = reconstruction_loss = None
        target = pixel_values if target_pixel_values is None else target_pixel_values
        is_comparable = self.training or target_pixel_values is not None or sample.shape == target.shape
        if return_loss and is_comparable:
            reconstruction_loss = self._reconstruction_loss(sample, target)
            loss = reconstruction_loss + quantizer_output.loss
        output = VQModelOutput(
            latents=latents,
            sample=sample,
            indices=quantizer_output.indices,
            loss=loss,
            reconstruction_loss=reconstruction_loss,
            quantizer_loss=quantizer_output.loss,
            codebook_loss=quantizer_output.codebook_loss,
            commitment_loss=quantizer_output.commitment_loss,
            perplexity=self._perplexity(quantizer_output.indices, latents),
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _reconstruction_loss(self, sample: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if sample.shape != target.shape:
            # mse_loss would broadcast them
            raise ValueError(
                "`target_pixel_values` (by default `pixel_values`) must have the shape of the reconstruction, "
                f"{tuple(sample.shape)}, got {tuple(target.shape)}."
            )
        loss = F.mse_loss(sample.float(), target.float())
        return loss if self.config.data_variance is None else loss / self.config.data_variance


__all__ = ["VQTokenizerModel", "build_quantizer_of"]
