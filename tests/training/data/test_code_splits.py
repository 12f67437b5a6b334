"""What the codes of a data set cannot be made of."""

import pytest

from hf_vq import VQVAE2Config, VQVAE2Model
from hf_vq.training.data.code_splits import load_code_splits
from hf_vq.training.data.image_datasets import DataArguments
from hf_vq.training.run import RunArguments, TrainingRun


@pytest.fixture
def run(tmp_path):
    return TrainingRun(RunArguments(str(tmp_path), cpu=True))


def make_tokenizer():
    return VQVAE2Model(VQVAE2Config(num_embeddings=8, embed_dim=4, hidden_size=8, resolution=16)).eval()


def test_several_levels_must_be_asked_for(run, tmp_path):
    with pytest.raises(ValueError, match="tokenizer: it must have one level of codes, got a VQVAE2Model with 2"):
        load_code_splits(run, DataArguments(str(tmp_path)), make_tokenizer(), random_flip=False)


def test_augmentations_that_change_the_codes_are_refused(run, tmp_path):
    data = DataArguments(str(tmp_path), random_flip=True)
    with pytest.raises(ValueError, match="random_flip_codes=True"):
        load_code_splits(run, data, make_tokenizer(), random_flip=False, several_levels=True)
