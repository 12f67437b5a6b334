"""Damaged folders: each class says in one error which file is wrong, and which keys, in place of random weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import hf_vq
from hf_vq.models.checked_loading import CheckedLoadingMixin
from hf_vq.registration import MODELS


GRID = {"codebook_size": 16, "grid_size": 4, "condition_type": "class", "condition_vocab_size": 3}
TOKENIZER = {"num_embeddings": 16, "resolution": 8, "quantizer": "ema"}


def make(name):
    torch.manual_seed(0)
    if name == "VQGANModel":
        sizes = {"base_channels": 4, "norm_num_groups": 2, "channel_multiplier": [1, 2], "num_res_blocks": 1}
        config = hf_vq.VQGANConfig(**sizes, attn_resolutions=[], latent_channels=4, embed_dim=4, **TOKENIZER)
    elif name == "VQVAEModel":
        config = hf_vq.VQVAEConfig(**TOKENIZER, embed_dim=4)
    elif name == "VQVAE2Model":
        config = hf_vq.VQVAE2Config(**TOKENIZER, embed_dim=4)
    elif name == "VQGPTForCausalLM":
        config = hf_vq.VQGPTConfig(**GRID, n_embd=16, n_layer=2, n_head=2)
    elif name == "VQLlamaForCausalLM":
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = hf_vq.VQLlamaConfig(**GRID, **sizes)
    elif name == "PixelCNNForCausalLM":
        config = hf_vq.PixelCNNConfig(**GRID, num_hidden_layers=2, hidden_size=8)
    elif name == "PixelSNAILForCausalLM":
        config = hf_vq.PixelSNAILConfig(**GRID)
    else:
        return hf_vq.VQDiffusionTransformer2DModel(
            num_embeddings=16, sample_size=4, num_layers=1, num_attention_heads=2, attention_head_dim=8
        )
    return getattr(hf_vq, name)(config)


NAMES = [name for _, classes in MODELS.values() for name in classes.values() if not name.endswith("Processor")]
NAMES.append("VQDiffusionTransformer2DModel")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of the small models, made when first asked for."""
    root = tmp_path_factory.mktemp("saved")

    def folder(name):
        if not (root / name).exists():
            make(name).save_pretrained(root / name)
        return root / name

    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy to damage, and its file of weights."""

    def copy(name):
        folder = shutil.copytree(saved(name), tmp_path / name)
        return folder, next(folder.glob("*.safetensors"))

    return copy


def edit_weights(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def edit_config(folder, **entries):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def message_of(name, folder, error=ValueError, **kwargs):
    with pytest.raises(error) as caught:
        getattr(hf_vq, name).from_pretrained(folder, **kwargs)
    return str(caught.value)


def test_every_model_class_checks():
    models = [getattr(hf_vq, name) for name in hf_vq.__all__]
    models = [cls for cls in models if isinstance(cls, type) and issubclass(cls, torch.nn.Module)]
    models = [cls for cls in models if hasattr(cls, "from_pretrained")]
    assert len(models) >= len(NAMES)
    assert all(cls.__mro__.index(CheckedLoadingMixin) < 8 and "from_pretrained" not in vars(cls) for cls in models)


@pytest.mark.parametrize("name", NAMES)
def test_missing_unexpected_and_misshapen_keys(name, damaged):
    folder, file = damaged(name)
    first, second = [key for key, value in load_file(file).items() if value.ndim > 1][:2]

    def edit(tensors):
        del tensors[first]
        tensors["surplus.weight"] = torch.zeros(2)
        tensors[second] = tensors[second][1:].contiguous()

    edit_weights(file, edit)
    message = message_of(name, folder)
    for expected in (str(file), first, "surplus.weight", second, "without", "with the unknown", "with other shapes"):
        assert expected in message, message


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(name, value, damaged):
    folder, file = damaged(name)
    key = list(load_file(file))[-1]
    edit_weights(file, lambda tensors: tensors[key].view(-1)[-1:].fill_(value))
    assert f"`{file}` must hold finite weights, got NaN or infinity in {key}." == message_of(name, folder)


NO_FILES = {
    "empty": (b"", "an empty file"),
    "zeros": (bytes(4096), "a file of zeros"),
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "a Git LFS pointer"),
    "short": (b"abc", "3 bytes"),
    "text": (b"not a checkpoint at all, but a note of somebody", "another kind of file"),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["VQGANModel", "VQGPTForCausalLM", "VQDiffusionTransformer2DModel"])
def test_other_files_in_place_of_weights(name, kind, damaged):
    folder, file = damaged(name)
    content, words = NO_FILES[kind]
    file.write_bytes(content)
    message = message_of(name, folder, OSError)
    assert str(file) in message and words in message


@pytest.mark.parametrize("kind", [kind for kind in NO_FILES if kind != "zeros"] + ["half", "list", "zeros"])
@pytest.mark.parametrize("name", ["VQGANModel", "PixelCNNForCausalLM", "VQDiffusionTransformer2DModel"])
def test_other_files_in_place_of_the_configuration(name, kind, damaged):
    folder, _ = damaged(name)
    file = folder / "config.json"
    whole = file.read_bytes()
    file.write_bytes({"half": whole[: len(whole) // 2], "list": b"[1]"}.get(kind) or NO_FILES.get(kind, [b""])[0])
    assert str(file) in message_of(name, folder, OSError)


@pytest.mark.parametrize("name", NAMES)
def test_truncated_weights(name, damaged):
    folder, file = damaged(name)
    whole = file.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 100):
        file.write_bytes(whole[:length])
        assert str(file) in message_of(name, folder, OSError)
    file.write_bytes(whole + b"12")
    assert "surplus data" in message_of(name, folder, OSError)
    file.unlink()
    assert file.name in message_of(name, folder, OSError)
    assert "config.json" in message_of(name, folder / "nowhere", OSError) or not (folder / "nowhere").exists()


def test_a_damaged_generation_configuration_is_not_ignored(damaged):
    folder, _ = damaged("VQGPTForCausalLM")
    (folder / "generation_config.json").write_text('{"max_length": ')
    assert "generation_config.json" in message_of("VQGPTForCausalLM", folder, OSError)


@pytest.mark.parametrize("name", ["VQGANModel", "VQGPTForCausalLM", "VQDiffusionTransformer2DModel"])
def test_shards(name, saved, tmp_path):
    model = getattr(hf_vq, name).from_pretrained(saved(name))
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    loaded = getattr(hf_vq, name).from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[:-1])
    assert str(shards[0]) in message_of(name, tmp_path, OSError)
    shards[0].unlink()
    message = message_of(name, tmp_path, OSError)
    assert shards[0].name in message and "index.json" in message
    shards[0].write_bytes(whole)
    key = next(iter(load_file(shards[0])))
    edit_weights(shards[0], lambda tensors: tensors.pop(key))
    assert key in message_of(name, tmp_path)
    index = next(tmp_path.glob("*.index.json"))
    index.write_text("{}")
    assert str(index) in message_of(name, tmp_path, OSError)


def test_weights_of_another_model(damaged, saved):
    """The prior's weights in the tokenizer's folder, and a configuration of another class."""
    folder, file = damaged("VQGANModel")
    shutil.copy(saved("VQGPTForCausalLM") / "model.safetensors", file)
    message = message_of("VQGANModel", folder)
    assert "without decoder.conv_in.bias" in message and "unknown lm_head.weight, transformer.h.0" in message
    for name, other, found in (
        ("VQVAE2Model", "VQGPTForCausalLM", "hf_vq_gpt"),
        ("VQGPTForCausalLM", "PixelCNNForCausalLM", "hf_vq_pixelcnn"),
        ("VQDiffusionTransformer2DModel", "VQGANModel", None),
    ):
        message = message_of(name, saved(other), (ValueError, OSError))
        assert str(saved(other)) in message and (found is None or found in message)


@pytest.mark.parametrize("name", ["VQGANModel", "VQVAEModel", "VQVAE2Model"])
def test_a_configuration_that_names_another_quantizer(name, damaged):
    folder, file = damaged(name)
    edit_config(folder, quantizer="vq")
    message = message_of(name, folder)
    assert str(file) in message and "cluster_size" in message


@pytest.mark.parametrize("layers", [1, 9])
def test_a_configuration_that_names_another_depth(layers, damaged):
    folder, file = damaged("VQGPTForCausalLM")
    edit_config(folder, n_layer=layers)
    message = message_of("VQGPTForCausalLM", folder)
    assert str(file) in message and f"transformer.h.{min(layers, 2)}." in message


def test_auto_classes_check(damaged):
    for auto_class, name in ((AutoModel, "VQGANModel"), (AutoModelForCausalLM, "PixelSNAILForCausalLM")):
        folder, file = damaged(name)
        key = list(load_file(file))[0]
        edit_weights(file, lambda tensors, key=key: tensors.pop(key))
        with pytest.raises(ValueError, match="must hold the weights") as caught:
            auto_class.from_pretrained(folder)
        assert str(file) in str(caught.value) and key in str(caught.value)


def test_what_the_caller_asks_for_stays(saved, damaged, load_reports):
    """Shapes may differ, the precision, the placement, the report and given tensors are the caller's choice."""
    folder = saved("VQGANModel")
    model = hf_vq.VQGANModel.from_pretrained(
        folder, num_embeddings=32, ignore_mismatched_sizes=True, dtype=torch.bfloat16, low_cpu_mem_usage=True
    )
    assert model.quantize.indices_to_latents(torch.full((1, 1, 1), 31)).shape == (1, 4, 1, 1)
    assert model.encoder.conv_in.weight.dtype == torch.bfloat16
    assert load_reports.messages
    load_reports.messages.clear()
    model, info = hf_vq.VQGANModel.from_pretrained(folder, device_map={"": "cpu"}, output_loading_info=True)
    assert not any(info.values())
    again = hf_vq.VQGANModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(again.encoder.conv_in.weight, model.encoder.conv_in.weight)
    denoiser, info = hf_vq.VQDiffusionTransformer2DModel.from_pretrained(
        saved("VQDiffusionTransformer2DModel"), torch_dtype=torch.bfloat16, device_map="cpu", output_loading_info=True
    )
    assert denoiser.out.weight.dtype == torch.bfloat16 and not any(info.values())
    denoiser = hf_vq.VQDiffusionTransformer2DModel.from_pretrained(
        saved("VQDiffusionTransformer2DModel"), num_embeddings=9, low_cpu_mem_usage=False, ignore_mismatched_sizes=True
    )
    assert denoiser.out.weight.shape[0] == 9
    assert 0.01 < denoiser.out.weight.std() < 0.03  # as its own initialisation draws it


def test_a_variant_and_a_subfolder(saved, tmp_path):
    model = hf_vq.VQGANModel.from_pretrained(saved("VQGANModel"))
    model.save_pretrained(tmp_path / "part", variant="fp16")
    loaded = hf_vq.VQGANModel.from_pretrained(tmp_path, subfolder="part", variant="fp16")
    assert torch.equal(loaded.encoder.conv_in.weight, model.encoder.conv_in.weight)
    file = tmp_path / "part" / "model.fp16.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert str(file) in message_of("VQGANModel", tmp_path, OSError, subfolder="part", variant="fp16")
