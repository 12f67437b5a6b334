"""Trackers (tensorboard, trackio, wandb) through Accelerate, and pictures."""

import io
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ..images import as_rgb
from .checkpointing import write_file_atomically
from .run_arguments import RunArguments


if TYPE_CHECKING:
    from accelerate import Accelerator


def start_tracker(accelerator: "Accelerator", arguments: RunArguments, output_dir: Path, step: int) -> None:
    """Starts the tracker that the arguments name so that a resumed run continues the same curves.

    tensorboard drops what an interrupted run wrote after `step`; trackio and wandb find their run by an identifier
    that is kept in the output folder.
    """
    if arguments.report_to == "none":
        return
    options = {}
    if arguments.report_to == "tensorboard":
        options = {"purge_step": step + 1} if step else {}
    elif accelerator.is_main_process:
        file = output_dir / "tracker_id"
        if not file.exists():
            write_file_atomically(file, uuid.uuid4().hex[:12])
        key = "id" if arguments.report_to == "wandb" else "name"
        options = {key: file.read_text(), "resume": "allow"}
    config = {name: value for name, value in asdict(arguments).items() if value is not None}
    accelerator.init_trackers(arguments.run_name, config=config, init_kwargs={arguments.report_to: options})


def image_grid(images: torch.Tensor, columns: int | None = None, gap: int = 2) -> Image.Image:
    """`images` `(N, C, H, W)` in [-1, 1] on a white sheet, row by row; about square if `columns` is not given."""
    if images.ndim != 4 or not images.shape[1] or len(images) == 0:
        raise ValueError(f"images has shape {tuple(images.shape)}: it must be (N, C, H, W) with N of at least 1.")
    images = as_rgb(images)
    count, _, height, width = images.shape
    columns = columns or int(count**0.5 + 0.999)
    rows = -(-count // columns)
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, picture in enumerate(pixels.numpy()):
        row, column = divmod(index, columns)
        sheet.paste(Image.fromarray(picture), (column * (width + gap), row * (height + gap)))
    return sheet


def track_images(
    accelerator: "Accelerator", folder: Path, name: str, images: torch.Tensor, step: int, columns: int | None
) -> None:
    """Writes a grid to `folder/<name>-<step>.png` and gives it to the trackers that take pictures."""
    import numpy as np

    sheet = image_grid(images, columns)
    folder.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    sheet.save(picture, "PNG")
    write_file_atomically(folder / f"{name}-{step:07d}.png", picture.getvalue())
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(sheet)[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [sheet]}, step=step)
