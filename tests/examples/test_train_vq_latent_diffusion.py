"""The training script of latent diffusion: its conditions, its resuming, and what it saves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_vq import VQLatentDiffusionPipeline, VQVAEConfig, VQVAEModel
from hf_vq.training.data.latents_cache import LatentsDataset
from tests.examples.runs import COMMON, finish, kill_at, places_and_length, rows, script


ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--block_out_channels", "8", "8", "--layers_per_block", "1", "--attention_levels", "1", "--attention_head_dim", "4",  # noqa: E501
    "--norm_num_groups", "4", "--sample_steps", "2", "--sample_classes", "2",
]  # fmt: skip


def train(inputs, output, *options, steps=2):
    arguments = [*places_and_length(inputs, steps), "--output_dir", str(output), "--logging_steps", "1"]
    script("vq_latent_diffusion").main([*arguments, *SMALL, *options])
    return VQLatentDiffusionPipeline.from_pretrained(output / "pipeline")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_classes(inputs, tmp_path, prediction):
    pipe = train(inputs, tmp_path, "--label_column", "number", "--prediction_type", prediction, "--min_snr_gamma", "5")
    assert pipe.condition_kind == "class" and pipe.config.null_class_id == 3
    expected = "FlowMatchEulerDiscreteScheduler" if prediction == "flow" else "DDIMScheduler"
    assert type(pipe.scheduler).__name__ == expected
    assert prediction == "flow" or pipe.scheduler.config.prediction_type == prediction
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=[0, 2], num_inference_steps=2, guidance_scale=2.0).images[1].size == (16, 16)
    assert (tmp_path / "pipeline/README.md").exists() and list((tmp_path / "pictures").iterdir())
    assert (tmp_path / "pipeline/vqvae/preprocessor_config.json").exists()
    assert np.isfinite(rows(tmp_path)[-1]["validation/loss"])


def test_text(inputs, tmp_path):
    options = ["--caption_column", "caption", "--text_encoder", str(inputs / "text"), "--text_max_length", "6"]
    pipe = train(inputs, tmp_path, *options)
    assert pipe.condition_kind == "text" and pipe.config.text_max_length == 6
    pipe.set_progress_bar_config(disable=True)
    assert (
        len(pipe(prompt="a picture of 1", num_inference_steps=2, guidance_scale=2.0, num_images_per_prompt=2).images)
        == 2
    )


def test_the_scale_is_measured_and_saved(inputs, tmp_path):
    pipe = train(inputs, tmp_path / "cached")
    assert pipe.condition_kind is None
    latents = np.stack([sample["latents"] for sample in LatentsDataset(tmp_path / "cached/latents/train")])
    assert pipe.vqvae.config.scaling_factor == pytest.approx(1 / latents.std(), rel=1e-5)
    again = train(inputs, tmp_path / "on_the_fly", "--cache_latents", "false")
    assert again.vqvae.config.scaling_factor == pytest.approx(pipe.vqvae.config.scaling_factor, rel=1e-4)
    assert train(inputs, tmp_path / "given", "--scaling_factor", "0.5").vqvae.config.scaling_factor == 0.5


def test_cached_and_encoded_latents_train_alike(inputs, tmp_path):
    losses = []
    for cached, streamed in (("true", "false"), ("true", "true"), ("false", "false")):
        folder, options = tmp_path / f"{cached}-{streamed}", ["--cache_latents", cached, "--streaming", streamed]
        train(inputs, folder, *options, "--scaling_factor", "1.5", steps=3)
        losses.append([row["loss"] for row in rows(folder) if "loss" in row])
    assert len(losses[0]) == 3
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


def test_a_resumed_run_is_an_unbroken_one(inputs, tmp_path, monkeypatch):
    options = [
        "--label_column",
        "number",
        "--checkpointing_steps",
        "2",
        "--ema_decay",
        "0.9",
        "--condition_dropout",
        "0.4",
    ]
    train(inputs, tmp_path / "unbroken", *options, steps=5)
    module = script("vq_latent_diffusion")
    seen, step = [], module.TrainingRun.finish_step

    def finish_step(run):
        step(run)
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("hf_vq.training.run.TrainingRun.finish_step", finish_step)
    with pytest.raises(KeyboardInterrupt):
        train(inputs, tmp_path / "broken", *options, steps=5)
    monkeypatch.setattr("hf_vq.training.run.TrainingRun.finish_step", step)
    train(inputs, tmp_path / "broken", *options, steps=5)
    assert rows(tmp_path / "broken") == rows(tmp_path / "unbroken")


def test_the_saved_denoiser_is_the_average(inputs, tmp_path):
    pipe = train(inputs, tmp_path, "--ema_decay", "0.9", "--checkpointing_steps", "1", "--learning_rate", "0.01")
    before = torch.load(tmp_path / "checkpoint-1/unet-ema.pt")["averages"]["conv_in.weight"]
    live = load_file(tmp_path / "checkpoint-2/unet.safetensors")["conv_in.weight"]
    # after the second step the decay is (1 + 2) / (10 + 2), which is less than 0.9
    torch.testing.assert_close(pipe.unet.conv_in.weight.data, 0.25 * before + 0.75 * live)
    assert (pipe.unet.conv_in.weight - live).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--caption_column", "caption"], "caption_column and text_encoder are given together"),
        (
            ["--caption_column", "caption", "--text_encoder", "text", "--label_column", "number"],
            "give the one that is the condition",
        ),
        (["--condition_dropout", "1"], r"`condition_dropout` must be a number in \[0, 1\)"),
        (["--crop", "random"], "has no effect on latents that are written once"),
        (["--scaling_factor", "-1"], "`scaling_factor` must be a finite number above 0"),
        (["--prediction_type", "flow", "--elbo_weight", "0.1"], "elbo_weight=0.1: a flow has no such bound"),
        (["--sample_steps", "2000"], "sample_steps=2000: it must be at most num_train_timesteps"),
        (["--beta_start", "0.5"], "beta_end=0.0195: it must lie between beta_start=0.5 and 1"),
        (["--attention_head_dim", "16"], r"attention_head_dim=16: it must divide the widths \[8, 8\]"),
        (["--norm_num_groups", "3"], "norm_num_groups=3: it must divide"),
        (["--attention_levels", "2"], r"there are the levels \[0, 1\]"),
        (
            ["--label_column", "number", "--streaming", "true", "--cache_latents", "false"],
            "the classes of a stream need names",
        ),
        (
            ["--label_column", "number", "--train_split", "train[:2]", "--validation_split", "train"],
            "the validation labels are 0 to 2, not within 0 to 1",
        ),
    ],
)
def test_what_is_refused(inputs, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(inputs, tmp_path, *options)


def test_captions_from_a_stream(inputs, tmp_path):
    """Encoded in every step, random crops included."""
    options = ["--streaming", "true", "--cache_latents", "false", "--crop", "random", "--random_flip", "true"]
    options += ["--caption_column", "caption", "--text_encoder", str(inputs / "text"), "--ema_decay", "0.5"]
    train(inputs, tmp_path / "whole", *options, "--checkpointing_steps", "2", steps=5)
    train(inputs, tmp_path / "parts", *options, "--checkpointing_steps", "2", steps=2)
    train(inputs, tmp_path / "parts", *options, "--checkpointing_steps", "2", steps=5)
    losses = [[row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 5


PUSH = """
import runpy, sys
sys.argv = ["train_vq_latent_diffusion.py", *{arguments!r}, "--push_to_hub", "true", "--hub_license", "cc-by-4.0"]
runpy.run_path({script!r}, run_name="__main__")
"""
LOAD = """
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

found = {}
for name, condition in (("class", {"class_labels": [0, 2]}), ("text", {"prompt": ["a picture", "of 1"]})):
    pipe = DiffusionPipeline.from_pretrained(f"tester/{name}", trust_remote_code=True)
    arguments = {**condition, "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
    found[name] = pipe(**arguments, generator=torch.Generator().manual_seed(0)).latents
    card = ModelCard.load(f"tester/{name}")
    assert card.data.license == "cc-by-4.0" and "validation" in card.text, card.text
torch.save(found, "FOUND")
"""


@pytest.mark.hub
@pytest.mark.slow
def test_pushed_and_loaded_by_a_stranger(hub, inputs, tmp_path):
    script_path = str(ROOT / "examples/vq_latent_diffusion/train_vq_latent_diffusion.py")
    text = ["--caption_column", "caption", "--text_encoder", str(inputs / "text")]
    conditions = {"class": (["--label_column", "number"], {"class_labels": [0, 2]})}
    conditions["text"] = (text, {"prompt": ["a picture", "of 1"]})
    for name, (options, _) in conditions.items():
        arguments = [*places_and_length(inputs, 2), *SMALL, "--output_dir", str(tmp_path / name), *options]
        hub.run(PUSH.format(arguments=[*arguments, "--hub_model_id", f"tester/{name}"], script=script_path))
    hub.run(LOAD.replace("FOUND", str(tmp_path / "found.pt")), installed=False)
    found = torch.load(tmp_path / "found.pt")
    for name, (_, condition) in conditions.items():
        pipe = VQLatentDiffusionPipeline.from_pretrained(tmp_path / name / "pipeline")
        arguments = {**condition, "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
        assert torch.equal(pipe(**arguments, generator=torch.Generator().manual_seed(0)).latents, found[name])


@pytest.mark.slow
def test_three_kills_change_nothing(tmp_path):
    command = [
        "examples/vq_latent_diffusion/train_vq_latent_diffusion.py", "examples/vq_latent_diffusion/emoji_32.yaml",
        *COMMON, "--tokenizer", "examples/checkpoints/emoji-32-segmentation/vqvae", "--block_out_channels", "32", "32",
        "--random_flip", "true", "--gradient_accumulation_steps", "2", "--sample_steps", "2",
    ]  # fmt: skip
    finish(command, tmp_path / "unbroken")
    for step in (4, 9, 16):
        kill_at(step, command, tmp_path / "killed")
    finish(command, tmp_path / "killed")
    assert rows(tmp_path / "killed") == rows(tmp_path / "unbroken") and len(rows(tmp_path / "killed")) == 22
    index = json.loads((tmp_path / "killed/pipeline/model_index.json").read_text())
    assert index["null_class_id"] == len(index["id2label"])


def test_a_residual_tokenizer_is_refused_before_its_latents_are_written(inputs, tmp_path):
    sizes = {
        "hidden_size": 8,
        "residual_hidden_size": 4,
        "num_residual_layers": 1,
        "embed_dim": 4,
        "num_embeddings": 8,
    }
    VQVAEModel(VQVAEConfig(resolution=16, quantizer="residual", **sizes)).save_pretrained(tmp_path / "residual")
    with pytest.raises(ValueError, match="`tokenizer` must have one code at each position"):
        train(inputs, tmp_path / "run", "--tokenizer", str(tmp_path / "residual"))
    assert not (tmp_path / "run" / "latents").exists()
