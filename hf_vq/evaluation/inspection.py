"""Looking at a model: what its codes stand for, where they are used, what lies between two images, what was copied."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..argument_checks import check_integer, check_tensor
from ..images import to_pil
from ..models.quantizers.codebook_statistics import check_indices
from .evaluate import evaluation_mode, progress_bar
from .features import FeatureExtractor, extract_features
from .pictures import labelled_rows


@torch.no_grad()
def codebook_atlas(
    tokenizer: PreTrainedModel,
    batches: Iterable[dict],
    context: int = 1,
    columns: int | None = None,
    level: int = 0,
    progress: bool = True,
) -> Image.Image:
    """A picture with one tile for each code: the code decoded where it occurred first, among the codes around it.

    Codes that never occurred have a grey tile, so that the picture also shows how much of the codebook is used.

    Args:
        tokenizer: a tokenizer; of one with several codes a position, the first.
        batches: dicts with `pixel_values` `(B, C, H, W)` in [-1, 1].
        context: codes around the one that is shown, on each side; fewer at the borders of the image.
        columns: tiles in a row; by default as many as make the picture square.
        level: of a hierarchy, from top to bottom.
        progress: show a progress bar.
    """
    context = check_integer("context", context, 0)
    codes = tokenizer.config.num_embeddings
    factor = tokenizer.config.downsample_factors[level]
    side = (2 * context + 1) * factor
    tiles: dict[int, torch.Tensor] = {}
    with evaluation_mode(tokenizer):
        for batch in progress_bar(batches, "atlas", progress):
            indices = tokenizer.encode(batch["pixel_values"].to(tokenizer.device, tokenizer.dtype)).indices
            sample = tokenizer.decode_indices(indices).sample.float().clamp(-1, 1).cpu()
            grid = _one_level(indices, level).cpu()
            padded = F.pad(sample, [context * factor] * 4, value=1.0)
            for code in set(grid.unique().tolist()) - tiles.keys():
                image, row, column = (grid == code).nonzero()[0].tolist()
                top, left = row * factor, column * factor
                tiles[code] = padded[image, :, top : top + side, left : left + side]
    if not tiles:
        raise ValueError("`batches` must yield at least one batch, got none.")
    columns = math.ceil(math.sqrt(codes)) if columns is None else check_integer("columns", columns, 1)
    empty = torch.zeros_like(next(iter(tiles.values())))
    pictures = to_pil(torch.stack([tiles.get(code, empty) for code in range(codes)]))
    rows = [("", pictures[start : start + columns]) for start in range(0, codes, columns)]
    return labelled_rows(rows, title=f"{len(tiles)} of {codes} codes", padding=1)


@torch.no_grad()
def usage_map(tokenizer: PreTrainedModel, batches: Iterable[dict], progress: bool = True) -> torch.Tensor:
    """How evenly each position uses the codebook: the perplexity of the codes there, float64 `(h, w)`, from 1 to K.

    Args:
        tokenizer: of one level.
        batches: dicts with `pixel_values` `(B, C, H, W)` in [-1, 1].
        progress: show a progress bar.
    """
    from .codebook import PositionCounts

    counts, size = PositionCounts(tokenizer.config.num_embeddings), None
    with evaluation_mode(tokenizer):
        for batch in progress_bar(batches, "usage", progress):
            indices = tokenizer.encode(batch["pixel_values"].to(tokenizer.device, tokenizer.dtype)).indices
            indices = _one_level(indices, 0)
            size = indices.shape[-2:]
            counts.update(indices)
    return (counts.entropy() * math.log(2)).exp().view(size)


def heat_map(values: torch.Tensor, scale: int = 16) -> Image.Image:
    """A picture of a map `(h, w)`, dark where it is lowest and bright where it is highest.

    Args:
        values: of any range; a constant map is dark.
        scale: pixels a value.
    """
    scale = check_integer("scale", scale, 1)
    if values.ndim != 2 or not values.isfinite().all():
        raise ValueError(f"`values` must be finite and of shape (h, w), got shape {tuple(values.shape)}.")
    span = (values.max() - values.min()).clamp_min(torch.finfo(torch.float32).tiny)
    levels = ((values - values.min()) / span).float().cpu()
    ramp = torch.tensor([[13, 8, 68], [126, 3, 168], [225, 100, 98], [253, 203, 38], [240, 249, 33]]) / 255
    position = levels * (len(ramp) - 1)
    low = position.floor().long().clamp(0, len(ramp) - 2)
    colours = torch.lerp(ramp[low], ramp[low + 1], (position - low).unsqueeze(-1))
    pixels = (colours * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(pixels).resize((values.shape[1] * scale, values.shape[0] * scale), Image.Resampling.NEAREST)


def index_map(indices: torch.LongTensor, num_embeddings: int, scale: int = 1) -> list[Image.Image]:
    """Pictures of grids of codes `(B, h, w)`, each code in a colour of its own.

    Args:
        indices: in 0…num_embeddings-1.
        num_embeddings: K.
        scale: pixels a code.
    """
    num_embeddings, scale = check_integer("num_embeddings", num_embeddings, 1), check_integer("scale", scale, 1)
    check_indices(indices, num_embeddings)
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (num_embeddings, 3), generator=generator, dtype=torch.uint8)
    pixels = colours[indices.detach().cpu()].numpy()
    return [
        Image.fromarray(one).resize((one.shape[1] * scale, one.shape[0] * scale), Image.Resampling.NEAREST)
        for one in pixels
    ]


@torch.no_grad()
def interpolate(
    tokenizer: PreTrainedModel, start: torch.Tensor, end: torch.Tensor, steps: int = 8, space: str = "latent"
) -> torch.Tensor:
    """Images between two images.

    Args:
        tokenizer: of one level.
        start, end: `(C, H, W)` in [-1, 1].
        steps: how many images, both ends included, at least 2.
        space: "latent": along the line between the latents before quantization, each point quantized and decoded;
            "index": codes of `start` are replaced by those of `end` in a random order, the same at every call.

    Returns:
        `(steps, C, H, W)` in [-1, 1].
    """
    steps = check_integer("steps", steps, 2)
    if space not in ("latent", "index"):
        raise ValueError(f'`space` must be "latent" or "index", got {space!r}.')
    if len(tokenizer.config.downsample_factors) > 1:
        raise ValueError(f"`tokenizer` must have one level of codes, got a {type(tokenizer).__name__}.")
    pair = torch.stack([start, end]).to(tokenizer.device, tokenizer.dtype)
    with evaluation_mode(tokenizer):
        encoded = tokenizer.encode(pair)
        shares = torch.linspace(0, 1, steps)
        if space == "latent":
            first, last = encoded.latents
            latents = torch.stack([torch.lerp(first, last, float(share)) for share in shares])
            return tokenizer.decode(latents).sample.float().clamp(-1, 1)
        first, last = encoded.indices
        order = torch.rand(first.shape, generator=torch.Generator().manual_seed(0)).to(first.device)
        grids = torch.stack([torch.where(order < float(share), last, first) for share in shares])
        return tokenizer.decode_indices(grids).sample.float().clamp(-1, 1)


class TokenizerLatents:
    """The latents of a tokenizer as the features of an image: images are close whose parts look alike in place.

    Args:
        tokenizer: on its device.
    """

    name = "latents"

    def __init__(self, tokenizer: PreTrainedModel):
        self.tokenizer = tokenizer

    @torch.no_grad()
    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """`images` `(B, C, H, W)` in [-1, 1] -> `(B, D · h · w)`, of a hierarchy those of all levels."""
        with evaluation_mode(self.tokenizer):
            latents = self.tokenizer.encode(images.to(self.tokenizer.device, self.tokenizer.dtype)).latents
        levels = latents if isinstance(latents, tuple) else (latents,)
        return torch.cat([level.flatten(1) for level in levels], dim=1).float()


def nearest_images(
    samples: torch.Tensor,
    dataset: Dataset,
    extractor: FeatureExtractor,
    count: int = 4,
    batch_size: int = 64,
    progress: bool = True,
) -> tuple[torch.LongTensor, torch.Tensor]:
    """The images of a data set that samples are closest to in the features of a network, so that copying shows.

    Args:
        samples: `(N, C, H, W)` in [-1, 1].
        dataset: map-style, with `pixel_values`; usually the training split.
        extractor: see `FeatureExtractor`.
        count: of neighbours.
        batch_size: images at a time.
        progress: show a progress bar.

    Returns:
        The numbers of the images in the data set, int64 `(N, count)`, the nearest first, and their distances.
    """
    count = check_integer("count", count, 1, len(dataset))
    from torch.utils.data import DataLoader

    from ..training.data.image_datasets import collate

    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
    real = extract_features(loader, extractor, progress=progress).features
    own = extract_features(samples.split(batch_size), extractor, progress=False).features
    distances, numbers = torch.cdist(own.double(), real.double()).topk(count, largest=False)
    return numbers, distances


def copied_share(samples: torch.Tensor, training: torch.Tensor, held_out: torch.Tensor) -> float:
    """The share of samples that are closer to a training image than the held-out images typically are.

    Args:
        samples, training, held_out: features `(N, D)`, `(M, D)` and `(L, D)` of one network.

    Returns:
        The share of samples whose distance to the nearest training image is below the median of the same distance of
        the held-out images, which were never trained on: about 0.5 for a generator that copies nothing.
    """
    for name, features in (("samples", samples), ("training", training), ("held_out", held_out)):
        check_tensor(name, features)
        if features.ndim != 2 or not len(features) or not features.isfinite().all():
            raise ValueError(f"`{name}` must be finite features (N, D), got shape {tuple(features.shape)}.")
    nearest = [torch.cdist(one.double(), training.double()).amin(dim=1) for one in (samples, held_out)]
    return float((nearest[0] < nearest[1].median()).double().mean())


def metric_rows(path: str | Path) -> list[dict]:
    """The rows of a run's `metrics.jsonl`.

    Raises:
        ValueError: a line that is no JSON object with a `step`; the message names the file and the line.
    """
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            text = line[:60].decode(errors="replace")
            raise ValueError(f"{path}, line {number} must be a JSON object with a `step`, got {text!r}.") from error
        rows.append(row)
    return rows


def loss_curves(metrics: str | Path, names: Sequence[str] | None = None):
    """A figure of a run's metrics over its steps.

    Args:
        metrics: the run's `metrics.jsonl`, or the folder that holds it.
        names: which ones; by default every one that changes.

    Returns:
        `matplotlib.figure.Figure`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(metrics)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"`metrics` must be a run's folder or its metrics.jsonl, got {str(metrics)!r}.")
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in metric_rows(path):
        step = row["step"]
        for name, value in row.items():
            if name not in ("step", "epoch") and isinstance(value, (int, float)):
                curves.setdefault(name, []).append((step, value))
    if names is None:
        names = [name for name, points in curves.items() if len({value for _, value in points}) > 1]
        if max(map(len, curves.values()), default=0) < 2:
            raise ValueError(f"`{path}` must have at least two rows of a metric for a curve, got only one so far.")
        if not names:
            raise ValueError(f"`{path}` must have a metric that changes, got the same values in every row.")
    unknown = sorted(set(names) - curves.keys())
    if unknown or not names:
        raise ValueError(f"`names` must be among {sorted(curves)}, got {unknown or 'none'}.")
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(5 * columns, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names, strict=False):
        axes.plot(*zip(*curves[name], strict=True), marker="." if len(curves[name]) < 30 else None)
        axes.set(title=name, xlabel="step")
    for axes in figure.axes[len(names) :]:
        axes.remove()
    return figure


def _one_level(indices: torch.Tensor | tuple, level: int) -> torch.LongTensor:
    """`(B, h, w)` of one level, of a residual's depths the first."""
    levels = indices if isinstance(indices, tuple) else (indices,)
    if not 0 <= level < len(levels):
        raise ValueError(f"`level` must lie in 0…{len(levels) - 1} for this tokenizer, got {level}.")
    chosen = levels[level]
    return chosen[..., 0] if chosen.ndim == 4 else chosen


__all__ = [
    "TokenizerLatents",
    "codebook_atlas",
    "copied_share",
    "heat_map",
    "index_map",
    "interpolate",
    "loss_curves",
    "metric_rows",
    "nearest_images",
    "usage_map",
]
