"""``hf-vq show``."""

import numpy as np
import torch
from PIL import Image

import hf_vq
from hf_vq.evaluation.pictures import labelled_rows
from hf_vq.images import to_pil
from tests.commands.command_line import run


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
