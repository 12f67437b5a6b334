"""Cards: their Python runs as it stands there, and says nothing of the machine that wrote it."""

import json
import re

import pytest
import torch
from PIL import Image

import hf_vq
from hf_vq.hub import folder_for_sharing, save_with_code
from hf_vq.hub_cards import model_card, with_section
from hf_vq.training.sharing import _without_folders
from tests.pipelines import latent_diffusion_parts, vq_diffusion_parts, vqvae2_parts
from tests.pipelines.autoregressive_parts import make_tiny_prior, make_tiny_tokenizer


def codes_condition():
    return {"condition_type": "codes", "condition_vocab_size": 8, "condition_length": 4}


SHARED = {
    "tokenizer": make_tiny_tokenizer,
    "hierarchy": lambda: vqvae2_parts.make_pipeline().vqvae,
    "prior": lambda: make_tiny_prior(condition_type="class", condition_vocab_size=3),
    "prior of codes": lambda: make_tiny_prior(**codes_condition()),
    "lower prior": lambda: vqvae2_parts.make_pipeline().priors[1],
    "denoiser": lambda: vq_diffusion_parts.make_pipeline("text").transformer,
    "scheduler": lambda: vq_diffusion_parts.make_pipeline("text").scheduler,
    "processor": lambda: hf_vq.VQImageProcessor(size=8),
    "condition processor": lambda: hf_vq.VQConditionProcessor("edges", size=8),
    "pipeline": lambda: hf_vq.VQAutoregressivePipeline(make_tiny_tokenizer(), make_tiny_prior()),
    "pipeline of codes": lambda: hf_vq.VQAutoregressivePipeline(
        make_tiny_tokenizer(), make_tiny_prior(**codes_condition())
    ),
    "hierarchical pipeline": vqvae2_parts.make_pipeline,
    "code diffusion": lambda: vq_diffusion_parts.make_pipeline("text"),
    "latent diffusion": lambda: latent_diffusion_parts.make_pipeline("class"),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_a_card_tells_to_type(name, tmp_path, monkeypatch):
    """Both snippets of what is shared, run in an empty folder that has an image."""
    torch.manual_seed(0)
    model, folder = SHARED[name](), tmp_path / "repository"
    save_with_code(model, folder)
    card = model_card(model, str(folder), "mit")
    snippets = re.findall(r"```python\n(.*?)```", card.text, re.S)
    assert len(snippets) == (1 if name == "scheduler" else 2)
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").convert("RGB").resize((9, 8)).save("image.png")
    for snippet in snippets:
        names = {}
        exec(snippet, names)
        if "tokenizer" in name or name == "hierarchy":
            assert names["sample"].shape == (1, 3, model.config.resolution, model.config.resolution)
        elif "prior" in name:
            assert names["indices"].shape == (4, *model.config.grid_size)
        elif "pipeline" in name or "diffusion" in name:
            assert Image.open("sample.png").size == names["image"].size
            (tmp_path / "sample.png").unlink()
    assert "{{" not in card.content and "{%" not in card.content


def test_a_card_has_pictures_licence_and_limits():
    card = model_card(make_tiny_prior(), "me/codes", "cc-by-4.0", pictures={"samples.png": "Samples, not selected"})
    assert card.data.license == "cc-by-4.0" and "![Samples, not selected](samples.png)" in card.text
    assert "\n## Limits\n\nIt knows images like those" in card.text
    assert "## Training" not in card.text and "## Figures" not in card.text
    assert "Faces only." in model_card(make_tiny_prior(), "me/codes", "mit", limits="Faces only.").text


def test_one_section_is_replaced():
    text = "# A\n\n## Use\n\nold\n\n### Old\n\n## Training\n\nkept\n"
    assert with_section(text, "# B\n\n## Use\n\nnew\n", "## Use") == "# A\n\n## Use\n\nnew\n## Training\n\nkept\n"
    assert with_section(text, "# B\n", "## Use") == text and with_section("# A\n", text, "## Use") == "# A\n"


def test_what_is_pushed_keeps_the_files_and_names_the_repository(tmp_path):
    """The card of the folder stays, its pictures and weights too; the code, its snippets and names are new."""
    torch.manual_seed(0)
    pipeline, source = (
        hf_vq.VQAutoregressivePipeline(make_tiny_tokenizer().half(), make_tiny_prior().half()),
        tmp_path / "run",
    )
    pipeline.save_pretrained(source)
    hf_vq.VQImageProcessor(size=12).save_pretrained(source / "vqvae")
    metrics = {"psnr": 20.5}
    model_card(pipeline, "user/run", "cc0-1.0", "noise", metrics=metrics, with_code=False).save(source / "README.md")
    (source / "samples.png").write_bytes(b"picture")
    (source / "notes.py").write_text("import os")
    folder = tmp_path / "shared"
    folder_for_sharing(source, folder, pipeline, "me/emoji")
    weights = "vqvae/model.safetensors"
    assert (folder / weights).read_bytes() == (source / weights).read_bytes()  # still half precision
    assert (folder / "samples.png").read_bytes() == b"picture" and not (folder / "notes.py").exists()
    text = (folder / "README.md").read_text()
    assert "user/run" not in text and 'DiffusionPipeline.from_pretrained("me/emoji", trust_remote_code=True)' in text
    assert "license: cc0-1.0" in text and "| psnr | 20.5 |" in text and "name: emoji" in text
    assert (folder / "image_processing_vq.py").is_file() and (folder / "vqvae" / "image_processing_vq.py").is_file()
    assert "user/run" in (source / "README.md").read_text() and not list(source.rglob("image_processing_vq.py"))


def test_linked_parts_are_pushed_too(tmp_path):
    """A folder whose tokenizer is a link to that of another folder."""
    torch.manual_seed(0)
    pipeline = hf_vq.VQAutoregressivePipeline(make_tiny_tokenizer(), make_tiny_prior())
    pipeline.save_pretrained(tmp_path / "run")
    (tmp_path / "run/vqvae").rename(tmp_path / "tokenizer")
    (tmp_path / "run/vqvae").symlink_to("../tokenizer")
    (tmp_path / "tokenizer/loop").symlink_to("..")
    folder = tmp_path / "shared"
    folder_for_sharing(tmp_path / "run", folder, pipeline, "me/emoji")
    weights = (folder / "vqvae/model.safetensors").read_bytes()
    assert weights == (tmp_path / "tokenizer/model.safetensors").read_bytes()
    assert json.loads((folder / "vqvae/config.json").read_text())["auto_map"]
    assert not (folder / "vqvae").is_symlink()  # the upload would not enter it


@pytest.mark.parametrize("name", ["tokenizer", "lower prior", "denoiser", "scheduler", "processor", "code diffusion"])
def test_a_saved_folder_is_shared_as_its_model_is(name, tmp_path):
    """The same files with the same contents, whether the model is saved with its code or its folder completed."""
    torch.manual_seed(0)
    model = SHARED[name]()
    save_with_code(model, tmp_path / "model")
    model.save_pretrained(tmp_path / "saved")
    folder_for_sharing(tmp_path / "saved", tmp_path / "folder", model, "me/a")
    (tmp_path / "folder" / "README.md").unlink()
    contents = []
    for folder in (tmp_path / "model", tmp_path / "folder"):
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        contents.append({file: json.loads(data) if file.endswith(".json") else data for file, data in files.items()})
    assert contents[0] == contents[1] and any(file.endswith(".py") for file in contents[0])


@pytest.mark.parametrize(
    "argument,expected",
    [
        ("/home/me/photos", "photos"),
        ("--data=/home/me/photos", "--data=photos"),
        ("outputs/a", "outputs/a"),
        ("3", "3"),
    ],
)
def test_a_command_names_no_folder_of_its_machine(argument, expected):
    assert _without_folders(argument) == expected
