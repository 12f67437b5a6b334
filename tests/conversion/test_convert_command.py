"""`hf-vq convert`: recognises, verifies, describes, and leaves folders of another kind alone."""

import pytest
import torch

from hf_vq import VQAutoregressivePipeline, VQGANModel
from hf_vq.cli import main
from hf_vq.commands.convert import recognise
from tests.conversion.golden import GOLDEN


SOURCES = {
    "taming_vqmodel_f4": "taming",
    "taming_gpt_uncond": "taming",
    "ldm_vq_uncond": "latent_diffusion",
    "vqdiff_uncond": "vq_diffusion",
    "rosinality_vqvae": "rosinality",
    "rosinality_pixelsnail_top": "rosinality",
    "zalando_ema": "zalando",
    "llamagen_vq": "llamagen",
}


def files(case):
    folder = GOLDEN / case
    return str(next(folder.glob("checkpoint.*"))), str(next(folder.glob("config.*"))), str(folder / "io.safetensors")


@pytest.mark.parametrize("case", SOURCES)
def test_the_source_is_recognised(case):
    assert recognise(files(case)[0]) == SOURCES[case]


def test_converts_verifies_and_describes(tmp_path, capsys):
    checkpoint, config, io = files("taming_gpt_uncond")
    output = tmp_path / "gpt"
    arguments = ["convert", "--checkpoint", checkpoint, "--config", config, "--verify", io, "--output", str(output)]
    assert main([*arguments, "--license", "mit"]) == 0
    printed = capsys.readouterr().out
    assert "this looks like a taming checkpoint" in printed
    errors = dict(line.split(": largest error ") for line in printed.splitlines() if "largest error" in line)
    assert float(errors["all_logits"]) < 1e-5
    card = (output / "README.md").read_text()
    assert "CompVis/taming-transformers" in card and "license: mit" in card and "| all_logits |" in card
    VQAutoregressivePipeline.from_pretrained(output)
    assert [path.name for path in tmp_path.iterdir()] == ["gpt"]


def test_folders_of_another_kind_are_refused(tmp_path, capsys):
    checkpoint, config, io = files("taming_vqmodel_f4")
    arguments = [
        "convert",
        "taming",
        "--checkpoint",
        checkpoint,
        "--config",
        config,
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--verify", io]) == 0
    out = capsys.readouterr().out
    assert "indices: largest error 0" in out and "xrec: largest error" in out
    assert main(arguments) == 0  # the same kind again
    VQGANModel.from_pretrained(tmp_path / "out")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    assert main([*arguments[:-1], str(tmp_path / "photos")]) == 1
    assert "holds other files, not a VQGANModel" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.png"]


def test_another_source_than_named(tmp_path, capsys):
    checkpoint, _, _ = files("zalando_ema")
    assert main(["convert", "rosinality", "--checkpoint", checkpoint, "--output", str(tmp_path / "out")]) == 1
    assert "looks like a zalando checkpoint, not like rosinality" in capsys.readouterr().err
    torch.save({"weight": torch.zeros(1)}, tmp_path / "strange.pt")
    assert main(["convert", "--checkpoint", str(tmp_path / "strange.pt"), "--output", str(tmp_path / "out")]) == 1
    assert "looks like none of taming" in capsys.readouterr().err
