"""The training script of PixelCNN and PixelSNAIL: every level of a tokenizer, its resuming, and what it saves."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from hf_vq import (
    PixelCNNForCausalLM,
    PixelSNAILForCausalLM,
    VQAutoregressivePipeline,
    VQImageProcessor,
    VQVAE2Config,
    VQVAE2Model,
    VQVAE2Pipeline,
    VQVAEConfig,
    VQVAEModel,
)
from hf_vq.training.data.indices_cache import load_indices
from tests.examples.runs import COMMON, STEPS, finish, kill_at, rows, script


ROOT = Path(__file__).resolve().parents[2]
SMALL = {"hidden_size": 8, "residual_hidden_size": 4, "num_residual_layers": 1, "embed_dim": 4, "num_embeddings": 8}
NETWORKS = {
    "pixelcnn": '{"num_hidden_layers": 2, "head_hidden_size": 8}',
    "pixelsnail": '{"num_blocks": 1, "num_res_blocks": 1, "res_channels": 8, "num_attention_heads": 2}',
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Tokenizers of 1, 2 and 3 levels, and images with labels 0 to 2."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    tokenizers = {
        1: VQVAEModel(VQVAEConfig(resolution=16, **SMALL)),
        2: VQVAE2Model(VQVAE2Config(resolution=16, downsample_factor=8, **SMALL)),
        3: VQVAE2Model(VQVAE2Config(resolution=16, downsample_factor=8, num_levels=3, **SMALL)),
    }
    for levels, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / f"tokenizer-{levels}")
        VQImageProcessor(size=16).save_pretrained(folder / f"tokenizer-{levels}")
    pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8)
    columns = {"image": [Image.fromarray(image) for image in pixels], "number": [0, 1, 2, 1] * 2}
    features = datasets.Features({"image": datasets.Image(), "number": datasets.Value("int32")})
    splits = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": splits, "validation": splits.select([1, 2, 3])}).save_to_disk(folder / "images")
    return folder


def arguments(inputs, output, *options, prior="pixelcnn", levels=1, steps=2):
    return [
        *("--tokenizer", str(inputs / f"tokenizer-{levels}"), "--dataset_name_or_path", str(inputs / "images")),
        *("--output_dir", str(output), "--max_train_steps", str(steps), "--train_batch_size", "4"),
        *("--resolution", "16", "--cpu", "true", "--logging_steps", "1", "--sample_classes", "2"),
        *("--prior", prior, "--prior_kwargs", NETWORKS[prior], "--hidden_size", "8", "--kernel_size", "3", *options),
    ]


def train(*args, **kwargs):
    script("pixelcnn").main(arguments(*args, **kwargs))


@pytest.mark.parametrize("prior", NETWORKS)
@pytest.mark.parametrize("labels", [[], ["--label_column", "number", "--guidance_scale", "2.0"]])
def test_a_single_level_becomes_a_pipeline(inputs, tmp_path, prior, labels):
    train(inputs, tmp_path, *labels, prior=prior)
    pipe = VQAutoregressivePipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.prior) is {"pixelcnn": PixelCNNForCausalLM, "pixelsnail": PixelSNAILForCausalLM}[prior]
    assert pipe.prior.config.condition_vocab_size == (3 if labels else 0)
    assert pipe(class_labels=2 if labels else None).images[0].size == (16, 16)
    assert (tmp_path / "pipeline/vqvae/preprocessor_config.json").exists()
    assert "bits_per_index" in (tmp_path / "pipeline/README.md").read_text()
    assert list((tmp_path / "pictures").iterdir())


def test_the_levels_of_a_hierarchy_make_a_pipeline(inputs, tmp_path):
    for level in ("top", "middle", "bottom"):
        options = ["--level", level, "--label_column", "number"]
        train(inputs, tmp_path / level, *options, prior="pixelsnail", levels=3)
        assert list((tmp_path / level / "pictures").iterdir()), level
    priors = {f"{level}_prior": tmp_path / level / "prior" for level in ("top", "middle", "bottom")}
    priors = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in priors.items()}
    assert [list(prior.config.grid_size) for prior in priors.values()] == [[2, 2], [4, 4], [8, 8]]
    assert "bits_per_index" in (tmp_path / "bottom/prior/README.md").read_text()
    vqvae = VQVAE2Model.from_pretrained(inputs / "tokenizer-3")
    pipe = VQVAE2Pipeline(vqvae, **priors)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=[0, 2]).images[1].size == (16, 16)

    # the bits of a level are those of its codes given the level above
    codes = load_indices(tmp_path / "bottom/indices/validation", vqvae)
    samples = [codes[i] for i in range(3)]
    own, above = (torch.stack([sample[name] for sample in samples]) for name in ("indices_2", "indices_1"))
    labels = [sample["label"] for sample in samples]
    with torch.no_grad():
        nats = priors["bottom_prior"].log_likelihood(own, labels, condition_indices=above)
    figures = rows(tmp_path / "bottom")[-1]
    bits = -nats.sum().item() / np.log(2)
    assert figures["validation/bits_per_index"] == pytest.approx(bits / (3 * 64), rel=1e-5)
    assert figures["validation/bits_per_pixel_dim"] == pytest.approx(bits / (3 * 3 * 256), rel=1e-5)


def test_the_top_level_can_be_a_pixelcnn(inputs, tmp_path):
    train(inputs, tmp_path, "--level", "top", levels=2)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "prior").config.grid_size == [2, 2]


def test_a_resumed_run_is_an_unbroken_one(inputs, tmp_path):
    options = [
        "--label_column",
        "number",
        "--ema_decay",
        "0.9",
        "--condition_dropout",
        "0.4",
        "--checkpointing_steps",
        "2",
    ]
    options += ["--level", "bottom", "--random_flip_codes", "true"]
    train(inputs, tmp_path / "whole", *options, prior="pixelsnail", levels=2, steps=5)
    for steps in (2, 5):
        train(inputs, tmp_path / "parts", *options, prior="pixelsnail", levels=2, steps=steps)
    losses = [[row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 5


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (["--level", "top"], {}, "the tokenizer has 1 levels, choose from single"),
        ([], {"levels": 2}, "the tokenizer has 2 levels, choose from top, bottom"),
        (["--level", "middle"], {"levels": 2}, "choose from top, bottom"),
        (["--level", "bottom"], {"levels": 2}, "needs prior=pixelsnail"),
        (["--prior_kwargs", '{"num_blocks": 1}'], {}, "no fields of PixelCNNConfig"),
        (["--prior_kwargs", '{"hidden_size": 16}'], {}, "must be given as arguments of their own: --hidden_size"),
        (["--prior_kwargs", '{"codebook_size": 9}'], {}, "which follow from the tokenizer and the data"),
        (["--random_flip", "true"], {}, "random_flip_codes"),
    ],
)
def test_what_is_refused(inputs, tmp_path, options, settings, message):
    with pytest.raises(ValueError, match=message):
        train(inputs, tmp_path, *options, **settings)


KILLED = [
    "examples/pixelcnn/train_pixelcnn.py", "examples/pixelcnn/emoji_32.yaml", *COMMON,
    "--tokenizer", "examples/checkpoints/emoji-32-segmentation/vqvae",
]  # fmt: skip


@pytest.mark.slow
def test_kills_change_nothing(tmp_path):
    finish(KILLED, tmp_path / "unbroken")
    for step in (4, 11):
        kill_at(step, KILLED, tmp_path / "killed")
    finish(KILLED, tmp_path / "killed")
    unbroken = rows(tmp_path / "unbroken")
    assert len(unbroken) == STEPS + 2 and rows(tmp_path / "killed") == unbroken


PUSH = """
import runpy, sys
sys.argv = ["train_pixelcnn.py", *{arguments!r}, "--push_to_hub", "true", "--hub_license", "cc-by-4.0"]
runpy.run_path({script!r}, run_name="__main__")
"""
LOAD = """
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

found = {}
for name in ("pixelcnn", "pixelsnail"):
    pipe = DiffusionPipeline.from_pretrained(f"tester/{name}", trust_remote_code=True)
    options = {"class_labels": [0, 2], "guidance_scale": 2.0, "output_type": "indices"}
    found[name] = pipe(**options, generator=torch.Generator().manual_seed(0)).indices
    assert "bits_per_index" in ModelCard.load(f"tester/{name}").text
prior = AutoModelForCausalLM.from_pretrained("tester/bottom", trust_remote_code=True)
above = torch.arange(4).view(1, 2, 2)
found["bottom"] = prior.generate(prior.prepare_condition(1), condition_indices=above, do_sample=False)
torch.save(found, "FOUND")
"""


@pytest.mark.hub
@pytest.mark.slow
def test_pushed_and_loaded_by_a_stranger(hub, inputs, tmp_path):
    runs = {"pixelcnn": ("pixelcnn", 1, []), "pixelsnail": ("pixelsnail", 1, [])}
    runs["bottom"] = ("pixelsnail", 2, ["--level", "bottom"])
    for name, (prior, levels, options) in runs.items():
        options = [*options, "--label_column", "number", "--hub_model_id", f"tester/{name}"]
        command = arguments(inputs, tmp_path / name, *options, prior=prior, levels=levels)
        hub.run(PUSH.format(arguments=command, script=str(ROOT / "examples/pixelcnn/train_pixelcnn.py")))
    hub.run(LOAD.replace("FOUND", str(tmp_path / "found.pt")), installed=False)
    found = torch.load(tmp_path / "found.pt")
    for name in ("pixelcnn", "pixelsnail"):
        pipe = VQAutoregressivePipeline.from_pretrained(tmp_path / name / "pipeline")
        options = {"class_labels": [0, 2], "guidance_scale": 2.0, "output_type": "indices"}
        assert torch.equal(pipe(**options, generator=torch.Generator().manual_seed(0)).indices, found[name])
    prior = AutoModelForCausalLM.from_pretrained(tmp_path / "bottom/prior")
    above = torch.arange(4).view(1, 2, 2)
    own = prior.generate(prior.prepare_condition(1), condition_indices=above, do_sample=False)
    assert torch.equal(own, found["bottom"])
