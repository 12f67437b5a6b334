"""What the web page does, without the page: models, uploads, codes, new pictures, and the limits of size and time."""

import inspect
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from hf_vq.argument_checks import check_integer
from hf_vq.evaluation.inspection import index_map
from hf_vq.evaluation.pictures import labelled_rows
from hf_vq.evaluation.reconstruction import psnr
from hf_vq.images import to_pil, to_rgb
from hf_vq.loading import load, read_json
from hf_vq.models.autoencoders.image_processing_vq import VQImageProcessor
from hf_vq.pipelines.conditioning import to_mask


MAX_UPLOAD_BYTES = 10 * 2**20
MAX_UPLOAD_PIXELS = 16_000_000
MAX_IMAGES = 16
TIME_LIMIT_S = 120.0
MAX_PALETTE_CODES = 4096
MODELS_HELD = 4
SHOWN_SIDE = 384  # pixels to which small pictures are enlarged

# Arguments of the pipelines' calls that the page has a control for, and the value that is the same as none.
OPTIONS = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_inference_steps": 0}


# Models


def find_checkpoints(folders: Sequence[str | Path]) -> dict[str, str]:
    """The folders of models and pipelines below `folders`, by their names, in alphabetical order."""
    found = {}
    for folder in map(Path, folders):
        if folder.is_dir():
            for inside in sorted(folder.iterdir()):
                if (inside / "model_index.json").is_file() or (inside / "config.json").is_file():
                    found.setdefault(inside.name, str(inside))
    return found


@dataclass
class PageModel:
    """A tokenizer, with the pipeline that draws with it if there is one.

    Args:
        name: what the page calls it.
        tokenizer: an image tokenizer of hf_vq.
        pipeline: one of hf_vq's pipelines, or None for a tokenizer alone.
        processor: makes `pixel_values` of pictures as the tokenizer was trained.
    """

    name: str
    tokenizer: Any
    pipeline: Any
    processor: VQImageProcessor
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def condition(self) -> str | None:
        """What a picture is drawn for: "class", "text", "image" or None."""
        if self.pipeline is None:
            return None
        if getattr(self.pipeline, "condition_processor", None) is not None:
            return "image"
        if hasattr(self.pipeline, "priors"):
            kinds = {prior.config.condition_type for prior in self.pipeline.priors}
            return next((kind for kind in ("class", "text") if kind in kinds), None)
        kind = {"class": "class", "class_token": "class", "text": "text"}.get(self.pipeline.condition_kind)
        return "image" if kind is None and self._map_channels in (1, 3) else kind

    @property
    def _map_channels(self) -> int:
        """Channels that a denoiser of latents takes beside them."""
        unet = getattr(self.pipeline, "unet", None)
        return 0 if unet is None else unet.config.in_channels - self.tokenizer.config.embed_dim

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, or their numbers where they have none; [] without classes."""
        if self.condition != "class":
            return []
        if hasattr(self.pipeline, "priors"):
            config = next(p.config for p in self.pipeline.priors if p.config.condition_type == "class")
            names, count = config.id2label or {}, config.condition_vocab_size
            null = config.null_class_token_id
            count -= null is not None and null - config.condition_token_offset == count - 1
        else:
            names, count = self.pipeline.id2label or {}, self.pipeline.num_classes
        return [names.get(i, str(i)) if names.get(i) != f"LABEL_{i}" else str(i) for i in range(count)]

    @property
    def options(self) -> list[str]:
        """The names of `OPTIONS` that its pipeline takes."""
        if self.pipeline is None:
            return []
        return [name for name in OPTIONS if name in inspect.signature(type(self.pipeline).__call__).parameters]

    @property
    def grids(self) -> list[tuple[int, int]]:
        """The sizes `(h, w)` of the codes of a picture, from the top level down."""
        height, width = self.tokenizer.config.image_size
        return [(height // factor, width // factor) for factor in self.tokenizer.config.downsample_factors]

    @property
    def summary(self) -> str:
        """A line of Markdown that says what it is."""
        config, parts = self.tokenizer.config, [self.tokenizer]
        height, width = config.image_size
        codes = " and ".join(f"{h}×{w}" for h, w in self.grids)
        text = (
            f"**{type(self.tokenizer).__name__}**, {height}×{width} pixels to {codes} codes of {config.num_embeddings}"
        )
        if self.pipeline is not None:
            parts = [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]
            priors = sorted({type(part).__name__ for part in parts} - {type(self.tokenizer).__name__})
            text += f"; **{type(self.pipeline).__name__}** with {', '.join(priors)}"
            text += f", conditioned on {self.condition or 'nothing'}"
        return f"{text}; {sum(p.numel() for part in parts for p in part.parameters()) / 1e6:.1f} M parameters"


class ModelShelf:
    """The models that the page has loaded: the last few that were asked for.

    Args:
        sources: folders or Hub ids by the names that the page shows.
        any_source: whether a name that is none of these is taken as a folder or Hub id itself.
        device: where models are put.
    """

    def __init__(self, sources: dict[str, str], any_source: bool = False, device: str = "cpu"):
        self.sources, self.any_source, self.device = dict(sources), any_source, device
        self._held: OrderedDict[str, PageModel] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> PageModel:
        """The model of that name.

        Raises:
            ValueError: an unknown name, or a folder or repository without a model of hf_vq.
        """
        name = (name or "").strip()
        if not name:
            raise ValueError("`model` must be the name of a model, a folder or a Hub id, got nothing.")
        if name not in self.sources and not self.any_source:
            raise ValueError(f"`model` must be one of {sorted(self.sources)}, got {name!r}.")
        with self._lock:
            if name not in self._held:
                self._held[name] = load_model(name, self.sources.get(name, name), self.device)
                while len(self._held) > MODELS_HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(name)
            return self._held[name]


def load_model(name: str, source: str, device: str = "cpu") -> PageModel:
    """The tokenizer or pipeline in a folder or Hub repository."""
    model = load(source)
    pipeline = model if hasattr(model, "components") else None
    tokenizer = model if pipeline is None else pipeline.vqvae
    if not hasattr(tokenizer, "decode_indices"):
        raise ValueError(f"`{source}` must be a tokenizer or a pipeline, got a {type(tokenizer).__name__}.")
    saved = read_json(source, "preprocessor_config.json") or read_json(source, "vqvae/preprocessor_config.json")
    processor = VQImageProcessor.from_dict(saved) if saved else VQImageProcessor(size=tokenizer.config.resolution)
    (pipeline or tokenizer).to(device)
    tokenizer.eval()
    if pipeline is not None:
        pipeline.set_progress_bar_config(disable=True)
    return PageModel(name, tokenizer, pipeline, processor)


# Uploads


def read_upload(upload: str | Path | Image.Image | None, what: str = "picture") -> Image.Image:
    """An uploaded file as an RGB picture, upright, transparency laid on white.

    Raises:
        ValueError: nothing, too large a file or picture, or no picture; says what would be right.
    """
    if upload is None:
        raise ValueError(f"Upload a {what} first.")
    if isinstance(upload, Image.Image):
        return to_rgb(upload)
    path = Path(upload)
    size = path.stat().st_size
    if size > MAX_UPLOAD_BYTES:
        raise ValueError(
            f"The {what} must be a file of at most {MAX_UPLOAD_BYTES >> 20} MB, got {size / 2**20:.1f} MB."
        )
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_UPLOAD_PIXELS:  # before it is decoded: a small file can hold a huge picture
                raise ValueError(
                    f"The {what} must have at most {MAX_UPLOAD_PIXELS // 10**6} million pixels, got {width}×{height}."
                )
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's decoders raise all of these
        raise ValueError(
            f"The {what} must be an image file such as PNG, JPEG or WebP; this one cannot be read."
        ) from error


def prepare(model: PageModel, picture: Image.Image) -> torch.Tensor:
    """The `pixel_values` `(1, C, H, W)` in [-1, 1] that the tokenizer sees of a picture."""
    values = model.processor(picture, return_tensors="pt", size=model.tokenizer.config.resolution).pixel_values
    return values.to(model.tokenizer.device, model.tokenizer.dtype)


# Codes


@dataclass
class Codes:
    """A picture as codes, and what was done to them.

    Args:
        levels: the codes `(h, w)` of each level, from the top down.
        shown: the picture that the tokenizer saw.
        history: the levels before each edit.
    """

    levels: list[np.ndarray]
    shown: Image.Image
    history: list[list[np.ndarray]] = field(default_factory=list)


@torch.no_grad()
def encode(model: PageModel, upload: Any) -> tuple[Codes, str]:
    """The codes of an upload, and a line that says how good they are."""
    if model.tokenizer.config.quantizer == "residual":
        raise ValueError(f"`{model.name}` has several codes at a position, which this page does not show.")
    pixel_values = prepare(model, read_upload(upload))
    indices = model.tokenizer.encode(pixel_values).indices
    levels = [level[0].cpu().numpy() for level in (indices if isinstance(indices, tuple) else (indices,))]
    sample = _decode(model, levels)
    value = psnr(sample, pixel_values.float().clamp(-1, 1).cpu()).item()
    count, different = sum(level.size for level in levels), sum(len(np.unique(level)) for level in levels)
    bits = count * np.log2(model.tokenizer.config.num_embeddings)
    text = f"{count} codes, {different} different ones, {bits / 8:.0f} bytes; PSNR {value:.2f} dB"
    return Codes(levels, to_pil(pixel_values)[0]), text


def decode(model: PageModel, levels: Sequence[np.ndarray]) -> Image.Image:
    """The picture of the codes of each level."""
    return to_pil(_decode(model, levels))[0]


@torch.no_grad()
def _decode(model: PageModel, levels: Sequence[np.ndarray]) -> torch.Tensor:
    grids = tuple(torch.from_numpy(level)[None].to(model.tokenizer.device) for level in levels)
    sample = model.tokenizer.decode_indices(grids if len(grids) > 1 else grids[0]).sample
    return sample.float().clamp(-1, 1).cpu()


def edit(codes: Codes, level: int, row: int, column: int, code: int, num_embeddings: int) -> Codes:
    """`codes` with another code at a place; what was there before can be had back by `undo`."""
    level = check_integer("level", level, 0, len(codes.levels) - 1)
    code = check_integer("code", code, 0, num_embeddings - 1)
    height, width = codes.levels[level].shape
    row, column = check_integer("row", row, 0, height - 1), check_integer("column", column, 0, width - 1)
    levels = [grid.copy() for grid in codes.levels]
    levels[level][row, column] = code
    return Codes(levels, codes.shown, [*codes.history, codes.levels])


def undo(codes: Codes, everything: bool = False) -> Codes:
    """`codes` before the last edit, or before all of them."""
    if not codes.history:
        return codes
    steps = 0 if everything else len(codes.history) - 1
    return Codes(codes.history[steps], codes.shown, codes.history[:steps])


def cell_of(click: Sequence[float], size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """`(row, column)` in `grid` of a click at pixels `(x, y)` of a picture of `size` `(width, height)`."""
    (x, y), (width, height), (rows, columns) = click, size, grid
    return min(rows - 1, max(0, int(y * rows / height))), min(columns - 1, max(0, int(x * columns / width)))


def enlarge(picture: Image.Image, side: int = SHOWN_SIDE) -> Image.Image:
    """A small picture, its pixels staying sharp, at least about `side` pixels wide."""
    scale = max(1, round(side / max(picture.size)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def with_grid(picture: Image.Image, grid: tuple[int, int], cell: tuple[int, int] | None = None) -> Image.Image:
    """An enlarged picture with the borders of its codes, and one of them framed."""
    picture = enlarge(picture).convert("RGB")
    draw, (rows, columns) = ImageDraw.Draw(picture, "RGBA"), grid
    for row in range(1, rows):
        y = row * picture.height // rows
        draw.line([(0, y), (picture.width, y)], fill=(0, 0, 0, 60))
    for column in range(1, columns):
        x = column * picture.width // columns
        draw.line([(x, 0), (x, picture.height)], fill=(0, 0, 0, 60))
    if cell is not None:
        high, wide = picture.height // rows, picture.width // columns
        left, top = cell[1] * picture.width // columns, cell[0] * picture.height // rows
        draw.rectangle([left, top, left + wide, top + high], outline=(255, 0, 90, 255), width=3)
    return picture


def code_colours(model: PageModel, codes: Codes, level: int) -> Image.Image:
    """The map of a level: each code in a colour of its own."""
    grid = torch.from_numpy(codes.levels[level])[None]
    return enlarge(index_map(grid, model.tokenizer.config.num_embeddings)[0])


@torch.no_grad()
def palette(model: PageModel, level: int = 0) -> tuple[Image.Image, tuple[int, int]]:
    """Each code of a level, decoded with itself on all sides, and how many `(rows, columns)` of them there are.

    The other levels of a hierarchy hold their code 0.

    Raises:
        ValueError: too large a codebook to show.
    """
    config = model.tokenizer.config
    count, factors = config.num_embeddings, config.downsample_factors
    if count > MAX_PALETTE_CODES:
        raise ValueError(f"The codebook must have at most {MAX_PALETTE_CODES} codes to be shown, got {count}.")
    side, largest = factors[level], max(factors)
    tiles = []
    for start in range(0, count, 128):
        codes = torch.arange(start, min(count, start + 128), device=model.tokenizer.device)
        grids = tuple(
            codes.view(-1, 1, 1).expand(-1, 3 * largest // factor, 3 * largest // factor) * (number == level)
            for number, factor in enumerate(factors)
        )
        sample = model.tokenizer.decode_indices(grids if len(grids) > 1 else grids[0]).sample.float().cpu()
        middle = sample.shape[-1] // 2 // side * side
        tiles += to_pil(sample[..., middle : middle + side, middle : middle + side])
    columns = int(np.ceil(np.sqrt(2 * count)))  # twice as wide as high
    rows = -(-count // columns)
    picture = Image.new("RGB", (columns * side, rows * side), "white")
    for number, tile in enumerate(tiles):
        picture.paste(tile, (number % columns * side, number // columns * side))
    return enlarge(picture, 2 * SHOWN_SIDE), (rows, columns)


# New pictures


@dataclass
class Wishes:
    """What is to be drawn.

    Args:
        classes: names, or numbers, of classes; each has its own pictures.
        prompts: texts.
        condition_image: an upload.
        count: pictures for each class, prompt or condition; together at most `MAX_IMAGES`.
        seed: of the draws; the same wishes give the same pictures.
        options: values of `OPTIONS`.
    """

    classes: Sequence[str] = ()
    prompts: Sequence[str] = ()
    condition_image: Any = None
    count: int = 4
    seed: int = 0
    options: dict[str, float] = field(default_factory=dict)


@dataclass
class Drawn:
    """Pictures, one row for each class, prompt or condition.

    Args:
        rows: pairs of what was asked for and its pictures.
        seconds: how long it took.
    """

    rows: list[tuple[str, list[Image.Image]]]
    seconds: float

    @property
    def captioned(self) -> list[tuple[Image.Image, str]]:
        """Each picture, enlarged, with what it was drawn for."""
        return [(enlarge(picture, 256), label) for label, row in self.rows for picture in row]


def draw(model: PageModel, wishes: Wishes, on_progress: Callable[[float], None] | None = None, **given: Any) -> Drawn:
    """Draws what is wished for.

    Args:
        model: with a pipeline.
        wishes: what to draw.
        on_progress: called with the share that is done, from 0 to 1.
        given: further arguments of the pipeline's call.

    Raises:
        ValueError: wishes that the model cannot grant, or that take longer than `TIME_LIMIT_S`.
    """
    if model.pipeline is None:
        raise ValueError(f"`{model.name}` is a tokenizer without a prior, which draws nothing new.")
    arguments, labels = _condition(model, wishes)
    count = check_integer("count", wishes.count, 1, MAX_IMAGES)
    if count * len(labels) > MAX_IMAGES:
        raise ValueError(
            f"At most {MAX_IMAGES} pictures are drawn at a time, got {count} for each of {len(labels)} conditions."
        )
    arguments |= {
        name: int(value) if isinstance(OPTIONS[name], int) else float(value)
        for name, value in wishes.options.items()
        if name in model.options and value is not None and value != OPTIONS[name]
    }
    if not any(name in arguments for name in ("class_labels", "prompt", "condition_image")):
        arguments.pop("guidance_scale", None)  # there is nothing to guide to
    seed = check_integer("seed", wishes.seed, 0, 2**32 - 1)
    with model.lock:
        began = time.monotonic()
        images = model.pipeline(
            **arguments,
            **given,
            num_images_per_prompt=count,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=_watch(model, arguments, began, on_progress),
        ).images
        seconds = time.monotonic() - began
    return Drawn([(label, images[i * count : (i + 1) * count]) for i, label in enumerate(labels)], seconds)


def _condition(model: PageModel, wishes: Wishes) -> tuple[dict[str, Any], list[str]]:
    """The arguments of the call that say what is drawn, and a label for each row."""
    if model.condition == "class" and wishes.classes:
        known = model.class_names
        unknown = [name for name in wishes.classes if name not in known]
        if unknown:
            raise ValueError(f"`classes` must be among {known}, got {unknown}.")
        return {"class_labels": [known.index(name) for name in wishes.classes]}, list(wishes.classes)
    prompts = [prompt.strip() for prompt in wishes.prompts if prompt.strip()]
    if model.condition == "text" and prompts:
        return {"prompt": prompts}, prompts
    if model.condition == "image":
        picture = _condition_map(model, wishes.condition_image)
        return {"condition_image": picture}, ["condition"]
    return {}, ["any"]


def _condition_map(model: PageModel, upload: Any) -> Image.Image:
    """A condition of the pipeline's kind: label ids and depths as they are in the file, anything else as RGB."""
    if upload is None:
        raise ValueError("Upload a condition first: a label map, depth map, edge map or drawing.")
    processor = getattr(model.pipeline, "condition_processor", None)
    if processor is not None and processor.condition in ("segmentation", "depth"):
        read_upload(upload, "condition")  # its errors
        with Image.open(upload) as image:
            image.load()
            return image
    return read_upload(upload, "condition")


def _watch(model: PageModel, arguments: dict, began: float, on_progress: Callable[[float], None] | None) -> Callable:
    """The callback of a call, which tells how far it is and ends it when it takes too long."""
    steps = sum(height * width for height, width in model.grids)
    if not hasattr(model.pipeline, "priors"):
        default = inspect.signature(type(model.pipeline).__call__).parameters["num_inference_steps"].default
        trained = model.pipeline.scheduler.config.num_train_timesteps
        steps = arguments.get("num_inference_steps") or default or trained
    done = 0

    def callback(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        nonlocal done
        done += 1
        if time.monotonic() - began > TIME_LIMIT_S:
            raise ValueError(
                f"Drawing takes longer than {TIME_LIMIT_S:g} seconds: ask for fewer pictures or fewer steps."
            )
        if on_progress is not None:
            on_progress(min(1.0, done / steps))
        return {}

    return callback


def prepare_completion(model: PageModel, upload: Any) -> tuple[torch.Tensor, Image.Image]:
    """What the tokenizer sees of an upload, `(1, C, H, W)` in [-1, 1], and the same, enlarged to paint on.

    Raises:
        ValueError: a bad upload, or a tokenizer alone.
    """
    if model.pipeline is None:
        raise ValueError(f"`{model.name}` is a tokenizer without a prior, which completes nothing.")
    pixel_values = prepare(model, read_upload(upload)).float().cpu().clamp(-1, 1)
    return pixel_values, enlarge(to_pil(pixel_values)[0])


def complete(
    model: PageModel,
    pixel_values: torch.Tensor | None,
    mask: Image.Image | None,
    wishes: Wishes,
    on_progress: Callable[[float], None] | None = None,
) -> tuple[Drawn, Image.Image]:
    """Draws the painted part of a picture anew.

    Args:
        model: with a pipeline.
        pixel_values: from `prepare_completion`.
        mask: of any size, laid over all of the picture; white is drawn anew.
        wishes: as in `draw`.
        on_progress: as in `draw`.

    Returns:
        What was drawn, and the picture that the model was given, the painted part grey.

    Raises:
        ValueError: also a mask that paints nothing or everything.
    """
    if pixel_values is None:
        raise ValueError("Upload a picture first.")
    if mask is None:
        raise ValueError("Paint over a part of the picture first: that part is drawn anew.")
    height, width = pixel_values.shape[-2:]
    painted = to_mask(mask.convert("L").resize((width, height), Image.Resampling.BOX))
    if float(painted.mean()) in (0.0, 1.0):
        raise ValueError("Paint over a part of the picture, and leave a part of it: the mask covers nothing or all.")
    given = to_pil(torch.where(painted == 1, torch.zeros_like(pixel_values), pixel_values))[0]
    return draw(model, wishes, on_progress, image=pixel_values, mask_image=painted), given


def mask_of_layers(layers: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image | None:
    """A mask, white where any layer `RGBA` of a drawing is opaque; None for a drawing without a stroke."""
    painted = Image.new("L", size, 0)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A").resize(size, Image.Resampling.NEAREST)
        painted.paste(255, mask=alpha.point(lambda value: 255 if value > 0 else 0))
    return painted if painted.getbbox() else None


def compare(
    models: Sequence[PageModel], wishes: Wishes, on_progress: Callable[[float], None] | None = None
) -> tuple[Image.Image, list[list[Any]]]:
    """The same wishes to several models: a sheet with a row for each model and wish, and a table of their speeds.

    Returns:
        The sheet, and rows of name, pipeline, parameters in millions, pictures and seconds.
    """
    if not 2 <= len(models) <= MODELS_HELD:
        raise ValueError(f"Choose 2 to {MODELS_HELD} models to compare, got {len(models)}.")
    rows, table = [], []
    for number, model in enumerate(models):

        def progress(share: float, number: int = number) -> None:
            if on_progress is not None:
                on_progress((number + share) / len(models))

        drawn = draw(model, wishes, progress)
        rows += [(f"{model.name}: {label}", pictures) for label, pictures in drawn.rows]
        modules = [part for part in model.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        parameters = sum(p.numel() for part in modules for p in part.parameters()) / 1e6
        pictures = sum(len(row) for _, row in drawn.rows)
        table.append(
            [model.name, type(model.pipeline).__name__, round(parameters, 2), pictures, round(drawn.seconds, 2)]
        )
    side = max(max(picture.size) for _, row in rows for picture in row)
    rows = [
        (label, [picture.resize((side, side), Image.Resampling.NEAREST) for picture in row]) for label, row in rows
    ]
    return labelled_rows(rows, scale=max(1, 128 // side)), table
