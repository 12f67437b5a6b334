import itertools
import json
import logging

import datasets
import pytest
import torch

from hf_vq.training.data.image_datasets import collate
from hf_vq.training.data.loading import micro_batches
from hf_vq.training.data.streaming import StreamingImageDataset
from tests.training.data.image_rows import encoded, expected_pixels, make_rows, open_stream, write_shards


def read(dataset, batches, state=None, **plan):
    """The first batches as `(labels, bytes of the pixels)`, and the states."""
    found = list(itertools.islice(dataset.read_batches(state, **{"batch_size": 4, **plan}), batches))
    contents = [
        [(sample["label"], sample["pixel_values"].numpy().tobytes()) for sample in samples] for samples, _ in found
    ]
    return contents, [state for _, state in found]


@pytest.fixture(scope="module", params=["shards", "one file", "saved", "limited"])
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "data"
    if request.param == "saved":
        make_rows(25).save_to_disk(folder)
        return str(folder), {}
    if request.param == "limited":
        return write_shards(folder, 2, 40), {"max_samples": 25}
    return write_shards(folder, 1 if request.param == "one file" else 3), {}


def test_every_epoch_has_every_sample_in_another_order(source):
    contents, _ = read(open_stream(source[0], **source[1]), 25)  # 100 samples: 4 epochs
    labels = [label for batch in contents for label, _ in batch]
    epochs = [labels[start : start + 25] for start in range(0, 100, 25)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 25 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_stream_continues_from_any_batch(source):
    """Also across the end of an epoch, and from a state that went through JSON, as in a checkpoint."""
    options = {"crop": "random", "random_flip": True, **source[1]}
    contents, states = read(open_stream(source[0], **options), 24)
    for stop in range(0, 20, 3):
        state = json.loads(json.dumps(states[stop]))
        assert read(open_stream(source[0], **options), 4, state)[0] == contents[stop + 1 : stop + 5]


def test_processes_and_micro_batches_share_a_batch_of_few_shards(tmp_path):
    options = {"crop": "random", "random_flip": True}
    folder = write_shards(tmp_path / "data", 1)
    expected, states = read(open_stream(folder, **options), 12)
    plan = {"micro_batches": 2, "num_processes": 2, "num_threads": 3}
    shares = [read(open_stream(folder, **options), 24, process_index=process, **plan) for process in range(2)]
    for step, whole in enumerate(expected):
        parts = [shares[process][0][2 * step + micro] for micro in range(2) for process in range(2)]
        assert sum(parts, []) == whole
        assert shares[0][1][2 * step + 1] == shares[1][1][2 * step + 1] == states[step]


def shares(dataset, batches, num_processes, states=None, **plan):
    """What each process reads of steps of 4 samples, and its last state."""
    found = []
    for process in range(num_processes):
        state = None if states is None else dataset.continued_state(states, process, num_processes)
        found.append(read(dataset, batches, state, process_index=process, num_processes=num_processes, **plan))
    return [contents for contents, _ in found], json.loads(json.dumps([states[-1] for _, states in found]))


def labels_of(contents):
    return [label for process in contents for batch in process for label, _ in batch]


def test_every_process_reads_its_own_shards(tmp_path):
    dataset = open_stream(write_shards(tmp_path / "data", 4, 32), crop="random", random_flip=True)
    contents, states = shares(dataset, 8, 2)  # 32 samples: one epoch
    assert sorted(labels_of(contents)) == list(range(32))
    parts = [{label // 8 for label, _ in sum(process, [])} for process in contents]  # 8 rows in each shard
    assert [len(part) for part in parts] == [2, 2] and not parts[0] & parts[1]
    one = dict(sum(read(dataset, 8)[0], []))
    assert dict(sum(contents[0] + contents[1], [])) == one  # the same crops, whoever reads a row


@pytest.mark.parametrize("stop", range(1, 14, 3))
def test_the_same_number_of_processes_continues_exactly(tmp_path, stop):
    dataset = open_stream(write_shards(tmp_path / "data", 5, 30), crop="random")
    whole, _ = shares(dataset, 18, 2)
    _, states = shares(dataset, stop, 2)
    rest, _ = shares(dataset, 18 - stop, 2, states)
    assert rest == [process[stop:] for process in whole]


@pytest.mark.parametrize("before, after", [(2, 4), (4, 1), (1, 2)])
def test_another_number_of_processes_continues_at_the_next_blocks(tmp_path, caplog, before, after):
    """Of the epoch, no row is read twice, and only those of the blocks that were begun are left."""
    dataset = open_stream(write_shards(tmp_path / "data", 8, 64))  # blocks of 4
    contents, states = shares(dataset, 5, before, batch_size=4)
    with caplog.at_level(logging.WARNING):
        continued = [dataset.continued_state(states, process, after) for process in range(after)]
    assert caplog.text.count(f"read in {before} parts and is now read in {after}") == 1
    seen = labels_of(contents)
    assert len(seen) == 20 == len(set(seen))
    rest = []
    for process, state in enumerate(continued):
        for block in dataset._blocks(state, process, after):
            if block.start["epoch"] > 0:
                break
            rest += [example["label"] for _, _, example in block.rows]
    assert len(rest) == len(set(rest)) and not set(rest) & set(seen)
    assert 64 - before * 3 <= len(rest) + len(seen) <= 64


def counted_stream(folder, opened):
    def generate(files):
        for file in files:
            content = file.read_bytes()
            opened.append(len(content))
            for number in range(content.count(b";")):
                yield {"image": {"bytes": encoded(number), "path": None}, "label": number}

    files = []
    for shard in range(16):
        files.append(folder / f"{shard}.txt")
        files[-1].write_bytes(b";" * 8)
    rows = datasets.IterableDataset.from_generator(generate, gen_kwargs={"files": files})
    return StreamingImageDataset(rows, 8, shuffle_block=8)


@pytest.mark.parametrize("num_processes", [1, 2, 4, 3])
def test_together_the_processes_read_the_data_once(tmp_path, num_processes):
    opened = []
    dataset = counted_stream(tmp_path, opened)
    batches = -(-16 // num_processes)  # of 8 samples, one shard, in each process
    for process in range(num_processes):
        read(dataset, batches, batch_size=8 * num_processes, process_index=process, num_processes=num_processes)
    assert sum(opened) == 8 * batches * num_processes  # 3 processes read 18 shards: two of them begin the next epoch


def test_a_worker_gives_the_same_batches_and_states(tmp_path):
    folder = write_shards(tmp_path / "data")

    def load(workers):
        plan = {"batch_size": 4, "micro_batches": 1, "process_index": 0, "num_processes": 1}
        batches = micro_batches(
            open_stream(folder), collate, plan, 0, 100, 0, True, None, num_workers=workers, pin_memory=False
        )
        return [(batch["label"].tolist(), state) for batch, state in itertools.islice(batches, 9)]

    assert load(0) == load(2)


def test_broken_images_in_a_stream(tmp_path, caplog):
    folder = write_shards(tmp_path / "data", 1, 8, broken=(1, 6))
    dataset = open_stream(folder)
    with caplog.at_level(logging.WARNING):
        contents, _ = read(dataset, 4)
    assert all(len(batch) == 4 for batch in contents)
    assert {label for batch in contents for label, _ in batch} == {0, 2, 3, 4, 5, 7}
    assert set(dataset.broken) == {"img-1.png (row 1 of shard 0)", "img-6.png (row 6 of shard 0)"}
    assert sum("Skipped the broken image" in record.getMessage() for record in caplog.records) == 2
    samples = next(iter(open_stream(folder, shuffle_block=8).read_batches(None, 8)))[0]
    assert sorted(name for sample in samples for name in sample.get("broken_images", ())) == sorted(dataset.broken)
    assert [sample["label"] for sample in open_stream(folder)] == [0, 2, 3, 4, 5, 7]
    with pytest.raises(ValueError, match="none of 4 consecutive images"):
        read(open_stream(write_shards(tmp_path / "bad", 1, 8, broken=(0, 1, 2, 3))), 2)


def test_iterating_gives_centre_crops_in_order(tmp_path):
    samples = list(open_stream(write_shards(tmp_path / "data", 1), crop="random", random_flip=True))
    assert [sample["label"] for sample in samples] == list(range(25))
    torch.testing.assert_close(samples[7]["pixel_values"], expected_pixels(7))


def test_an_empty_stream(tmp_path):
    make_rows(1).select([]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="the stream is empty"):
        read(open_stream(str(tmp_path)), 1)
