"""What a denoiser of latents takes beside them: classes, text, and maps that are concatenated."""

import PIL.Image
import torch
import torch.nn.functional as F

from ..images import to_pixel_values
from .class_conditioning import class_ids
from .pipeline_utils import onload
from .text_conditioning import TextConditionMixin


def resize_map(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    `(B, C, H, W)` to `size`: the mean of the pixels that fall on a latent where it shrinks (two bilinear halvings, the
    original's way for a factor of 4, are the same), bilinear where it grows.
    """
    if values.shape[-2:] == tuple(size):
        return values
    shrinks = values.shape[-2] >= size[0] and values.shape[-1] >= size[1]
    if shrinks:
        return F.interpolate(values, size=size, mode="area")
    return F.interpolate(values, size=size, mode="bilinear", align_corners=False)


def to_mask(mask) -> torch.FloatTensor:
    """PIL images or a tensor `(H, W)`, `(B, H, W)` or `(B, 1, H, W)` in [0, 1], as 0 and 1 `(B, 1, H, W)`; 1 is painted."""
    if isinstance(mask, torch.Tensor):
        if mask.ndim == 2:
            mask = mask[None]
        mask = mask[:, None] if mask.ndim == 3 else mask
        if mask.ndim != 4 or mask.shape[1] != 1 or not mask.numel() or not ((mask >= 0) & (mask <= 1)).all():
            raise ValueError(f"`mask_image` must be (B, 1, H, W) with values in [0, 1], got {tuple(mask.shape)}.")
        return (mask >= 0.5).float()
    return (to_pixel_values(mask, 1) >= 0).float()


def to_map(values) -> torch.FloatTensor:
    """A map to concatenate: a tensor `(B, C, H, W)` or `(C, H, W)` of any kind of number, or PIL images in [-1, 1]."""
    if not isinstance(values, (torch.Tensor, list, tuple, PIL.Image.Image)):
        raise ValueError(
            f"`condition_image` must be a tensor (B, C, H, W) or PIL images, got a {type(values).__name__}."
        )
    if not isinstance(values, torch.Tensor):
        return to_pixel_values(values, 3)
    if values.ndim not in (3, 4):
        raise ValueError(f"`condition_image` must be (B, C, H, W), got {tuple(values.shape)}.")
    return values.float() if values.ndim == 4 else values.float()[None]


def repeat_to(values: torch.Tensor, count: int, name: str, times: int = 1) -> torch.Tensor:
    """
    The rows for `count` inputs with `times` images each, those of one input adjacent. `values`, of the argument `name`, has
    a row for each input, or 1 for all: nothing else says which rows belong together.
    """
    if len(values) not in (1, count):
        raise ValueError(
            f"`{name}` must hold one entry for all, or one for each of {count} inputs, got {len(values)}."
        )
    return values.repeat_interleave(count * times // len(values), dim=0)


def repeat_inputs(inputs: dict[str, torch.Tensor] | None, times: int) -> dict[str, torch.Tensor] | None:
    """A denoiser's keyword arguments, or None, with each row `times` times, those of one adjacent."""
    return inputs and {name: rows.repeat_interleave(times, dim=0) for name, rows in inputs.items()}


class LatentConditionMixin(TextConditionMixin):
    """For a pipeline with `unet`, `vqvae` and perhaps `text_encoder` and `tokenizer`, and the config of `VQLatentDiffusionPipeline`."""

    @property
    def condition_kind(self) -> str | None:
        """
        How the denoiser is conditioned: "class" (its class embedding), "class_token" (one-hot classes through its
        `encoder_hid_proj`, a table of vectors for cross-attention), "text" or None.
        """
        config = self.unet.config
        if config.get("num_class_embeds") is not None:
            return "class"
        if config.get("cross_attention_dim") is None:
            return None
        is_token = config.get("encoder_hid_dim_type") == "text_proj" and self.text_encoder is None
        return "class_token" if is_token else "text"

    @property
    def num_classes(self) -> int:
        """Classes of the denoiser, the null class included."""
        config = self.unet.config
        return config.num_class_embeds if self.condition_kind == "class" else config.encoder_hid_dim

    def class_ids(self, class_labels) -> torch.LongTensor:
        """Ids `(B,)` of classes, which may be names of `id2label`."""
        if self.condition_kind not in ("class", "class_token"):
            raise ValueError("`class_labels` needs a denoiser with classes.")
        return class_ids(class_labels, self.num_classes, self.id2label)

    def _class_inputs(self, ids: torch.LongTensor) -> dict[str, torch.Tensor]:
        device = self._execution_device
        if self.condition_kind == "class":
            return {"class_labels": ids.to(device)}
        tokens = F.one_hot(ids, self.num_classes)[:, None]
        return {"encoder_hidden_states": tokens.to(device, self.unet.dtype)}

    def _text_inputs(self, prompt, embeds, mask, count: int, name: str) -> dict[str, torch.Tensor]:
        condition = self.text_states(name, prompt, embeds, mask)
        if condition is None:
            condition = self.encode_prompt("", name)
        device, argument = self._execution_device, name if embeds is None else f"{name}_embeds"
        inputs = {
            "encoder_hidden_states": repeat_to(condition.embeddings, count, argument).to(device, self.unet.dtype)
        }
        if self.config.text_mask:
            inputs["encoder_attention_mask"] = repeat_to(condition.mask, count, argument).to(device)
        return inputs

    def _text_condition(self, count: int, given: tuple, null: tuple | None) -> tuple[dict, dict | None]:
        inputs = self._text_inputs(*given, count, "prompt")
        if null is None:
            return inputs, None
        null_inputs = self._text_inputs(*null, count, "negative_prompt")
        shapes = [tuple(x["encoder_hidden_states"].shape[1:]) for x in (null_inputs, inputs)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "`negative_prompt_embeds` must have as many tokens of the same width as the prompt, got "
                f"{shapes[0]} and {shapes[1]}."
            )
        return inputs, null_inputs

    def prepare_condition(
        self,
        count: int,
        class_labels=None,
        prompt=None,
        negative_prompt=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        prompt_attention_mask=None,
        negative_prompt_attention_mask=None,
        guided: bool = False,
    ) -> tuple[dict, dict | None]:
        """
        The denoiser's keyword arguments for `count` conditions and, if `guided`, those of the null condition.

        Raises:
            ValueError: a condition that the denoiser does not take, or guidance without a null condition.
        """
        kind = self.condition_kind
        class_labels = None if class_labels is None else self.class_ids(class_labels)
        text_given = any(x is not None for x in (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds))
        if text_given and kind != "text":
            raise ValueError("`prompt` needs a denoiser with cross-attention and without classes.")
        if kind is None:
            if guided:
                raise ValueError("`guidance_scale` other than 1 needs a conditional denoiser.")
            return {}, None
        if kind == "text":
            given = (prompt, prompt_embeds, prompt_attention_mask)
            null = (negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask)
            return self._text_condition(count, given, null if guided else None)
        null = self.config.null_class_id
        if class_labels is None and null is None:
            raise ValueError("`class_labels` must be given: the denoiser has classes and no null class.")
        if guided and (class_labels is None or null is None):
            raise ValueError("`guidance_scale` other than 1 needs `class_labels`, and a denoiser with a null class.")
        ids = torch.tensor([null]) if class_labels is None else class_labels
        inputs = self._class_inputs(repeat_to(ids, count, "class_labels"))
        return inputs, self._class_inputs(torch.full((count,), null)) if guided else None

    def encode_image(self, pixel_values: torch.Tensor, batch_size: int = 16) -> torch.Tensor:
        """Images `(B, C, H, W)` in [-1, 1] to latents before quantization, not scaled, float32; `batch_size` at a time."""
        onload(self.vqvae)
        pixels = pixel_values.to(self._execution_device, self.vqvae.dtype)
        return torch.cat([self.vqvae.encode(part).latents.float() for part in pixels.split(batch_size)])

    def prepare_concatenated(self, count: int, size, condition_image=None, image=None, mask=None, times: int = 1):
        """
        The maps `(count * times, C, h, w)` that are concatenated to the noisy latents of `times` images for each input, or None.

        Inpainting (`mask` `(B, 1, H, W)`, 1 is painted): the latents of the image with its masked pixels black, not
        scaled, and the mask in {-1, 1}, nearest. Otherwise `condition_image`, resized to the latents.

        Raises:
            ValueError: maps of other channels than the denoiser has beside the latents, or of other proportions.
        """
        channels = self.unet.config.in_channels - self.vqvae.config.embed_dim
        maps = None
        if mask is not None:
            masked = (1 - mask) * (image + 1) - 1
            hidden = F.interpolate(mask * 2 - 1, size=size, mode="nearest")
            maps = torch.cat([self.encode_image(masked), hidden.to(self._execution_device)], dim=1)
        elif condition_image is not None:
            height, width = condition_image.shape[-2:]
            if height * size[1] != width * size[0]:
                raise ValueError(
                    f"`condition_image` must have the proportions of the {size[0]}x{size[1]} latents, got {height}x{width}; "
                    "crop it, or give `height` and `width`."
                )
            maps = resize_map(condition_image.to(self._execution_device), size)
        if maps is None and channels:
            raise ValueError(
                f"`condition_image`, or `image` with `mask_image`, must be given: the denoiser takes {channels} channels "
                "beside the latents."
            )
        found = 0 if maps is None else maps.shape[1]
        if found != channels:
            name = "mask_image" if mask is not None else "condition_image"
            raise ValueError(
                f"`{name}` must give the {channels} channels that the denoiser takes beside the latents, got {found}."
            )
        return None if maps is None else repeat_to(maps, count, "condition_image", times)


__all__ = ["LatentConditionMixin", "repeat_inputs", "repeat_to", "resize_map", "to_map", "to_mask"]
