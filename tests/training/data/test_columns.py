"""Labels and captions: gaps, and several captions of one image."""

import datasets
import pytest

from hf_vq.training.data.columns import draw_caption
from hf_vq.training.data.image_datasets import CaptionedDataArguments, DataArguments, load_image_dataset
from tests.training.data.image_rows import encoded


COLUMNS = {
    "kind": ["a", "b", None, "a"],
    "class": [0, 1, -1, 0],
    "number": [0, 1, None, 0],
    "text": ["one", "two", None, "four"],
    "texts": [["one", "uno"], ["two", None], [], ["four"]],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gaps")
    columns = {"image": [{"bytes": encoded(number), "path": None} for number in range(4)], **COLUMNS}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "kind": datasets.Value("string"),
            "class": datasets.ClassLabel(names=["a", "b"]),
            "number": datasets.Value("int32"),
            "text": datasets.Value("string"),
            "texts": datasets.List(datasets.Value("string")),
        }
    )
    rows = datasets.Dataset.from_dict(columns, features=features)
    for split in ("train", "validation"):
        rows.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def load(source, column, split="train", **options):
    kind = {"caption_column": column} if column.startswith("text") else {"label_column": column}
    return load_image_dataset(CaptionedDataArguments(source, resolution=8, **kind, **options), split, seed=3)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["number", "class"])
def test_captions_are_texts(source, column, streaming):
    data = CaptionedDataArguments(source, resolution=8, caption_column=column, streaming=streaming)
    with pytest.raises(ValueError, match=f"caption_column='{column}' must hold texts, or lists of texts, got "):
        load_image_dataset(data, "train")


@pytest.mark.parametrize("column", list(COLUMNS))
def test_gaps_are_refused_when_the_data_are_opened(source, column):
    with pytest.raises(ValueError, match=f"the column '{column}' has no value in row 2: .*missing_condition=null"):
        load(source, column)


@pytest.mark.parametrize("column", ["kind", "number", "text", "texts"])
def test_gaps_of_a_stream_are_refused_when_they_are_read(source, column):
    stream = iter(load(source, column, streaming=True, class_names=["a", "b"]))
    next(stream), next(stream)
    with pytest.raises(ValueError, match="has no value in row 2"):
        next(stream)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", list(COLUMNS))
def test_gaps_as_the_null_condition(source, column, streaming):
    key = column if column.startswith("text") else "label"
    options = {"missing_condition": "null", "streaming": streaming}
    train = [sample[key] for sample in load(source, column, **options)]
    if key == "label":
        assert train == [0, 1, -1, 0]
    elif column == "text" or not streaming:
        assert train[1:] == ["two", None, "four"] and train[0] in ("one", "uno")
    else:  # all of them, for a cache
        assert train == [list(captions) for captions in COLUMNS[column]]
    assert len(load(source, column, "validation", **options)) == 3


def test_a_caption_is_drawn_in_every_epoch(source):
    dataset = load(source, "texts", missing_condition="null")
    drawn = [dataset.sample(0, epoch)["texts"] for epoch in range(60)]
    assert set(drawn) == {"one", "uno"} and 15 < drawn.count("uno") < 45
    assert drawn == [load(source, "texts", missing_condition="null").sample(0, epoch)["texts"] for epoch in range(60)]
    assert dataset.read(0)["texts"] == ["one", "uno"]
    stream = load(source, "texts", missing_condition="null", streaming=True).read_batches(None, 4)
    epochs = [next(stream)[0] for _ in range(40)]
    seen = {sample["texts"] for samples in epochs for sample in samples}
    assert seen == {"one", "uno", "two", None, "four"}
    assert draw_caption("one", 0, 0, 0) == "one" and draw_caption([None], 0, 0, 0) is None


def test_one_condition():
    with pytest.raises(ValueError, match="give the one that is the condition"):
        CaptionedDataArguments("x", label_column="kind", caption_column="text")
    assert DataArguments("x", extra_columns=["a"]).carried_columns == ["a"]


def test_sizes_that_do_not_fit():
    DataArguments("x", resolution=[16, 24]).check_multiple_of(8)
    with pytest.raises(ValueError, match=r"resolution=\(16, 20\): its sides must be multiples of 8"):
        DataArguments("x", resolution=[16, 20]).check_multiple_of(8)
