"""Images read from a stream, in an order that can be continued from any step.

The shards are read one after another, in a new order in every epoch, and the samples of each run of `shuffle_block` rows
are shuffled within it. Both orders are drawn from the seed, so a position is described by the epoch, the shard, the
`datasets` state at the start of the current block, and the offset in the block: at most one block is read again to
continue. Every process reads the whole stream but decodes only its own part of each batch, so the samples of a step do not
depend on the number of processes.
"""

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


class _Block:
    """Consecutive rows of the stream in their shuffled order.

    Args:
        start (`dict`): where it begins: the `epoch`, the number of the `block` and of the `row` in the epoch, how many
            shards are done (`shard`), the `datasets` state within the next one (`source`; `None`: its start) and the
            rows that were read of it (`shard_row`).
        rows (`list`): `(name, example)` of every row; the name is the same in every epoch.
        order (`np.ndarray`): the permutation of the rows.
    """

    def __init__(self, start: dict, rows: list[tuple[str, dict]], order: np.ndarray):
        self.start = start
        self.rows = rows
        self.order = order


_BEGINNING = {"epoch": 0, "block": 0, "row": 0, "shard": 0, "source": None, "shard_row": 0}


class StreamingImageDataset:
    """Images from a `datasets.IterableDataset` whose rows hold `image` (undecoded) and, optionally, `label`.

    `read_batches` is what a training run uses; iterating over the data set gives the centre crops of one epoch, in order,
    without the broken images.

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
        micro, _ = micro_batch_sizes(batch_size, micro_batches, num_processes)
        (mine,) = process_slice(0, micro, 1, process_index, num_processes)
        positions = self._positions(state)
        with ThreadPoolExecutor(num_threads) as pool:
            while True:
                places = [next(positions) for _ in range(micro)]
                samples = list(pool.map(lambda place: self._sample(*place), [places[index] for index in mine]))
                block, offset = places[-1]
                yield samples, {**block.start, "offset": offset + 1}

    def _positions(self, state: dict | None) -> Iterator[tuple[_Block, int]]:
        offset = state["offset"] if state else 0
        for block in self._blocks(state):
            yield from ((block, position) for position in range(offset, len(block.rows)))
            offset = 0

    def _blocks(self, state: dict | None) -> Iterator[_Block]:
        """All blocks from `state` on, epoch after epoch."""
        start = dict(_BEGINNING) if state is None else {name: state[name] for name in _BEGINNING}
        while True:
            found = False
            for block in self._epoch_blocks(start):
                found = True
                yield block
            if not found and start["block"] == 0:
                raise ValueError("the stream is empty: it has no row.")
            start = {**_BEGINNING, "epoch": start["epoch"] + 1}

    def _epoch_blocks(self, start: dict) -> Iterator[_Block]:
        epoch, count = start["epoch"], self.rows.num_shards
        shards = np.random.default_rng((self.seed, epoch)).permutation(count)
        begin, rows = start, []

        def block() -> _Block:
            generator = np.random.default_rng((self.seed, epoch, begin["block"]))
            return _Block(begin, rows, generator.permutation(len(rows)))

        for shard_number in range(start["shard"], count):
            index = int(shards[shard_number])
            # a new object, even of a single shard: one that was given a state starts there in every later epoch
            shard = self.rows.shard(num_shards=count, index=index)
            shard_row = 0
            if shard_number == start["shard"] and start["source"] is not None:
                shard.load_state_dict(start["source"])
                shard_row = start["shard_row"]
            for example in shard:
                rows.append((f"row {shard_row} of shard {index}", example))
                shard_row += 1
                if len(rows) == self.shuffle_block:
                    yield block()
                    begin = {
                        "epoch": epoch,
                        "block": begin["block"] + 1,
                        "row": begin["row"] + len(rows),
                        "shard": shard_number,
                        "source": shard.state_dict(),
                        "shard_row": shard_row,
                    }
                    rows = []
        if rows:
            yield block()

    def _sample(self, block: _Block, offset: int) -> dict:
        """The sample at `offset` of the block's order; in place of a broken one, the next in the block that can be read."""
        passed = []
        for step in range(len(block.rows)):
            name, example = block.rows[block.order[(offset + step) % len(block.rows)]]
            pair = self._pair(example, name)
            if pair is not None:
                break
            passed.append(named(example["image"], name))
        else:
            raise ValueError(f"none of {len(passed)} consecutive images of the stream can be read; one: {passed[0]}.")
        row = block.start["row"] + int(block.order[offset])
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
