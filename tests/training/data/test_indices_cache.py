import itertools
import json
import logging
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from torch import nn

from hf_vq.training.data.cache_identity import StaleIndicesError, images_fingerprint, tokenizer_fingerprint
from hf_vq.training.data.image_datasets import load_image_dataset
from hf_vq.training.data.indices_cache import load_indices, smallest_dtype, write_indices
from tests.process_groups import in_processes
from tests.training.data.image_rows import arguments, encoded, make_rows, write_shards


class ToyTokenizer(nn.Module):
    """Grey levels of the 2×2 patches as codes; `levels` makes it a hierarchy."""

    def __init__(self, num_embeddings=300, levels=1):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor((num_embeddings - 1) / 2.0))
        self.register_buffer("used", torch.zeros(3, dtype=torch.bfloat16))
        self.levels = levels
        self.num_embeddings = num_embeddings
        self.config = SimpleNamespace(
            num_embeddings=num_embeddings, to_dict=lambda: {"num_embeddings": num_embeddings}
        )
        self.images = 0

    def encode(self, pixel_values):
        assert not self.training and not torch.is_grad_enabled()
        self.images += len(pixel_values)
        grids = [((nn.functional.avg_pool2d(pixel_values.mean(1), side) + 1) * self.scale).long() for side in (4, 2)]
        return SimpleNamespace(indices=tuple(grids) if self.levels > 1 else grids[1])


@pytest.fixture
def source(tmp_path):
    make_rows(23, broken=(4, 22)).to_parquet(tmp_path / "data" / "train.parquet")
    return str(tmp_path / "data")


def open_images(source, **options):
    return load_image_dataset(arguments(source, label_column="animal", extra_columns=["text"], **options))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_cache_holds_what_the_tokenizer_gives(source, tmp_path, streaming):
    tokenizer, images = ToyTokenizer().train(), open_images(source, streaming=streaming)
    path = write_indices(tokenizer, images, tmp_path / "cache", flip=True, batch_size=4, rows_per_shard=10)
    assert tokenizer.training
    dataset = load_indices(path, tokenizer)
    readable = [row for row in range(23) if row not in (4, 22)]
    assert len(dataset) == 21 and dataset.class_names == ["cat", "dog"] and dataset.grids == {"indices": [4, 4]}
    assert dataset.codebook_size == 300
    tokenizer.eval()
    flipped = 0
    augmented = load_indices(path, random_flip=True, seed=1)
    plain = open_images(source)
    for row, number in enumerate(readable):
        pixels = plain.read(number)["pixel_values"][None]
        sample = dataset[row]
        with torch.no_grad():
            own, mirrored = (tokenizer.encode(x).indices[0] for x in (pixels, pixels.flip(-1)))
        assert sample["indices"].dtype == torch.int64 and torch.equal(sample["indices"], own)
        assert (sample["label"], sample["text"]) == (number % 2, f"text {number % 3}")
        views = [augmented.sample(row, epoch)["indices"] for epoch in range(20)]
        assert all(torch.equal(view, own) or torch.equal(view, mirrored) for view in views)
        flipped += sum(torch.equal(view, mirrored) for view in views)
        assert torch.equal(views[3], augmented.sample(row, 3)["indices"])
    assert 130 < flipped < 290  # half of 420
    info = json.loads((path / "config.json").read_text())
    assert info["broken_rows"] == ([[0, 4], [0, 22]] if streaming else [4, 22]) and info["rows"] == 21
    from_disk = load_indices(path, in_memory=False)
    assert all(torch.equal(from_disk[row]["indices"], dataset[row]["indices"]) for row in range(21))


def test_datasets_opens_the_folder(source, tmp_path):
    write_indices(ToyTokenizer(), open_images(source), tmp_path / "cache", rows_per_shard=10)
    rows = datasets.load_dataset("parquet", data_dir=str(tmp_path / "cache"), split="train")
    assert rows.features["indices"] == datasets.List(datasets.Value("uint16"), length=16)
    assert rows.features["label"].names == ["cat", "dog"] and len(rows) == 21


def test_levels_give_a_column_each(source, tmp_path):
    path = write_indices(ToyTokenizer(levels=2), open_images(source), tmp_path / "cache")
    sample = load_indices(path)[0]
    assert sample["indices_0"].shape == (2, 2) and sample["indices_1"].shape == (4, 4) and "indices" not in sample


@pytest.mark.parametrize("streaming", [False, True])
def test_an_interrupted_cache_is_continued(source, tmp_path, monkeypatch, streaming):
    tokenizer, images = ToyTokenizer(), open_images(source, streaming=streaming)
    whole = write_indices(tokenizer, images, tmp_path / "whole", rows_per_shard=5, batch_size=2)

    import pyarrow.parquet as pq

    real, written = pq.write_table, []

    def write_then_die(table, path, **options):
        if len(written) == 2:
            path.write_bytes(b"half a shard")
            raise OSError("No space left on device")
        written.append(path)
        real(table, path, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(pq, "write_table", write_then_die)
        write_indices(tokenizer, images, tmp_path / "cache", rows_per_shard=5, batch_size=2)
    with pytest.raises(ValueError, match="not complete: call write_indices again"):
        load_indices(tmp_path / "cache")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("indices-*.parquet")}
    assert len(before) == 2

    tokenizer.images = 0
    path = write_indices(tokenizer, images, tmp_path / "cache", rows_per_shard=5, batch_size=2)
    assert tokenizer.images == 1 + 13 - 1  # one to learn the shape; 3 of 5 shards, 13 images, one of them broken
    assert all((path / name).stat().st_mtime_ns == time for name, time in before.items())
    assert sorted(file.name for file in path.iterdir()) == sorted(file.name for file in whole.iterdir())
    for file in whole.iterdir():
        assert (path / file.name).read_bytes() == file.read_bytes(), file.name

    tokenizer.images = 0
    write_indices(tokenizer, images, tmp_path / "cache", rows_per_shard=5, batch_size=2)
    assert tokenizer.images == 0


def written_by(processes, folder, images, path, **options):
    """The images that each process has encoded, and each file's content."""

    def write():
        tokenizer = ToyTokenizer()
        write_indices(tokenizer, images, path, progress=False, **options)
        return tokenizer.images

    counts = in_processes(processes, folder, write)
    return counts, {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("shards", [None, 1, 5])
def test_processes_share_the_work_and_any_number_goes_on(tmp_path, shards):
    """Of a map-style data set, of a stream with fewer shards than processes, and of one with more."""
    source = write_shards(tmp_path / "data", shards or 1, rows=23, broken=(4, 22))
    images = open_images(source, streaming=shards is not None)
    whole = write_indices(ToyTokenizer(), images, tmp_path / "whole", rows_per_shard=3, progress=False)
    expected = {file.name: file.read_bytes() for file in whole.iterdir()}
    counts, files = written_by(2, tmp_path, images, tmp_path / "two", rows_per_shard=3)
    assert files == expected
    assert sum(counts) == 21 + 2 and min(counts) >= 9  # every process encodes the first image, to learn the shape
    for name in sorted(name for name in files if name.startswith("indices"))[::2]:
        (tmp_path / "two" / name).unlink()
    assert written_by(3, tmp_path, images, tmp_path / "two", rows_per_shard=3)[1] == expected
    assert written_by(3, tmp_path, images, tmp_path / "two", rows_per_shard=3)[0] == [0, 0, 0]
    rows = load_indices(whole)
    assert [rows[i]["text"] for i in range(21)] == [f"text {n % 3}" for n in range(23) if n not in (4, 22)]


@pytest.mark.slow
def test_processes_read_a_stream_once(tmp_path):
    """Bytes that are read of 16 files, over all processes, in units of the data, their footers included."""
    features = datasets.Features({"img": datasets.Image(), "animal": datasets.Value("string")})
    (tmp_path / "data").mkdir()
    noise = [{"bytes": encoded(row, (256, 256)), "path": f"{row}.png"} for row in range(32)]
    for number in range(16):
        rows = datasets.Dataset.from_dict({"img": noise, "animal": ["cat"] * 32}, features=features)
        rows.to_parquet(tmp_path / "data" / f"train-{number:05d}-of-00016.parquet")
    total = sum(file.stat().st_size for file in (tmp_path / "data").iterdir())

    def write(path):
        images = load_image_dataset(arguments(str(tmp_path / "data"), streaming=True))
        before = bytes_read()
        write_indices(ToyTokenizer(), images, path, progress=False)
        return bytes_read() - before

    write(tmp_path / "imports")  # which read files, too
    for processes in (1, 2, 4):
        read = sum(in_processes(processes, tmp_path, write, tmp_path / str(processes)))
        print(f"{processes} processes read {read / total:.2f} of the data")
        assert 1.0 <= read / total < 1.05


def test_by_default_every_process_has_a_part(tmp_path):
    """Of the same shards, whatever the number of processes: a few hundred images are not one shard."""
    images = torch.utils.data.StackDataset(pixel_values=torch.rand(600, 3, 4, 4) * 2 - 1)
    counts, files = written_by(2, tmp_path, images, tmp_path / "two")
    assert sorted(counts) == [1 + 256, 1 + 344]
    assert [file for file in sorted(files) if file != "config.json"] == [f"indices-{n:05d}.parquet" for n in range(3)]
    assert written_by(1, tmp_path, images, tmp_path / "one") == ([601], files)


def test_the_first_images_of_a_stream_may_be_broken_or_few(tmp_path):
    """What is read to know the images is of several parts, and is written all the same."""
    source = write_shards(tmp_path / "data", 5, rows=23, broken=(0, 1, 2, 3, 4, 6, 22))
    whole = write_indices(ToyTokenizer(), open_images(source, streaming=True), tmp_path / "one", progress=False)
    assert [load_indices(whole)[i]["text"] for i in range(16)] == [f"text {n % 3}" for n in (5, *range(7, 22))]
    counts, files = written_by(2, tmp_path, open_images(source, streaming=True), tmp_path / "two")
    assert files == {file.name: file.read_bytes() for file in whole.iterdir()} and sum(counts) == 16 + 2


def bytes_read():
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text()).group(1))


def test_stale_indices_are_refused(source, tmp_path):
    tokenizer, images = ToyTokenizer(), open_images(source)
    path = write_indices(tokenizer, images, tmp_path / "cache", rows_per_shard=10)
    other = ToyTokenizer()
    with torch.no_grad():
        other.scale.add_(0.001)
    with pytest.raises(StaleIndicesError, match="another tokenizer"):
        load_indices(path, other)
    for call, what in (
        ((other, images), "tokenizer"),
        ((tokenizer, open_images(source, resolution=6)), "images"),
        ((tokenizer, open_images(source, max_samples=20)), "images"),
    ):
        with pytest.raises(StaleIndicesError, match=f"differ in {what} from"):
            write_indices(*call, path, rows_per_shard=10)
    with pytest.raises(StaleIndicesError, match="differ in flip, rows_per_shard"):
        write_indices(tokenizer, images, path, rows_per_shard=5, flip=True)
    write_indices(other, images, path, rows_per_shard=100, overwrite=True)
    assert len(list(path.glob("*.parquet"))) == 1 and len(load_indices(path, other)) == 21


def test_fingerprints():
    first, second = ToyTokenizer(), ToyTokenizer()
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    prints = {tokenizer_fingerprint(first), tokenizer_fingerprint(ToyTokenizer(301))}
    second.used[1] = 1
    prints.add(tokenizer_fingerprint(second))
    prints.add(tokenizer_fingerprint(first.to(torch.bfloat16)))
    assert len(prints) == 4

    class Images:
        def __init__(self, change=None):
            self.change = change

        def __len__(self):
            return 40

        def __getitem__(self, index):
            return {"pixel_values": torch.full((3, 2, 2), float(index == self.change)), "label": 0}

    assert images_fingerprint(Images()) == images_fingerprint(Images())
    assert images_fingerprint(Images()) != images_fingerprint(Images(39))


def test_bad_use(source, tmp_path):
    with pytest.raises(ValueError, match="holds no cached indices"):
        load_indices(tmp_path)
    path = write_indices(ToyTokenizer(), open_images(source), tmp_path / "cache")
    with pytest.raises(ValueError, match="was written with flip=False"):
        load_indices(path, random_flip=True)
    wrong = ToyTokenizer(300)
    wrong.config.num_embeddings = 10
    with pytest.raises(ValueError, match="num_embeddings=10"):
        write_indices(wrong, open_images(source), tmp_path / "wrong")
    make_rows(2, broken=(0, 1)).to_parquet(tmp_path / "bad" / "train.parquet")
    with pytest.raises(ValueError, match="no image that can be read"):
        write_indices(ToyTokenizer(), open_images(str(tmp_path / "bad")), tmp_path / "c")


def test_smallest_dtype():
    for size, name in ((2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")):
        assert smallest_dtype(size) == np.dtype(name)


def test_workers_change_nothing(source, tmp_path):
    paths = [
        write_indices(ToyTokenizer(), open_images(source), tmp_path / str(workers), num_workers=workers, batch_size=3)
        for workers in (0, 2)
    ]
    first, second = (load_indices(path) for path in paths)
    assert all(torch.equal(a["indices"], b["indices"]) for a, b in itertools.zip_longest(iter(first), iter(second)))


def zero_the_middle(file):
    data = bytearray(file.read_bytes())
    middle = data.find(b"PAR1", 4) // 3
    data[middle : middle + 40] = bytes(40)
    file.write_bytes(data)


DAMAGES = {
    "lost": ("indices-00001.parquet", lambda file: file.unlink()),
    "empty": ("indices-00002.parquet", lambda file: file.write_bytes(b"")),
    "truncated": ("indices-00001.parquet", lambda file: file.write_bytes(file.read_bytes()[:-20])),
    "zeroed": ("indices-00000.parquet", zero_the_middle),
    "half a configuration": ("config.json", lambda file: file.write_text(file.read_text()[:50])),
    "a configuration of nothing": ("config.json", lambda file: file.write_text("[]")),
    "another's shard": ("indices-00000.parquet", None),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_what_is_damaged_is_named_and_written_again(source, tmp_path, caplog, damage):
    tokenizer, images = ToyTokenizer(), open_images(source)
    path = write_indices(tokenizer, images, tmp_path / "cache", rows_per_shard=9)
    whole = {file.name: file.read_bytes() for file in path.iterdir()}
    name, do = DAMAGES[damage]
    if do is None:
        other = write_indices(ToyTokenizer(301), images, tmp_path / "other", rows_per_shard=9)
        do = lambda file: file.write_bytes((other / name).read_bytes())  # noqa: E731
    do(path / name)
    if damage != "another's shard":
        with pytest.raises(ValueError, match=name if name != "config.json" else "holds no cached indices"):
            load_indices(path)
    times = {file.name: file.stat().st_mtime_ns for file in path.glob("*.parquet") if file.name != name}
    with caplog.at_level(logging.WARNING):
        write_indices(tokenizer, images, path, rows_per_shard=9)
    assert any(name in record.getMessage() for record in caplog.records)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == whole
    assert all((path / other).stat().st_mtime_ns == time for other, time in times.items())
    assert len(load_indices(path)) == 21


def test_a_second_run_waits_for_the_first(source, tmp_path, caplog):
    """And reads what that one has written."""
    slow, quick = ToyTokenizer(), ToyTokenizer()
    entered, may_go = threading.Event(), threading.Event()
    encode = slow.encode

    def slow_encode(pixel_values):
        entered.set()
        may_go.wait(20)
        return encode(pixel_values)

    slow.encode = slow_encode
    first = threading.Thread(target=write_indices, args=(slow, open_images(source), tmp_path / "cache"))
    second = threading.Thread(target=write_indices, args=(quick, open_images(source), tmp_path / "cache"))
    first.start()
    assert entered.wait(20)
    with caplog.at_level(logging.WARNING):
        second.start()
        second.join(0.5)
    assert second.is_alive() and any("Waiting for another run" in record.getMessage() for record in caplog.records)
    may_go.set()
    first.join(20), second.join(20)
    assert not second.is_alive() and quick.images == 0 and len(load_indices(tmp_path / "cache")) == 21
