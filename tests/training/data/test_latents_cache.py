"""Latents that are computed once."""

import errno
import shutil

import pytest
import torch
from torch.utils.data import Dataset

from hf_vq import VQVAE2Config, VQVAE2Model, VQVAEConfig, VQVAEModel
from hf_vq.training.data.cache_identity import StaleIndicesError
from hf_vq.training.data.latents_cache import LatentsDataset, encode_latents, write_latents
from tests.process_groups import in_processes
from tests.training.data.image_rows import open_stream, write_shards


SHARD = "latents-00000.arrow"


class Images(Dataset):
    def __init__(self, count=5, seed=0):
        self.pixels = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        return {"pixel_values": self.pixels[index], "label": index % 3, "caption": f"image {index}"}


def make_tokenizer(seed=0):
    torch.manual_seed(seed)
    config = VQVAEConfig(
        resolution=8, hidden_size=8, residual_hidden_size=4, num_residual_layers=1, embed_dim=4, num_embeddings=8
    )
    return VQVAEModel(config).eval()


def test_written_and_read(tmp_path):
    tokenizer, images = make_tokenizer(), Images()
    write_latents(tokenizer, images, tmp_path / "latents", flip=True, batch_size=2)
    dataset = LatentsDataset(tmp_path / "latents")
    with torch.no_grad():
        expected = tokenizer.encode(images.pixels).latents
        mirrored = tokenizer.encode(images.pixels.flip(-1)).latents
    assert len(dataset) == 5 and dataset.labels.tolist() == [0, 1, 2, 0, 1]
    for i in range(5):
        sample = dataset[i]
        torch.testing.assert_close(sample["latents"], expected[i])
        assert (sample["label"], sample["caption"]) == (i % 3, f"image {i}")
    flipping, seen = LatentsDataset(tmp_path / "latents", random_flip=True, seed=1), []
    for epoch in range(20):
        for i in range(5):
            latents = flipping.sample(i, epoch)["latents"]
            assert torch.equal(latents, flipping.sample(i, epoch)["latents"])
            is_mirrored = torch.allclose(latents, mirrored[i], atol=1e-5)
            assert is_mirrored or torch.allclose(latents, expected[i], atol=1e-5)
            seen.append(is_mirrored)
    assert 30 < sum(seen) < 70
    with pytest.raises(IndexError):
        dataset[5]


def test_a_second_call_writes_nothing_and_others_are_refused(tmp_path):
    tokenizer, images, folder = make_tokenizer(), Images(), tmp_path / "latents"
    write_latents(tokenizer, images, folder)
    changed = (folder / SHARD).stat().st_mtime_ns
    write_latents(tokenizer, images, folder)
    assert (folder / SHARD).stat().st_mtime_ns == changed
    for other, why in (((make_tokenizer(1), images), "tokenizer"), ((tokenizer, Images(seed=1)), "images")):
        with pytest.raises(StaleIndicesError, match=f"differ in {why}"):
            write_latents(*other, folder)
    with pytest.raises(StaleIndicesError, match="differ in flip"):
        write_latents(tokenizer, images, folder, flip=True)
    with pytest.raises(ValueError, match="`random_flip` needs mirrored latents"):
        LatentsDataset(folder, random_flip=True)
    write_latents(make_tokenizer(1), images, folder, flip=True, overwrite=True)
    assert len(LatentsDataset(folder, random_flip=True)) == 5


def test_a_tokenizer_of_several_levels_is_refused():
    model = VQVAE2Model(VQVAE2Config(resolution=8, downsample_factor=4, hidden_size=8, embed_dim=4, num_embeddings=8))
    with pytest.raises(ValueError, match="`tokenizer` must have one level of codes, got a VQVAE2Model"):
        encode_latents(model.eval(), Images().pixels)


def test_an_interrupted_write_goes_on(tmp_path):
    class Broken(Images):
        limit = 20

        def __getitem__(self, index):
            if index == self.limit:  # not one of the 16 that the fingerprint reads
                raise KeyboardInterrupt
            return super().__getitem__(index)

    images, folder = Broken(count=40), tmp_path / "latents"
    with pytest.raises(KeyboardInterrupt):
        write_latents(make_tokenizer(), images, folder, batch_size=2, rows_per_shard=4)
    with pytest.raises(ValueError, match="the latents in .* are not complete: call write_latents again"):
        LatentsDataset(folder)
    times = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.arrow")}
    assert len(times) == 4  # the fifth was not closed yet
    images.limit = 100
    write_latents(make_tokenizer(), images, folder, batch_size=2, rows_per_shard=4)
    assert all((folder / name).stat().st_mtime_ns == time for name, time in times.items())
    expected = encode_latents(make_tokenizer(), images.pixels)
    found = torch.stack([sample["latents"] for sample in LatentsDataset(folder)])
    torch.testing.assert_close(found, expected)


def test_processes_write_together(tmp_path):
    tokenizer, images = make_tokenizer(), Images(count=21)
    whole = write_latents(tokenizer, images, tmp_path / "one", flip=True, rows_per_shard=4)

    def write():
        write_latents(tokenizer, images, tmp_path / "two", flip=True, rows_per_shard=4, progress=False)
        return sum("_flipped" in name for name in LatentsDataset(tmp_path / "two", random_flip=True)._columns)

    assert in_processes(2, tmp_path, write) == [1, 1]
    assert len(list(whole.iterdir())) == 7
    for file in whole.iterdir():
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes(), file.name


def test_latents_of_a_stream(tmp_path):
    source = write_shards(tmp_path / "data", 3, rows=10)
    images, tokenizer = (open_stream(source), make_tokenizer())
    dataset = LatentsDataset(write_latents(tokenizer, images, tmp_path / "latents"))
    expected = encode_latents(tokenizer, torch.stack([sample["pixel_values"] for sample in images]))
    torch.testing.assert_close(torch.stack([sample["latents"] for sample in dataset]), expected)
    assert dataset.labels.tolist() == list(range(10))


def test_latents_are_float32():
    assert encode_latents(make_tokenizer(), torch.zeros(1, 3, 8, 8)).dtype == torch.float32


@pytest.mark.parametrize("damage", ["zeroed", "truncated", "lost", "half a configuration"])
def test_what_is_damaged_is_named_and_written_again(tmp_path, caplog, damage):
    tokenizer, images, folder = make_tokenizer(), Images(), tmp_path / "latents"
    write_latents(tokenizer, images, folder)
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    file = folder / ("config.json" if damage == "half a configuration" else SHARD)
    data = file.read_bytes()
    if damage == "lost":
        file.unlink()
    else:
        file.write_bytes(data[:128] + bytes(len(data) - 128) if damage == "zeroed" else data[: len(data) // 2])
    with pytest.raises(ValueError, match="holds no cached" if file.name == "config.json" else file.name):
        LatentsDataset(folder)
    write_latents(tokenizer, images, folder)
    assert any(str(file) in record.getMessage() for record in caplog.records)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(OSError, match=r"too full\): it takes about 320 bytes, and 100 bytes are free") as caught:
        write_latents(make_tokenizer(), Images(), tmp_path / "latents")
    assert caught.value.errno == errno.ENOSPC and not list((tmp_path / "latents").iterdir())


def test_broken_images_and_several_captions(tmp_path):
    class Several(Images):
        def read(self, index):
            captions = {"caption": [f"{index} a", f"{index} b"]}
            return None if index == 1 else {**super().__getitem__(index), **captions}

    folder = write_latents(make_tokenizer(), Several(), tmp_path / "latents")
    dataset = LatentsDataset(folder, caption_column="caption")
    assert {dataset.sample(0, epoch)["caption"] for epoch in range(30)} == {"0 a", "0 b"}
    assert len(dataset) == 4 and dataset.sample(1)["caption"][0] == "2"
    torch.testing.assert_close(dataset[1]["latents"][None], encode_latents(make_tokenizer(), Several().pixels[2:3]))
