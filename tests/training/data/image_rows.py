"""Small data sets of noise images with labels and captions."""

import io

import datasets
import numpy as np
import torch
from PIL import Image

from hf_vq.training.data.image_datasets import DataArguments, load_image_dataset


def picture(number, size=(12, 8)):
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8))


def encoded(number, size=(12, 8)):
    buffer = io.BytesIO()
    picture(number, size).save(buffer, "PNG")
    return buffer.getvalue()


def make_rows(count=10, broken=()):
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "animal": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
            "number": datasets.Value("int32"),
        }
    )
    images = [{"bytes": b"rubbish" if i in broken else encoded(i), "path": f"img-{i}.png"} for i in range(count)]
    columns = {
        "img": images,
        "animal": [i % 2 for i in range(count)],
        "text": [f"text {i % 3}" for i in range(count)],
        "number": list(range(count)),
    }
    return datasets.Dataset.from_dict(columns, features=features)


def arguments(source, **options):
    return DataArguments(source, **{"image_column": "img", "resolution": 8, **options})


def expected_pixels(number):
    return torch.from_numpy(np.asarray(picture(number))[:, 2:10].copy()).permute(2, 0, 1) / 127.5 - 1


def write_shards(folder, count=3, rows=25, broken=()):
    folder.mkdir(parents=True)
    whole = make_rows(rows, broken)
    for index in range(count):
        whole.shard(count, index).to_parquet(folder / f"train-{index:05d}-of-{count:05d}.parquet")
    return str(folder)


def open_stream(source, **options):
    options = {"streaming": True, "shuffle_block": 4, "label_column": "number", **options}
    return load_image_dataset(arguments(source, **options), augment=True, seed=3)
