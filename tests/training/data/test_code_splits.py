"""The codes of a training and a validation set, what they cannot be made of, and how many classes they have."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from hf_vq import VQVAE2Config, VQVAE2Model, VQVAEConfig, VQVAEModel
from hf_vq.training.data.code_splits import check_condition_tokenizer, count_classes, load_code_splits
from hf_vq.training.data.image_datasets import DataArguments
from hf_vq.training.run import RunArguments, TrainingRun
from tests.training.data.image_rows import arguments, expected_pixels, make_rows


@pytest.fixture
def run(tmp_path):
    return TrainingRun(RunArguments(str(tmp_path), cpu=True))


def test_codes_labels_and_names(run, tmp_path):
    """Against each image encoded alone, and mirrored where the training codes are those of the mirrored image."""
    rows = make_rows(6)
    datasets.DatasetDict({"train": rows, "validation": rows.select([3, 0])}).save_to_disk(tmp_path / "images")
    torch.manual_seed(0)
    config = {"hidden_size": 8, "residual_hidden_size": 4, "num_residual_layers": 1, "embed_dim": 4}
    tokenizer = VQVAEModel(VQVAEConfig(resolution=8, num_embeddings=64, **config)).eval()
    tokenizer.quantize.embedding.copy_(torch.randn(64, 4) / 10)
    splits, names = load_code_splits(
        run, arguments(str(tmp_path / "images"), label_column="animal"), tokenizer, random_flip=True
    )
    assert names == ["cat", "dog"] and count_classes(splits, names, "animal") == 2
    assert splits["train"].labels.tolist() == [0, 1] * 3 and splits["validation"].labels.tolist() == [1, 0]

    def encode(pixels):
        with torch.no_grad():
            return tokenizer.encode(pixels[None]).indices[0]

    for split, numbers in (("train", range(6)), ("validation", (3, 0))):
        for row, number in enumerate(numbers):
            pixels, found = expected_pixels(number), splits[split][row]["indices"]
            either = [encode(pixels), encode(pixels.flip(-1))][: 2 if split == "train" else 1]
            assert any(torch.equal(found, codes) for codes in either)
    assert len({tuple(splits["train"][row]["indices"].flatten().tolist()) for row in range(6)}) > 1


def make_tokenizer():
    return VQVAE2Model(VQVAE2Config(num_embeddings=8, embed_dim=4, hidden_size=8, resolution=16)).eval()


def test_several_levels_must_be_asked_for(run, tmp_path):
    with pytest.raises(ValueError, match="tokenizer: it must have one level of codes, got a VQVAE2Model with 2"):
        load_code_splits(run, DataArguments(str(tmp_path)), make_tokenizer(), random_flip=False)


def test_several_codes_a_position_are_refused_before_the_data_are_read(run, tmp_path):
    config = {"hidden_size": 8, "residual_hidden_size": 4, "num_residual_layers": 1, "embed_dim": 4, "resolution": 8}
    residual = {"quantizer": "residual", "quantizer_kwargs": {"depth": 2}}
    tokenizer = VQVAEModel(VQVAEConfig(num_embeddings=8, **config, **residual))
    with pytest.raises(ValueError, match="`tokenizer` must have one code at each position, got a VQVAEModel"):
        load_code_splits(run, DataArguments("nowhere"), tokenizer, random_flip=False)
    with pytest.raises(ValueError, match="`condition_tokenizer` must have one code at each position"):
        check_condition_tokenizer(tokenizer, None)


def test_augmentations_that_change_the_codes_are_refused(run, tmp_path):
    data = DataArguments(str(tmp_path), random_flip=True)
    with pytest.raises(ValueError, match="random_flip_codes=True"):
        load_code_splits(run, data, make_tokenizer(), random_flip=False, several_levels=True)


def splits(train, validation):
    arrays = {"train": train, "validation": validation}
    return {name: SimpleNamespace(labels=v if v is None else np.array(v)) for name, v in arrays.items()}


def test_as_many_as_names_or_as_labels():
    assert count_classes(splits([0, 2, 2], [1]), None, "number") == 3
    assert count_classes(splits([0, 1], [1]), ["a", "b", "c", "d"], "name") == 4
    assert count_classes({"train": object(), "validation": object()}, ["a", "b"], "name") == 2  # a stream
    assert count_classes(splits(None, None), None, None) == 0


def test_classes_that_are_validated_and_not_trained_are_named(caplog):
    count_classes(splits([0, 1], [1, 0]), ["a", "b", "c"], "name")
    assert not caplog.records
    count_classes(splits([0, 0], [1, 2]), ["a", "b", "c"], "name")
    assert "No image of the classes ['b', 'c'] is trained on" in caplog.text


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (([0, 1], [2]), None, "the validation labels are 2 to 2, not within 0 to 1"),
        (([-1, 1], [0]), None, "the train labels are -1 to 1, not within 0 to 1"),
        (([0, 1], [1]), ["a"], "the train labels are 0 to 1, not within 0 to 0"),
        ((None, None), None, "label_column='number': the classes of a stream need names"),
    ],
)
def test_what_is_refused(labels, names, message):
    with pytest.raises(ValueError, match=message):
        count_classes(splits(*labels), names, "number")
