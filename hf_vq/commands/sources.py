"""What the subcommands are given: models, image files, devices."""

import argparse
import glob
import inspect
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..folders import files_below
from ..loading import image_processor_of, load


if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel


def check_call(pipeline: Any, names: Iterable[str], flag: str, own: tuple[str, ...] = ()) -> None:
    """A ValueError for an argument that a pipeline's call does not take.

    Args:
        pipeline: whose call it is.
        names: of the arguments.
        flag: how the command line writes one, with `{}` for its name.
        own: arguments that the subcommand gives itself.
    """
    known = inspect.signature(type(pipeline).__call__).parameters
    for name in names:
        if name not in known or name in own:
            raise ValueError(f"{flag.format(name)} has no meaning for a {type(pipeline).__name__}.")


def is_indices(source: Path) -> bool:
    """Whether a folder holds indices, or a folder of them for each split."""
    return any(source.glob("indices-*.parquet")) or any(source.glob("*/indices-*.parquet"))


def load_tokenizer(options: argparse.Namespace):
    """The tokenizer `options.model`, or that of the pipeline `options.model`, on the device."""
    model = load(options.model)
    model = getattr(model, "vqvae", model)
    if not hasattr(model, "decode_indices"):
        raise ValueError(
            f"`{options.model}` must be a tokenizer or a pipeline that has one, got {type(model).__name__}."
        )
    return model.to(device(options)).eval()


def device(options: argparse.Namespace) -> str:
    """`--device`, once something was placed on it, or else a GPU if there is one."""
    import torch

    if options.device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without the device
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"`--device` must be one that torch can use here, got {options.device!r}: {reason}"
        ) from error
    return options.device


def check_output_file(path: Path) -> None:
    """Refuses a folder where a file is to be written, before the work that would be lost."""
    if path.is_dir():
        raise ValueError(f"`--output` must be a file, got the folder {str(path)!r}.")


def image_files(given: list[str], flag: str = "IMAGE") -> list[Path]:
    """The image files that arguments name: themselves, those in folders, matches of patterns, or a list by ``-``.

    Args:
        given: the arguments.
        flag: what the command line calls them.

    Raises:
        ValueError: a folder without an image, a pattern without a match, or nothing at all.
    """
    from PIL import Image

    endings = Image.registered_extensions()  # imports Pillow's formats
    found = []
    for name in [line for item in given for line in (sys.stdin.read().splitlines() if item == "-" else [item])]:
        if not name.strip():
            continue  # an empty path would be the working directory
        path = Path(name)
        if path.is_dir():
            inside = [file for file in files_below(path) if file.suffix.lower() in endings]
            if not inside:
                raise ValueError(
                    f"`{flag}` must name a folder that holds images, got `{path}`, where no file ends as one."
                )
            found += inside
        elif not path.exists() and glob.has_magic(name):
            matches = sorted(Path(match) for match in glob.glob(name, recursive=True) if Path(match).is_file())
            if not matches:
                raise ValueError(f"`{flag}` must be a pattern that matches a file, got `{name}`, which matches none.")
            found += matches
        else:
            found.append(path)
    if not found:
        raise ValueError(f"`{flag}` must name at least one file, got none.")
    return found


def read_images(given: list[str], flag: str) -> tuple[list["Image.Image"], list[str]]:
    """The images that an option names as `image_files` says, and the names of their files.

    Raises:
        ValueError: a file that is no image.
    """
    from PIL import Image, ImageOps

    images, names = [], []
    for path in image_files(given, flag):
        try:
            with Image.open(path) as image:
                images.append(ImageOps.exif_transpose(image))  # which reads it
        except Exception as error:  # decoders fail in many ways
            raise ValueError(f"`{flag}` must be an image file, got {str(path)!r}: {error}") from error
        names.append(path.stem)
    return images, names


class ImageBatches:
    """The image files in batches of `pixel_values` `(B, C, H, W)` on the model's device, prepared as its folder says.

    A file that cannot be read is named on standard error and left out.

    Args:
        options: `images`, `size`, `batch_size` and `model` of the command.
        model: the tokenizer.

    Attributes:
        skipped: how many files could not be read so far.
    """

    def __init__(self, options: argparse.Namespace, model: "PreTrainedModel"):
        self.processor = image_processor_of(options.model, model.config)
        self.size = {} if options.size is None else {"size": options.size}
        self.files, self.batch_size, self.model = image_files(options.images), options.batch_size, model
        self.skipped = 0

    def __iter__(self) -> Iterator[tuple[list[Path], object]]:
        """Pairs of the files of a batch and their pixel values."""
        import torch
        from tqdm.auto import tqdm

        paths, values = [], []
        for path in tqdm(self.files, unit="image", disable=len(self.files) <= self.batch_size):
            pixel_values = self._read(path)
            if pixel_values is None:
                self.skipped += 1
                continue
            if values and pixel_values.shape != values[0].shape:  # without a crop, images keep their sizes
                yield paths, self._on_device(torch.stack(values))
                paths, values = [], []
            paths.append(path)
            values.append(pixel_values)
            if len(values) == self.batch_size:
                yield paths, self._on_device(torch.stack(values))
                paths, values = [], []
        if values:
            yield paths, self._on_device(torch.stack(values))
        if self.skipped == len(self.files):
            raise ValueError(f"None of {len(self.files)} images could be read.")
        if self.skipped:
            print(f"skipped {self.skipped} of {len(self.files)} images that could not be read", file=sys.stderr)

    def _read(self, path: Path):
        from PIL import Image

        try:
            with Image.open(path) as image:
                return self.processor(image, return_tensors="pt", **self.size).pixel_values[0]
        except Exception as error:  # decoders fail in many ways; each is named, counted, and ends in exit code 1
            reason = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
            print(f"{path}: skipped, not a readable image ({reason})", file=sys.stderr)
            return None

    def _on_device(self, pixel_values):
        return pixel_values.to(self.model.device, self.model.dtype)


def check_picture(path: Path) -> None:
    """A ValueError for a file name that Pillow cannot write a picture to, before the work is done."""
    from PIL import Image

    check_output_file(path)
    Image.init()
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"`--output` must end as an image file does, such as .png, got {str(path)!r}.")


def write_image(image: "Image.Image", path: Path, announce: bool = True) -> None:
    """Saves a PIL image, with the folders above it, and prints where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    if announce:
        print(path)


def announce(options: argparse.Namespace, found: dict, lines: Iterable[object] | None = None) -> None:
    """Prints what a subcommand has made, as JSON if it is asked for; else `lines`, by default the values."""
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print(*(found.values() if lines is None else lines), sep="\n")
