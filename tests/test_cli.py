import argparse
import contextlib
import importlib.abc
import io
import json
import pathlib
import shutil
import subprocess
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import hf_vq
from hf_vq.cli import EXTRAS, build_parser, main
from hf_vq.evaluation.inspection import metric_rows
from hf_vq.evaluation.pictures import labelled_rows
from hf_vq.hub_cards import model_card
from hf_vq.images import to_pil
from hf_vq.training.data.indices_cache import write_indices
from tests.pipelines import latent_diffusion_parts, vq_diffusion_parts, vqvae2_parts
from tests.pipelines.autoregressive_parts import make_tiny_prior, make_tiny_tokenizer
from tests.pipelines.test_condition_images import make_conditional
from tests.process_groups import in_processes


SUBCOMMANDS = next(
    action.choices for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds a tokenizer, a prior, a pipeline of both, and two pictures."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    vqgan = make_tiny_tokenizer()
    prior = make_tiny_prior(condition_type="class", num_classes=3, id2label={0: "cat", 1: "dog", 2: "owl"})
    vqgan.save_pretrained(folder / "vqgan")
    prior.save_pretrained(folder / "prior")
    hf_vq.VQAutoregressivePipeline(vqvae=vqgan, prior=prior.eval()).save_pretrained(folder / "pipeline")
    Image.radial_gradient("L").resize((13, 9)).save(folder / "a.png")
    Image.linear_gradient("L").resize((20, 20)).save(folder / "b.png")
    return folder


@pytest.fixture
def model(folder):
    return hf_vq.VQGANModel.from_pretrained(folder / "vqgan")


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_info(folder, model, capsys):
    assert run("info", folder / "vqgan") == 0
    printed = capsys.readouterr().out
    assert "VQGANModel" in printed and f"{model.num_parameters():,}" in printed and "16 codes of 4 channels" in printed
    assert run("info", folder / "pipeline") == 0
    printed = capsys.readouterr().out
    assert "vqvae:" in printed and "prior:" in printed and "VQGPTForCausalLM" in printed and "4×4 of 16" in printed


def test_encode_and_decode(folder, model, tmp_path):
    indices_file = tmp_path / "new" / "indices.safetensors"
    assert run("encode", folder / "vqgan", folder / "a.png", folder / "b.png", "--output", indices_file) == 0
    with safe_open(indices_file, "pt") as file:
        indices = file.get_tensor("indices")
    processor = hf_vq.VQImageProcessor(size=8)
    images = [Image.open(folder / name) for name in ("a.png", "b.png")]
    with torch.no_grad():
        expected = model.encode(processor(images, return_tensors="pt").pixel_values).indices
        samples = processor.postprocess(model.decode_indices(expected).sample)
    assert indices.dtype == torch.int64 and torch.equal(indices, expected)
    assert run("decode", folder / "pipeline", indices_file, "--output", tmp_path / "decoded") == 0
    for name, sample in zip(("0000-a.png", "0001-b.png"), samples, strict=True):
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / "decoded" / name)), np.array(sample))


def test_the_saved_image_processor_and_size_are_used(folder, model, tmp_path):
    model.save_pretrained(tmp_path / "vqgan")
    hf_vq.VQImageProcessor(size=12).save_pretrained(tmp_path / "vqgan")
    output = tmp_path / "indices.safetensors"
    for options, side in (((), 6), (("--size", 10), 5)):
        assert run("encode", tmp_path / "vqgan", folder / "b.png", "--output", output, *options) == 0
        with safe_open(output, "pt") as file:
            assert file.get_tensor("indices").shape == (1, side, side)


def test_the_image_processor_of_a_pipeline_is_used(folder, tmp_path):
    hf_vq.VQAutoregressivePipeline.from_pretrained(folder / "pipeline").save_pretrained(tmp_path / "pipeline")
    hf_vq.VQImageProcessor(size=12).save_pretrained(tmp_path / "pipeline" / "vqvae")
    output = tmp_path / "indices.safetensors"
    assert run("encode", tmp_path / "pipeline", folder / "b.png", "--output", output) == 0
    with safe_open(output, "pt") as file:
        assert file.get_tensor("indices").shape == (1, 6, 6)


def test_residual_indices_are_decoded(folder, tmp_path):
    torch.manual_seed(0)
    quantizer = {"quantizer": "residual", "quantizer_kwargs": {"depth": 2}}
    model = make_tiny_tokenizer(**quantizer)
    model.save_pretrained(tmp_path / "residual")
    output = tmp_path / "indices.safetensors"
    assert run("encode", tmp_path / "residual", folder / "b.png", "--output", output) == 0
    with safe_open(output, "pt") as file:
        indices = file.get_tensor("indices")
    assert indices.shape == (1, 4, 4, 2)
    assert run("decode", tmp_path / "residual", output, "--output", tmp_path / "decoded") == 0
    with torch.no_grad():
        sample = hf_vq.VQImageProcessor().postprocess(model.decode_indices(indices).sample)[0]
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "decoded" / "0000-b.png")), np.array(sample))


def test_the_levels_of_a_hierarchy_are_encoded_decoded_and_sampled(folder, tmp_path, capsys):
    source = tmp_path / "hierarchy"
    pipeline = vqvae2_parts.make_pipeline()
    pipeline.save_pretrained(source)
    output, model = tmp_path / "indices.safetensors", pipeline.vqvae
    assert run("encode", source, folder / "b.png", "--output", output) == 0
    pixels = hf_vq.VQImageProcessor(size=8)(Image.open(folder / "b.png"), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model.encode(pixels).indices
        sample = hf_vq.VQImageProcessor().postprocess(model.decode_indices(expected).sample)[0]
    with safe_open(output, "pt") as file:
        assert [torch.equal(file.get_tensor(f"indices_{level}"), expected[level]) for level in (0, 1)] == [True, True]
    assert run("decode", source, output, "--output", tmp_path / "decoded") == 0
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "decoded" / "0000-b.png")), np.array(sample))
    assert run("sample", source, "--class-label", "owl", "--num-images", 2, "--output", tmp_path / "samples.png") == 0
    assert run("info", source) == 0
    assert "pixels a code  4×4, 2×2" in capsys.readouterr().out
    save_file({"indices": expected[0]}, output)
    assert run("decode", source, output) == 1
    assert "must hold a tensor `indices_0`, got ['indices']" in capsys.readouterr().err


def test_a_folder_that_does_not_exist_while_the_hub_cannot_be_reached(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for source, message in (("outputs/vqgam", "the Hub could not be reached"), ("outputs/a/b", "not the name of")):
        assert run("info", source) == 1
        error = capsys.readouterr().err
        assert f"folder `{source}` does not exist" in error and message in error, error


def test_reconstruct(folder, tmp_path, capsys):
    output = tmp_path / "both.png"
    assert run("reconstruct", folder / "vqgan", folder / "a.png", folder / "b.png", "--output", output) == 0
    assert capsys.readouterr().out.count(".png: PSNR") == 2
    assert Image.open(output).width > 16


def test_folders_patterns_and_lists_in_batches(folder, tmp_path, capsys, monkeypatch):
    photos = tmp_path / "photos" / "more"
    photos.mkdir(parents=True)
    for number in range(5):
        Image.radial_gradient("L").rotate(20 * number).resize((13, 9)).save(photos / f"{number}.png")
    (photos / "notes.txt").write_text("no image")
    output = tmp_path / "indices.safetensors"

    def encode(*images):
        code = run("encode", folder / "vqgan", *images, "--batch-size", 2, "--output", output)
        with safe_open(output, "pt") as file:
            return code, file.get_tensor("indices"), json.loads(file.metadata()["images"])

    code, indices, names = encode(tmp_path / "photos")
    assert code == 0 and [name[-5:] for name in names] == [f"{i}.png" for i in range(5)]
    for number in range(5):
        assert torch.equal(encode(photos / f"{number}.png")[1][0], indices[number])
    assert torch.equal(encode(photos / "[1-3].png")[1], indices[1:4])
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{photos / '4.png'}\n{photos / '0.png'}\n"))
    assert torch.equal(encode("-")[1], indices[[4, 0]])

    (photos / "2.png").write_bytes(b"no image")
    capsys.readouterr()
    code, without, names = encode(tmp_path / "photos", tmp_path / "missing.png")
    assert code == 1 and torch.equal(without, indices[[0, 1, 3, 4]]) and len(names) == 4
    error = capsys.readouterr().err
    assert f"{photos / '2.png'}: skipped" in error and "missing.png: skipped, not a readable image (no such" in error
    assert "skipped 2 of 6 images" in error


def test_the_sheet_is_limited_and_all_are_measured(folder, tmp_path, capsys):
    images = [folder / "a.png", folder / "b.png"] * 3
    output = tmp_path / "both.png"
    options = ("--output", output, "--batch-size", 4, "--max-pictures", 5, "--json")
    assert run("reconstruct", folder / "vqgan", *images, *options) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [figure["image"] for figure in figures["images"]] == [str(image) for image in images]
    values = [figure["psnr"] for figure in figures["images"]]
    assert values[2:] == pytest.approx(values[:4]) and figures["mean_psnr"] == pytest.approx(sum(values) / 6)
    assert figures["skipped"] == 0
    assert run("reconstruct", folder / "vqgan", *images, *options[:-1]) == 0
    assert "the sheet shows the first 5 of 6 images" in capsys.readouterr().out


def test_classes_of_several_options_are_all_drawn(folder, tmp_path):
    common = ("--num-images", 2, "--seed", 4, "--output")
    assert run("sample", folder / "pipeline", "--class-label", "dog", "2", *common, tmp_path / "a.png") == 0
    assert (
        run(
            "sample",
            folder / "pipeline",
            *("--class-label", "dog") * 1,
            "--class-label",
            2,
            *common,
            tmp_path / "b.png",
        )
        == 0
    )
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "a.png")), np.array(Image.open(tmp_path / "b.png")))


@pytest.mark.parametrize("command", ["", *SUBCOMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "exit codes" in printed and (not command or f"hf-vq {command} " in printed.split("examples:")[1])


def test_sample(folder, tmp_path):
    arguments = ("sample", folder / "pipeline", "--class-label", "dog", "2", "--num-images", "3", "--seed", "4")
    assert run(*arguments, "--output", tmp_path / "one.png") == 0
    assert run(*arguments, "--output", tmp_path / "two.png") == 0
    assert run(*arguments[:-1], "5", "--output", tmp_path / "three.png") == 0
    one, two, three = (np.array(Image.open(tmp_path / f"{name}.png")) for name in ("one", "two", "three"))
    np.testing.assert_array_equal(one, two)
    assert one.shape == three.shape and (one != three).any()


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    """A folder for each kind of pipeline that samples by diffusion."""
    folder = tmp_path_factory.mktemp("diffusion")
    vq_diffusion_parts.make_pipeline("text").save_pretrained(folder / "codes")
    latent_diffusion_parts.make_pipeline("class").save_pretrained(folder / "latents")
    return folder


def test_a_row_for_each_image_scaled_to_the_model(folder, tmp_path):
    """Of files of any size; the mask is cut as its image is, and one does for all."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, size in enumerate([(13, 9), (30, 30)]):
        Image.radial_gradient("L").rotate(45 * number).resize(size).convert("RGB").save(photos / f"{number}.png")
    mask = Image.new("L", (26, 18))
    mask.paste(255, (0, 9, 26, 18))  # the lower half
    mask.save(tmp_path / "mask.png")
    arguments = ("sample", folder / "pipeline", "--num-images", 2, "--seed", 4, "--class-label", "dog")
    output = tmp_path / "both.png"
    assert run(*arguments, "--image", photos / "0.png", "--mask-image", tmp_path / "mask.png", "--output", output) == 0
    pipeline = hf_vq.VQAutoregressivePipeline.from_pretrained(folder / "pipeline")
    pixels = hf_vq.VQImageProcessor(size=8)(Image.open(photos / "0.png"), return_tensors="pt").pixel_values
    lower = torch.zeros(1, 1, 8, 8)
    lower[:, :, 4:] = 1
    images = pipeline(
        class_labels="dog",
        image=pixels,
        mask_image=lower,
        num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(4),
    ).images
    np.testing.assert_array_equal(np.array(Image.open(output)), np.array(labelled_rows([("0", images)])))
    square = tmp_path / "square.png"
    mask.resize((30, 30)).save(square)
    masks = ("--mask-image", tmp_path / "mask.png", square)
    assert run(*arguments, "--image", photos, *masks, "--output", output) == 0
    assert Image.open(output).height > 16


def test_conditions_of_a_folder(tmp_path, capsys):
    pipeline = make_conditional("segmentation")
    pipeline.save_pretrained(tmp_path / "pipeline")
    maps = tmp_path / "maps"
    maps.mkdir()
    for number in range(2):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(maps / f"map{number}.png")
    output = tmp_path / "sheet.png"
    arguments = ("sample", tmp_path / "pipeline", "--condition-image", maps / "*.png", "--num-images", 1, "--seed", 4)
    assert run(*arguments, "--output", output, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"output": str(output), "rows": ["map0", "map1"], "images": 2, "seed": 4}
    images = pipeline(
        condition_image=[Image.open(maps / f"map{number}.png") for number in range(2)],
        generator=torch.Generator().manual_seed(4),
    ).images
    sheet = labelled_rows([("map0", images[:1]), ("map1", images[1:])])
    np.testing.assert_array_equal(np.array(Image.open(output)), np.array(sheet))


def test_levels_may_differ_in_their_sampling(tmp_path):
    pipeline = vqvae2_parts.make_pipeline()
    pipeline.save_pretrained(tmp_path / "hierarchy")
    output = tmp_path / "sheet.png"
    options = ("--temperature", 0.5, 2, "--guidance-scale", 3, 1, "--seed", 4, "--num-images", 2, "--output", output)
    assert run("sample", tmp_path / "hierarchy", "--class-label", 1, *options) == 0
    images = pipeline(
        class_labels=1,
        temperature=[0.5, 2.0],
        guidance_scale=[3.0, 1.0],
        num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(4),
    ).images
    np.testing.assert_array_equal(np.array(Image.open(output)), np.array(labelled_rows([("1", images)])))


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


def test_sample_by_diffusion(diffusion, tmp_path):
    """The sheet holds the images of the pipeline's own call."""
    for name, arguments, call in (
        (
            "codes",
            (
                *("--prompt", "a red cat", "dog", "--truncation-rate", "0.8", "--num-inference-steps", "4"),
                *("--prior-rule", "2", "--prior-weight", "1", "--guidance-start", "0.25"),
            ),
            {
                "prompt": ["a red cat", "dog"],
                "truncation_rate": 0.8,
                "num_inference_steps": 4,
                "prior_rule": 2,
                "prior_weight": 1.0,
                "guidance_start": 0.25,
            },
        ),
        (
            "latents",
            ("--class-label", "cat", "1", "--num-inference-steps", "2", "--eta", "1", "--guidance-end", "0.5"),
            {"class_labels": ["cat", 1], "num_inference_steps": 2, "eta": 1.0, "guidance_end": 0.5},
        ),
    ):
        output = tmp_path / f"{name}.png"
        common = ("--num-images", "3", "--seed", "1", "--guidance-scale", "2", "--device", "cpu", "--output", output)
        assert run("sample", diffusion / name, *arguments, *common) == 0
        pipeline = DiffusionPipeline.from_pretrained(diffusion / name)
        generator = torch.Generator().manual_seed(1)
        images = pipeline(**call, num_images_per_prompt=3, guidance_scale=2.0, generator=generator).images
        labels = call.get("prompt") or ["cat", "1"]
        sheet = labelled_rows([(labels[0], images[:3]), (labels[1], images[3:])])
        np.testing.assert_array_equal(np.array(Image.open(output)), np.array(sheet))


def test_options_that_a_pipeline_does_not_have(folder, diffusion, capsys):
    for source, option in (
        (folder / "pipeline", ("--truncation-rate", "0.9")),
        (diffusion / "codes", ("--top-k", "5")),
        (diffusion / "latents", ("--temperature", "2")),
    ):
        assert run("sample", source, *option) == 1
        assert f"`{option[0]}` has no meaning for a VQ" in capsys.readouterr().err


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
        (("sample", "pipeline", "--image", "pipeline/model_index.json"), "`--image` "),
        (("sample", "pipeline", "--image", "a.png", "--mask-image", "b.png"), "`--mask-image` must have the shape"),
        (("sample", "pipeline", "--condition-image", "prior"), "`--condition-image` "),
        (("sample", "pipeline", "--output", "sheet.xyz"), "`--output` must end as an image file does"),
        (("sample", "pipeline", "--output", "sheet"), "`--output` must end as an image file does"),
        (("show", "usage", "vqgan", "a.png", "--output", "map.xyz"), "`--output` must end as an image file does"),
        (("evaluate", "pipeline", "--data", ".", "--sampling", "nonsense=2"), "`--sampling nonsense` has no meaning"),
        (("evaluate", "pipeline", "--data", ".", "--sampling", "generator=2"), "`--sampling generator` has no"),
        (("sample", "vqgan"), "is not a pipeline"),
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


def test_wrong_usage_exits_with_2(capsys):
    for arguments in ([], ["sample", "x", "--num-images", "0"], ["sample", "x", "--seed", str(2**63)]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_version():
    done = subprocess.run([sys.executable, "-m", "hf_vq.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == f"hf-vq {hf_vq.__version__}"


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


def test_show_the_images_that_a_sample_copies(folder, tmp_path):
    """A training image given as the sample is nearest to itself, and one picture further than the other."""
    for number in range(6):
        Image.radial_gradient("L").rotate(40 * number).resize((8, 8 + number)).save(tmp_path / f"{number}.png")
    images = [tmp_path / f"{number}.png" for number in range(6)]
    output = tmp_path / "nearest.png"
    arguments = ("show", "nearest", folder / "vqgan", *images, "--output", output, "--samples", images[4], images[1])
    assert run(*arguments) == 0
    sheet = np.array(Image.open(output))
    model, processor = hf_vq.VQGANModel.from_pretrained(folder / "vqgan").eval(), hf_vq.VQImageProcessor(size=8)
    values = processor([Image.open(image) for image in images], return_tensors="pt").pixel_values
    with torch.no_grad():
        latents = model.encode(values).latents.flatten(1)
    rows = []
    for sample in (4, 1):
        distances = (latents - latents[sample]).square().sum(1).sqrt()
        near = distances.argsort()[:4].tolist()
        assert near[0] == sample
        rows.append(("0", to_pil(values[[sample, *near]])))
    expected = labelled_rows(rows, title="samples, and the images closest to them in latents")
    np.testing.assert_array_equal(sheet, np.array(expected))
    drawn = ("show", "nearest", folder / "pipeline", *images, "--output", output)
    assert run(*drawn) == 0 and Image.open(output).height > 8 * 8
    assert run(*drawn[:2], folder / "vqgan", *images) == 1
    assert run("show", "atlas", folder / "vqgan", *images, "--samples", images[0]) == 1


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


def test_show(folder, tmp_path, capsys):
    images = (folder / "a.png", folder / "b.png")
    for what in ("atlas", "usage", "indices", "interpolation"):
        output = tmp_path / f"{what}.png"
        assert run("show", what, folder / "vqgan", *images, "--output", output) == 0
        assert np.asarray(Image.open(output).convert("RGB")).std() > 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n')
    assert run("show", "curves", tmp_path, "--output", tmp_path / "curves.png") == 0
    assert Image.open(tmp_path / "curves.png").width > 100
    assert run("show", "atlas", folder / "vqgan") == 1
    assert "`IMAGE` must name at least one file" in capsys.readouterr().err
    assert run("show", "interpolation", folder / "vqgan", images[0]) == 1


def test_blank_lines_of_a_list_are_no_folder(monkeypatch, tmp_path):
    from hf_vq.commands.sources import image_files

    (tmp_path / "other.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("cat.png\r\n\n   \ndog.png\n"))
    assert list(map(str, image_files(["-"]))) == ["cat.png", "dog.png"]


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


@pytest.mark.parametrize("seed", ["-1", str(10**30)])
def test_seeds(capsys, seed):
    with pytest.raises(SystemExit, match="2"):
        main(["sample", "no/model", "--seed", seed])
    assert "invalid seed value" in capsys.readouterr().err


@pytest.mark.parametrize("images", ["[1", "5", '{"a": 1}', "[1, 2]"])
def test_a_list_of_images_that_is_none(tmp_path, images):
    from hf_vq.commands.tokenize import _read_indices

    save_file({"indices": torch.zeros(2, 4, 4, dtype=torch.uint8)}, tmp_path / "codes", metadata={"images": images})
    model = SimpleNamespace(config=SimpleNamespace(downsample_factors=[2], num_embeddings=8, quantizer="vq"))
    with pytest.raises(ValueError, match="codes` must list its images"):
        _read_indices(tmp_path / "codes", model)
    for dtype in (torch.bool, torch.complex64):
        save_file({"indices": torch.zeros(2, 4, 4, dtype=dtype)}, tmp_path / "codes")
        with pytest.raises(ValueError, match="`indices` must be whole numbers"):
            _read_indices(tmp_path / "codes", model)


def test_metrics_that_are_no_text(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\x80\n')
    for command in (["info", str(tmp_path)], ["show", "curves", str(tmp_path)]):
        assert main(command) == 1
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 must be a JSON object"):
        metric_rows(tmp_path / "metrics.jsonl")
