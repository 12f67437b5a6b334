"""Pictures of results: labelled grids of images, and a plot of how a codebook is used."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from ..images import to_pil
from ..models.quantizers.codebook_statistics import codebook_statistics


BACKGROUND = (255, 255, 255)
TEXT = (40, 40, 40)


def labelled_rows(
    rows: Sequence[tuple[str, torch.Tensor | Sequence[Image.Image]]],
    title: str | None = None,
    scale: int = 1,
    padding: int = 4,
    font_size: int = 14,
) -> Image.Image:
    """One row of images for each label, the label at its left.

    Args:
        rows: pairs of a label and its images, a tensor `(n, C, H, W)` in [-1, 1] or PIL images. Rows may differ in
            length; all images are of one size. An empty label in every row leaves out the label column.
        title: a line of text above the grid.
        scale: enlarges every image by this integer factor, pixels staying sharp.
        padding: pixels between images.
        font_size: of labels and title, in pixels.
    """
    if scale < 1 or scale != int(scale):
        raise ValueError(f"`scale` must be a positive integer, got {scale}")
    pictures = [(label, to_pil(images) if torch.is_tensor(images) else list(images)) for label, images in rows]
    sizes = {picture.size for _, row in pictures for picture in row}
    if len(sizes) != 1:
        raise ValueError(f"`rows` must hold images of one size, got sizes {sorted(sizes)}")
    width, height = (side * scale for side in sizes.pop())
    font = ImageFont.load_default(font_size)
    label_width = max((_text_width(label, font) for label, _ in pictures), default=0)
    left = label_width + 2 * padding if label_width else padding
    top = font_size + 2 * padding if title else padding
    row_height = max(height, font_size if label_width else 0) + padding
    columns = max(len(row) for _, row in pictures)
    right = left + columns * (width + padding)
    if title:
        right = max(right, _text_width(title, font) + 2 * padding)

    grid = Image.new("RGB", (right, top + len(pictures) * row_height), BACKGROUND)
    draw = ImageDraw.Draw(grid)
    if title:
        draw.text((padding, padding), title, fill=TEXT, font=font)
    for i, (label, row) in enumerate(pictures):
        y = top + i * row_height
        draw.text((padding, y + height / 2), label, fill=TEXT, font=font, anchor="lm")
        for j, picture in enumerate(row):
            picture = picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            grid.paste(picture, (left + j * (width + padding), y))
    return grid


def reconstruction_grid(
    originals: torch.Tensor,
    reconstructions: torch.Tensor | dict[str, torch.Tensor],
    columns: int = 8,
    **kwargs: Any,
) -> Image.Image:
    """Originals in one row, their reconstructions in the row below, `columns` at a time.

    Args:
        originals: `(B, C, H, W)` in [-1, 1].
        reconstructions: the same shape, or several of them by the name that their rows get.
        columns: images in a row.
        kwargs: passed to `labelled_rows`.
    """
    if columns < 1:
        raise ValueError(f"`columns` must be positive, got {columns}")
    named = reconstructions if isinstance(reconstructions, dict) else {"reconstruction": reconstructions}
    for name, images in named.items():
        if images.shape != originals.shape:
            raise ValueError(
                f"`reconstructions` ({name}) must have the shape of `originals`, {tuple(originals.shape)}, "
                f"got {tuple(images.shape)}"
            )
    rows = []
    for start in range(0, originals.shape[0], columns):
        rows += [(name, images[start : start + columns]) for name, images in {"original": originals, **named}.items()]
    return labelled_rows(rows, **kwargs)


def samples_by_class(
    images: torch.Tensor | Sequence[Image.Image],
    labels: Sequence[int] | torch.Tensor,
    class_names: Sequence[str] | None = None,
    **kwargs: Any,
) -> Image.Image:
    """One row for each class that occurs, in the order of its number, with its name at the left.

    Args:
        images: `(B, C, H, W)` in [-1, 1], or PIL images.
        labels: B class numbers.
        class_names: the name of class `i` at position `i`; the numbers where not given.
        kwargs: passed to `labelled_rows`.
    """
    labels = [int(label) for label in labels]
    pictures = to_pil(images) if torch.is_tensor(images) else list(images)
    if len(labels) != len(pictures):
        raise ValueError(f"`labels` must be as many as `images`, got {len(labels)} and {len(pictures)}")
    if class_names is not None and labels and not 0 <= min(labels) <= max(labels) < len(class_names):
        raise ValueError(f"`labels` must be in [0, {len(class_names)}), got {min(labels)} to {max(labels)}")
    rows = []
    for number in sorted(set(labels)):
        name = str(number) if class_names is None else class_names[number]
        rows.append((name, [p for p, label in zip(pictures, labels, strict=True) if label == number]))
    return labelled_rows(rows, **kwargs)


def plot_codebook_usage(counts: torch.Tensor, path: str | os.PathLike, title: str = "Codebook") -> None:
    """Save a plot of the codes' frequencies, the most frequent first, on logarithmic axes.

    Args:
        counts (`(K,)`): how often each code occurred.
        path: the file to write; its ending gives the format (png, svg, pdf).
        title: precedes usage and perplexity in the plot's title.
    """
    # Without pyplot: no global state, and no display is needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    statistics = codebook_statistics(counts)
    if int(counts.sum()) == 0:
        raise ValueError("`counts` must count something, got no code at all")
    counts = counts.detach().double().cpu()
    frequencies = (counts / counts.sum()).sort(descending=True).values
    used = frequencies[frequencies > 0]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(range(1, len(used) + 1), used.tolist(), marker="." if len(used) < 50 else None, label="used codes")
    axes.axhline(1 / len(counts), color="grey", linestyle=":", label="uniform use, 1/K")
    axes.set(
        xscale="log", yscale="log", xlabel="code, by frequency", ylabel="frequency", xlim=(0.9, len(counts) * 1.1)
    )
    axes.set_title(
        f"{title}: {len(used)} of {len(counts)} codes used ({float(statistics.usage):.1%}), "
        f"perplexity {float(statistics.perplexity):.1f}"
    )
    axes.legend()
    figure.savefig(path, dpi=120)


def _text_width(text: str, font: ImageFont.FreeTypeFont) -> int:
    return int(font.getlength(text)) + 1 if text else 0


__all__ = ["labelled_rows", "plot_codebook_usage", "reconstruction_grid", "samples_by_class"]
