"""Checkpoints that carry their code, loaded by processes that do not have hf_vq, from a folder and from the Hub."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

import hf_vq
from hf_vq.hub import save_for_sharing, save_with_code
from hf_vq.hub_cards import CARD_TEMPLATE, facts, model_card
from hf_vq.training.data.image_datasets import DataArguments
from hf_vq.training.data.indices_cache import write_indices
from hf_vq.training.sharing import save_trained
from tests.pipelines.autoregressive_parts import make_tiny_prior, make_tiny_tokenizer


pytestmark = pytest.mark.hub


@pytest.fixture
def vqgan():
    torch.manual_seed(0)
    return make_tiny_tokenizer()


@pytest.fixture
def pipeline(vqgan):
    torch.manual_seed(1)
    pipeline = hf_vq.VQAutoregressivePipeline(vqgan, make_tiny_prior(condition_type="class", num_classes=3))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


LOAD_MODEL = """
import sys, torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

assert AutoConfig.from_pretrained({source!r}, trust_remote_code=True).codebook_size == 16
processor = AutoImageProcessor.from_pretrained({source!r}, trust_remote_code=True)
for dtype in ("float32", "bfloat16"):
    model = AutoModel.from_pretrained({source!r}, trust_remote_code=True, dtype=getattr(torch, dtype))
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    expected = load_file({expected!r} + dtype)
    values = processor(Image.open({picture!r}), return_tensors="pt").pixel_values
    assert torch.equal(values, expected.pop("pixel_values"))
    with torch.no_grad():
        assert torch.equal(model.decode_indices(expected.pop("indices")).sample, expected.pop("sample"))
    state = {{**dict(model.named_parameters()), **dict(model.named_buffers())}}
    assert state.keys() == expected.keys(), state.keys() ^ expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name
assert "hf_vq" not in sys.modules
"""


def expect_model(source, processor, folder):
    """Writes what a stranger must get, in each precision: pixel values, a decoded image and every tensor."""
    picture = folder / "picture.png"
    Image.radial_gradient("L").resize((13, 9)).save(picture)
    indices = torch.arange(16).view(1, 4, 4)
    for dtype in ("float32", "bfloat16"):
        model = hf_vq.VQGANModel.from_pretrained(source, dtype=getattr(torch, dtype))
        expected = {"indices": indices, **dict(model.named_parameters()), **dict(model.named_buffers())}
        expected["pixel_values"] = processor(Image.open(picture), return_tensors="pt").pixel_values
        with torch.no_grad():
            expected["sample"] = model.decode_indices(indices).sample
        expected = {name: value.detach().clone().contiguous() for name, value in expected.items()}
        save_file(expected, folder / f"expected-{dtype}")
    return {"expected": str(folder / "expected-"), "picture": str(picture)}


def test_model_without_hf_vq(vqgan, hub, tmp_path):
    processor = hf_vq.VQImageProcessor(size=8)
    folder = str(tmp_path / "model")
    save_with_code(vqgan, folder)
    save_with_code(processor, folder)
    expected = expect_model(folder, processor, tmp_path)
    hub.run(LOAD_MODEL.format(source=folder, **expected), installed=False)
    hub.run(
        f"import hf_vq\nfrom hf_vq.hub import push_to_hub\nmodel = hf_vq.VQGANModel.from_pretrained({folder!r})\n"
        f"processor = hf_vq.VQImageProcessor.from_pretrained({folder!r})\n"
        "push_to_hub(model, 'tester/vqgan', image_processor=processor)"
    )
    assert {"modeling_vqgan.py", "image_processing_vq.py", "model.safetensors"} <= hub.files("tester/vqgan").keys()
    hub.run(LOAD_MODEL.format(source="tester/vqgan", **expected), installed=False)


LOAD_PIPELINE = """
import sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
pipeline = DiffusionPipeline.from_pretrained({source!r}, trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
assert "hf_vq" not in sys.modules
assert type(pipeline).__module__.startswith("diffusers_modules."), type(pipeline)
output = pipeline(class_labels=[0, 2], generator=torch.Generator().manual_seed(0), output_type="pt")
expected = load_file({expected!r})
assert torch.equal(output.indices, expected["indices"])
assert torch.equal(output.images, expected["images"])
"""
LOAD_PRIOR_AND_VQVAE = """
from transformers import AutoModel, AutoModelForCausalLM, set_seed
prior = AutoModelForCausalLM.from_pretrained({prior!r}, trust_remote_code=True)
assert type(prior).__module__.startswith("transformers_modules.")
codes = prior.generate(prior.prepare_condition([1]), max_new_tokens=16, do_sample=False)
assert torch.equal(codes, load_file({expected!r})["codes"])
vqvae = AutoModel.from_pretrained({vqvae!r}, trust_remote_code=True)
with torch.no_grad():
    sample = vqvae(torch.zeros(1, 3, 8, 8)).sample
assert torch.equal(sample, load_file({expected!r})["sample"])
assert "hf_vq" not in sys.modules
"""
LOAD_COMPONENTS = """
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM
for component in ("vqvae", "prior"):
    auto_class = AutoModel if component == "vqvae" else AutoModelForCausalLM
    model = auto_class.from_pretrained({source!r}, subfolder=component, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    for name, value in getattr(pipeline, component).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
processor = AutoImageProcessor.from_pretrained({source!r}, subfolder="vqvae", trust_remote_code=True)
assert processor.size["shortest_edge"] == 12, processor
assert "hf_vq" not in sys.modules
"""
LOAD_PIPELINE_INSTALLED = """
import hf_vq, torch
from diffusers import DiffusionPipeline
for pipeline in (
    hf_vq.VQAutoregressivePipeline.from_pretrained({source!r}),
    {cls}.from_pretrained({source!r}),
):
    assert type(pipeline) is hf_vq.VQAutoregressivePipeline
    assert type(pipeline.vqvae) is hf_vq.VQGANModel and type(pipeline.prior) is hf_vq.VQGPTForCausalLM
"""


def expect_images(pipeline, folder):
    output = pipeline(class_labels=[0, 2], generator=torch.Generator().manual_seed(0), output_type="pt")
    save_file({"indices": output.indices.contiguous(), "images": output.images.contiguous()}, folder / "expected.st")
    return str(folder / "expected.st")


def expect_prior_and_vqvae(prior, folder):
    vqvae = hf_vq.VQVAEModel(hf_vq.VQVAEConfig(num_embeddings=16, resolution=8)).eval()
    save_with_code(prior, folder / "prior")
    save_with_code(vqvae, folder / "vqvae")
    codes = prior.generate(prior.prepare_condition([1]), max_new_tokens=16, do_sample=False)
    with torch.no_grad():
        sample = vqvae(torch.zeros(1, 3, 8, 8)).sample
    save_file({"codes": codes.contiguous(), "sample": sample.contiguous()}, folder / "more.st")
    return {"prior": str(folder / "prior"), "vqvae": str(folder / "vqvae"), "expected": str(folder / "more.st")}


def test_pipeline_without_hf_vq(pipeline, hub, tmp_path):
    folder = str(tmp_path / "pipeline")
    save_with_code(pipeline, folder)
    expected = expect_images(pipeline, tmp_path)
    models = LOAD_PRIOR_AND_VQVAE.format(**expect_prior_and_vqvae(pipeline.prior, tmp_path))
    hub.run(LOAD_PIPELINE.format(source=folder, expected=expected) + models, installed=False)
    hub.run(
        "import hf_vq\nfrom hf_vq import model_card, push_to_hub\n"
        f"pipeline = hf_vq.VQAutoregressivePipeline.from_pretrained({folder!r})\n"
        "card = model_card(pipeline, 'tester/pipeline', 'apache-2.0', 'emoji-64', metrics={'psnr': 20.5})\n"
        "processor = hf_vq.VQImageProcessor(size=12)\n"
        "push_to_hub(pipeline, 'tester/pipeline', card=card, image_processor=processor)\n"
        "from huggingface_hub import ModelCard\n"
        "assert ModelCard.load('tester/pipeline').data.eval_results[0].metric_value == 20.5\n"
        + LOAD_PIPELINE_INSTALLED.format(source="tester/pipeline", cls="hf_vq.VQAutoregressivePipeline")
    )
    assert "POST /api/validate-yaml" in hub.store.requests
    assert {"README.md", "model_index.json", "pipeline_vq_autoregressive.py", "vqvae/modeling_vqgan.py"} <= hub.files(
        "tester/pipeline"
    ).keys()
    assert "vqvae/preprocessor_config.json" in hub.files("tester/pipeline")
    assert "preprocessor_config.json" not in hub.files("tester/pipeline")
    source = "tester/pipeline"
    components = LOAD_COMPONENTS.format(source=source)
    hub.run(LOAD_PIPELINE.format(source=source, expected=expected) + components, installed=False)


def test_pipeline_with_hf_vq_and_without_code(pipeline, hub, tmp_path):
    """Saved the usual way: `DiffusionPipeline` finds the class once hf_vq is imported, in a folder and on the Hub."""
    pipeline.save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["vqvae"] == ["hf_vq", "VQGANModel"] and index["prior"] == ["hf_vq", "VQGPTForCausalLM"]
    folder = str(tmp_path / "pipeline")
    hub.run(
        f"import hf_vq\nhf_vq.VQAutoregressivePipeline.from_pretrained({folder!r}).push_to_hub('tester/plain')\n"
        + LOAD_PIPELINE_INSTALLED.format(source=folder, cls="DiffusionPipeline")
        + LOAD_PIPELINE_INSTALLED.format(source="tester/plain", cls="DiffusionPipeline")
    )


def test_saving_with_code_leaves_no_trace(vqgan, pipeline, tmp_path):
    save_with_code(pipeline, tmp_path / "code")
    pipeline.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").rglob("*.py"))
    assert "auto_map" not in (tmp_path / "plain" / "vqvae" / "config.json").read_text()
    save_with_code(vqgan, tmp_path / "model")
    vqgan.save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").rglob("*.py"))
    assert "auto_map" not in (tmp_path / "again" / "config.json").read_text()


def test_every_component_names_its_code(pipeline, tmp_path):
    """Where the Auto classes look for it: beside the component, and at the root if they are given a `subfolder`."""
    save_for_sharing(tmp_path, pipeline, image_processor=hf_vq.VQImageProcessor(size=12))
    for name, auto_class in (
        ("vqvae/config.json", "AutoModel"),
        ("prior/config.json", "AutoModelForCausalLM"),
        ("vqvae/preprocessor_config.json", "AutoImageProcessor"),
    ):
        module = json.loads((tmp_path / name).read_text())["auto_map"][auto_class].split(".")[0]
        for folder in (tmp_path, (tmp_path / name).parent):
            assert (folder / f"{module}.py").is_file(), (folder, module)


def test_a_trained_pipeline_has_the_card_of_its_folder(pipeline, tmp_path, monkeypatch):
    """On disk without code, pushed with it; its image processor beside the tokenizer, and the run's last picture."""
    pushed = {}

    def push_folder(folder, repo_id, message, **options):
        pushed.update({str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*.*")})
        return repo_id

    monkeypatch.setattr("hf_vq.hub.push_folder", push_folder)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "validation/psnr": 20.5}\n')
    (tmp_path / "pictures").mkdir()
    for step in (2, 10):
        (tmp_path / "pictures" / f"samples-{step:07d}.png").write_bytes(str(step).encode())
    arguments = SimpleNamespace(hub_model_id="tester/a", hub_license="mit", train_batch_size=2, push_to_hub=True)
    trained = SimpleNamespace(output_dir=tmp_path, arguments=arguments, global_step=3)
    data = DataArguments(str(tmp_path))
    folder = save_trained(trained, pipeline, "pipeline", data, hf_vq.VQImageProcessor(size=12))
    assert not list(folder.rglob("*.py")) and "trust_remote_code" not in (folder / "README.md").read_text()
    card = pushed["README.md"].decode()
    assert 'from_pretrained("tester/a", trust_remote_code=True)' in card and str(tmp_path) not in card
    assert "![samples, at the end of the run](samples.png)" in card and pushed["samples.png"] == b"10"
    assert "image_processing_vq.py" in pushed and "vqvae/preprocessor_config.json" in pushed
    assert (folder / "vqvae" / "preprocessor_config.json").is_file()
    assert not (folder / "preprocessor_config.json").exists()


def test_installed_classes_win_over_the_code_of_a_folder(vqgan, pipeline, tmp_path):
    from transformers import AutoModel

    save_with_code(vqgan, tmp_path / "model")
    save_with_code(pipeline, tmp_path / "pipeline")
    for trust in (None, True):
        assert type(AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=trust)) is hf_vq.VQGANModel
    loaded = hf_vq.VQAutoregressivePipeline.from_pretrained(tmp_path / "pipeline")
    assert type(loaded.vqvae) is hf_vq.VQGANModel and type(loaded.prior) is hf_vq.VQGPTForCausalLM

    for trust in (None, True):  # nothing of the folder is executed
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", trust_remote_code=trust)
        assert type(loaded) is hf_vq.VQAutoregressivePipeline and type(loaded.vqvae) is hf_vq.VQGANModel


def denoising_parts():
    torch.manual_seed(2)
    sizes = {"sample_size": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    denoiser = hf_vq.VQDiffusionTransformer2DModel(num_embeddings=16, num_train_timesteps=4, **sizes)
    return denoiser.eval(), hf_vq.MaskReplaceScheduler(num_embeddings=16, num_train_timesteps=4)


LOAD_PARTS = """
import importlib.util, sys, torch
from diffusers import AutoModel
from safetensors.torch import load_file
denoiser = AutoModel.from_pretrained({folder!r} + "/denoiser", trust_remote_code=True)
expected = load_file({folder!r} + "/denoiser/diffusion_pytorch_model.safetensors")
assert all(torch.equal(value, expected[name]) for name, value in denoiser.state_dict().items())
spec = importlib.util.spec_from_file_location("code", {folder!r} + "/scheduler/scheduling_mask_replace.py")
code = importlib.util.module_from_spec(spec)
sys.modules["code"] = code
spec.loader.exec_module(code)
assert code.MaskReplaceScheduler.from_pretrained({folder!r} + "/scheduler").config.num_embeddings == 16
"""
SAVE_AGAIN = """
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({folder!r} + "/pipeline", trust_remote_code=True)
pipeline.save_pretrained({folder!r} + "/again")
"""
CUSTOM = """
import hf_vq
pipe = DiffusionPipeline.from_pretrained(
    {folder!r} + "/plain",
    custom_pipeline={folder!r} + "/pipeline/pipeline_vq_autoregressive.py",
    trust_remote_code=True,
)
assert type(pipe).__module__.startswith("diffusers_modules.") and type(pipe.vqvae) is hf_vq.VQGANModel
"""


@pytest.mark.slow  # three starts of Python; models and pipelines alone are loaded above
def test_parts_alone_and_remote_pipelines(pipeline, hub, tmp_path):
    """A denoiser and a scheduler without their pipeline; a pipeline of remote code saves its code again."""
    denoiser, scheduler = denoising_parts()
    save_with_code(denoiser, tmp_path / "denoiser")
    save_with_code(scheduler, tmp_path / "scheduler")
    save_with_code(pipeline, tmp_path / "pipeline")
    pipeline.save_pretrained(tmp_path / "plain")
    expected = expect_images(pipeline, tmp_path)
    folder = str(tmp_path)
    code = LOAD_PARTS + 'assert "hf_vq" not in sys.modules\n' + SAVE_AGAIN
    hub.run(code.format(folder=folder), installed=False)
    hub.run(LOAD_PIPELINE.format(source=folder + "/again", expected=expected), installed=False)
    hub.run("from diffusers import DiffusionPipeline\n" + CUSTOM.format(folder=folder))


def test_a_denoiser_alone_loads_by_its_folder(tmp_path):
    denoiser, _ = denoising_parts()
    denoiser.save_pretrained(tmp_path)
    loaded = diffusers.AutoModel.from_pretrained(str(tmp_path))
    assert type(loaded) is hf_vq.VQDiffusionTransformer2DModel
    assert torch.equal(loaded.out.weight, denoiser.out.weight)


def test_a_damaged_part_of_a_pipeline(tmp_path):
    """The parts of other packages that a pipeline loads are held to the same rule as ours."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
    )
    config = hf_vq.VQVAEConfig(num_embeddings=16, embed_dim=4, resolution=16, downsample_factor=4)
    pipe = hf_vq.VQLatentDiffusionPipeline(hf_vq.VQVAEModel(config), unet, diffusers.DDIMScheduler())
    pipe.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is hf_vq.VQLatentDiffusionPipeline
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    for edit, message in (
        (lambda tensors: tensors.pop("conv_in.weight"), "without conv_in.weight"),
        (lambda tensors: tensors["conv_in.bias"].fill_(math.nan), "NaN or infinity in conv_in.bias"),
    ):
        tensors = {name: value.clone() for name, value in whole.items()}
        edit(tensors)
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ValueError, match=message) as caught:
            DiffusionPipeline.from_pretrained(tmp_path)
        assert "unet" in str(caught.value)


def test_pushing_to_a_branch_and_as_a_pull_request(hub, tmp_path):
    denoiser, scheduler = denoising_parts()
    denoiser.save_pretrained(tmp_path / "denoiser")
    scheduler.save_pretrained(tmp_path / "scheduler")
    hub.run(
        "import hf_vq\n"
        f"denoiser = hf_vq.VQDiffusionTransformer2DModel.from_pretrained({str(tmp_path / 'denoiser')!r})\n"
        f"scheduler = hf_vq.MaskReplaceScheduler.from_pretrained({str(tmp_path / 'scheduler')!r})\n"
        "processor = hf_vq.VQImageProcessor(size=8)\n"
        "for _ in range(2):\n"
        "    hf_vq.push_to_hub(denoiser, 'tester/parts', revision='trial', private=True)\n"
        "url = hf_vq.push_to_hub(scheduler, 'tester/parts', create_pr=True)\n"
        "assert url.endswith('/tester/parts/discussions/1'), url\n"
        "hf_vq.push_to_hub(processor, 'tester/parts')\n"
        "loaded = hf_vq.VQDiffusionTransformer2DModel.from_pretrained('tester/parts', revision='trial')\n"
        "assert (loaded.out.weight == denoiser.out.weight).all()\n"
        "hf_vq.MaskReplaceScheduler.from_pretrained('tester/parts', revision='refs/pr/1')\n"
    )
    repository = hub.store.repositories["model", "tester/parts"]
    assert repository.private and set(repository.heads) == {"main", "trial", "refs/pr/1"}
    assert set(repository.at("main").files) == {"image_processing_vq.py", "preprocessor_config.json"}
    assert {"config.json", "transformer_vq_diffusion.py"} <= set(repository.at("trial").files)
    assert "scheduler_config.json" in repository.at("refs/pr/1").files


def write_codes(tokenizer, folder):
    """Writes the indices of four images with labels; returns the indices."""
    images = [{"pixel_values": torch.rand(3, 8, 8), "label": number} for number in range(4)]
    write_indices(tokenizer, images, folder, progress=False)
    with torch.no_grad():
        return [tokenizer.encode(image["pixel_values"][None]).indices.flatten().tolist() for image in images]


def test_pushing_indices_as_a_data_set(vqgan, hub, tmp_path):
    expected = {split: write_codes(vqgan, tmp_path / "indices" / split) for split in ("train", "validation")}
    hub.run(
        "import datasets, hf_vq\n"
        f"hf_vq.push_to_hub({str(tmp_path / 'indices')!r}, 'tester/codes', private=True)\n"
        f"hf_vq.push_to_hub({str(tmp_path / 'indices' / 'train')!r}, 'tester/codes', revision='small')\n"
        f"found = datasets.load_dataset('tester/codes')\n"
        "assert sorted(found) == ['train', 'validation'], found\n"
        f"expected = {expected!r}\n"
        "for split in found:\n"
        "    assert found[split]['label'] == [0, 1, 2, 3]\n"
        "    assert found[split]['indices'] == expected[split]\n"
        "assert list(datasets.load_dataset('tester/codes', revision='small')) == ['train']\n"
    )
    printed = hub.run("from hf_vq.cli import main\nassert main(['info', 'tester/codes', '--json']) == 0\n")
    found = json.loads(printed)
    assert set(found) == {"train", "validation"} and found["train"]["images"] == 4
    different = len({code for row in expected["train"] for code in row})
    assert f"{len(expected['train'][0])} codes an image, {different} different codes" in found["train"]["indices"]
    assert hub.store.repositories["dataset", "tester/codes"].private


def test_what_is_no_data_set_of_indices(tmp_path):
    with pytest.raises(ValueError, match="`model` must be a folder of indices"):
        hf_vq.push_to_hub(tmp_path, "tester/codes")
    (tmp_path / "config.json").write_text('{"complete": false}')
    with pytest.raises(ValueError, match="`model` must be a folder of complete indices"):
        hf_vq.push_to_hub(str(tmp_path), "tester/codes")


@pytest.mark.parametrize("save", [save_with_code, lambda part, folder: part.save_pretrained(folder)])
def test_a_saved_pipeline_does_not_say_where_it_was(vqgan, save, tmp_path):
    hf_vq.VQDiffusionImagePipeline(vqgan, *denoising_parts()).save_pretrained(tmp_path / "first")
    loaded = hf_vq.VQDiffusionImagePipeline.from_pretrained(tmp_path / "first")
    save(loaded, tmp_path / "second")
    files = list((tmp_path / "second").rglob("*.json"))
    assert len(files) >= 4 and not [file for file in files if str(tmp_path) in file.read_text()]
    assert str(loaded.name_or_path) == str(tmp_path / "first")  # it still knows


def test_what_cannot_be_saved_with_code(tmp_path):
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError, match="`model` must be .*BertModel"):
        save_with_code(BertModel(config), tmp_path)
    with pytest.raises(ValueError, match="`model` must be .*dict"):
        save_with_code({}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_card_round_trip(pipeline, tmp_path):
    card = model_card(
        pipeline,
        "tester/name",
        license="cc-by-4.0",
        dataset="emoji-64: Noto Emoji (Apache-2.0) and Twemoji (CC BY 4.0)",
        dataset_id="tester/emoji-64",
        metrics={"psnr": 21.5, "codebook_usage": 0.875},
        description="Small.",
        command="python train.py",
        tags=("emoji",),
    )
    card.save(tmp_path / "README.md")
    data = metadata_load(tmp_path / "README.md")
    assert (
        data["library_name"] == "hf_vq" and data["license"] == "cc-by-4.0" and data["datasets"] == ["tester/emoji-64"]
    )
    assert data["pipeline_tag"] == "unconditional-image-generation" and "emoji" in data["tags"]
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {(r.metric_type, r.metric_value, r.dataset_split) for r in results} == {
        ("psnr", 21.5, "validation"),
        ("codebook_usage", 0.875, "validation"),
    }
    text = (tmp_path / "README.md").read_text()
    for expected in (
        'DiffusionPipeline.from_pretrained("tester/name", trust_remote_code=True)',
        "pipeline(class_labels=0).images",
        "| psnr | 21.5 |",
        "| codebook_usage | 0.875 |",
        "python train.py",
        "Twemoji (CC BY 4.0)",
        "16 codes of 4 channels",
    ):
        assert expected in text, text
    assert "{{" not in text and "{%" not in text


def test_card_of_a_model_without_figures(vqgan):
    card = model_card(vqgan, "tester/name", license="mit", dataset="noise", with_code=False)
    assert card.data.eval_results is None and "model-index" not in card.content and "model_name" not in card.content
    assert "trust_remote_code" not in card.content and "Figures" not in card.content
    assert 'VQGANModel.from_pretrained("tester/name")' in card.content
    with pytest.raises(ValueError, match=r"metrics\['psnr'\].*nan"):
        model_card(vqgan, "tester/name", license="mit", dataset="noise", metrics={"psnr": math.nan})


def test_the_repository_has_one_template():
    link = CARD_TEMPLATE.parent.parent / "model_cards" / "template.md"
    assert link.resolve() == CARD_TEMPLATE


def test_facts(pipeline):
    assert dict(facts(pipeline.vqvae))["parameters"] == f"{sum(p.numel() for p in pipeline.vqvae.parameters()):,}"
    assert dict(facts(pipeline.prior))["codes"] == "4×4 of 16"
