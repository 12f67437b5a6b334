"""The command line as a whole: help, errors that a user can mend, extras, and what is printed for programs."""

import importlib.abc
import json
import pathlib
import shlex
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import hf_vq
from hf_vq.cli import EXTRAS, build_parser, main
from hf_vq.training.metrics import TrainingStoppedError
from tests.commands.command_line import SUBCOMMANDS, run


def test_a_folder_that_does_not_exist_while_the_hub_cannot_be_reached(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for source, message in (("outputs/vqgam", "the Hub could not be reached"), ("outputs/a/b", "not the name of")):
        assert run("info", source) == 1
        error = capsys.readouterr().err
        assert f"folder `{source}` does not exist" in error and message in error, error


@pytest.mark.parametrize("command", ["", *SUBCOMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "exit codes" in printed and (not command or f"hf-vq {command} " in printed.split("examples:")[1])


def examples(command):
    """The arguments of the examples in the help of a subcommand, as a shell reads them."""
    lines = SUBCOMMANDS[command].epilog.splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("  hf-vq ")]


def test_the_examples_of_the_help_are_right_usage():
    for command in SUBCOMMANDS:
        for arguments in examples(command):
            options = build_parser().parse_args(arguments)
            if getattr(options, "data", None) == "photos/":  # a plain folder has no other split
                assert options.split == "train" or options.validation_share is not None, arguments


def test_the_examples_of_train_run_on_a_plain_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(40):
        Image.linear_gradient("L").rotate(9 * number).resize((70, 64)).save(tmp_path / "photos" / f"{number}.jpg")
    short = "--max_train_steps 1 --train_batch_size 2 --validation_steps 1 --checkpointing_steps 9 --cpu true"
    tokenizer, prior, _ = examples("train")
    small = "--base_channels 32 --channel_multiplier 1 1 1 --attn_resolutions 16 --latent_channels 32"
    assert run(*tokenizer, *short.split(), *small.split(), "--embed_dim", 4) == 0
    small = "--num_hidden_layers 1 --hidden_size 8 --num_attention_heads 1 --sample_classes 1"
    assert run(*prior, *short.split(), *small.split()) == 0
    assert (tmp_path / "outputs" / "vq_gpt" / "pipeline" / "model_index.json").is_file()


def test_what_is_printed_for_programs(folder, tmp_path, capsys):
    """With `--json`, nothing else is on standard output."""

    def found(*arguments):
        assert run(*arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    images = (folder / "a.png", folder / "b.png")
    assert found("encode", folder / "vqgan", *images, "--output", tmp_path / "i.safetensors") == {
        "output": str(tmp_path / "i.safetensors"),
        "shapes": {"indices": [2, 4, 4]},
        "skipped": 0,
    }
    files = found("decode", folder / "vqgan", tmp_path / "i.safetensors", "--output", tmp_path / "decoded")["files"]
    assert [Image.open(file).size for file in files] == [(8, 8)] * 2
    for what in ("atlas", "usage", "indices", "interpolation", "nearest"):
        options = ("--samples", images[0]) if what == "nearest" else ()
        shown = found("show", what, folder / "vqgan", *images, *options, "--output", tmp_path / "picture.png")
        assert shown["output"] == str(tmp_path / "picture.png") and shown["skipped"] == 0
        if what == "usage":
            low, high = shown["perplexity_of_a_position"]
            assert 1 <= low <= high <= 2
        if what == "nearest":
            assert shown["distance_of_the_closest"] == pytest.approx([0, 0], abs=1e-4)
    drawn = ("sample", folder / "pipeline", "--num-images", 1, "--output", tmp_path / "sheet.png")
    seeds = [found(*drawn)["seed"] for _ in range(2)]
    second = Image.open(tmp_path / "sheet.png").tobytes()
    assert seeds[0] != seeds[1] and found(*drawn, "--seed", seeds[1])["rows"] == [""]
    assert Image.open(tmp_path / "sheet.png").tobytes() == second


def test_every_subcommand_that_prints_has_json():
    """But `train`, which prints what its script does."""
    for name, parser in SUBCOMMANDS.items():
        assert (name == "train") != ("--json" in parser.format_help()), name


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("info", "."), "must hold one of model_index.json, config.json"),
        (("encode", "prior", "a.png"), "must be a tokenizer"),
        (("encode", "vqgan", "missing.png"), "None of 1 images could be read"),
        (("encode", "vqgan", "prior"), "`IMAGE` must name a folder that holds images, got `prior`"),
        (("encode", "vqgan", "*.tif"), "`IMAGE` must be a pattern that matches a file, got `*.tif`"),
        (("reconstruct", "vqgan", "a.png", "--output", "sheet.xyz"), "`--output` must end as an image file does"),
        (("info", "broken"), "broken/config.json` must be a JSON file"),
        (
            ("sample", "pipeline", "--image", "pipeline/model_index.json", "--mask-image", "a.png"),
            "`--image` must be an",
        ),
        (("sample", "pipeline", "--image", "a.png"), "`--image` needs `--mask-image`, which says what a VQAutoreg"),
        (("sample", "pipeline", "--mask-image", "a.png"), "`--mask-image` needs the `--image` that it is for"),
        (("sample", "pipeline", "--image", "a.png", "--mask-image", "b.png"), "`--mask-image` must have the shape"),
        (("sample", "pipeline", "--condition-image", "prior"), "`--condition-image` "),
        (("sample", "pipeline", "--output", "sheet.xyz"), "`--output` must end as an image file does"),
        (("sample", "pipeline", "--output", "sheet"), "`--output` must end as an image file does"),
        (("show", "usage", "vqgan", "a.png", "--output", "map.xyz"), "`--output` must end as an image file does"),
        (("evaluate", "pipeline", "--data", ".", "--sampling", "nonsense=2"), "`--sampling nonsense` has no meaning"),
        (("evaluate", "pipeline", "--data", ".", "--sampling", "generator=2"), "`--sampling generator` has no"),
        (("sample", "vqgan"), "is not a pipeline"),
        (("sample", "run"), "It is the folder of a run: give `run/pipeline` or `run/tokenizer`."),
        (("push", "run", "user/name"), "It is the folder of a run: give `run/pipeline` or `run/tokenizer`."),
        (("sample", "pipeline", "--class-label", "cow"), "cow"),
        (("decode", "vqgan", "outside.safetensors"), "below 16"),
        (("decode", "vqgan", "other.safetensors"), "a tensor `indices`"),
        (("decode", "vqgan", "flat.safetensors"), "(B, h, w) below 16"),
        (("decode", "vqgan", "a.png"), "must be a safetensors file"),
        (("info", "./nowhere/to/be/found"), "does not exist"),
        (("encode", "vqgan", "a.png", "--device", "toaster"), "`--device`"),
        (("sample", "pipeline", "--device", "cuda:77"), "`--device`"),
    ],
)
def test_errors_a_user_can_mend(folder, arguments, message, capsys, monkeypatch):
    save_file({"indices": torch.full((1, 4, 4), 16)}, folder / "outside.safetensors")
    save_file({"codes": torch.zeros(1, 4, 4)}, folder / "other.safetensors")
    save_file({"indices": torch.zeros(1, 4, dtype=torch.int64)}, folder / "flat.safetensors")
    (folder / "broken").mkdir(exist_ok=True)
    for part in ("pipeline", "tokenizer"):
        (folder / "run" / part).mkdir(parents=True, exist_ok=True)
    (folder / "run" / "metrics.jsonl").touch()
    (folder / "broken" / "config.json").write_text('{"architectures": ["VQGANM')
    monkeypatch.chdir(folder)
    assert run(*arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"hf-vq {arguments[0]}: ") and message in error, error


@pytest.mark.parametrize(
    "missing,arguments",
    [
        ("datasets", ("evaluate", "vqgan", "--data", ".", "--perceptual", "none")),
        ("datasets", ("train", "vqvae", "--dataset_name_or_path", ".", "--output_dir", "run", "--cpu", "true")),
        ("matplotlib", ("show", "curves", "curves")),
        ("onnx", ("export", "vqgan", "--output", "onnx")),
    ],
)
def test_a_package_of_an_extra_that_is_missing(missing, arguments, folder, capsys, monkeypatch):
    class Missing(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name.partition(".")[0] == missing:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in list(sys.modules):
        if name.partition(".")[0] == missing:
            monkeypatch.delitem(sys.modules, name)
    (folder / "curves").mkdir(exist_ok=True)
    (folder / "curves" / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n')
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    monkeypatch.chdir(folder)
    assert run(*arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"hf-vq {arguments[0]}: needs the package {missing}: pip install 'hf_vq["), error


def test_the_extras_hold_what_they_are_named_for():
    text = (pathlib.Path(hf_vq.__file__).parents[1] / "pyproject.toml").read_text()
    for package, extra in EXTRAS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{extra} = [")]
        assert f'"{package}>=' in line


def test_a_training_that_stops_says_why(capsys, monkeypatch):
    def stop(arguments):
        raise TrainingStoppedError("the loss is not finite at step 3: lower `learning_rate`")

    monkeypatch.setattr("hf_vq.training.scripts.train_vqvae.main", stop)
    assert run("train", "vqvae", "--cpu", "true") == 1
    assert capsys.readouterr().err == "hf-vq train: the loss is not finite at step 3: lower `learning_rate`\n"


def test_wrong_usage_exits_with_2(capsys):
    for arguments in ([], ["sample", "x", "--num-images", "0"], ["sample", "x", "--seed", str(2**63)]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_version():
    done = subprocess.run([sys.executable, "-m", "hf_vq.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == f"hf-vq {hf_vq.__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "MODEL", "IMAGE", "--output", "FOLDER"], "`--output` must be a file, got the folder"),
        (["reconstruct", "MODEL", "IMAGE", "--output", "sheet"], "`--output` must end as an image file"),
        (["sample", "MODEL", "--output", "sheet.xyz"], "`--output` must end as an image file"),
        (["show", "atlas", "MODEL", "IMAGE", "--output", "FOLDER"], "`--output` must be a file, got the folder"),
        (["decode", "MODEL", "codes.safetensors", "--output", "IMAGE"], "`--output` must be a folder, got the file"),
        (["evaluate", "MODEL", "--data", "images", "--output", "FOLDER"], "`--output` must be a file"),
        (["evaluate", "MODEL", "--data", "images", "--update-card"], "`--update-card` needs a local folder"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path, capsys, arguments, message):
    """The model does not exist: it would be the next error."""
    (tmp_path / "image.png").touch()
    names = {"FOLDER": str(tmp_path), "IMAGE": str(tmp_path / "image.png"), "MODEL": "no/model"}
    assert main([names.get(argument, argument) for argument in arguments]) == 1
    assert message in capsys.readouterr().err
