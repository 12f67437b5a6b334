"""The training scripts in this process: their arguments, and a prior on labels without names."""

import math
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_vq import (
    VQAutoregressivePipeline,
    VQGPTForCausalLM,
    VQImageProcessor,
    VQLlamaForCausalLM,
    VQVAEConfig,
    VQVAEModel,
)
from hf_vq.models.quantizers.build import QUANTIZERS
from hf_vq.training.data import code_splits
from hf_vq.training.data.code_splits import training_inputs
from hf_vq.training.run_arguments import parse_arguments
from tests.examples.runs import EXAMPLES, rows, script


def tokenizer_arguments(name, *argv):
    module = script(name)
    kind = module.VQGANArguments if name == "vqgan" else module.VQVAEArguments
    return parse_arguments((kind,), list(argv))[0]


SCRIPTS = sorted(path.parent.name for path in EXAMPLES.glob("*/train_*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, capsys):
    assert len(SCRIPTS) == 7
    with pytest.raises(SystemExit, match="^0$"):
        script(name).main(["--help"])
    text = capsys.readouterr().out
    assert '"train[5%:]"' in " ".join(text.split()) and "--max_train_steps" in text
    if name in ("vqgan", "vqvae", "vqvae2"):
        assert f"{{{','.join(QUANTIZERS)}}}" in text


@pytest.mark.parametrize("name", ["vqgan", "vqvae"])
def test_quantizer_kwargs_from_the_command_line_and_from_a_file(tmp_path, name):
    file = tmp_path / "fsq.yaml"
    file.write_text("quantizer: fsq\nquantizer_kwargs:\n  levels: [8, 5, 5]\n")
    assert tokenizer_arguments(name).quantizer_kwargs == {}
    assert tokenizer_arguments(name, str(file)).quantizer_kwargs == {"levels": [8, 5, 5]}
    assert tokenizer_arguments(name, str(file), "--quantizer_kwargs", '{"levels": [4, 4]}').quantizer_kwargs == {
        "levels": [4, 4]
    }


def test_the_commitment_cost_reaches_the_vqgan():
    small = ["--base_channels", "32", "--channel_multiplier", "1", "--attn_resolutions", "8", "--embed_dim", "4"]
    args = tokenizer_arguments("vqgan", *small, "--latent_channels", "8", "--commitment_cost", "0.7")
    assert script("vqgan").build_model(args, 8).quantize.commitment_cost == 0.7


@pytest.mark.parametrize(("option", "first"), [("fraction: 1", None), ("fraction: 0.5", 3), ("step: 1", 2)])
def test_the_discriminator_starts_where_the_run_is_told(inputs, option, first):
    """The first step, from 1, of the script's own run of four that reports a loss of the discriminator."""
    (inputs / "vqgan.yaml").write_text(f"disc_start_{option}\n")
    shape = "--base_channels 32 --channel_multiplier 1 1 --num_res_blocks 1 --attn_resolutions 4 --latent_channels 8"
    critic = "--embed_dim 4 --num_embeddings 8 --perceptual none --disc_channels 4 --disc_layers 1"
    length = "--max_train_steps 4 --train_batch_size 4 --resolution 16 --cpu true --logging_steps 1"
    places = f"--dataset_name_or_path {inputs / 'images'} --output_dir {inputs / 'vqgan'} --min_codebook_perplexity 0"
    script("vqgan").main([str(inputs / "vqgan.yaml"), *f"{shape} {critic} {length} {places}".split()])
    found = [row["step"] for row in rows(inputs / "vqgan") if "disc_loss" in row]
    assert found == ([] if first is None else list(range(first, 5)))


@pytest.fixture
def inputs(tmp_path):
    """A tokenizer, and a saved data set with labels 0 to 2 as integers and as strings."""
    config = VQVAEConfig(
        resolution=8, hidden_size=8, residual_hidden_size=4, num_residual_layers=1, embed_dim=4, num_embeddings=8
    )
    VQVAEModel(config).save_pretrained(tmp_path / "tokenizer")
    VQImageProcessor(size=8).save_pretrained(tmp_path / "tokenizer")
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 8, 3), np.uint8)
    columns = {"image": [Image.fromarray(image) for image in pixels], "number": [0, 1, 2, 1] * 2}
    features = datasets.Features({"image": datasets.Image(), "number": datasets.Value("int32")})
    rows = datasets.Dataset.from_dict(columns, features=features)
    rows = rows.add_column("name", [f"class {number}" for number in columns["number"]])
    # the validation rows have the labels 1 and 2 only, whose own numbers would be 0 and 1
    datasets.DatasetDict({"train": rows, "validation": rows.select([1, 2, 3])}).save_to_disk(tmp_path / "images")
    return tmp_path


def train_prior(folder, *options):
    shape = "--num_hidden_layers 1 --hidden_size 8 --num_attention_heads 1 --sample_classes 1".split()
    length = "--max_train_steps 1 --train_batch_size 4 --resolution 8 --cpu true".split()
    places = [f"--{key}={folder / value}" for key, value in PLACES.items()]
    script("vq_gpt").main([*places, *shape, *length, *options])
    return VQGPTForCausalLM.from_pretrained(folder / "prior/pipeline/prior").config


PLACES = {"tokenizer": "tokenizer", "dataset_name_or_path": "images", "output_dir": "prior"}


def test_a_prior_on_labels_without_names_has_their_classes(inputs):
    config = train_prior(inputs, "--label_column", "number")
    assert (config.condition_type, config.condition_vocab_size) == ("class", 3)


def test_a_prior_on_strings_has_the_names_of_the_training_data(inputs):
    config = train_prior(inputs, "--label_column", "name")
    assert config.id2label == {0: "class 0", 1: "class 1", 2: "class 2"}
    cached = datasets.load_dataset("parquet", data_dir=str(inputs / "prior/indices/validation"), split="train")
    assert cached["label"][:] == [1, 2, 1]


def test_rows_without_a_label_train_the_null_class(inputs):
    saved = datasets.load_from_disk(str(inputs / "images"))
    rows = saved["train"].remove_columns("number").add_column("number", [0, None, 2, 1, None, None, 2, 1])
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(inputs / "gaps")
    options = ["--label_column", "number", "--dataset_name_or_path", str(inputs / "gaps")]
    with pytest.raises(ValueError, match="the column 'number' has no value in row 1 and in 2 more rows"):
        train_prior(inputs, *options)
    config = train_prior(inputs, *options, "--missing_condition", "null")
    assert config.condition_vocab_size == 3
    prior = VQGPTForCausalLM(config)
    indices = torch.zeros(3, *config.grid_size, dtype=torch.long)
    ids = training_inputs(prior, indices, torch.tensor([2, -1, 0]))["input_ids"]
    assert torch.equal(
        ids[:, 0], torch.tensor([config.codebook_size + 2, config.null_class_token_id, config.codebook_size])
    )


def test_a_prior_without_labels(inputs):
    assert train_prior(inputs).condition_type == "unconditional"


def test_a_prior_sees_images_of_its_tokenizers_size(inputs):
    """Where no `--resolution` is given; and one validation image is enough."""
    shape = "--num_hidden_layers 1 --hidden_size 8 --num_attention_heads 1 --sample_classes 1 --max_train_steps 1"
    places = [f"--{key}={inputs / value}" for key, value in PLACES.items()]
    options = ["--train_batch_size", "4", "--cpu", "true", "--validation_share", "0.1"]
    script("vq_gpt").main([*places, *shape.split(), *options])
    pipeline = VQAutoregressivePipeline.from_pretrained(inputs / "prior/pipeline")
    assert pipeline.image_size == (8, 8)
    card = (inputs / "prior/pipeline/README.md").read_text()
    assert "10 % of train, at random" in card and "standard_error" not in card


def test_a_llama_trains_and_its_pipeline_samples(inputs):
    places = [f"--{key}={inputs / value}" for key, value in PLACES.items()]
    shape = "--architecture llama --num_hidden_layers 1 --hidden_size 16 --num_attention_heads 2 --sample_classes 1"
    length = (
        "--max_train_steps 30 --train_batch_size 8 --learning_rate 0.03 --lr_warmup_steps 0 --resolution 8 --cpu true"
    )
    regularisation = "--dropout 0 --condition_dropout 0.1 --attention_dropout 0.1 --pkeep 0.9"
    options = [*shape.split(), *length.split(), *regularisation.split(), "--label_column", "number"]
    script("vq_gpt").main([*places, *options])
    pipeline = VQAutoregressivePipeline.from_pretrained(inputs / "prior/pipeline")
    pipeline.set_progress_bar_config(disable=True)
    prior = pipeline.prior
    assert type(prior) is VQLlamaForCausalLM and prior.config.condition_vocab_size == 3
    assert (prior.config.pkeep, prior.config.attention_dropout, prior.config.embd_pdrop) == (0.9, 0.1, 0.0)
    images = pipeline(
        class_labels=[2, 0], guidance_scale=2.0, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images
    assert images.shape == (2, 3, 8, 8)
    # it knows the images that it was trained on better than codes at random
    saved = datasets.load_dataset("parquet", data_dir=str(inputs / "prior/indices/train"), split="train")
    codes, labels = torch.tensor(saved["indices"][:]).reshape(8, *prior.config.grid_size), saved["label"][:]
    with torch.no_grad():
        nats = -prior.log_likelihood(codes, torch.tensor(labels)).mean().item() / codes[0].numel()
    assert nats < 0.8 * math.log(prior.config.codebook_size)


def test_architectures_and_heads_that_do_not_exist():
    for options, message in (
        (["--architecture", "mamba"], "must be 'gpt' or 'llama'"),
        (["--architecture", "llama", "--hidden_size", "12", "--num_attention_heads", "2"], "a multiple of 4 channels"),
        (["--architecture", "llama", "--n_unmasked", "2"], "n_unmasked=2: it needs architecture='gpt'"),
        (["--architecture", "llama", "--condition_tokenizer", "maps"], "condition_tokenizer='maps': it needs"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_arguments((script("vq_gpt").VQGPTArguments,), ["--tokenizer", "folder", *options])


def test_weight_decay_spares_the_embedding_of_a_llama():
    args = script("vq_gpt").VQGPTArguments(
        "folder", architecture="llama", num_hidden_layers=1, hidden_size=16, num_attention_heads=2
    )
    tokenizer = SimpleNamespace(config=SimpleNamespace(num_embeddings=8))
    prior = script("vq_gpt").build_prior(args, tokenizer, {"indices": (2, 2)}, 3, None)
    kept = {id(p) for p in script("vq_gpt").weight_groups(prior, 0.1)[1]["params"]}
    names = {name for name, parameter in prior.named_parameters() if id(parameter) in kept}
    assert "model.embed_tokens.weight" in names and all("norm" in name or "embed" in name for name in names)


def test_validation_labels_beyond_those_of_the_training_data_are_refused(inputs):
    with pytest.raises(ValueError, match="the validation labels are 0 to 2, not within 0 to 1"):
        train_prior(inputs, "--label_column", "number", "--train_split", "train[:2]", "--validation_split", "train")


@pytest.mark.parametrize("option", ["--random_flip=true", "--crop=random"])
def test_augmentation_that_codes_cannot_have_is_refused(inputs, option):
    with pytest.raises(ValueError, match="random_flip_codes"):
        train_prior(inputs, option)


def test_workers_read_the_images_that_are_encoded(inputs, monkeypatch):
    module, seen = script("vq_gpt"), {}

    def write_indices(*args, num_workers=0, **kwargs):
        seen["num_workers"] = num_workers
        raise KeyboardInterrupt

    monkeypatch.setattr(code_splits, "write_indices", write_indices)
    places = [f"--{key}={inputs / value}" for key, value in PLACES.items()]
    with pytest.raises(KeyboardInterrupt):
        module.main([*places, "--resolution", "8", "--cpu", "true", "--dataloader_num_workers", "3"])
    assert seen == {"num_workers": 3}
