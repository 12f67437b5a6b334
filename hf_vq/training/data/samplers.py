"""Which sample stands where: the order of the data as a pure function of the seed and the position.

A run reads one endless sequence of samples: a permutation of the data set for every epoch, drawn from `(seed, epoch)`.
A *position* counts samples since the first step, over all processes. Nothing here has a state, so a run that resumes
at position `p`, with any number of processes or workers, meets the samples that the unbroken run would have met.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np


class SampleOrder:
    """The sample at each position of an endless, shuffled sequence of epochs.

    Args:
        size (`int`): the number of samples in the data set.
        seed (`int`): every epoch's permutation is drawn from `(seed, epoch)`.
        shuffle (`bool`): without it, every epoch runs from 0 to `size - 1`.
    """

    def __init__(self, size: int, seed: int = 0, shuffle: bool = True):
        if size < 1:
            raise ValueError(f"the data set is empty (size={size}): at least one sample is needed.")
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.size)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """`(epoch, index)` of the sample at `position`."""
        epoch, offset = divmod(position, self.size)
        return epoch, int(self._permutation(epoch)[offset]) if self.shuffle else offset


def process_slice(start: int, batch_size: int, micro_batches: int, process_index: int, num_processes: int):
    """The positions that one process reads of the global batch `[start, start + batch_size)`.

    The global batch is cut into `micro_batches` equal runs of positions, and each of these into `num_processes`: the
    samples of a step do not depend on either number.

    Returns:
        `list[range]`: one range of positions for every micro-batch.
    """
    micro, per_process = micro_batch_sizes(batch_size, micro_batches, num_processes)
    firsts = (start + index * micro + process_index * per_process for index in range(micro_batches))
    return [range(first, first + per_process) for first in firsts]


def micro_batch_sizes(batch_size: int, micro_batches: int, num_processes: int) -> tuple[int, int]:
    """`(samples per micro-batch over all processes, samples per micro-batch and process)`, or a `ValueError`."""
    parts = micro_batches * num_processes
    if batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"train_batch_size={batch_size} is the number of samples per optimizer step over all "
            f"processes: it must be "
            f"a positive multiple of gradient_accumulation_steps × processes = {micro_batches} × {num_processes} = "
            f"{parts}."
        )
    return batch_size // micro_batches, batch_size // parts


class ProcessBatchSampler:
    """Yields lists of `(epoch, index)`, one list per micro-batch of this process, for steps `[first, last)`.

    Args:
        order (`SampleOrder`): the sequence that is read.
        position (`int`): the position at which the first step starts.
        steps (`int`): how many optimizer steps to yield.
        batch_size (`int`): samples per step over all processes and micro-batches.
        micro_batches, process_index, num_processes (`int`): see `process_slice`.
    """

    def __init__(
        self,
        order: SampleOrder,
        position: int,
        steps: int,
        batch_size: int,
        micro_batches: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        micro_batch_sizes(batch_size, micro_batches, num_processes)
        self.order = order
        self.position = position
        self.steps = steps
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.process_index = process_index
        self.num_processes = num_processes

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.steps):
            start = self.position + step * self.batch_size
            for positions in process_slice(
                start, self.batch_size, self.micro_batches, self.process_index, self.num_processes
            ):
                yield [self.order[position] for position in positions]
