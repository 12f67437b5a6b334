"""Every container of images gives the same pictures, mapped and streamed."""

import io
import json
import tarfile
import zipfile

import datasets
import fsspec
import pytest
import torch

from hf_vq.training.data.columns import prepare_columns
from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset
from hf_vq.training.data.sources import is_from_hub, open_rows, path_rules
from tests.training.data.image_rows import encoded, expected_pixels, make_rows


NAMES = ["cat", "dog"]


def write_zip(folder, split):
    (folder / split).mkdir(parents=True)
    with zipfile.ZipFile(folder / split / "images.zip", "w") as archive:
        for number in range(4):
            archive.writestr(f"{NAMES[number % 2]}/{number}.png", encoded(number))
    return str(folder), {"label_column": "label"}


def write_tar(folder, split):
    with tarfile.open(folder / f"{split}-0000.tar", "w") as archive:
        for number in range(4):
            for ending, data in (("png", encoded(number)), ("cls", b"%d" % (number % 2)), ("txt", b"a picture")):
                entry = tarfile.TarInfo(f"{number:04d}.{ending}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return str(folder), {"image_column": "png", "label_column": "cls", "class_names": NAMES, "extra_columns": ["txt"]}


def write_jsonl(folder, split):
    (folder / "pictures").mkdir(exist_ok=True)
    for number in range(4):
        (folder / "pictures" / f"{number}.png").write_bytes(encoded(number))
    rows = [{"file": f"pictures/{number}.png", "kind": NAMES[number % 2]} for number in range(4)]
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder), {"image_column": "file", "label_column": "kind"}


def write_parquet(folder, split):
    make_rows(4).to_parquet(folder / f"{split}.parquet")
    return str(folder), {"image_column": "img", "label_column": "animal"}


def write_memory(folder, split):
    root = f"memory://{folder.name}"
    for number in range(4):
        with fsspec.open(f"{root}/{split}/{NAMES[number % 2]}/{number}.png", "wb") as file:
            file.write(encoded(number))
    return root, {"label_column": "label"}


def check(source, options, split="train"):
    dataset = load_image_dataset(DataArguments(source, resolution=8, **options), split)
    samples = list(dataset)
    assert dataset.class_names == NAMES and not dataset.broken
    pictures = {sample["pixel_values"].numpy().tobytes(): sample["label"] for sample in samples}
    assert pictures == {expected_pixels(number).numpy().tobytes(): number % 2 for number in range(4)}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [write_zip, write_tar, write_jsonl, write_parquet, write_memory])
def test_folders(tmp_path, monkeypatch, write, streaming):
    if write is write_memory and not streaming:
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # reading memory counts as online
    for split in ("train", "validation"):
        source, options = write(tmp_path, split)
    for split in ("train", "validation"):
        check(source, {**options, "streaming": streaming}, split)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [write_zip, write_tar, write_jsonl, write_parquet])
def test_files_and_patterns(tmp_path, write, streaming):
    source, options = write(tmp_path, "train")
    pattern = {write_zip: "*/*.zip", write_tar: "*.tar", write_jsonl: "*.jsonl", write_parquet: "*.parquet"}[write]
    options["streaming"] = streaming
    check(f"{source}/{pattern}", options)
    (file,) = map(str, tmp_path.glob(pattern))
    check(file, options)
    write(tmp_path / "more" if write is write_zip else tmp_path, "validation")
    check(f"{source}/**/{pattern}" if write is write_zip else f"{source}/{pattern}", options, "validation")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_list_may_name_its_images_as_the_metadata_of_a_folder_does(tmp_path, streaming):
    write_jsonl(tmp_path, "train")
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    lines = [json.dumps({"file_name": row["file"], "map_file_name": row["file"], "kind": row["kind"]}) for row in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = str(tmp_path / "metadata.jsonl")
    check(source, {"label_column": "kind", "streaming": streaming})
    data = DataArguments(source, conditioning_image_column="map", streaming=streaming)
    rows, _ = prepare_columns(open_rows(data, "train"), data)
    assert set(next(iter(rows))) == {"image", "conditioning_image"}
    with pytest.raises(ValueError, match="no column 'picture'"):
        load_image_dataset(DataArguments(source, image_column="picture", streaming=streaming), "train")


def test_what_is_no_data_set(tmp_path):
    (tmp_path / "a.parquet").touch()
    (tmp_path / "a.csv").touch()
    for source, message in (
        (f"{tmp_path}/*.tar", "neither a folder, a file, a pattern"),
        ("memory://nowhere", "neither a folder"),
        (f"{tmp_path}/*", r"files of one kind are needed, got \['csv', 'parquet'\]"),
        ("nonsense://x", "nonsense"),
    ):
        with pytest.raises(ValueError, match=message):
            open_rows(DataArguments(source), "train")


def test_rows_of_the_hub_name_no_local_files(tmp_path):
    assert [is_from_hub(name) for name in ("squad", "user/name", "./name", "hf://a/b", "x/*.tar", str(tmp_path))] == [
        True,
        True,
        *[False] * 4,
    ]
    for source in ("user/name", "hf://datasets/user/name"):
        rules = path_rules(source)
        assert rules.protocols == ("hf",) and len(rules.folders) == 3
    assert path_rules(str(tmp_path)).folders is None and len(path_rules("memory://x").folders) == 3


def test_a_hostile_row_is_a_broken_image(tmp_path):
    images = [{"bytes": None, "path": "/dev/zero"}, {"bytes": encoded(1), "path": None}]
    rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    rows.to_parquet(tmp_path / "train.parquet")
    dataset = load_image_dataset(DataArguments(str(tmp_path), resolution=8))
    torch.testing.assert_close(dataset[0]["pixel_values"], expected_pixels(1))
    assert dataset.broken == {"/dev/zero (row 0)": "/dev/zero is not a regular file"}
