"""A wrong setting of a training script is refused when the run starts: before any data are read."""

import importlib

import pytest

from hf_vq import VQConditionProcessor, VQGANConfig, VQGANModel, VQVAE2Config, VQVAE2Model
from tests.pipelines.latent_diffusion_parts import make_text_parts


COMMON = {"dataset_name_or_path": "images", "cpu": "true", "resolution": "16"}
VQGAN = {"base_channels": "32", "channel_multiplier": "1 1", "attn_resolutions": "4", "perceptual": "none"}
VQGAN |= {"disc_weight": "0"}
VQGAN |= {"embed_dim": "4", "latent_channels": "4", "num_embeddings": "8"}
GPT = {"tokenizer": "VQGAN", "num_hidden_layers": "1", "hidden_size": "16", "num_attention_heads": "2"}
DIFFUSION = {"tokenizer": "VQGAN", "num_layers": "1", "num_attention_heads": "2", "attention_head_dim": "4"}
LATENT = {"tokenizer": "VQGAN", "block_out_channels": "8 8", "attention_head_dim": "4", "norm_num_groups": "4"}
TEXT = {"text_encoder": "TEXT", "caption_column": "text"}
SCRIPTS = {
    "vqvae": {"hidden_size": "8", "num_embeddings": "8", "embed_dim": "4"},
    "vqvae2": {"hidden_size": "8", "num_embeddings": "8", "embed_dim": "4", "downsample_factor": "4"},
    "vqgan": VQGAN,
    "pixelcnn": {"tokenizer": "VQGAN", "hidden_size": "8"},
    "vq_gpt": GPT,
    "vq_diffusion": DIFFUSION,
    "vq_latent_diffusion": LATENT,
}
EVERYWHERE = [
    {"resume_from_checkpoint": "gone"},
    {"resolution": "9"},
    {"hub_model_id": "a/b/c"},
    {"push_to_hub": "true", "hub_model_id": "user/name"},
    {"report_to": "trackio"},
    {"train_batch_size": "3", "gradient_accumulation_steps": "2"},
]
WRONG = {
    "vqvae": [
        {"quantizer_kwargs": '{"decay": 2}'},
        {"quantizer_kwargs": '{"size": 2}'},
        {"quantizer": "fsq", "embed_dim": "4"},
        {"downsample_factor": "3"},
        {"validation_perceptual": "vgg"},
        {"perceptual": "vgg"},
        {"perceptual": "mobilenet_v2", "perceptual_weight": "-1"},
        {"min_codebook_perplexity": "9"},
        {"model_name_or_path": "VQGAN"},
    ],
    "vqvae2": [
        {"quantizer_kwargs": '{"decay": 2}'},
        {"num_levels": "3"},
        {"validation_perceptual": "vgg"},
        {"min_codebook_perplexity": "9"},
    ],
    "vqgan": [
        {"channel_multiplier": "1 0"},
        {"base_channels": "31"},
        {"quantizer": "lfq", "embed_dim": "4"},
        {"quantizer_kwargs": '{"decay": 2}'},
        {"perceptual": "vgg"},
        {"disc_layers": "3", "disc_weight": "0.8"},
        {"min_codebook_perplexity": "9"},
        {"discriminator": "gone"},
        {"condition": "segmentation", "num_labels": "3", "label_map": "0 5"},
        {"condition": "depth"},
    ],
    "pixelcnn": [
        {"kernel_size": "4"},
        {"level": "bottom"},
        {"prior_kwargs": '{"num_layers": -1}'},
        {"prior": "pixelsnail", "prior_kwargs": '{"num_attention_heads": 3}'},
        {"tokenizer": "VQVAE2", "level": "bottom"},
        {"condition_dropout": "0", "guidance_scale": "2"},
    ],
    "vq_gpt": [
        {"n_unmasked": "99"},
        {"condition_dropout": "0", "guidance_scale": "2"},
        {"condition_tokenizer": "VQGAN"},
        {"condition": "coordinates", "picture_size": "16"},
        {"condition": "coordinates", "picture_size": "4", "crop": "random"},
        {"tokenizer": "VQVAE2"},
        {"random_flip": "true"},
    ],
    "vq_diffusion": [
        {"num_train_timesteps": "1", "sample_steps": "1", "validation_timesteps": "1"},
        {"condition_dropout": "0", "guidance_scale": "2", "label_column": "label"},
        {"caption_column": "text"},
        {**TEXT, "text_max_length": "7"},
        {**TEXT, "text_max_length": "7", "cache_indices": "false"},
        {"tokenizer": "VQVAE2"},
        {"sample_steps": "101"},
        {"validation_timesteps": "101"},
    ],
    "vq_latent_diffusion": [
        {"block_out_channels": "8 8 8 8 8", "attention_levels": "0"},
        {"condition_dropout": "0", "guidance_scale": "2"},
        {"text_encoder": "TEXT"},
        {**TEXT, "text_max_length": "7"},
        {"tokenizer": "VQVAE2"},
        {"sample_steps": "1001"},
        {"crop": "random"},
        {"elbo_weight": "1", "prediction_type": "flow"},
    ],
}
CASES = [(name, wrong) for name in SCRIPTS for wrong in EVERYWHERE + WRONG[name]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    sizes = {"latent_channels": 4, "embed_dim": 4, "num_embeddings": 8, "resolution": 8}
    vqgan = VQGANConfig(base_channels=32, channel_multiplier=(1, 1), num_res_blocks=1, attn_resolutions=(), **sizes)
    VQGANModel(vqgan).save_pretrained(root / "VQGAN")
    VQConditionProcessor("depth", size=8).save_pretrained(root / "VQGAN")
    sizes = {"hidden_size": 8, "residual_hidden_size": 4, "num_residual_layers": 1, "embed_dim": 4}
    VQVAE2Model(VQVAE2Config(downsample_factor=4, num_embeddings=8, resolution=8, **sizes)).save_pretrained(
        root / "VQVAE2"
    )
    for part in make_text_parts(start=True):
        part.save_pretrained(root / "TEXT")
    return {name: str(root / name) for name in ("VQGAN", "VQVAE2", "TEXT")}


class DataWereReadError(Exception):
    pass


def start(name, settings, folders, output_dir, monkeypatch):
    def open_rows(*arguments, **options):
        raise DataWereReadError

    monkeypatch.setattr("hf_vq.training.data.image_datasets.open_rows", open_rows)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("hf_vq.training.run_arguments.get_token", lambda: None)
    script = importlib.import_module(f"hf_vq.training.scripts.train_{name}")
    argv = ["--output_dir", str(output_dir)]
    for key, value in {**COMMON, **SCRIPTS[name], **settings}.items():
        argv += [f"--{key}", *(folders.get(part, part) for part in ([value] if "{" in value else value.split()))]
    script.main(argv)


@pytest.mark.parametrize("name", SCRIPTS)
def test_right_settings_reach_the_data(name, folders, tmp_path, monkeypatch):
    with pytest.raises(DataWereReadError):
        start(name, {}, folders, tmp_path, monkeypatch)


@pytest.mark.parametrize(("name", "wrong"), CASES, ids=[f"{name}-{'-'.join(wrong)}" for name, wrong in CASES])
def test_wrong_settings_do_not(name, wrong, folders, tmp_path, monkeypatch):
    with pytest.raises((ValueError, OSError)) as caught:
        start(name, wrong, folders, tmp_path, monkeypatch)
    words = [word.strip('{":') for pair in wrong.items() for part in pair for word in part.split()]
    assert any(folders.get(word, word) in str(caught.value) for word in words), caught.value
