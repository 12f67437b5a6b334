"""``hf-vq evaluate``."""

import contextlib
import io
import json
import math
import shutil

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import hf_vq
from hf_vq.hub_cards import model_card
from tests.commands.command_line import SUBCOMMANDS, run
from tests.pipelines import vqvae2_parts
from tests.pipelines.autoregressive_parts import make_tiny_prior, make_tiny_tokenizer
from tests.process_groups import in_processes


def test_evaluate(folder, tmp_path, capsys):
    rows = [
        {
            "image": Image.radial_gradient("L").rotate(30 * number).resize((16, 16)),
            "kind": ["cat", "dog", "owl"][number % 3],
        }
        for number in range(6)
    ]
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog", "owl"])})
    data = tmp_path / "data"
    data.mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(data / "validation.parquet"))
    shutil.copytree(folder / "pipeline", tmp_path / "pipeline")
    model_card(
        hf_vq.VQAutoregressivePipeline.from_pretrained(tmp_path / "pipeline"), "user/name", "mit", "gradients"
    ).save(tmp_path / "pipeline" / "README.md")
    arguments = ("--data", data, "--label-column", "kind", "--perceptual", "none", "--features", "none")
    prior = make_tiny_prior(grid_size=6, condition_type="class", num_classes=3)
    hf_vq.VQAutoregressivePipeline(make_tiny_tokenizer(resolution=12), prior).save_pretrained(tmp_path / "wide")
    output = tmp_path / "figures.json"
    options = (*arguments, "--metrics", "likelihood", "--output", output, "--update-card", "--batch-size", 4)
    assert run("evaluate", tmp_path / "pipeline", *options) == 0
    printed = capsys.readouterr().out
    figures = json.loads(output.read_text())
    assert figures["num_images"] == 6 and figures["data"] == "data, split validation"
    assert f"{figures['bits_per_index']:.6g}" in printed and str(tmp_path) not in figures["data"]
    results = ModelCard.load(tmp_path / "pipeline" / "README.md").data.eval_results
    assert {result.metric_type: result.metric_value for result in results}["bits_per_index"] == figures[
        "bits_per_index"
    ]
    assert run("evaluate", folder / "vqgan", *arguments, "--size", 12, "--json") == 0
    assert json.loads(capsys.readouterr().out).keys() >= {"psnr", "ssim", "codebook_entropy_per_position"}
    whole = (*arguments, "--size", 12, "--json", "--max-images", 2)  # without networks, nothing is drawn
    assert run("evaluate", tmp_path / "wide", *whole) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= {"psnr", "bits_per_index"} and "num_samples" not in found
    assert run("evaluate", folder / "prior", *arguments) == 1
    assert "give the pipeline that has it, or its --tokenizer" in capsys.readouterr().err
    prior = ("evaluate", folder / "prior", *arguments, "--metrics", "likelihood", "--json", "--tokenizer")
    assert run(*prior, folder / "vqgan") == 0
    assert json.loads(capsys.readouterr().out)["bits_per_index"] == pytest.approx(figures["bits_per_index"], rel=1e-5)
    assert run(*prior, folder / "prior") == 1
    assert "`--tokenizer` must be an image tokenizer, got a VQGPTForCausalLM" in capsys.readouterr().err


@pytest.fixture
def owls(tmp_path):
    """Pictures in a folder for each class, and one file that is none."""
    for number, kind in enumerate(["owl", "cat", "owl", "dog"]):
        path = tmp_path / "photos" / kind / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.radial_gradient("L").rotate(30 * number).resize((8, 8)).save(path)
    (tmp_path / "photos" / "owl" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "photos"


QUICK = ("--perceptual", "none", "--features", "none", "--json")


def test_classes_are_told_by_their_names(folder, owls, capsys):
    """`datasets` numbers folders by the alphabet: these as the pipeline does, the others otherwise."""
    arguments = (
        "evaluate",
        folder / "pipeline",
        "--split",
        "train",
        "--label-column",
        "label",
        "--metrics",
        "likelihood",
        *QUICK,
    )
    figures = {}
    for name in ("photos", "two"):
        if name == "two":
            shutil.rmtree(owls / "cat")
            owls.rename(owls.parent / "two")
        assert run(*arguments, "--data", owls.parent / name) == 0
        figures[name] = json.loads(capsys.readouterr().out)
    pipeline = hf_vq.VQAutoregressivePipeline.from_pretrained(folder / "pipeline")
    expected = []
    for file, label in (("dog/3.png", 1), ("owl/0.png", 2), ("owl/2.png", 2)):
        pixels = hf_vq.VQImageProcessor(size=8)(Image.open(owls.parent / "two" / file), return_tensors="pt")
        indices = pipeline.vqvae.encode(pixels.pixel_values).indices
        expected.append(-pipeline.prior.log_likelihood(indices, torch.tensor([label])).item() / math.log(2))
    assert figures["two"]["bits_per_image"] == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert (figures["photos"]["num_images"], figures["two"]["num_images"]) == (4, 3)  # the broken one is none
    (owls.parent / "two" / "dog").rename(owls.parent / "two" / "cow")
    assert run(*arguments, "--data", owls.parent / "two") == 1
    assert "label_column='label' holds ['cow']: the classes are ['cat', 'dog', 'owl']" in capsys.readouterr().err
    assert run(*arguments, "--data", owls.parent / "two", "--classes-by-number") == 0
    assert json.loads(capsys.readouterr().out)["bits_per_image"] != pytest.approx(figures["two"]["bits_per_image"])
    tokenizer = ("evaluate", folder / "vqgan", "--data", owls.parent / "two", "--split", "train", *QUICK)
    assert run(*tokenizer, "--metrics", "likelihood") == 1
    assert "`metrics` must be among ['reconstruction', 'codebook'] for a VQGANModel" in capsys.readouterr().err


def test_images_are_measured_at_the_size_of_the_prior(tmp_path, owls, capsys):
    """Not at that of its tokenizer, and on the images that its training held out."""
    prior = make_tiny_prior(grid_size=(6, 8))
    pipeline = hf_vq.VQAutoregressivePipeline(make_tiny_tokenizer(), prior)
    pipeline.save_pretrained(tmp_path / "wide")
    assert run("evaluate", tmp_path / "wide", "--data", owls, "--validation-share", 0.4, *QUICK) == 0
    figures = json.loads(capsys.readouterr().out)
    height, width = pipeline.image_size
    assert height != width and figures["image_size"].startswith(f"{height}x{width}, ")
    assert figures["data"] == "photos, split 40 % of train, at random" and figures["num_images"] in (1, 2)


def test_a_level_of_a_hierarchy_is_measured_by_its_pipeline(tmp_path, capsys):
    vqvae2_parts.make_pipeline().save_pretrained(tmp_path / "hierarchy")
    for level, message in (("top_prior", "several need a prior for each"), ("bottom_prior", "give the pipeline that")):
        arguments = ("--tokenizer", tmp_path / "hierarchy" / "vqvae", "--data", "images")
        assert run("evaluate", tmp_path / "hierarchy" / level, *arguments) == 1
        assert message in capsys.readouterr().err
    (help,) = [action.help for action in SUBCOMMANDS["evaluate"]._actions if action.dest == "tokenizer"]
    assert "of a level of VQ-VAE-2 give the pipeline instead" in help


def test_what_the_data_lack_is_said_by_the_options_of_the_command(folder, tmp_path, capsys):
    for number in range(5):
        Image.radial_gradient("L").rotate(40 * number).resize((12, 12)).save(tmp_path / f"{number}.png")
    arguments = ("--data", tmp_path, "--split", "train", "--perceptual", "none", "--size", 12)
    assert run("evaluate", folder / "pipeline", *arguments, "--features", "none") == 1
    assert "`--label-column` must name what holds the class of each image" in capsys.readouterr().err
    assert run("evaluate", folder / "vqgan", *arguments) == 1
    error = capsys.readouterr().err
    assert "`--data` must have at least 8 images for distances of features, got 5; `--features none` leaves" in error


def evaluate_in_this_process(arguments):
    """What the process prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run(*arguments) == 0
    return printed.getvalue()


def test_evaluate_on_two_processes_prints_once(folder, tmp_path, capsys):
    """The figures of one process; the other one prints and writes nothing."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(5):
        Image.radial_gradient("L").rotate(40 * number).resize((8, 8)).save(data / f"{number}.png")
    arguments = ("evaluate", folder / "vqgan", "--data", data, "--split", "train[:60%]", "--perceptual", "none")
    arguments = (*arguments, "--size", 12, "--features", "none", "--json", "--output", tmp_path / "figures.json")
    assert run(*arguments) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["num_images"] == 3  # of five
    (tmp_path / "figures.json").unlink()
    (tmp_path / "group").mkdir()
    printed = in_processes(2, tmp_path / "group", evaluate_in_this_process, arguments)
    assert printed[1] == ""
    found = json.loads(printed[0])
    assert json.loads((tmp_path / "figures.json").read_text()) == found and set(found) == set(alone)
    for name, value in alone.items():
        if isinstance(value, float) and name != "images_per_second":
            assert found[name] == pytest.approx(value, rel=1e-5)
