"""The tokenizer scripts on images of any channels and sizes, and going on from a trained tokenizer."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from hf_vq import VQGANModel, VQVAE2Config, VQVAE2Model, VQVAEModel
from hf_vq.evaluation.inspection import codebook_atlas
from hf_vq.training.fine_tuning import train_part
from hf_vq.training.objectives.discriminator import PatchDiscriminator
from hf_vq.training.objectives.perceptual import LPIPS, build_perceptual
from tests.examples.runs import rows, script


SMALL = {
    "vqgan": "--base_channels 32 --channel_multiplier 1 1 --num_res_blocks 1 --attn_resolutions 4 --latent_channels 8 "
    "--embed_dim 4 --num_embeddings 8 --perceptual none --disc_channels 4 --disc_layers 1 --disc_start_fraction 0",
    "vqvae": "--hidden_size 8 --residual_hidden_size 4 --num_residual_layers 1 --embed_dim 4 --num_embeddings 8",
    "vqvae2": "--hidden_size 8 --residual_hidden_size 4 --num_residual_layers 1 --embed_dim 4 --num_embeddings 8",
}
LENGTH = "--max_train_steps 2 --train_batch_size 4 --cpu true --min_codebook_perplexity 0 --learning_rate 0.01"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 24, 3), np.uint8)
    columns = {
        "image": [Image.fromarray(image) for image in pixels],
        "bands": np.repeat(pixels, 2, -1)[..., :5].tolist(),
    }
    features = datasets.Features({"image": datasets.Image(), "bands": datasets.Array3D((16, 24, 5), "uint8")})
    rows = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": rows, "validation": rows.select(range(2))}).save_to_disk(folder)
    return str(folder)


def train(name, images, output, *options):
    arguments = f"--dataset_name_or_path {images} --output_dir {output} {SMALL[name]} {LENGTH}".split()
    script(name).main([*arguments, "--resolution", "16", "24", *options])
    return output / "tokenizer"


@pytest.mark.parametrize("name", ["vqgan", "vqvae", "vqvae2"])
def test_grey_rectangles(images, tmp_path, name):
    folder = train(name, images, tmp_path, "--in_channels", "1")
    processor = AutoImageProcessor.from_pretrained(folder)
    values = processor(Image.new("RGB", (50, 40), "white"), return_tensors="pt").pixel_values
    assert values.shape == (1, 1, 16, 24) and values.min() == 1


@pytest.mark.parametrize("name", ["vqvae", "vqvae2"])
def test_the_card_shows_what_each_code_stands_for(images, tmp_path, name):
    folder = train(name, images, tmp_path)
    tokenizer = AutoModel.from_pretrained(folder)
    rows = datasets.load_from_disk(images)["validation"]
    processor = AutoImageProcessor.from_pretrained(folder)
    batch = processor([row["image"] for row in rows], return_tensors="pt")
    for level, file in enumerate(["atlas.png"] if name == "vqvae" else ["atlas_0.png", "atlas_1.png"]):
        assert f"]({file})" in (folder / "README.md").read_text()
        shown = np.asarray(Image.open(folder / file).convert("RGB")).astype(int)
        atlas = np.asarray(codebook_atlas(tokenizer, [batch], level=level, progress=False).convert("RGB"))
        inside = [
            shown[top : top + len(atlas), left : left + atlas.shape[1]]
            for top in range(len(shown) - len(atlas) + 1)
            for left in range(shown.shape[1] - atlas.shape[1] + 1)
        ]
        assert min(np.abs(part - atlas).max() for part in inside) <= 1


@pytest.mark.parametrize("name", ["vqvae", "vqvae2"])
def test_a_perceptual_distance_in_the_loss(images, tmp_path, name):
    """The first step's figure is the network's own, of a reconstruction that is all but grey, and is weighed."""
    options = ("--max_train_steps", "1", "--logging_steps", "1", "--learning_rate", "1e-9", "--seed", "5")
    train(name, images, tmp_path / "plain", *options)
    folder = train(
        name, images, tmp_path / "own", *options, "--perceptual", "mobilenet_v2", "--perceptual_weight", "3"
    )
    plain, own = (rows(tmp_path / kind)[0] for kind in ("plain", "own"))
    assert "perceptual_loss" not in plain
    terms = 3 * own["perceptual_loss"] + own["reconstruction_loss"] + own["quantizer_loss"]
    assert own["loss"] == pytest.approx(terms, rel=1e-5)
    assert own["reconstruction_loss"] == pytest.approx(plain["reconstruction_loss"], rel=1e-5)
    # validation measures with the same network, here what training has not changed, on some of the same images
    tokenizer = AutoModel.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(
        [row["image"] for row in datasets.load_from_disk(images)["train"]], return_tensors="pt"
    ).pixel_values
    with torch.no_grad():
        found = build_perceptual("mobilenet_v2")(tokenizer(pixels).sample, pixels)
    assert found.min() <= own["perceptual_loss"] <= found.max()
    measured = rows(tmp_path / "own")[-1]["validation/perceptual"]
    assert measured == pytest.approx(found[:2].mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["vqvae", "vqvae2"])
def test_a_perceptual_distance_reaches_the_weights(images, tmp_path, name):
    options = ("--max_train_steps", "8", "--logging_steps", "8", "--seed", "5", "--learning_rate", "0.003")
    far = {}
    for weight in ("0", "30"):
        output = tmp_path / weight
        train(name, images, output, *options, "--perceptual", "mobilenet_v2", "--perceptual_weight", weight)
        far[weight] = rows(output)[-1]["validation/perceptual"]
    assert far["30"] < 0.9 * far["0"]


def test_arrays_of_five_channels(images, tmp_path):
    folder = train("vqgan", images, tmp_path, "--in_channels", "5", "--image_column", "bands")
    assert VQGANModel.from_pretrained(folder).config.in_channels == 5


def test_images_too_small_for_a_perceptual_network(images, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hf_vq.training.scripts.train_vqvae.build_perceptual", lambda name, **_: LPIPS() if name == "lpips" else None
    )
    for option in ("--perceptual", "--validation_perceptual"):
        with pytest.raises(ValueError, match=f"{option[2:]}=lpips needs at least 16 pixels"):
            train("vqvae", images, tmp_path, option, "lpips", "--resolution", "12", "16")


def test_what_does_not_fit_is_refused_at_the_start(images, tmp_path):
    for name, options, message in (
        ("vqvae", ["--resolution", "16", "22"], r"resolution.*multiple"),
        ("vqvae", ["--perceptual_weight", "-1"], "`perceptual_weight` must be"),
        (
            "vqvae",
            ["--resolution", "8", "16"],
            r"resolution=\(8, 16\): the SSIM of validation needs at least 11 pixels",
        ),
        ("vqgan", ["--resolution", "8"], "the SSIM of validation needs at least 11 pixels"),
        ("vqvae2", ["--perceptual", "squeezenet"], "`perceptual` must be one of .* got 'squeezenet'"),
        ("vqvae2", ["--validation_perceptual", "squeezenet"], "`validation_perceptual` must be one of"),
        ("vqgan", ["--disc_layers", "3"], "disc_layers=3 needs at least 24 pixels"),
        ("vqgan", ["--commitment_cost", "nan"], "`commitment_cost` must be"),
        ("vqgan", ["--adam_beta1", "1"], "`adam_beta1` must be"),
        ("vqvae2", ["--level_dropout", "1.5"], "`level_dropout` must be"),
    ):
        with pytest.raises(ValueError, match=message):
            train(name, images, tmp_path / "refused", *options)


@pytest.mark.parametrize("name", ["vqgan", "vqvae", "vqvae2"])
@pytest.mark.parametrize("quantizer", ["simvq", "ibq", "bsq"])
def test_quantizers_of_large_codebooks(images, tmp_path, name, quantizer):
    folder = train(name, images, tmp_path, "--quantizer", quantizer, "--embed_dim", "3")  # BSQ's 8 codes have 3 bits
    kind = {"vqgan": VQGANModel, "vqvae": VQVAEModel, "vqvae2": VQVAE2Model}[name]
    model = kind.from_pretrained(folder)
    assert model.config.quantizer == quantizer
    indices = model.encode(torch.zeros(1, 3, 16, 24)).indices
    assert all(level.max() < 8 for level in (indices if isinstance(indices, tuple) else (indices,)))


@pytest.mark.parametrize("quantizer", ["ema", "vq"])
@pytest.mark.parametrize("name,kind", [("vqgan", VQGANModel), ("vqvae", VQVAEModel), ("vqvae2", VQVAE2Model)])
def test_the_decoder_alone(images, tmp_path, name, kind, quantizer):
    first = train(name, images, tmp_path / "first", "--quantizer", quantizer)
    second = train(name, images, tmp_path / "second", "--model_name_or_path", str(first), "--train", "decoder")
    before, after = (kind.from_pretrained(folder).state_dict() for folder in (first, second))
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    besides = {"vqgan": {"post_quant_conv"}, "vqvae": set(), "vqvae2": {"upsample"}}
    assert changed == {"decoder"} | besides[name]
    third = train(name, images, tmp_path / "third", "--model_name_or_path", str(first))
    after = kind.from_pretrained(third).state_dict()
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert {"encoder", "quantize", "decoder"} <= changed  # a loaded model is in evaluation mode until it is trained


def test_codes_of_three_levels_do_not_depend_on_what_is_trained():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "residual_hidden_size": 4, "num_residual_layers": 1, "embed_dim": 4}
    model = VQVAE2Model(VQVAE2Config(resolution=32, num_levels=3, downsample_factor=16, num_embeddings=64, **sizes))
    trained, pixels = train_part(model, "decoder"), torch.rand(2, 3, 32, 32)
    latents, images = model.encode(pixels).latents, model.eval()(pixels).sample
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1)
    assert all(torch.equal(*pair) for pair in zip(latents, model.encode(pixels).latents, strict=True))
    assert not torch.allclose(images, model(pixels).sample)
    upsampling = [name for name, value in model.upsample.named_parameters() if value.requires_grad]
    assert upsampling == ["1.weight", "1.bias"]


def test_a_part_that_is_not_there():
    with pytest.raises(ValueError, match="`part` must be one of"):
        train_part(VQVAEModel.__new__(VQVAEModel), "encoder")


def test_a_discriminator_goes_on(images, tmp_path):
    folder = train("vqgan", images, tmp_path / "first")
    assert not (folder / "discriminator").exists()  # not shared
    trained = PatchDiscriminator.from_folder(tmp_path / "first" / "discriminator")
    trained.save(folder / "discriminator")  # where the conversion of an original writes it
    options = ["--model_name_or_path", str(folder), "--disc_channels", "16", "--learning_rate", "1e-12"]
    train("vqgan", images, tmp_path / "second", *options)
    again = PatchDiscriminator.from_folder(tmp_path / "second" / "discriminator")
    weights = {key: value for key, value in trained.state_dict().items() if "running" not in key and "num" not in key}
    assert all(torch.allclose(again.state_dict()[key], value, atol=1e-9) for key, value in weights.items())
    train("vqgan", images, tmp_path / "third", *options, "--discriminator", "none")
    assert PatchDiscriminator.from_folder(tmp_path / "third" / "discriminator").arguments["base_channels"] == 16
    (folder / "discriminator" / "model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match="discriminator must hold a discriminator"):
        train("vqgan", images, tmp_path / "fourth", *options)
