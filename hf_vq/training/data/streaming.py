"""Images read from a stream, in an order that can be continued from any step.

The shards are read one after another, in a new order in every epoch, and the samples of each run of `shuffle_block`
rows are shuffled within it. Both orders are drawn from the seed, so a position is described by the epoch, the shards
that are left of it, the `datasets` state at the start of the current block, and the offset in the block: at most one
block is read again to continue.

With at least as many shards as processes, every process reads its own shards, every N-th of the epoch's order. With
fewer, every process reads the whole stream and decodes its part of each batch.

The shards are dealt out here and not by `datasets.distributed.split_dataset_by_node`, which gives a process the same
ones in every epoch and reads everything N times where their number is no multiple of N; nor is torchdata's
`StatefulDataLoader` used: its state is that of its workers, so that it can be continued neither with other workers nor
by other processes.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from .columns import CONDITION, NO_LABEL, draw_caption, is_missing, missing_error
from .conditions import ConditionReader, decode_pair, seen_through
from .image_decoding import (
    ANY_PATH,
    BrokenImageError,
    BrokenImages,
    PathRules,
    as_size,
    choose_window,
    named,
)
from .samplers import micro_batch_sizes, process_slice


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)


class _Block:
    """Consecutive rows of the stream in their shuffled order.

    Args:
        start (`dict`): where it begins: the `epoch`, the number of the `block` in the epoch, and `shards`, what the
            process has still to read in the epoch: `[number, datasets state (None: its start), rows that were read]`
            of each.
        end (`dict`): the same of the next block.
        rows (`list`): `(shard, row in the shard, example)` of each.
        order (`np.ndarray`): the permutation of the rows.
    """

    def __init__(self, start: dict, end: dict, rows: list[tuple[int, int, dict]], order: np.ndarray):
        self.start = start
        self.end = end
        self.rows = rows
        self.order = order


class StreamingImageDataset:
    """Images from a `datasets.IterableDataset` whose rows hold `image` (undecoded) and, optionally, `label`.

    `read_batches` is what a training run uses; iterating over the data set gives the centre crops of one epoch, in
    order, without the broken images.

    Args:
        rows (`datasets.IterableDataset`): the stream.
        shuffle_block (`int`): samples are shuffled within blocks of so many rows, which are held in memory undecoded.
        resolution, crop, random_flip, seed, class_names, channels, caption_column, rules, condition_reader: as in
            `ImageDataset`.
        allow_missing (`bool`): rows may lack their label, which is -1 then, or their caption.

    Attributes:
        broken (`BrokenImages`): the broken images met so far in this process.
    """

    def __init__(
        self,
        rows: "datasets.IterableDataset",
        resolution: int | Sequence[int],
        shuffle_block: int = 1000,
        crop: str = "center",
        random_flip: bool = False,
        seed: int = 0,
        class_names: list[str] | None = None,
        channels: int = 3,
        caption_column: str | None = None,
        rules: PathRules = ANY_PATH,
        allow_missing: bool = False,
        condition_reader: ConditionReader | None = None,
    ):
        self.rows = rows
        self.condition_reader = condition_reader
        self.size = as_size(resolution)
        self.channels = channels
        self.caption_column = caption_column
        self.rules = rules
        self.allow_missing = allow_missing
        self.shuffle_block = shuffle_block
        self.crop = crop
        self.random_flip = random_flip
        self.seed = seed
        self.class_names = class_names
        self.broken = BrokenImages()

    def __iter__(self) -> Iterator[dict]:
        for row, example in enumerate(self.rows):
            sample = self.read(example, f"row {row}")
            if sample is not None:
                yield sample

    def read(self, example: dict, name: str) -> dict | None:
        """The centre crop of one row of `self.rows` with its other fields, or `None` if the image is broken.

        `name` is what a broken image without a path is called.
        """
        pair = self._pair(example, name)
        if pair is None:
            return None
        window = choose_window(pair[0], self.size)
        return {**seen_through(window, *pair, self.condition_reader), **self._fields(example, name)}

    def num_readers(self, num_processes: int) -> int:
        """How many parts the stream is read in: one for each process, or a single one that all of them read."""
        return num_processes if self.rows.num_shards >= num_processes else 1

    def continued_state(self, states: list[dict], process_index: int, num_processes: int) -> dict:
        """Where a process goes on, given the states of all processes of a checkpoint.

        With as many readers as there were, exactly there. Otherwise the blocks that were begun are left, and the
        shards that were still to be read in the epoch are dealt out anew.
        """
        readers = self.num_readers(num_processes)
        if states[0]["readers"] == readers:
            return states[process_index if readers > 1 else 0]
        if process_index == 0:
            logger.warning(
                "The stream was read in %d parts and is now read in %d: it goes on at the next block of each.",
                states[0]["readers"],
                readers,
            )
        ends = [state["next"] for state in states[: states[0]["readers"]]]
        shards = [shard for end in ends for shard in end["shards"]]
        begin = {
            "epoch": max(end["epoch"] for end in ends),
            # a number that no process has had in this epoch: the order of a block is drawn from it
            "block": 1 + max(end["block"] for end in ends),
            "shards": shards[process_index % readers :: readers],
        }
        return {**begin, "offset": 0, "readers": readers, "next": begin}

    def read_batches(
        self,
        state: dict | None,
        batch_size: int,
        micro_batches: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
        num_threads: int = 1,
    ) -> Iterator[tuple[list[dict], dict]]:
        """Endlessly yields `(samples of this process's micro-batch, state after it)`.

        Args:
            state: what was yielded with the last batch that was used, or `None` for the start.
            batch_size: samples per step over all processes and micro-batches.
            num_threads: how many images are decoded at a time.
        """
        micro, per_process = micro_batch_sizes(batch_size, micro_batches, num_processes)
        readers = self.num_readers(num_processes)
        if readers == num_processes:
            taken, mine = per_process, range(per_process)
        else:
            taken = micro
            (mine,) = process_slice(0, micro, 1, process_index, num_processes)
            if process_index == 0 and state is None:
                logger.warning(
                    "The stream has fewer shards (%d) than there are processes (%d): each of them reads all of it.",
                    self.rows.num_shards,
                    num_processes,
                )
        positions = self._positions(state, process_index % readers, readers)
        with ThreadPoolExecutor(num_threads) as pool:
            while True:
                places = [next(positions) for _ in range(taken)]
                samples = list(pool.map(lambda place: self._sample(*place), [places[index] for index in mine]))
                block, offset = places[-1]
                yield samples, {**block.start, "offset": offset + 1, "readers": readers, "next": block.end}

    def _positions(self, state: dict | None, reader: int, readers: int) -> Iterator[tuple[_Block, int]]:
        offset = state["offset"] if state else 0
        for block in self._blocks(state, reader, readers):
            yield from ((block, position) for position in range(offset, len(block.rows)))
            offset = 0

    def _blocks(self, state: dict | None, reader: int, readers: int) -> Iterator[_Block]:
        """All blocks of one reader from `state` on, epoch after epoch."""
        start = self._epoch_start(0, reader, readers)
        if state is not None:
            start = {name: state[name] for name in start}
        empty_epochs = 0
        while True:
            found = False
            for block in self._epoch_blocks(start, reader):
                found = True
                yield block
            # the part of one reader may be without a row in one epoch, hardly in so many
            empty_epochs = 0 if found or start["block"] else empty_epochs + 1
            if empty_epochs == (1 if readers == 1 else 100):
                raise ValueError("the stream is empty: it has no row.")
            start = self._epoch_start(start["epoch"] + 1, reader, readers)

    def _epoch_start(self, epoch: int, reader: int, readers: int) -> dict:
        shards = np.random.default_rng((self.seed, epoch)).permutation(self.rows.num_shards)
        return {"epoch": epoch, "block": 0, "shards": [[int(shard), None, 0] for shard in shards[reader::readers]]}

    def _epoch_blocks(self, start: dict, reader: int) -> Iterator[_Block]:
        epoch, count = start["epoch"], self.rows.num_shards
        begin, rows = start, []

        def block(end: dict) -> _Block:
            generator = np.random.default_rng((self.seed, epoch, begin["block"], reader))
            return _Block(begin, end, rows, generator.permutation(len(rows)))

        for position, (index, source, rows_read) in enumerate(start["shards"]):
            later = start["shards"][position + 1 :]
            # a new object, even of a single shard: one that was given a state starts there in every later epoch
            shard = self.rows.shard(num_shards=count, index=index)
            if source is not None:
                shard.load_state_dict(source)
            for example in shard:
                rows.append((index, rows_read, example))
                rows_read += 1
                if len(rows) == self.shuffle_block:
                    left = [[index, shard.state_dict(), rows_read], *later]
                    end = {"epoch": epoch, "block": begin["block"] + 1, "shards": left}
                    yield block(end)
                    begin, rows = end, []
        if rows:
            yield block({"epoch": epoch, "block": begin["block"] + 1, "shards": []})

    def _sample(self, block: _Block, offset: int) -> dict:
        """The sample at `offset` of the block's order; in place of a broken one, the next in the block that can be
        read.
        """
        passed = []
        for step in range(len(block.rows)):
            shard, row, example = block.rows[block.order[(offset + step) % len(block.rows)]]
            name = f"row {row} of shard {shard}"
            pair = self._pair(example, name)
            if pair is not None:
                break
            passed.append(named(example["image"], name))
        else:
            raise ValueError(f"none of {len(passed)} consecutive images of the stream can be read; one: {passed[0]}.")
        shard, row, _ = block.rows[block.order[offset]]
        row += shard << 40  # one number for each row of the stream, whoever reads it
        generator = np.random.default_rng((self.seed, block.start["epoch"], row))
        window = choose_window(pair[0], self.size, self.crop, self.random_flip, generator)
        sample = {**seen_through(window, *pair, self.condition_reader), **self._fields(example, name)}
        if self.caption_column is not None:
            caption = draw_caption(sample[self.caption_column], self.seed, block.start["epoch"], row)
            sample[self.caption_column] = caption
        if passed:
            sample["broken_images"] = tuple(passed)
        return sample

    def _pair(self, example: dict, name: str) -> tuple | None:
        try:
            return decode_pair(example, self.channels, self.rules, self.condition_reader)
        except BrokenImageError as error:
            self.broken.add(named(example["image"], name), error)
            return None

    def _fields(self, example: dict, name: str) -> dict:
        fields = {column: value for column, value in example.items() if column not in ("image", CONDITION)}
        for column in filter(None, ("label" if "label" in fields else None, self.caption_column)):
            if is_missing(fields[column]) and not self.allow_missing:
                raise missing_error(column, named(example["image"], name))
        if "label" in fields:
            fields["label"] = NO_LABEL if fields["label"] is None else int(fields["label"])
        return fields
