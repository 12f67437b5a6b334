"""The latents of a whole data set before quantization, computed once, for a denoiser to train on.

```python
write_latents(tokenizer, load_image_dataset(data, "train"), "outputs/latents/train", flip=True)
dataset = LatentsDataset("outputs/latents/train", random_flip=True)
dataset[0]  # {"latents": float32 (D, h, w), "label": int}
```
"""

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ...distributed import from_main_process
from ..checkpointing import (
    draft_folder,
    find_damage,
    preserved_random_state,
    publish_folder,
    remove_folder,
    write_manifest,
)
from .cache_identity import (
    StaleIndicesError,
    cache_lock,
    images_fingerprint,
    read_sample,
    tokenizer_fingerprint,
)
from .columns import draw_caption
from .image_datasets import collate


logger = logging.getLogger(__name__)

_LAYOUT = 1  # of the folder; raised when it changes


@torch.no_grad()
def encode_latents(tokenizer: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Latents `(B, D, h, w)` before quantization, not scaled, float32.

    Raises:
        ValueError: the tokenizer has several levels.
    """
    latents = tokenizer.encode(pixel_values.to(tokenizer.device, tokenizer.dtype)).latents
    if not isinstance(latents, torch.Tensor):
        raise ValueError(f"`tokenizer` must have one level of codes, got a {type(tokenizer).__name__}.")
    return latents.float()


def write_latents(
    tokenizer: nn.Module,
    dataset: Dataset,
    path: str | Path,
    flip: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    is_main_process: bool = True,
) -> Path:
    """Writes the latents of every image in float32, with the other fields of its sample; called by every process.

    The folder appears complete or not at all. One that is there already must hold what is asked for.

    Args:
        tokenizer: used in eval mode.
        dataset (`ImageDataset`): its centre crops are taken; a broken image is replaced by the next.
        path: the folder.
        flip: also the latents of the mirrored images.
        is_main_process: the process that writes.

    Raises:
        StaleIndicesError: the folder holds the latents of another tokenizer or of other images.
        ValueError: the data set is a stream.
    """
    path = Path(path)
    if not hasattr(dataset, "__len__"):
        raise ValueError("`dataset` must have a length: the latents of a stream are not cached.")
    error = None
    if is_main_process:
        wanted = {
            "layout": _LAYOUT,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "images": images_fingerprint(dataset),
            "flip": flip,
        }
        with cache_lock(path, is_writer=True):
            known = _read_undamaged(path)
            stale = [name for name, value in wanted.items() if known is not None and known.get(name) != value]
            if stale:
                error = (
                    f"the latents in {path} differ in {', '.join(stale)} from what is asked for: give another folder."
                )
            elif known is None:
                with preserved_random_state():
                    _write(tokenizer.eval(), dataset, path, wanted, batch_size, num_workers)
    error = from_main_process(error)
    if error is not None:
        raise StaleIndicesError(error)
    return path


def _read_undamaged(path: Path) -> dict | None:
    """What `config.json` says of a whole cache; one that is damaged is named and removed."""
    if not path.exists():
        return None
    damage = find_damage(path)
    if damage is None:
        return json.loads((path / "config.json").read_text())
    logger.warning("Writing the latents in %s again: %s.", path, damage)
    remove_folder(path)
    return None


def _new_array(file: Path, shape: tuple[int, ...]) -> np.memmap:
    """An array on the disk whose space is taken at once: a full disk would end the process without a word later."""
    size = 4 * int(np.prod(shape))
    array = np.lib.format.open_memmap(file, "w+", dtype=np.float32, shape=shape)
    try:
        with open(file, "r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    except OSError as error:
        free = shutil.disk_usage(file.parent).free
        reason = f"the latents take {size} bytes, and {free} are free ({error.strerror})"
        raise OSError(error.errno, reason, str(file)) from error
    return array


def _write(tokenizer, dataset, path: Path, wanted: dict, batch_size: int, num_workers: int) -> None:
    from tqdm.auto import tqdm

    draft = draft_folder(path)
    loader = DataLoader(_ReadableImages(dataset), batch_size=batch_size, num_workers=num_workers, collate_fn=collate)
    arrays, fields, start = {}, {}, 0
    for batch in tqdm(loader, desc="latents", unit="batch", mininterval=1.0):
        pixels = batch.pop("pixel_values")
        for suffix in ("", "_flipped") if wanted["flip"] else ("",):
            latents = encode_latents(tokenizer, pixels.flip(-1) if suffix else pixels).cpu().numpy()
            if start == 0:
                shape = (len(dataset), *latents.shape[1:])
                file = draft / f"latents{suffix}.npy"
                arrays[suffix] = _new_array(file, shape)
            arrays[suffix][start : start + len(latents)] = latents
        for name, values in batch.items():
            fields.setdefault(name, []).extend(values.tolist() if torch.is_tensor(values) else values)
        start += len(pixels)
    for array in arrays.values():
        array.flush()
    (draft / "fields.json").write_text(json.dumps(fields))
    (draft / "config.json").write_text(json.dumps(wanted, indent=1))
    write_manifest(draft)
    publish_folder(draft, path)


class _ReadableImages(Dataset):
    """Without augmentation and with all captions; in place of a broken image, the next that can be read."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        for row in range(index, index + len(self)):
            sample = read_sample(self.dataset, row % len(self))
            if sample is not None:
                return sample
        raise ValueError(f"none of the {len(self)} images of the data set can be read.")


class LatentsDataset(Dataset):
    """What `write_latents` has written, read from the disk as it is needed.

    Args:
        path: the folder.
        random_flip: in half of the cases the mirrored image's latents, drawn from `(seed, epoch, row)`.

    Attributes:
        labels (`np.ndarray` or `None`): all labels.
    """

    def __init__(self, path: str | Path, random_flip: bool = False, seed: int = 0, caption_column: str | None = None):
        path = Path(path)
        damage = find_damage(path)
        if damage is not None:
            raise ValueError(f"`path` must hold whole latents: {damage}. write_latents writes them again.")
        flipped = path / "latents_flipped.npy"
        if random_flip and not flipped.exists():
            raise ValueError(f"`random_flip` needs mirrored latents: {path} was written with flip=False.")
        self.latents = np.load(path / "latents.npy", mmap_mode="r")
        self.flipped = np.load(flipped, mmap_mode="r") if random_flip else None
        self.fields = json.loads((path / "fields.json").read_text())
        self.labels = np.asarray(self.fields["label"]) if "label" in self.fields else None
        self.seed = seed
        self.caption_column = caption_column

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict:
        return self.sample(index)

    def sample(self, index: int, epoch: int = 0) -> dict:
        """`latents` float32 `(D, h, w)`, and the other fields."""
        if not 0 <= index < len(self):
            raise IndexError(f"index={index}: there are the rows 0 to {len(self) - 1}.")
        mirrored = self.flipped is not None and np.random.default_rng((self.seed, epoch, index)).random() < 0.5
        latents = torch.from_numpy(np.array((self.flipped if mirrored else self.latents)[index]))
        sample = {"latents": latents, **{name: values[index] for name, values in self.fields.items()}}
        if self.caption_column is not None:
            sample[self.caption_column] = draw_caption(sample[self.caption_column], self.seed, epoch, index)
        return sample


__all__ = ["LatentsDataset", "encode_latents", "write_latents"]
