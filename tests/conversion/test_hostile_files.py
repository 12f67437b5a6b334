"""What strangers bring to the converters: each file that is not what it should be is one line, and nothing is left."""

import copy
import io
import json
import os
import zipfile

import pytest
import torch
import yaml
from safetensors.torch import save_file

from hf_vq import VQGANConfig, load_tokenizer
from hf_vq.cli import main
from hf_vq.commands.convert import OPTIONS
from hf_vq.conversion import (
    convert_latent_diffusion,
    convert_llamagen,
    convert_rosinality,
    convert_taming,
    convert_vq_diffusion,
    convert_zalando,
)
from hf_vq.conversion.checkpoints import errors_name, run_script, written_folder
from hf_vq.conversion.reading import ConfigLoader
from tests.conversion.golden import GOLDEN


CASES = {
    "taming": "taming_vqmodel_f2_plcallback",
    "latent_diffusion": "ldm_vq_uncond",
    "vq_diffusion": "vqdiff_uncond",
    "rosinality": "rosinality_vqvae",
    "zalando": "zalando_ema",
    "llamagen": "llamagen_vq",
}


def saved(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def archive(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(name, "nothing")
    return buffer.getvalue()


FILES = {
    "html": b"<!DOCTYPE html><html><body>Sign in</body></html>",
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "empty": b"",
    "cut": saved({"a": torch.zeros(9)})[:150],
    "cut_legacy": saved({"a": torch.zeros(9)}, _use_new_zipfile_serialization=False)[:120],
    "list": saved([torch.zeros(1)]),
    "no_weights": saved({"epoch": 3}),
    "nan": saved({"state_dict": {"a": torch.tensor([float("nan")])}, "model": {"a": torch.tensor([float("nan")])}}),
    "infinite": saved({"a": torch.tensor([float("inf")])}),
    "zip": archive("weights.bin"),
    "script": archive("model/code/__torch__.py"),
    "json": b'{"a": 1}',
}


def one_line(text: str, *parts: str) -> None:
    lines = [line for line in text.splitlines() if line.startswith("hf-vq convert:")]
    assert len(lines) == 1 and all(part in lines[0] for part in parts), text
    assert "Traceback" not in text and "weights_only" not in text


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("source", [*OPTIONS, None])
def test_files_that_are_no_checkpoint(source, kind, tmp_path, capsys):
    path = tmp_path / "strange.ckpt"
    path.write_bytes(FILES[kind])
    named = [] if source is None else [source]
    config = []
    if source in CASES:
        config = ["--config", str(next((GOLDEN / CASES[source]).glob("config.*")))]
    assert main(["convert", *named, "--checkpoint", str(path), *config, "--output", str(tmp_path / "out")]) == 1
    one_line(capsys.readouterr().err, "strange.ckpt" if kind not in ("nan", "infinite", "no_weights") else "`")
    assert [file.name for file in tmp_path.iterdir()] == ["strange.ckpt"]


@pytest.mark.parametrize("kind", FILES)
def test_load_tokenizer(kind, tmp_path):
    path = tmp_path / "strange.pt"
    path.write_bytes(FILES[kind])
    with pytest.raises(ValueError, match="strange.pt") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------------

WRONG_CONFIGS = {
    "tags": "model: !!python/object/apply:os.system ['true']",
    "list": "- 1\n",
    "number": "7",
    "html": "<!doctype html>",
    "lfs": "version https://git-lfs.github.com/spec/v1",
    "broken": "model: [1",
    "other": "data:\n  x: 1\n",
    "target": "model:\n  target: 3\n  params: {}\n",
    "unknown": "model:\n  target: a.B\n  params: {}\n",
    "params": "model:\n  target: taming.models.vqgan.VQModel\n  params: [1]\n",
}


@pytest.mark.parametrize("kind", WRONG_CONFIGS)
@pytest.mark.parametrize("source", CASES)
def test_files_that_are_no_configuration(source, kind, tmp_path, capsys):
    checkpoint = next((GOLDEN / CASES[source]).glob("checkpoint.*"))
    config = tmp_path / "strange.yaml"
    config.write_text(WRONG_CONFIGS[kind])
    arguments = ["--checkpoint", str(checkpoint), "--config", str(config), "--output", str(tmp_path / "out")]
    assert main(["convert", source, *arguments]) == 1
    one_line(capsys.readouterr().err, "`config`", "strange.yaml")
    assert [file.name for file in tmp_path.iterdir()] == ["strange.yaml"]


CONVERTERS = {
    "taming_gumbel": lambda folder, config, out: convert_taming.convert(folder / "checkpoint.ckpt", config, out),
    "taming_gpt_class": lambda folder, config, out: convert_taming.convert(folder / "checkpoint.ckpt", config, out),
    "ldm_vq_uncond": lambda folder, config, out: convert_latent_diffusion.convert(
        folder / "checkpoint.ckpt", config, out
    ),
    "vqdiff_uncond": lambda folder, config, out: convert_vq_diffusion.convert(
        folder / "checkpoint.ckpt", config, folder / "codec_config.yaml", out
    ),
    "rosinality_pixelsnail_top": lambda folder, config, out: convert_rosinality.convert(
        folder / "checkpoint.pt", out, config=config
    ),
    "zalando_ema": lambda folder, config, out: convert_zalando.convert(folder / "checkpoint.pt", out, config),
    "llamagen_vq": lambda folder, config, out: convert_llamagen.convert(folder / "checkpoint.pt", out, config),
}
# Sections that say how the original was trained, and data and files that it read.
UNREAD = ("base_learning_rate", "lossconfig", "monitor", "ckpt_path", "config_path", "mapping_path", "trainable")
UNREAD += ("content_info", "condition_info", "cond_stage_key", "first_stage_key", "image_key", "log_every_t")
UNREAD += ("image_size", "target", "decay")
WRONG_VALUES = (["a"], {"a": 1}, -7)


def leaves(node, path=()):
    for name, value in node.items():
        if name not in UNREAD:
            yield from leaves(value, (*path, name)) if isinstance(value, dict) else [(*path, name)]


def read(path):
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else yaml.load(text, ConfigLoader)


OPTIONS_OF = [(case, path) for case in CONVERTERS for path in leaves(read(next((GOLDEN / case).glob("config.*"))))]


@pytest.mark.parametrize(
    ("case", "path"), OPTIONS_OF, ids=lambda value: value if isinstance(value, str) else value[-1]
)
def test_every_option_of_a_wrong_kind(case, path, tmp_path, monkeypatch):
    """Each is an error that names the file; none is one of Python's."""
    source = next((GOLDEN / case).glob("config.*"))
    content = read(source)
    monkeypatch.setattr("hf_vq.conversion.reading.read_config", lambda *given: copy.deepcopy(content))
    section = content
    for name in path[:-1]:
        section = section[name]
    right, out = section[path[-1]], tmp_path / "out"
    for value in WRONG_VALUES:
        if value == right:
            continue
        section[path[-1]] = value
        try:
            CONVERTERS[case](GOLDEN / case, source, out)
        except ValueError as error:
            text = str(error)
            assert "\n" not in text and (source.name in text or "checkpoint." in text), (value, text)
        else:
            pytest.fail(f"{path[-1]}={value!r} is taken")
    assert not list(tmp_path.iterdir())


def test_options_that_a_source_does_not_have(tmp_path, capsys):
    folder = GOLDEN / "zalando_ema"
    given = ["--checkpoint", str(folder / "checkpoint.pt"), "--output", str(tmp_path / "out")]
    assert main(["convert", *given, "--live"]) == 1
    one_line(capsys.readouterr().err, "`live` must not be given: a zalando checkpoint has no use for it")
    given = ["--checkpoint", str(GOLDEN / "taming_gumbel/checkpoint.ckpt"), "--output", str(tmp_path / "out")]
    assert main(["convert", *given]) == 1
    one_line(capsys.readouterr().err, "`config` must be given: a taming checkpoint needs the YAML")


# ---------------------------------------------------------------------------------------------------------------------
# The folder, weights that are dropped, scripts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CONVERTERS)
def test_an_output_that_is_a_file(case, tmp_path):
    out = tmp_path / "out"
    out.write_text("mine")
    config = next((GOLDEN / case).glob("config.*"))
    for output in (out, out / "inside"):
        with pytest.raises(ValueError, match=f"`output` {output} must be a folder, but {out} is a file"):
            CONVERTERS[case](GOLDEN / case, config, output)
    assert out.read_text() == "mine"


def test_what_fails_leaves_nothing(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError), written_folder(out) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not out.exists() and not list(out.parent.iterdir())
    for _ in range(2):  # the second time into the folder of the first
        with written_folder(out) as folder:
            (folder / "whole").write_text("x")
    assert [path.name for path in out.iterdir()] == ["whole"] and [path.name for path in out.parent.iterdir()] == [
        "out"
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is protected from root")
def test_a_protected_folder(tmp_path):
    tmp_path.chmod(0o500)
    with (
        pytest.raises(ValueError, match="`output` .* cannot be written: Permission denied"),
        written_folder(tmp_path / "out"),
    ):
        pass
    tmp_path.chmod(0o700)


def test_infinite_weights_that_are_dropped(tmp_path):
    """Such as a discriminator's, or an average that is not taken: something went wrong in the training."""
    folder = GOLDEN / "taming_vqmodel_f4"
    content = torch.load(folder / "checkpoint.ckpt", weights_only=True)
    key = next(key for key in content["state_dict"] if key.startswith("loss.") and key.endswith("weight"))
    content["state_dict"][key] = torch.full_like(content["state_dict"][key], float("inf"))
    torch.save({"state_dict": content["state_dict"]}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=f"bad.ckpt, entry 'state_dict', has an infinite value in {key}"):
        convert_taming.convert(tmp_path / "bad.ckpt", folder / "config.yaml", tmp_path / "out")


def test_large_weights_are_finite(tmp_path):
    """Whose sum is not, in half precision."""
    save_file({"a": torch.full((100,), 6e4, dtype=torch.float16)}, tmp_path / "large.safetensors")
    from hf_vq.conversion.reading import load_state_dict

    assert load_state_dict(tmp_path / "large.safetensors")["a"][0] == 6e4


def test_errors_say_which_file():
    with pytest.raises(ValueError, match=r"^`config` a.yaml: `n_head` must be an int$"), errors_name(config="a.yaml"):
        raise ValueError("`n_head` must be an int")
    with pytest.raises(ValueError, match="^`config` a.yaml lacks it$"), errors_name(config="a.yaml"):
        raise ValueError("`config` lacks it")
    with pytest.raises(ValueError, match="^`tokenizer` must be a folder$"), errors_name(config="a.yaml"):
        raise ValueError("`tokenizer` must be a folder")


def test_scripts_end_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["conversion/convert_taming.py"])

    def failing():
        raise ValueError("`checkpoint` x does not exist.")

    with pytest.raises(SystemExit, match="1"):
        run_script(failing)
    assert capsys.readouterr().err == "convert_taming.py: `checkpoint` x does not exist.\n"


@pytest.mark.parametrize("name", ["channel_multiplier", "decoder_channel_multiplier", "attn_resolutions"])
@pytest.mark.parametrize("value", [1, "12", {1: 2}])
def test_lists_of_the_configuration(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a list of ints of at least 1, got"):
        VQGANConfig(**{name: value})
