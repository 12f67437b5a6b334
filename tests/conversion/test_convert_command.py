"""`hf-vq convert`: recognises, verifies, describes, and leaves folders of another kind alone."""

import pytest
import torch
from safetensors.torch import load_file

from hf_vq import VQAutoregressivePipeline, VQGANModel
from hf_vq.cli import main
from hf_vq.commands.convert import recognise
from hf_vq.conversion.reading import load_checkpoint
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


def arguments_of(case, checkpoint):
    folder = GOLDEN / case
    found = {"checkpoint": checkpoint, "config": files(case)[1]}
    found |= {"codec_config": folder / "codec_config.yaml"} if (folder / "codec_config.yaml").exists() else {}
    found |= {"mapping": folder / "codec_mapping.pt"} if (folder / "codec_mapping.pt").exists() else {}
    return ["convert", *(text for name, path in found.items() for text in (f"--{name}", str(path)))]


def changed(content, change):
    """What a file holds with another name and value of every weight."""
    if isinstance(content, dict) and content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return dict(change(name, value) for name, value in content.items())
    if isinstance(content, dict):
        return {name: changed(value, change) for name, value in content.items()}
    return content


def weights_of(folder):
    found = {str(path.relative_to(folder)): load_file(path) for path in folder.rglob("*.safetensors")}
    return {(path, name): value for path, weights in found.items() for name, value in weights.items()}


def in_half(name, value):
    return name, value.half() if value.is_floating_point() else value


@pytest.mark.parametrize("change", [lambda name, value: (f"module.{name}", value), in_half], ids=["module", "half"])
@pytest.mark.parametrize("case", SOURCES)
def test_every_source_in_half_precision_and_of_distributed_training(case, change, tmp_path):
    """Is recognised, and gives the same weights as the file itself, in float32, up to what half precision rounds."""
    torch.save(changed(load_checkpoint(files(case)[0]), change), tmp_path / "checkpoint.pt")
    for name, checkpoint in (("own", files(case)[0]), ("changed", tmp_path / "checkpoint.pt")):
        assert main([*arguments_of(case, checkpoint), "--output", str(tmp_path / name)]) == 0
    own, found = weights_of(tmp_path / "own"), weights_of(tmp_path / "changed")
    assert own.keys() == found.keys() and all(own[key].dtype == found[key].dtype for key in own)
    for key, value in own.items():
        limits = {"atol": 1e-3, "rtol": 2e-3} if change is in_half else {"atol": 0, "rtol": 0}
        torch.testing.assert_close(found[key], value, **limits)


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


@pytest.mark.parametrize("source", [("taming", "--config", "model.yaml"), ("diffusers",), ()])
def test_a_checkpoint_that_does_not_exist(tmp_path, capsys, source):
    assert main(["convert", *source, "--checkpoint", "last.ckpt", "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error == "hf-vq convert: `--checkpoint` must be a file, got 'last.ckpt', which does not exist.\n"


def test_another_source_than_named(tmp_path, capsys):
    checkpoint, _, _ = files("zalando_ema")
    assert main(["convert", "rosinality", "--checkpoint", checkpoint, "--output", str(tmp_path / "out")]) == 1
    assert "looks like a zalando checkpoint, not like rosinality" in capsys.readouterr().err
    torch.save({"weight": torch.zeros(1)}, tmp_path / "strange.pt")
    assert main(["convert", "--checkpoint", str(tmp_path / "strange.pt"), "--output", str(tmp_path / "out")]) == 1
    assert "looks like none of taming" in capsys.readouterr().err
