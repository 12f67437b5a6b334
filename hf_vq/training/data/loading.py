"""Batches of one process of a run, from a position in the data on."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .samplers import ProcessBatchSampler, SampleOrder
from .streaming import StreamingImageDataset


class _SamplesByEpoch(Dataset):
    """Reads `(epoch, index)`; a data set without `sample(index, epoch)` is the same in every epoch."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        return self.dataset.sample(index, epoch) if hasattr(self.dataset, "sample") else self.dataset[index]


class _CollatedStream(IterableDataset):
    """`(batch, state after it)` from `read_batches`, so that a worker process can read ahead."""

    def __init__(self, dataset: StreamingImageDataset, collate_fn: Callable, state: dict | None, plan: dict):
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.state = state
        self.plan = plan

    def __iter__(self) -> Iterator[tuple]:
        for samples, state in self.dataset.read_batches(self.state, **self.plan):
            yield self.collate_fn(samples), state


def micro_batches(
    dataset: Dataset,
    collate_fn: Callable,
    plan: dict,
    position: int,
    steps: int,
    seed: int,
    shuffle: bool,
    stream_state: dict | None,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[tuple]:
    """Yields `(micro-batch, stream state after it)`; the state is `None` for a map-style data set.

    Args:
        plan (`dict`): `batch_size`, `micro_batches`, `process_index` and `num_processes`, see `process_slice`.
        position (`int`), stream_state (`dict`): where a map-style data set, or a stream, is continued.
        steps (`int`): optimizer steps that are left.
    """
    # A generator of their own: the loaders draw from the global one at every start, which a resumed run does once
    # more.
    options = {"pin_memory": pin_memory, "generator": torch.Generator()}
    if isinstance(dataset, StreamingImageDataset):
        stream = _CollatedStream(dataset, collate_fn, stream_state, {**plan, "num_threads": max(1, num_workers)})
        # One process reads the stream; the workers asked for are its threads.
        yield from DataLoader(stream, batch_size=None, num_workers=min(1, num_workers), **options)
        return
    sampler = ProcessBatchSampler(SampleOrder(len(dataset), seed, shuffle), position, steps, **plan)
    loader = DataLoader(
        _SamplesByEpoch(dataset), batch_sampler=sampler, collate_fn=collate_fn, num_workers=num_workers, **options
    )
    for batch in loader:
        yield batch, None


def move_to_device(batch: Any, device: torch.device):
    """Moves the tensors of a batch (a tensor, or a dict, list or tuple of them) to a device."""
    if torch.is_tensor(batch):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: move_to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(move_to_device(value, device) for value in batch)
    return batch
