"""The training script of VQ-Diffusion: its conditions, its resuming, and what it saves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from hf_vq import VQDiffusionImagePipeline, VQVAEConfig, VQVAEModel
from hf_vq.evaluation.diffusion_likelihood import DiffusionLikelihood
from hf_vq.pipelines.conditioning import encode_text
from hf_vq.training.data.indices_cache import load_indices
from hf_vq.training.sample_generators import sample_generators
from tests.examples.runs import COMMON, finish, kill_at, places_and_length, rows, script


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "examples/vq_diffusion/train_vq_diffusion.py"
SMALL = [
    "--num_layers", "1", "--num_attention_heads", "2", "--attention_head_dim", "4", "--num_train_timesteps", "10",
    "--validation_timesteps", "2", "--sample_steps", "2", "--sample_classes", "2",
]  # fmt: skip


def arguments(inputs, output, *options, steps=2):
    shared = places_and_length(inputs, steps)
    return [*shared, "--output_dir", str(output), "--logging_steps", "1", *SMALL, *options]


def train(inputs, output, *options, steps=2):
    script("vq_diffusion").main(arguments(inputs, output, *options, steps=steps))
    pipe = VQDiffusionImagePipeline.from_pretrained(output / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_options(inputs):
    return ["--caption_column", "caption", "--text_encoder", str(inputs / "text"), "--text_max_length", "7"]


@pytest.mark.parametrize("mlp_type", ["fc", "conv"])
def test_classes(inputs, tmp_path, mlp_type):
    options = ["--label_column", "number", "--mlp_type", mlp_type, "--gradient_checkpointing", "true"]
    options += ["--auxiliary_weight", "0.25"]
    pipe = train(inputs, tmp_path, *options)
    config = pipe.transformer.config
    assert (config.condition_type, config.num_classes, config.mlp_type) == ("class", 3, mlp_type)
    assert pipe.transformer.null_class_id == 3 and pipe.scheduler.config.auxiliary_loss_weight == 0.25
    assert pipe(class_labels=[0, 2], num_inference_steps=2, guidance_scale=2.0).images[1].size == (16, 16)
    assert (tmp_path / "pipeline/README.md").exists() and list((tmp_path / "pictures").iterdir())
    assert (tmp_path / "pipeline/vqvae/preprocessor_config.json").exists()
    last = rows(tmp_path)[-1]
    assert 0 < last["validation/bits_per_index"] < 20 and last["validation/uniform_bits_per_index"] == 3


@pytest.mark.parametrize("learnable", ["true", "false"])
def test_text(inputs, tmp_path, learnable):
    pipe = train(inputs, tmp_path, *text_options(inputs), "--learnable_null_embedding", learnable)
    assert pipe.transformer.config.condition_type == "text" and pipe.config.text_max_length == 7
    if learnable == "true":
        assert pipe.transformer.null_embedding.shape == (7, 8)
    images = pipe("a picture of 1", num_inference_steps=2, guidance_scale=2.0, num_images_per_prompt=2).images
    assert len(images) == 2


@pytest.mark.parametrize("schedule", ["cosine", "uniform_only"])
def test_unconditional(inputs, tmp_path, schedule):
    pipe = train(inputs, tmp_path, "--schedule", schedule)
    assert pipe.scheduler.config.schedule == schedule
    assert pipe.transformer.config.condition_type == "unconditional"
    assert pipe(num_images_per_prompt=3, num_inference_steps=2, output_type="indices").indices.shape == (3, 4, 4)


def test_the_null_condition_takes_the_place_of_what_is_dropped(inputs, tmp_path):
    options = [*text_options(inputs), "--learnable_null_embedding", "true", "--condition_dropout", "0.5"]
    pipe = train(inputs, tmp_path, *options)
    module, captions = script("vq_diffusion"), ["a picture of 1", "a picture of 2", "a picture of 1"]
    plain = encode_text(pipe.text_encoder, pipe.tokenizer, captions, max_length=7)
    condition = module.Condition(pipe, "caption", set(captions))
    kept, dropped = condition.inputs(captions), condition.inputs(captions, dropout=1.0)
    torch.testing.assert_close(kept["encoder_hidden_states"], plain.embeddings)
    assert torch.equal(kept["encoder_attention_mask"], plain.mask) and not plain.mask.all()
    null = pipe.transformer.null_embedding
    assert torch.equal(dropped["encoder_hidden_states"], null.expand(3, -1, -1))
    assert dropped["encoder_attention_mask"].all()
    torch.manual_seed(0)
    some = condition.inputs(captions * 100, dropout=0.3)["encoder_hidden_states"]
    assert 50 < (some == null).all(dim=2).all(dim=1).sum() < 130


def test_without_a_learned_null_condition_the_empty_caption_stands_for_it(inputs, tmp_path):
    pipe = train(inputs, tmp_path, *text_options(inputs))
    module = script("vq_diffusion")
    for captions in (None, {"a picture of 1"}):  # encoded when needed, and from the table
        condition = module.Condition(pipe, "caption", captions)
        dropped = condition.inputs(["a picture of 1"], dropout=1.0)
        empty = encode_text(pipe.text_encoder, pipe.tokenizer, "", max_length=7)
        torch.testing.assert_close(dropped["encoder_hidden_states"], empty.embeddings)
        assert torch.equal(dropped["encoder_attention_mask"], empty.mask)


def losses(output):
    return [row["loss"] for row in rows(output) if "loss" in row]


def test_cached_and_encoded_codes_and_captions_train_alike(inputs, tmp_path):
    options = [*text_options(inputs), "--exclude", "number=0"]
    train(inputs, tmp_path / "encoded", *options, "--cache_indices", "false", steps=3)
    train(inputs, tmp_path / "cached", *options, "--cache_captions", "true", steps=3)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "encoded"), rel=1e-4)
    assert len(losses(tmp_path / "cached")) == 3
    cached = datasets.load_dataset("parquet", data_dir=str(tmp_path / "cached/indices/train"), split="train")
    assert sorted(set(cached["caption"][:])) == ["a picture of 1", "a picture of 2"]


def test_the_bound_of_a_validation_is_that_of_the_saved_pipeline(inputs, tmp_path):
    options = ["--label_column", "number", "--validation_timesteps", "10", "--ema_decay", "0.5"]
    pipe = train(inputs, tmp_path, *options, steps=4)
    codes = load_indices(tmp_path / "indices/validation")
    bound = DiffusionLikelihood(
        pipe.transformer, pipe.scheduler, generator=lambda batch_size: sample_generators(0, range(batch_size))
    )
    batch = [codes[i] for i in range(3)]
    indices, labels = torch.stack([b["indices"] for b in batch]), torch.tensor([b["label"] for b in batch])
    bits = -bound.log_likelihood(indices, labels).mean() / indices[0].numel() / np.log(2)
    assert rows(tmp_path)[-1]["validation/bits_per_index"] == pytest.approx(float(bits), rel=1e-4)


def test_a_resumed_run_is_an_unbroken_one(inputs, tmp_path, monkeypatch):
    # of three timesteps, each is soon met so often that the history of their losses counts
    options = ["--label_column", "number", "--checkpointing_steps", "12", "--ema_decay", "0.9"]
    options += ["--condition_dropout", "0.4", "--num_train_timesteps", "3", "--dropout", "0.1"]
    train(inputs, tmp_path / "unbroken", *options, steps=17)
    step = script("vq_diffusion").TrainingRun.finish_step

    def finish_step(run):
        step(run)
        if run.global_step == 14:
            raise KeyboardInterrupt

    monkeypatch.setattr("hf_vq.training.run.TrainingRun.finish_step", finish_step)
    with pytest.raises(KeyboardInterrupt):
        train(inputs, tmp_path / "broken", *options, steps=17)
    monkeypatch.setattr("hf_vq.training.run.TrainingRun.finish_step", step)
    train(inputs, tmp_path / "broken", *options, steps=17)
    assert rows(tmp_path / "broken") == rows(tmp_path / "unbroken")
    state = torch.load(tmp_path / "unbroken/checkpoint-12/timesteps.pt", weights_only=True)
    assert (state["counts"] > 10).all() and state["counts"].sum() == 12 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--caption_column", "caption"], "caption_column and text_encoder are given together"),
        (["--condition_dropout", "1"], r"`condition_dropout` must be a number in \[0, 1\)"),
        (["--sample_steps", "11"], "sample_steps=11: it must be at most num_train_timesteps=10"),
        (["--truncation_rate", "nan"], "`truncation_rate` must be"),
        (["--crop", "random"], "have no effect on codes that are written once"),
        (["--learnable_null_embedding", "true"], "learnable_null_embedding=True needs a text_encoder"),
        (["--random_flip_codes", "true", "--cache_indices", "false"], "random_flip_codes=True needs cache_indices"),
        (["--cache_captions", "true"], "cache_captions=True needs a text_encoder"),
        (["--label_column", "number", "--caption_column", "caption", "--text_encoder", "x"], "give the one"),
        (["--validation_timesteps", "11"], "validation_timesteps=11: it must be at most num_train_timesteps=10"),
        (["--label_column", "number", "--streaming", "true", "--cache_indices", "false"], "of a stream need names"),
    ],
)
def test_what_is_refused(inputs, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(inputs, tmp_path, *options)


def test_several_codes_a_position_are_refused(inputs, tmp_path):
    config = VQVAEConfig(
        resolution=8, hidden_size=8, residual_hidden_size=4, embed_dim=4, quantizer="residual", num_embeddings=8
    )
    VQVAEModel(config).save_pretrained(tmp_path / "residual")
    with pytest.raises(ValueError, match="must have one code at each position, got a"):
        train(inputs, tmp_path / "run", "--tokenizer", str(tmp_path / "residual"))


@pytest.mark.slow
def test_two_processes_have_one_history(inputs, tmp_path):
    options = [*text_options(inputs), "--learnable_null_embedding", "true", "--condition_dropout", "0.3"]
    command = ["torchrun", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", *command[1:], SCRIPT]
    command += arguments(inputs, tmp_path, *options, steps=3)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    state = torch.load(tmp_path / "checkpoint-3/timesteps.pt", weights_only=True)
    assert state["counts"].sum() == 3 * 4
    assert rows(tmp_path)[-1]["validation/num_images"] == 3


PUSH = """
import runpy, sys
sys.argv = ["train_vq_diffusion.py", *{arguments!r}, "--push_to_hub", "true", "--hub_model_id", "tester/text"]
runpy.run_path({script!r}, run_name="__main__")
"""
LOAD = """
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

pipe = DiffusionPipeline.from_pretrained("tester/text", trust_remote_code=True)
arguments = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "indices"}
indices = pipe(["a picture", "of 1"], **arguments, generator=torch.Generator().manual_seed(0)).indices
assert "bits_per_index" in ModelCard.load("tester/text").text
torch.save(indices, "FOUND")
"""


@pytest.mark.hub
@pytest.mark.slow
def test_pushed_and_loaded_by_a_stranger(hub, inputs, tmp_path):
    options = [*text_options(inputs), "--learnable_null_embedding", "true"]
    command = arguments(inputs, tmp_path / "run", *options)
    hub.run(PUSH.format(arguments=command, script=str(ROOT / SCRIPT)))
    hub.run(LOAD.replace("FOUND", str(tmp_path / "found.pt")), installed=False)
    pipe = VQDiffusionImagePipeline.from_pretrained(tmp_path / "run/pipeline")
    sampling = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "indices"}
    indices = pipe(["a picture", "of 1"], **sampling, generator=torch.Generator().manual_seed(0)).indices
    assert torch.equal(indices, torch.load(tmp_path / "found.pt"))


@pytest.mark.slow
def test_three_kills_change_nothing(tmp_path):
    command = [
        SCRIPT, "examples/vq_diffusion/emoji_32.yaml", *COMMON,
        "--tokenizer", "examples/checkpoints/emoji-32-segmentation/vqvae",
        "--num_layers", "2", "--num_attention_heads", "2", "--random_flip_codes", "true", "--sample_steps", "2",
        "--gradient_accumulation_steps", "2", "--num_train_timesteps", "4", "--validation_timesteps", "2",
    ]  # fmt: skip
    finish(command, tmp_path / "unbroken")
    for step in (4, 9, 16):
        kill_at(step, command, tmp_path / "killed")
    finish(command, tmp_path / "killed")
    assert rows(tmp_path / "killed") == rows(tmp_path / "unbroken") and len(rows(tmp_path / "killed")) == 22
    index = json.loads((tmp_path / "killed/pipeline/model_index.json").read_text())
    assert len(index["id2label"]) == 9


def test_texts_of_one_vector_are_not_trained_on():
    start = SimpleNamespace(source="user/pooled", text_options={"text_pooled": True})
    with pytest.raises(ValueError, match=r"model_name_or_path='user/pooled': its texts are one projected vector"):
        script("vq_diffusion").load_text(SimpleNamespace(text_encoder="any"), torch.device("cpu"), start)
