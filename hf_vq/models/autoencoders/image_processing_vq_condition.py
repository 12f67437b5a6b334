"""Spatial conditions to the `pixel_values` of a condition tokenizer, and back to pictures of them."""

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from ...argument_checks import check_integer, check_real
from ..checked_loading import CheckedProcessorMixin


CONDITIONS = ("segmentation", "depth", "edges", "pose", "image")
CHANNELS = {"depth": 1, "edges": 1, "pose": 3, "image": 3}


class VQConditionProcessor(CheckedProcessorMixin, BaseImageProcessor):
    """Label maps, depth maps, edge maps and drawn skeletons, cut as `VQImageProcessor` cuts the images they belong to.

    Args:
        condition (`str`): "segmentation": label maps to one channel for each label, 0 or 1; "depth": one channel, each
            map's own minimum and maximum to -1 and 1, of 8, 16 or 32 bits, floating-point, or float32 packed into
            RGBA, see [`picture_values`]; "edges": one channel, -1, and 1 on an edge; "pose" and "image":
            RGB in [-1, 1].
        num_labels (`int`, *optional*): of a segmentation, N; the ids are 0…N-1.
        ignore_index (`int`, *optional*, defaults to 255): an id of a label map that means "unlabelled".
        ignore_label (`int`, *optional*): the label that unlabelled pixels get; without it they get none, and all of
            their channels are 0.
        label_map (`dict` or `list`, *optional*): from the ids of the data to the labels, applied before anything else:
            a list gives the label of id i at position i, a dict may leave out ids, which are then errors.
        palette (`list`, *optional*): the colour `[r, g, b]` of each label, by which coloured label maps are read and
            pictures drawn; without it labels are drawn in colours of their own.
        size (`int` or `dict`, defaults to 256): `{"height": int, "width": int}` of the result. The shorter side,
            relative to this, is scaled to it, and the centre is cut out. Ids are taken from the nearest pixel.
        threshold (`float`, defaults to 0.5): an edge is where a map of values in [0, 1] lies above.

    Called with a Pillow image, an array or tensor `(H, W)` (or `(H, W, 3)` where it has colours), or a list of them,
    returns `pixel_values`, float32 `(B, N or 1 or 3, height, width)`.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        condition: str = "segmentation",
        num_labels: int | None = None,
        ignore_index: int | None = 255,
        ignore_label: int | None = None,
        label_map: Mapping[int, int] | Sequence[int] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        size: int | Mapping[str, int] = 256,
        threshold: float = 0.5,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if condition not in CONDITIONS:
            raise ValueError(f"`condition` must be one of {', '.join(map(repr, CONDITIONS))}, got {condition!r}.")
        if (condition == "segmentation") != (num_labels is not None):
            raise ValueError(
                f'`num_labels` must be given with condition "segmentation" alone, got {num_labels!r} '
                f"with {condition!r}."
            )
        if num_labels is not None:
            num_labels = check_integer("num_labels", num_labels, 1)
        if ignore_index is not None:
            ignore_index = check_integer("ignore_index", ignore_index)
        if ignore_label is not None:
            ignore_label = check_integer("ignore_label", ignore_label, 0, (num_labels or 0) - 1)
        if palette is not None and (num_labels is None or len(palette) < num_labels):
            raise ValueError(f"`palette` must have a colour for each of {num_labels} labels, got {len(palette)}.")
        self.condition = condition
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.ignore_label = ignore_label
        # JSON has no integer keys
        self.label_map = None if label_map is None else _labels_by_id(label_map, num_labels or 0)
        self.palette = None if palette is None else [list(map(int, colour)) for colour in palette]
        self.size = _height_and_width(size)
        self.threshold = check_real("threshold", threshold)

    @property
    def num_channels(self) -> int:
        """Of `pixel_values`: the `in_channels` of the condition tokenizer."""
        return self.num_labels if self.condition == "segmentation" else CHANNELS[self.condition]

    def preprocess(
        self,
        images: Any,
        size: int | Mapping[str, int] | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """The conditions as `pixel_values`.

        Args:
            images: one condition or a list of them, see the class.
            size: in place of the processor's own.
            return_tensors: "pt" or "np".

        Raises:
            ValueError: an id that is no label, colours that no palette explains, values without a range, or another
                shape.
        """
        height, width = _height_and_width(self.size if size is None else size).values()
        images = images if isinstance(images, (list, tuple)) else _split(images)
        if not len(images):
            raise ValueError("`images` must hold at least one condition, got none.")
        read = {"segmentation": self._labels, "depth": self._depth, "edges": self._edges}.get(
            self.condition, self._rgb
        )
        values = np.stack([read(image, height, width) for image in images])
        return BatchFeature({"pixel_values": values}, tensor_type=return_tensors)

    def labels(self, images: Any, size: int | Mapping[str, int] | None = None) -> torch.LongTensor:
        """The labels `(B, height, width)` of label maps; -1 where a pixel is unlabelled and has no label of its
        own.
        """
        height, width = _height_and_width(self.size if size is None else size).values()
        images = images if isinstance(images, (list, tuple)) else _split(images)
        return torch.from_numpy(np.stack([self._ids(image, height, width) for image in images]))

    def postprocess(self, sample: torch.Tensor, output_type: str = "pil") -> list[Image.Image] | torch.Tensor:
        """Pictures of conditions, or of what a condition tokenizer decodes to.

        Args:
            sample: `(B, C, H, W)` as `pixel_values` has it; of a segmentation also logits.
            output_type: "pil" for RGB pictures, "pt" for labels `(B, H, W)` or values in [0, 1] `(B, C, H, W)`.
        """
        if output_type not in ("pil", "pt"):
            raise ValueError(f'`output_type` must be "pil" or "pt", got {output_type!r}.')
        if sample.ndim != 4 or sample.shape[1] != self.num_channels:
            raise ValueError(f"`sample` must have shape (B, {self.num_channels}, H, W), got {tuple(sample.shape)}.")
        if self.condition == "segmentation":
            labels = sample.argmax(dim=1)
            if output_type == "pt":
                return labels
            colours = self._colours()
            return [Image.fromarray(colours[one]) for one in labels.cpu().numpy()]
        values = (sample.detach().float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return values
        pixels = (values.expand(-1, 3, -1, -1) * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(one) for one in pixels]

    def _labels(self, image: Any, height: int, width: int) -> np.ndarray:
        ids = self._ids(image, height, width)
        return (np.arange(self.num_labels)[:, None, None] == ids).astype(np.float32)

    def _ids(self, image: Any, height: int, width: int) -> np.ndarray:
        """int64 `(height, width)` of labels, -1 for none."""
        ids = self._from_palette(image) if self.palette is not None and _has_colours(image) else _integers(image)
        ids = cover(ids, height, width, Image.Resampling.NEAREST)
        unlabelled = ids == self.ignore_index if self.ignore_index is not None else np.zeros_like(ids, bool)
        if self.label_map is not None:
            pairs = enumerate(self.label_map) if isinstance(self.label_map, (list, tuple)) else self.label_map.items()
            known = {int(old): int(new) for old, new in pairs}
            found = np.unique(ids[~unlabelled])
            unknown = [int(one) for one in found if int(one) not in known]
            if unknown:
                raise ValueError(f"`images` must hold ids that `label_map` has, got {unknown[:8]} beside them.")
            mapped = np.full_like(ids, -1)
            for one in found:
                mapped[ids == one] = known[int(one)]
            ids = mapped
        ids = np.where(unlabelled, -1 if self.ignore_label is None else self.ignore_label, ids)
        wrong = np.unique(ids[((ids < 0) & ~unlabelled) | (ids >= self.num_labels)])
        if len(wrong):
            raise ValueError(
                f"`images` must hold labels in 0…{self.num_labels - 1}"
                + (f" or {self.ignore_index} for unlabelled" if self.ignore_index is not None else "")
                + f", got {wrong[:8].tolist()}."
            )
        return ids

    def _from_palette(self, image: Any) -> np.ndarray:
        pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
        keys = pixels[..., :3].astype(np.int64) @ np.array([65536, 256, 1])
        colours = np.asarray(self.palette, np.int64) @ np.array([65536, 256, 1])
        order = np.argsort(colours, kind="stable")
        ids = order[np.minimum(np.searchsorted(colours[order], keys), len(colours) - 1)]
        if (colours[ids] != keys).any():
            wrong = np.argwhere(colours[ids] != keys)[0]
            raise ValueError(f"`images` must hold colours of `palette`, got {pixels[tuple(wrong)].tolist()}.")
        return ids

    def _depth(self, image: Any, height: int, width: int) -> np.ndarray:
        depth = cover(_floats(image, self.condition), height, width, Image.Resampling.BILINEAR)
        low, high = float(depth.min()), float(depth.max())
        if not np.isfinite([low, high]).all():
            raise ValueError("`images` must hold finite depths, got infinite or NaN ones.")
        scale = high - low
        return np.zeros((1, *depth.shape), np.float32) if scale == 0 else ((depth - low) / scale * 2 - 1)[None]

    def _edges(self, image: Any, height: int, width: int) -> np.ndarray:
        edges = _floats(image, self.condition)
        edges = edges / 255 if edges.max(initial=0) > 1 else edges
        if not (edges.min(initial=0) >= 0 and edges.max(initial=0) <= 1):
            raise ValueError(f"`images` of edges must lie in [0, 1] or 0…255, got {edges.min():g} to {edges.max():g}.")
        edges = cover(edges, height, width, Image.Resampling.NEAREST)
        return np.where(edges > self.threshold, 1.0, -1.0).astype(np.float32)[None]

    def _rgb(self, image: Any, height: int, width: int) -> np.ndarray:
        if not isinstance(image, Image.Image):
            pixels = np.asarray(image)
            if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
                raise ValueError(
                    f"`images` must be PIL images or uint8 arrays (H, W, 3) for {self.condition!r}, "
                    f"got {pixels.dtype} "
                    f"of shape {pixels.shape}."
                )
            image = Image.fromarray(pixels)
        box = _box(image.width, image.height, width, height)
        image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, box=box)
        return np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1

    def _colours(self) -> np.ndarray:
        if self.palette is not None:
            return np.asarray(self.palette, np.uint8)
        golden = 0.61803398875  # steps of the golden ratio keep neighbouring labels apart
        hues = [(number * golden) % 1 for number in range(self.num_labels)]
        colours = [colorsys.hsv_to_rgb(hue, 0.65, 0.95) for hue in hues]
        return np.rint(np.array(colours) * 255).astype(np.uint8)


def _labels_by_id(label_map: Mapping[int, int] | Sequence[int], num_labels: int) -> dict[str, int] | list[int]:
    """`label_map` with ints as labels; ids of a mapping are texts, since JSON has no other keys."""
    if isinstance(label_map, (list, tuple)):
        return [check_integer("label_map", label, 0, num_labels - 1) for label in label_map]
    if not isinstance(label_map, Mapping) or not all(str(old).lstrip("-").isdecimal() for old in label_map):
        raise ValueError(f"`label_map` must be a list of labels, or a mapping from ids to labels, got {label_map!r}.")
    return {str(old): check_integer("label_map", new, 0, num_labels - 1) for old, new in label_map.items()}


def cover(values: np.ndarray, height: int, width: int, resample: Image.Resampling) -> np.ndarray:
    """A map `(H, W)` scaled until it covers `(height, width)`, and its centre cut out; of `values`' dtype."""
    box = _box(values.shape[1], values.shape[0], width, height)
    is_float = np.issubdtype(values.dtype, np.floating)
    image = Image.fromarray(values.astype(np.float32 if is_float else np.int32))
    return np.asarray(image.resize((width, height), resample, box=box)).astype(values.dtype)


def _box(width: int, height: int, new_width: int, new_height: int) -> tuple[float, float, float, float]:
    """The central part with the proportions of the result."""
    scale = min(width / new_width, height / new_height)
    left, top = (width - new_width * scale) / 2, (height - new_height * scale) / 2
    return left, top, left + new_width * scale, top + new_height * scale


def _height_and_width(size: int | Mapping[str, int]) -> dict[str, int]:
    pair = {"height": size, "width": size} if isinstance(size, int) else dict(size)
    if set(pair) != {"height", "width"} or not all(isinstance(side, int) and side > 0 for side in pair.values()):
        raise ValueError(f'`size` must be an int or {{"height": int, "width": int}}, positive, got {size!r}.')
    return {"height": pair["height"], "width": pair["width"]}


def _split(images: Any) -> list:
    """One condition, or a batch of them in one array or tensor, as a list."""
    if isinstance(images, Image.Image):
        return [images]
    values = images.detach().cpu().numpy() if torch.is_tensor(images) else np.asarray(images)
    if values.ndim == 2 or (values.ndim == 3 and values.shape[-1] == 3):
        return [values]
    if values.ndim in (3, 4):
        return list(values)
    raise ValueError(
        f"`images` must be maps (H, W) or (B, H, W), or pictures with 3 channels last, got {values.shape}."
    )


def _has_colours(image: Any) -> bool:
    return (
        image.mode not in ("L", "P", "1") and not image.mode.startswith("I")
        if isinstance(image, Image.Image)
        else (np.ndim(image) == 3)
    )


def _integers(image: Any) -> np.ndarray:
    """int64 `(H, W)` of the ids in a label map."""
    if isinstance(image, Image.Image):
        if _has_colours(image):
            raise ValueError(
                f"`images` must be label maps of one channel without a `palette`, got mode {image.mode!r}; a photo "
                "needs an `annotator`."
            )
        image = np.asarray(image)  # of "P" the indices, not the colours
    values = image.detach().cpu().numpy() if torch.is_tensor(image) else np.asarray(image)
    values = values[0] if values.ndim == 3 and values.shape[0] == 1 else values
    if values.ndim != 2 or not values.size or not (np.issubdtype(values.dtype, np.integer) or values.dtype == bool):
        raise ValueError(
            f"`images` must be label maps of integers (H, W), got {values.dtype} of shape "
            f"{values.shape}; a photo needs an "
            "`annotator`."
        )
    return values.astype(np.int64)


def picture_values(image: Image.Image, condition: str) -> np.ndarray:
    """
    The values `(H, W)` of a picture of one channel, of the picture's own type: 8, 16 or 32 bits, or floating-point;
    the colours of a palette rather than its indices.

    Args:
        image: a picture; with the condition "depth" also one of RGBA whose four bytes are a little-endian float32, as
            the depth maps of the original VQGAN are stored.
        condition: of [`VQConditionProcessor`].

    Raises:
        ValueError: a picture with colours.
    """
    if image.mode in ("L", "F", "1") or image.mode.startswith("I"):
        return np.asarray(image)
    bands = np.asarray(image.convert("RGB"))
    if (bands == bands[..., :1]).all():
        return bands[..., 0]
    if condition == "depth" and image.mode == "RGBA":
        values = np.ascontiguousarray(np.asarray(image)).view("<f4")[..., 0]
        size = np.abs(values[values != 0])
        # the bytes of a photo's pixels are no numbers of such a size: an opaque one is above 1e38, or NaN
        if size.size and size.min() > 1e-12 and size.max() < 1e12:
            return values.astype(np.float32)
    raise ValueError(
        f"`images` must be maps of one channel, got colours (mode {image.mode!r}); a photo needs an `annotator`."
    )


def _floats(image: Any, condition: str) -> np.ndarray:
    """float32 `(H, W)` of a map of values."""
    image = picture_values(image, condition) if isinstance(image, Image.Image) else image
    values = image.detach().float().cpu().numpy() if torch.is_tensor(image) else np.asarray(image)
    values = values[0] if values.ndim == 3 and values.shape[0] == 1 else values
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"`images` must be maps (H, W), got shape {values.shape}.")
    return values.astype(np.float32)


__all__ = ["VQConditionProcessor", "cover", "picture_values"]
