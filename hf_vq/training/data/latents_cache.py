"""The latents of a whole data set before quantization, computed once, for a denoiser to train on.

```python
write_latents(tokenizer, load_image_dataset(data, "train"), "outputs/latents/train", flip=True)
dataset = LatentsDataset("outputs/latents/train", random_flip=True)
dataset[0]  # {"latents": float32 (D, h, w), "label": int}
```

The folder holds Arrow files, which are mapped into memory and read as rows are needed, and `config.json`; it is
written as that of `hf_vq.training.data.indices_cache` is, by all processes together.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from .cache_identity import tokenizer_fingerprint
from .columns import draw_caption
from .shard_cache import CacheRequest, ShardFormat, whole_shards, write_cache


if TYPE_CHECKING:
    import pyarrow as pa

_LAYOUT = 2  # of the folder; raised when it changes


def _write_arrow(table: "pa.Table", file: Path) -> None:
    import pyarrow as pa

    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def _map_arrow(file: Path) -> "pa.Table":
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


def _read_arrow_schema(file: Path) -> "pa.Schema":
    return _map_arrow(file).schema


_FORMAT = ShardFormat("latents", "arrow", _write_arrow, _map_arrow, _read_arrow_schema, is_compressed=False)


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


class _LatentsEncoder(nn.Module):
    """The columns `latents` and, with `flip`, `latents_flipped` of a batch of samples."""

    def __init__(self, tokenizer: nn.Module, flip: bool):
        super().__init__()
        self.tokenizer, self.flip = tokenizer, flip

    def forward(self, samples: list[dict]) -> dict[str, np.ndarray]:
        pixels = torch.stack([sample["pixel_values"] for sample in samples])
        columns = {"latents": encode_latents(self.tokenizer, pixels)}
        if self.flip:
            columns["latents_flipped"] = encode_latents(self.tokenizer, pixels.flip(-1))
        return {name: latents.cpu().numpy() for name, latents in columns.items()}


def write_latents(
    tokenizer: nn.Module,
    dataset: Dataset,
    path: str | Path,
    flip: bool = False,
    batch_size: int = 64,
    rows_per_shard: int | None = None,
    num_workers: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Writes the latents of every image in float32, with the other fields of its sample, or what is missing of them;
    called by every process.

    Args:
        tokenizer: used in eval mode.
        dataset: `ImageDataset` or `StreamingImageDataset` (their centre crops are taken), or any map-style data set of
            dicts with `pixel_values`. Broken images get no row; their number is written in `config.json`.
        path: the folder.
        flip: also the latents of the mirrored images.
        batch_size: images that are encoded at a time.
        rows_per_shard: images per file; by default up to 4096, see `CacheRequest`.
        num_workers: processes that read images ahead (map-style data only).
        overwrite: replace the latents of another tokenizer or of other images.

    Raises:
        StaleIndicesError: the folder holds other latents, and `overwrite` is not set.
        OSError: the disk is full; of a map-style data set, before anything is written.
    """
    request = CacheRequest(
        _FORMAT,
        _LatentsEncoder(tokenizer, flip),
        dataset,
        {"layout": _LAYOUT, "tokenizer": tokenizer_fingerprint(tokenizer), "flip": flip},
        {},
        batch_size=batch_size,
        rows_per_shard=rows_per_shard,
        num_workers=num_workers,
        progress=progress,
    )
    write_cache(request, Path(path), overwrite)
    return Path(path)


class LatentsDataset(Dataset):
    """What `write_latents` has written, read from the disk as it is needed.

    Args:
        path: the folder.
        random_flip: in half of the cases the mirrored image's latents, drawn from `(seed, epoch, row)`.
        caption_column: of several captions in it, give one, drawn from `(seed, epoch, row)`.

    Attributes:
        labels (`np.ndarray` or `None`): all labels.
    """

    def __init__(self, path: str | Path, random_flip: bool = False, seed: int = 0, caption_column: str | None = None):
        info, files = whole_shards(_FORMAT, Path(path), "write_latents")
        if random_flip and not info["flip"]:
            raise ValueError(f"`random_flip` needs mirrored latents: {path} was written with flip=False.")
        tables = [_map_arrow(file) for file in files]
        names = ["latents", "latents_flipped"] if random_flip else ["latents"]
        self.grid = info["grids"]["latents"]
        self._columns = {name: [_rows_of(table, name, self.grid) for table in tables] for name in names}
        self._fields = [table.drop_columns([n for n in info["grids"] if n in table.column_names]) for table in tables]
        self._ends = np.cumsum([table.num_rows for table in tables])
        has_labels = "label" in tables[0].column_names
        self.labels = np.concatenate([table.column("label").to_numpy() for table in tables]) if has_labels else None
        self.random_flip = random_flip
        self.seed = seed
        self.caption_column = caption_column

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict:
        return self.sample(index)

    def sample(self, index: int, epoch: int = 0) -> dict:
        """`latents` float32 `(D, h, w)`, and the other fields."""
        if not 0 <= index < len(self):
            raise IndexError(f"index={index}: there are the rows 0 to {len(self) - 1}.")
        mirrored = self.random_flip and np.random.default_rng((self.seed, epoch, index)).random() < 0.5
        shard = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[shard - 1]) if shard else 0)
        latents = self._columns["latents_flipped" if mirrored else "latents"][shard][row]
        sample = {"latents": torch.from_numpy(latents.copy())}
        if self._fields[shard].num_columns:
            sample |= self._fields[shard].slice(row, 1).to_pylist()[0]
        if self.caption_column is not None:
            sample[self.caption_column] = draw_caption(sample[self.caption_column], self.seed, epoch, index)
        return sample


def _rows_of(table: "pa.Table", name: str, grid: list[int]) -> np.ndarray:
    """A column of a mapped file as an array on that file."""
    (chunk,) = table.column(name).chunks or [None]
    if chunk is None:
        return np.empty((0, *grid), np.float32)
    return chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, *grid)


__all__ = ["LatentsDataset", "encode_latents", "write_latents"]
