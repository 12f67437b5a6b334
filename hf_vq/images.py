"""Images in and out: Pillow images, numpy arrays and tensors to pixel values in [-1, 1], and back."""

import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as RGB: transparency laid on white, 16-bit values scaled to 8.

    Raises:
        ValueError: for values that do not fit in 16 bits, and floating-point ones, which have no fixed range.
    """
    if image.mode == "F":
        raise ValueError("floating-point images have no fixed range; store 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values {values.min()} to {values.max()} do not fit in 16 bits")
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Any Pillow image with 1 (grey), 3 (RGB) or 4 channels (RGBA), of 8 bits each, as `to_rgb` reads it.

    Raises:
        ValueError: for another number of channels, or values without a range.
    """
    if channels == 4 and image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        return image.convert("RGBA")
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if channels not in modes:
        raise ValueError(f"`channels` must be 1, 3 or 4 for a picture, got {channels}: give arrays (H, W, {channels})")
    return to_rgb(image).convert(modes[channels])


def covering_size(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """`(height, width)` of an image that is scaled, in its own shape, until it just covers `size`."""
    (height, width), (target_height, target_width) = image_size, size
    if target_height * width >= target_width * height:
        return target_height, max(target_width, round(width * target_height / height))
    return max(target_height, round(height * target_width / width)), target_width


def is_elongated(resized: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether an image of `resized` would be more than 16 times as large as the window `size` that is cut out of
    it.
    """
    return resized[0] * resized[1] > 16 * size[0] * size[1]


def resize(
    image: Image.Image | np.ndarray,
    size: tuple[int, int],
    resample: int = Image.Resampling.BICUBIC,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """An image, or the part of it in `box`, antialiased, as uint8 `(height, width, channels)`.

    Args:
        image: a Pillow image of mode L, RGB or RGBA, or uint8 `(H, W, C)`.
        size: `(height, width)`.
        resample: of Pillow.
        box: `(left, top, right, bottom)`, as Pillow's.
    """
    if isinstance(image, np.ndarray):
        if image.shape[:2] == size and box is None:
            return image
        bands = [Image.fromarray(np.ascontiguousarray(image[..., band])) for band in range(image.shape[-1])]
        return np.concatenate([resize(band, size, resample, box) for band in bands], axis=-1)
    if box is not None or (image.height, image.width) != size:
        image = image.resize(size[::-1], resample, box=box)
    pixels = np.array(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def resize_and_crop(
    image: Image.Image | np.ndarray,
    resized: tuple[int, int],
    corner: tuple[int, int],
    size: tuple[int, int],
    resample: int = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """The window of `size` at `corner` of an image that is resized, antialiased.

    Of an elongated image only the part is resized that the window shows: a picture of 1×60000 pixels whose shorter
    side becomes 64 would take 0.7 GB otherwise.

    Args:
        image: a Pillow image of mode L, RGB or RGBA, or uint8 `(H, W, C)`.
        resized: `(height, width)` to which the whole image is resized.
        corner: `(top, left)` of the window.
        size: `(height, width)` of the window, which lies within.
        resample: of Pillow.

    Returns:
        uint8 `(height, width, channels)`.
    """
    (top, left), (height, width) = corner, size
    image_size = image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
    if image_size == tuple(resized) or not is_elongated(resized, size):
        return resize(image, tuple(resized), resample)[top : top + height, left : left + width]
    down, right = image_size[0] / resized[0], image_size[1] / resized[1]
    bottom, end = min((top + height) * down, image_size[0]), min((left + width) * right, image_size[1])
    return resize(image, (height, width), resample, box=(left * right, top * down, end, bottom))


def array_to_pil(image: np.ndarray | torch.Tensor, input_data_format: str | None = None) -> Image.Image:
    """One image of uint8, or floating-point values in [0, 1], `(H, W)` or with 1, 3 or 4 channels first or last.

    Args:
        image: the array or tensor.
        input_data_format: "channels_first" or "channels_last"; inferred where it is None.

    Raises:
        ValueError: values of another type or range.
    """
    pixels = image.detach().cpu().numpy() if torch.is_tensor(image) else np.asarray(image)
    if pixels.ndim == 3:
        layout = input_data_format or infer_channel_dimension_format(pixels, num_channels=(1, 3, 4))
        if layout == ChannelDimension.FIRST:
            pixels = np.moveaxis(pixels, 0, -1)
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    return Image.fromarray(np.ascontiguousarray(_as_uint8(pixels)))


def array_to_pixels(
    image: np.ndarray | torch.Tensor, channels: int, input_data_format: str | None = None
) -> np.ndarray:
    """An array of any number of channels as uint8 `(H, W, channels)`.

    Args:
        image: uint8, or floating-point values in [0, 1], with the channels last or first; `(H, W)` for one channel.
        channels: how many it must have.
        input_data_format: "channels_first" or "channels_last"; where it is None, last if that fits.

    Raises:
        ValueError: values of another type or range, or another number of channels.
    """
    pixels = image.detach().cpu().numpy() if torch.is_tensor(image) else np.asarray(image)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or channels not in (pixels.shape[0], pixels.shape[-1]):
        raise ValueError(f"`images` must be arrays (H, W, {channels}) or ({channels}, H, W), got {pixels.shape}.")
    is_first = pixels.shape[-1] != channels if input_data_format is None else input_data_format == "channels_first"
    pixels = np.moveaxis(pixels, 0, -1) if is_first else pixels
    if pixels.shape[-1] != channels:
        raise ValueError(f"`images` must have {channels} channels ({input_data_format}), got {pixels.shape[-1]}.")
    return np.ascontiguousarray(_as_uint8(pixels))


def _as_uint8(pixels: np.ndarray) -> np.ndarray:
    if np.issubdtype(pixels.dtype, np.floating):
        if not pixels.size or not (pixels.min() >= 0 and pixels.max() <= 1):
            got = f"{pixels.min()} to {pixels.max()}" if pixels.size else "none"
            raise ValueError(f"`images` of floating-point values must lie in [0, 1], got {got}.")
        pixels = np.rint(pixels * 255).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ValueError(f"`images` must hold uint8 or floating-point values, got {pixels.dtype}.")
    return pixels


def pixels_to_tensor(pixels: np.ndarray) -> torch.FloatTensor:
    """uint8 `(H, W, C)` to float32 `(C, H, W)` in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(127.5).sub_(1.0)


def to_pixel_values(
    image: Image.Image | np.ndarray | torch.Tensor, channels: int, name: str = "image"
) -> torch.FloatTensor:
    """What a pipeline is given as an image, as pixel values `(B, channels, H, W)`, float32 in [-1, 1].

    Args:
        image: a Pillow image of any mode, an array `(H, W)`, `(H, W, C)` or `(B, H, W, C)`, uint8 or floating-point in
            [0, 1], or a list of either, all of one size; or a floating-point tensor `(C, H, W)` or `(B, C, H, W)` in
            [-1, 1]. EXIF orientation is applied, and transparency is laid on white.
        channels: of the result; Pillow images and arrays need 1 or 3.
        name: of the argument, for error messages.

    Raises:
        ValueError: anything else; the message names the argument.
    """
    if isinstance(image, torch.Tensor):
        return _tensor_to_pixel_values(image, channels, name)
    if isinstance(image, np.ndarray) and image.ndim == 4:
        image = list(image)
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if not images or not all(isinstance(item, (Image.Image, np.ndarray)) for item in images):
        got = type(next((item for item in images if not isinstance(item, Image.Image)), image)).__name__
        raise ValueError(
            f"`{name}` must be a PIL image, an array, a list of either, or a tensor in [-1, 1], got "
            f"{'an empty list' if not images else got}."
        )
    if channels not in (1, 3):
        raise ValueError(f"`{name}` must be a tensor of {channels} channels for this tokenizer.")
    arrays = [_pixels_of(item, channels, name) for item in images]
    if not all(pixels.size for pixels in arrays):
        raise ValueError(f"`{name}` must hold images with pixels, got one of shape {arrays[0].shape[:2]}.")
    sizes = sorted({(pixels.shape[1], pixels.shape[0]) for pixels in arrays})
    if len(sizes) > 1:
        raise ValueError(f"`{name}` must hold images of one size, got {sizes}.")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).mul(2).sub(1).contiguous()


def _tensor_to_pixel_values(image: torch.Tensor, channels: int, name: str) -> torch.FloatTensor:
    if not image.is_floating_point() or image.ndim not in (3, 4):
        raise ValueError(
            f"`{name}` must be a float tensor (B, C, H, W) in [-1, 1], got {image.dtype} of shape "
            f"{tuple(image.shape)}."
        )
    if image.shape[-3] != channels:
        raise ValueError(f"`{name}` must have {channels} channels, got a tensor of shape {tuple(image.shape)}.")
    if not image.numel() or not image.isfinite().all():
        raise ValueError(f"`{name}` must be finite and not empty, got a tensor of shape {tuple(image.shape)}.")
    if image.abs().max() > 2:  # resizing, or a decoder, may leave some pixels a little beyond
        raise ValueError(
            f"`{name}` must be a tensor in [-1, 1], got values from {image.min().item():g} to {image.max().item():g}."
        )
    return image.float() if image.ndim == 4 else image.float()[None]


def _pixels_of(image: Image.Image | np.ndarray, channels: int, name: str) -> np.ndarray:
    """float32 `(H, W, channels)` in [0, 1]."""
    mode = "RGB" if channels == 3 else "L"
    try:
        if isinstance(image, np.ndarray):
            if np.issubdtype(image.dtype, np.floating) and (image.ndim, *image.shape[2:]) in ((2,), (3, 1), (3, 3)):
                return _floats(image, mode)
            image = array_to_pil(image, "channels_last")
        pixels = np.array(to_rgb(ImageOps.exif_transpose(image)).convert(mode), dtype=np.float32) / 255
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{name}` cannot be read as an image: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _floats(image: np.ndarray, mode: str) -> np.ndarray:
    """As `_pixels_of`, for values that need no rounding to 8 bits."""
    if not image.size or not (image.min() >= 0 and image.max() <= 1):
        got = f"{image.min():g} to {image.max():g}" if image.size else "none"
        raise ValueError(f"floating-point values must lie in [0, 1], got {got}")
    image = image.reshape(*image.shape[:2], -1).astype(np.float32)
    if mode == "RGB":
        return np.broadcast_to(image, (*image.shape[:2], 3))
    luma = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601-2, as Pillow's conversion to "L"
    return image if image.shape[2] == 1 else (image @ luma)[..., None]


def check_pixel_range(name: str, images: torch.Tensor) -> None:
    """Whether `images`, of any shape, are pixel values in [-1, 1], which figures of images are defined on.

    Values that all lie in [0, 1], the range of most files and of `output_type="pt"`, and fill more than half of it
    may be right for bright images and are warned about. Those of a decoder that has learnt little fill less.

    Raises:
        ValueError: integers, values that are not finite, or values beyond [-1, 1]; the message says how to convert.
    """
    if not images.is_floating_point():
        raise ValueError(
            f"`{name}` must be floating-point values in [-1, 1], got {images.dtype}: convert 0…255 by "
            "`images / 127.5 - 1`."
        )
    if images.numel() == 0:
        raise ValueError(f"`{name}` must hold at least one value, got shape {tuple(images.shape)}.")
    low, high = (float(value) for value in images.detach().aminmax())
    if not (-1.001 <= low and high <= 1.001):  # a rounding beyond is none of the caller's doing
        raise ValueError(
            f"`{name}` must lie in [-1, 1], got {low:g} to {high:g}: clamp, or convert, before measuring."
        )
    if low >= 0 and high - low > 0.5:
        warnings.warn(
            f"`{name}` is expected in [-1, 1], and no value lies below 0 ({low:g} to {high:g}): convert images in "
            "[0, 1] by `2 * images - 1`.",
            stacklevel=3,
        )


def images_as(images: torch.FloatTensor, output_type: str) -> torch.FloatTensor | np.ndarray | list[Image.Image]:
    """Images `(B, C, H, W)` in [0, 1] as `output_type`: "pil", "np" or "pt", see [`VQPipelineOutput`]."""
    if output_type == "pt":
        return images
    images = images.permute(0, 2, 3, 1).cpu().numpy()
    return images if output_type == "np" else numpy_to_pil(images)


def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
    """An array `(B, H, W, 1 or 3)` in [0, 1] as Pillow images."""
    pixels = (images * 255).round().astype("uint8")
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]


def as_rgb(images: torch.Tensor) -> torch.Tensor:
    """What is shown of images `(B, C, H, W)`: three channels; of more the first three, of fewer the first as grey."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """RGB pictures of pixel values `(B, C, H, W)`, see `as_rgb`; [-1, 1] becomes [0, 255], what lies outside is
    clamped.
    """
    if images.ndim != 4 or not images.shape[1]:
        raise ValueError(f"`images` must have shape (B, C, H, W), got {tuple(images.shape)}.")
    pixels = ((as_rgb(images).detach().float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return [Image.fromarray(pixel.permute(1, 2, 0).contiguous().numpy()) for pixel in pixels]


__all__ = [
    "array_to_pil",
    "array_to_pixels",
    "as_rgb",
    "check_pixel_range",
    "covering_size",
    "images_as",
    "is_elongated",
    "numpy_to_pil",
    "pixels_to_tensor",
    "resize",
    "resize_and_crop",
    "to_channels",
    "to_pil",
    "to_pixel_values",
    "to_rgb",
]
