"""``hf-vq evaluate``."""

import contextlib
import io
import json
import shutil

import datasets
import pytest
from huggingface_hub import ModelCard
from PIL import Image

import hf_vq
from hf_vq.hub_cards import model_card
from tests.commands.command_line import run
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
