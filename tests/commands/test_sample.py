"""``hf-vq sample``."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import hf_vq
from hf_vq.cli import main
from hf_vq.evaluation.pictures import labelled_rows
from tests.commands.command_line import run
from tests.pipelines import vqvae2_parts
from tests.pipelines.test_condition_images import make_conditional


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


def test_sample(folder, tmp_path):
    arguments = ("sample", folder / "pipeline", "--class-label", "dog", "2", "--num-images", "3", "--seed", "4")
    assert run(*arguments, "--output", tmp_path / "one.png") == 0
    assert run(*arguments, "--output", tmp_path / "two.png") == 0
    assert run(*arguments[:-1], "5", "--output", tmp_path / "three.png") == 0
    one, two, three = (np.array(Image.open(tmp_path / f"{name}.png")) for name in ("one", "two", "three"))
    np.testing.assert_array_equal(one, two)
    assert one.shape == three.shape and (one != three).any()


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


@pytest.mark.parametrize("seed", ["-1", str(10**30)])
def test_seeds(capsys, seed):
    with pytest.raises(SystemExit, match="2"):
        main(["sample", "no/model", "--seed", seed])
    assert "invalid seed value" in capsys.readouterr().err
