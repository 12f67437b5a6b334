"""``hf-vq encode``, ``decode`` and ``reconstruct``."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import hf_vq
from tests.commands.command_line import run
from tests.pipelines import vqvae2_parts
from tests.pipelines.autoregressive_parts import make_tiny_tokenizer


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


def test_blank_lines_of_a_list_are_no_folder(monkeypatch, tmp_path):
    from hf_vq.commands.sources import image_files

    (tmp_path / "other.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("cat.png\r\n\n   \ndog.png\n"))
    assert list(map(str, image_files(["-"]))) == ["cat.png", "dog.png"]


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
