"""``hf-vq info`` of models, parts, pipelines, runs and indices."""

import json

import pytest
import torch

import hf_vq
from hf_vq.cli import main
from hf_vq.evaluation.inspection import metric_rows
from hf_vq.training.data.indices_cache import write_indices
from tests.commands.command_line import run
from tests.pipelines.autoregressive_parts import make_tiny_tokenizer


def test_info(folder, model, capsys):
    assert run("info", folder / "vqgan") == 0
    printed = capsys.readouterr().out
    assert "VQGANModel" in printed and f"{model.num_parameters():,}" in printed and "16 codes of 4 channels" in printed
    assert run("info", folder / "pipeline") == 0
    printed = capsys.readouterr().out
    assert "vqvae:" in printed and "prior:" in printed and "VQGPTForCausalLM" in printed and "4×4 of 16" in printed


def test_info_of_a_stock_part(diffusion, capsys):
    assert run("info", diffusion / "latents" / "unet") == 0
    assert "UNet2DModel" in capsys.readouterr().out
    assert run("info", diffusion / "latents" / "scheduler", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"class": "DDIMScheduler"}


def test_info_of_diffusion(diffusion, capsys):
    assert run("info", diffusion / "codes") == 0
    printed = capsys.readouterr().out
    for expected in (
        "transformer:",
        "4×4 of 16",
        "scheduler:",
        "MaskReplaceScheduler",
        "text_encoder:",
        "CLIPTextModel",
    ):
        assert expected in printed
    assert run("info", diffusion / "codes" / "transformer") == 0
    assert "VQDiffusionTransformer2DModel" in capsys.readouterr().out
    assert run("info", diffusion / "latents") == 0
    printed = capsys.readouterr().out
    assert "unet:" in printed and "DDIMScheduler" in printed and "text_encoder:" not in printed


def test_info_of_a_run_of_parts_and_of_indices(folder, tmp_path, capsys):
    def printed(source):
        assert run("info", source, "--json") == 0
        return json.loads(capsys.readouterr().out)

    hf_vq.MaskReplaceScheduler(num_embeddings=16, num_train_timesteps=4).save_pretrained(tmp_path / "scheduler")
    assert printed(tmp_path / "scheduler")["steps"] == "4"
    hf_vq.VQImageProcessor(size=12).save_pretrained(tmp_path / "processor")
    assert printed(tmp_path / "processor") == {"class": "VQImageProcessor", "size": "shortest_edge 12"}

    torch.manual_seed(0)
    model = make_tiny_tokenizer(quantizer="ema")
    model.quantize.cluster_size.copy_(torch.tensor([4.0, 4.0, 8.0] + [0.0] * 13))
    run_folder = tmp_path / "run"
    model.save_pretrained(run_folder / "tokenizer")
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "validation/psnr": 9.0}]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_folder / "checkpoint-2").mkdir()
    found = printed(run_folder)
    assert found["steps"] == 2 and found["checkpoints"] == "checkpoint-2"
    assert found["metrics"] == {"loss": 1.5} and found["validation"] == {"psnr": 9.0}
    # entropy of 1/4, 1/4, 1/2 is 1.5 bits
    assert "3 of 16, perplexity 2.8 " in found["tokenizer"]["codes in use"]

    images = [{"pixel_values": torch.rand(3, 8, 8), "label": number} for number in range(4)]
    for split in ("train", "validation"):
        write_indices(model.eval(), images, tmp_path / "indices" / split, progress=False)
    found = printed(tmp_path / "indices")
    with torch.no_grad():
        codes = model.encode(torch.stack([image["pixel_values"] for image in images])).indices
    assert set(found) == {"train", "validation"} and found["train"]["images"] == 4
    assert f"16 codes an image, {len(codes.unique())} different codes up to {codes.max()}" in found["train"]["indices"]
    assert printed(tmp_path / "indices" / "train")["images"] == 4


def test_metrics_that_are_no_text(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\x80\n')
    for command in (["info", str(tmp_path)], ["show", "curves", str(tmp_path)]):
        assert main(command) == 1
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 must be a JSON object"):
        metric_rows(tmp_path / "metrics.jsonl")
