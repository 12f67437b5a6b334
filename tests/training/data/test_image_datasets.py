import json
import logging

import datasets
import pytest
import torch

from hf_vq.training.data.columns import prepare_columns
from hf_vq.training.data.image_datasets import DataArguments, collate, load_image_dataset
from hf_vq.training.data.streaming import StreamingImageDataset
from tests.training.data.image_rows import arguments, expected_pixels, make_rows, picture


@pytest.fixture
def parquet(tmp_path):
    make_rows().to_parquet(tmp_path / "data" / "train.parquet")
    make_rows(4).to_parquet(tmp_path / "data" / "validation.parquet")
    return str(tmp_path / "data")


def test_parquet(parquet):
    dataset = load_image_dataset(arguments(parquet, label_column="animal", extra_columns=["text"]))
    assert len(dataset) == 10 and dataset.class_names == ["cat", "dog"] and dataset.labels.tolist() == [0, 1] * 5
    sample = dataset[3]
    assert set(sample) == {"pixel_values", "label", "text"} and (sample["label"], sample["text"]) == (1, "text 0")
    torch.testing.assert_close(sample["pixel_values"], expected_pixels(3))
    assert len(load_image_dataset(arguments(parquet), "validation")) == 4
    assert len(load_image_dataset(arguments(parquet, max_samples=6))) == 6
    assert len(load_image_dataset(arguments(parquet, train_split="train[30%:]"))) == 7
    assert set(load_image_dataset(arguments(parquet))[0]) == {"pixel_values"}
    assert len(list(dataset)) == 10  # it ends


def test_saved_data_sets(tmp_path):
    make_rows().save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": make_rows(), "validation": make_rows(3)}).save_to_disk(tmp_path / "two")
    assert len(load_image_dataset(arguments(str(tmp_path / "one")))) == 10
    assert len(load_image_dataset(arguments(str(tmp_path / "two")), "validation")) == 3
    streamed = load_image_dataset(arguments(str(tmp_path / "two"), streaming=True), "train")
    torch.testing.assert_close(next(iter(streamed))["pixel_values"], expected_pixels(0))
    with pytest.raises(ValueError, match="no split 'test'"):
        load_image_dataset(arguments(str(tmp_path / "two")), "test")


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_are_excluded(parquet, streaming):
    def numbers(*exclude, split="train"):
        options = arguments(parquet, exclude=list(exclude), extra_columns=["number"], streaming=streaming)
        return sorted(sample["number"] for sample in load_image_dataset(options, split))

    assert numbers("animal=cat") == [1, 3, 5, 7, 9]
    assert numbers("animal=cat", "text=text 0", "text=text 1") == [5]
    assert numbers("number=3", split="validation") == [0, 1, 2]
    for wrong, message in (("animal", "written column=value"), ("a=1", "no column 'a'"), ("animal=cow", "'cow'")):
        with pytest.raises(ValueError, match=message):
            numbers(wrong)


@pytest.mark.parametrize("streaming", [False, True])
def test_slices_of_saved_data_sets(tmp_path, streaming):
    make_rows().save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": make_rows(), "my-split": make_rows(3)}).save_to_disk(tmp_path / "two")

    def numbers(folder, split):
        options = arguments(str(tmp_path / folder), extra_columns=["number"], streaming=streaming)
        return sorted(sample["number"] for sample in load_image_dataset(options, split))

    for folder in ("one", "two"):
        assert numbers(folder, "train[:20%]") == [0, 1]
        assert numbers(folder, "train[:1]+train[8:]") == [0, 8, 9]
        with pytest.raises(ValueError, match="no split 'validation'"):
            numbers(folder, "validation")
    assert numbers("two", "my-split") == [0, 1, 2]


def test_a_folder_of_images(tmp_path):
    for split, count in (("train", 3), ("validation", 1)):
        for number, name in enumerate(["cat", "dog"]):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for copy in range(count):
                picture(10 * number + copy).save(folder / f"{copy}.png")
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"rubbish")
    source = DataArguments(str(tmp_path), resolution=8, label_column="label")
    dataset = load_image_dataset(source)
    assert len(dataset) == 6 and dataset.class_names == ["cat", "dog"]
    torch.testing.assert_close(dataset[3]["pixel_values"], expected_pixels(10))
    assert dataset[4]["broken_images"] and "dog/1.png" in dataset[4]["broken_images"][0]
    torch.testing.assert_close(dataset[4]["pixel_values"], expected_pixels(12))
    assert len(load_image_dataset(source, "validation")) == 2


def test_the_validation_split_of_a_stream_is_held_in_memory(parquet):
    options = {"streaming": True, "label_column": "animal", "extra_columns": ["text"]}
    streamed = load_image_dataset(arguments(parquet, **options), "validation")
    plain = load_image_dataset(arguments(parquet, **{**options, "streaming": False}), "validation")
    assert len(streamed) == len(plain) == 4 and streamed.class_names == plain.class_names
    for first, second in zip(streamed, plain, strict=True):
        assert torch.equal(first.pop("pixel_values"), second.pop("pixel_values")) and first == second
    assert len(load_image_dataset(arguments(parquet, max_samples=3, **options), "validation")) == 3


def test_a_stream_without_a_schema(tmp_path):
    picture(5).save(tmp_path / "5.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"img": str(tmp_path / "5.png"), "number": 7}) + "\n")
    rows = datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", streaming=True)
    rows, _ = prepare_columns(rows, arguments("x", label_column="number"))
    sample = next(iter(StreamingImageDataset(rows, resolution=8)))
    torch.testing.assert_close(sample["pixel_values"], expected_pixels(5))
    assert sample["label"] == 7


def test_labels_of_other_types(parquet):
    strings = load_image_dataset(arguments(parquet, label_column="text"))
    assert strings.class_names == ["text 0", "text 1", "text 2"] and strings[4]["label"] == 1
    integers = load_image_dataset(arguments(parquet, label_column="number"))
    assert integers.class_names is None and integers[4]["label"] == 4
    named = load_image_dataset(arguments(parquet, label_column="number", class_names=list("abcdefghij")))
    assert named.class_names == list("abcdefghij") and named[4]["label"] == 4


def test_a_stream_of_labels_that_are_strings(parquet):
    options = {"label_column": "text", "streaming": True}
    streamed = load_image_dataset(arguments(parquet, **options))
    plain = load_image_dataset(arguments(parquet, label_column="text"))
    assert streamed.class_names == plain.class_names
    assert [sample["label"] for sample in streamed] == plain.labels.tolist()
    other = arguments(parquet, class_names=["text 2", "text 0", "text 1"], **options)
    assert [sample["label"] for sample in load_image_dataset(other)] == [1, 2, 0] * 3 + [1]
    names = load_image_dataset(other).class_names
    assert load_image_dataset(other, "validation", class_names=names).labels.tolist() == [1, 2, 0, 1]
    few = arguments(parquet, class_names=["text 2", "text 0"], **options)
    with pytest.raises(ValueError, match="label_column='text' holds 'text 1': .*'text 2', 'text 0'"):
        list(load_image_dataset(few))


def test_validation_has_the_classes_of_the_training_data(tmp_path):
    rows = make_rows()
    parts = {"train": rows, "validation": rows.select([2, 1]), "other": rows.select([0])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    options = arguments(str(tmp_path / "saved"), label_column="text")
    names = load_image_dataset(options).class_names
    validation = load_image_dataset(options, "validation", class_names=names)
    assert validation.class_names == names and validation.labels.tolist() == [2, 1]
    with pytest.raises(ValueError, match=r"label_column='text' holds \['text 0'\]: .*\['text 1', 'text 2'\]"):
        load_image_dataset(options, "other", class_names=names[1:])
    of_animals = arguments(options.dataset_name_or_path, label_column="animal")
    other = load_image_dataset(of_animals, class_names=["owl", "dog", "cat"])
    assert other.class_names == ["owl", "dog", "cat"] and other.labels.tolist() == [2, 1] * 5
    streamed = load_image_dataset(
        arguments(options.dataset_name_or_path, label_column="animal", streaming=True), class_names=["dog", "cat"]
    )
    assert [sample["label"] for sample in streamed][:4] == [1, 0, 1, 0]
    with pytest.raises(ValueError, match=r"label_column='animal' holds \['dog'\]: the classes are \['cat'\]"):
        load_image_dataset(of_animals, class_names=["cat"])
    of_cats = arguments(str(tmp_path / "saved"), label_column="animal", exclude=["animal=dog"])
    assert load_image_dataset(of_cats, class_names=["owl", "cat"]).labels.tolist() == [1] * 5  # a name without images


def test_file_names_are_no_images_where_there_are_some(tmp_path):
    rows = make_rows(2).rename_columns({"img": "picture", "text": "file_name"})
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"no column 'image'.*images: \['picture'\]"):
        load_image_dataset(arguments(str(tmp_path), image_column="image"))


@pytest.mark.parametrize("label_column", ["animal", "text"])
def test_a_share_of_the_training_data_is_held_out(parquet, label_column):
    options = arguments(parquet, validation_share=0.3, label_column=label_column, extra_columns=["number"])
    training = load_image_dataset(options)
    validation = load_image_dataset(options, "validation", class_names=training.class_names)
    numbers = [[sample["number"] for sample in part] for part in (training, validation)]
    assert len(numbers[1]) == 3 and sorted(numbers[0] + numbers[1]) == list(range(10))
    assert numbers[1] != [0, 1, 2]  # at random
    again = load_image_dataset(options, "validation")
    assert [sample["number"] for sample in again] == numbers[1] and again.class_names == training.class_names
    assert options.validation_name == "30 % of train, at random"
    with pytest.raises(ValueError, match="validation_share=0.01: of 10 images it leaves 0"):
        load_image_dataset(arguments(parquet, validation_share=0.01))
    with pytest.raises(ValueError, match=r"`validation_share` must be a number in \(0, 1\)"):
        arguments(parquet, validation_share=1)
    with pytest.raises(ValueError, match="validation_share=0.3: a stream"):
        arguments(parquet, validation_share=0.3, streaming=True)


@pytest.mark.parametrize("cache", [False, True])
def test_the_images_that_can_be_read(tmp_path, cache):
    make_rows(6, broken=(2, 3, 5)).to_parquet(tmp_path / "train.parquet")
    options = arguments(str(tmp_path), label_column="animal", cache_images=cache, extra_columns=["number"])
    found = load_image_dataset(options).readable()
    samples = list(found)
    assert [sample["number"] for sample in samples] == [0, 1, 4] and found.labels.tolist() == [0, 1, 0]
    torch.testing.assert_close(samples[2]["pixel_values"], expected_pixels(4))
    assert not any("broken_images" in sample for sample in samples) and found.readable() is found
    make_rows(2, broken=(0, 1)).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="none of the 2 images"):
        load_image_dataset(arguments(str(tmp_path))).readable()


@pytest.mark.parametrize("cache", [False, True])
def test_broken_images_are_replaced_named_and_counted(tmp_path, cache, caplog):
    make_rows(6, broken=(2, 3, 5)).to_parquet(tmp_path / "train.parquet")
    with caplog.at_level(logging.WARNING):
        dataset = load_image_dataset(arguments(str(tmp_path), label_column="animal", cache_images=cache))
        samples = [dataset[i] for i in range(6)]
        _ = dataset[2]
    for index, source in ((0, 0), (2, 4), (3, 4), (5, 0)):
        torch.testing.assert_close(samples[index]["pixel_values"], expected_pixels(source))
        assert samples[index]["label"] == source % 2
    assert samples[2]["broken_images"] == ("img-2.png (row 2)", "img-3.png (row 3)")
    assert set(dataset.broken) == {"img-2.png (row 2)", "img-3.png (row 3)", "img-5.png (row 5)"}
    warnings = [record.getMessage() for record in caplog.records if "broken image" in record.getMessage()]
    assert len(warnings) == 3 and "img-2.png" in warnings[0] and "not an image of a known format" in warnings[0]
    assert dataset.read(2) is None and "broken_images" not in dataset.read(1)
    batch = collate(samples)
    assert batch["pixel_values"].shape == (6, 3, 8, 8) and batch["label"].tolist() == [0, 1, 0, 0, 0, 0]
    assert len(batch["broken_images"]) == 4


def test_nothing_readable(tmp_path):
    make_rows(3, broken=(0, 1, 2)).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="none of the 3 images"):
        load_image_dataset(arguments(str(tmp_path)))[0]


def test_augmentation_depends_on_seed_epoch_and_index_alone(parquet):
    options = arguments(parquet, crop="random", random_flip=True, resolution=6)
    first, second = (load_image_dataset(options, augment=True, seed=5) for _ in range(2))
    _ = [second.sample(i, epoch) for epoch in (3, 1) for i in (9, 2)]  # other history
    torch.manual_seed(1)
    assert torch.equal(first.sample(4, epoch=2)["pixel_values"], second.sample(4, epoch=2)["pixel_values"])
    views = {first.sample(4, epoch)["pixel_values"].numpy().tobytes() for epoch in range(30)}
    assert len(views) > 4
    other = load_image_dataset(options, augment=True, seed=6)
    assert any(
        not torch.equal(other.sample(4, e)["pixel_values"], first.sample(4, e)["pixel_values"]) for e in range(9)
    )
    plain = load_image_dataset(options, augment=False)
    assert torch.equal(plain.sample(4, 0)["pixel_values"], plain.sample(4, 7)["pixel_values"])


def test_the_cache_gives_the_same_images(parquet):
    options = {"crop": "random", "random_flip": True, "resolution": 6}
    slow = load_image_dataset(arguments(parquet, **options), augment=True)
    fast = load_image_dataset(arguments(parquet, cache_images=True, **options), augment=True)
    for index in range(10):
        assert torch.equal(slow.sample(index, 3)["pixel_values"], fast.sample(index, 3)["pixel_values"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "picture"}, r"no column 'picture'; it has \['animal', 'img', 'number', 'text'\]"),
        ({"label_column": "class"}, "no column 'class'"),
        ({"extra_columns": ["captions"]}, "no column 'captions'"),
        ({"train_split": "training"}, "no split 'training'"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_wrong_names(parquet, options, message, streaming):
    with pytest.raises(ValueError, match=message):
        load_image_dataset(arguments(parquet, streaming=streaming, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "middle"}, "crop='middle'"),
        ({"resolution": 0}, "`resolution` must be an int of at least 1, got 0"),
        ({"resolution": [8, 8, 8]}, "a side, or a height and a width"),
        ({"class_names": ["a", "a"]}, "the names must differ"),
        ({"missing_condition": "drop"}, "missing_condition='drop'"),
        ({"max_samples": 0}, "max_samples=0"),
        ({"streaming": True, "cache_images": True}, "choose one"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        DataArguments("x", **options)


def test_a_share_of_a_folder_of_one_split_is_to_be_held_out(parquet, tmp_path):
    (tmp_path / "data" / "validation.parquet").unlink()
    with pytest.raises(
        ValueError, match=r"no split 'validation'; it has \['train'\]\. Hold .* --validation_share 0.05"
    ):
        load_image_dataset(arguments(parquet), "validation")
    for split in ("train[20:", "train[:150%]"):
        with pytest.raises(ValueError, match="the split must be a name, or a part of one such as"):
            load_image_dataset(arguments(parquet, train_split=split))
    for split in ("train[20%:]", "train+validation"):
        with pytest.raises(ValueError, match="must be a whole one with streaming=True"):
            load_image_dataset(arguments(parquet, train_split=split, streaming=True))


def test_a_missing_folder():
    for source in ("./nowhere", "/nowhere/at/all", "a/b/c"):
        with pytest.raises(ValueError, match="neither a folder, a file"):
            load_image_dataset(arguments(source))
