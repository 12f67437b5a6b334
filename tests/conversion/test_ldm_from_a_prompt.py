"""A latent diffusion checkpoint with a text encoder, from the file to images of a prompt, against the original's own
steps: tokens padded to their full length, every one of them read, states for cross-attention.
"""

import json
import math

import torch
import torch.nn.functional as F
import yaml
from transformers import BertTokenizerFast, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hf_vq import VQLatentDiffusionPipeline
from hf_vq.cli import main
from hf_vq.conversion.ldm_unet import unet_config
from hf_vq.conversion.reading import load_state_dict
from tests.conversion.golden import GOLDEN
from tests.conversion.test_convert_latent_diffusion import original_name


FOLDER, WIDTH, LENGTH = GOLDEN / "ldm_vq_uncond", 16, 7
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "heart", "on", "a", "tile"]


def checkpoint(tmp_path, width, stage, weights):
    """The golden case with a denoiser that reads texts, saved; and its denoiser as a stock one with random weights."""
    model = yaml.safe_load((FOLDER / "config.yaml").read_text())["model"]
    params = model["params"]
    unet = params["unet_config"]["params"]
    unet |= {"use_spatial_transformer": True, "context_dim": width}
    params |= {"conditioning_key": "crossattn", "cond_stage_config": stage}
    kind, config = unet_config(unet)
    torch.manual_seed(0)
    reference = kind(**config).eval()
    old = load_state_dict(FOLDER / "checkpoint.ckpt")
    state_dict = {key: value for key, value in old.items() if not key.startswith(("model.", "model_ema."))}
    state_dict |= {f"model.diffusion_model.{original_name(k)}": v for k, v in reference.state_dict().items()}
    state_dict |= {f"cond_stage_model.{key}": value for key, value in weights.items()}
    torch.save({"state_dict": state_dict}, tmp_path / "last.ckpt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    return reference


def converted(tmp_path, tokenizer):
    given = ["--checkpoint", str(tmp_path / "last.ckpt"), "--config", str(tmp_path / "config.yaml")]
    tokenizer.save_pretrained(tmp_path / "words")
    out = tmp_path / "out"
    assert main(["convert", *given, "--tokenizer", str(tmp_path / "words"), "--output", str(out)]) == 0
    pipe = VQLatentDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compare(pipe, reference, prompts, states, null):
    """One guided step of the chain, and the whole of it from the prompt and from the states."""
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([400, 400])
    inputs, no_text = pipe.prepare_condition(2, prompt=prompts, guided=True)
    for given, expected in ((inputs, states), (no_text, null.expand_as(states))):
        with torch.no_grad():
            found, wanted = pipe.unet(x, t, **given).sample, reference(x, t, expected).sample
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    chain = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt", "latents": x}
    images = pipe(prompts, **chain).images
    assert images.shape == (2, 3, 32, 32) and not torch.equal(*images)
    embeds = {"prompt_embeds": states, "negative_prompt_embeds": null.expand_as(states)}
    torch.testing.assert_close(images, pipe(**embeds, **chain).images, atol=1e-4, rtol=1e-4)


def bert(ids, weights):
    """x-transformers' encoder: pre-norm, 8 heads of 64, no biases before the output."""
    x = weights["token_emb.weight"][ids] + weights["pos_emb.emb.weight"][: ids.shape[1]]
    for i in (0, 2):
        get = lambda j, name, i=i: weights[f"attn_layers.layers.{i + j}.{name}"]  # noqa: E731
        h = F.layer_norm(x, (WIDTH,), get(0, "0.weight"), get(0, "0.bias"))
        q, k, v = (F.linear(h, get(0, f"1.to_{n}.weight")).unflatten(-1, (8, 64)).transpose(1, 2) for n in "qkv")
        mixed = (q @ k.mT / 8).softmax(-1) @ v
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), get(0, "1.to_out.weight"), get(0, "1.to_out.bias"))
        h = F.layer_norm(x, (WIDTH,), get(1, "0.weight"), get(1, "0.bias"))
        h = F.gelu(F.linear(h, get(1, "1.net.0.0.weight"), get(1, "1.net.0.0.bias")))
        x = x + F.linear(h, get(1, "1.net.2.weight"), get(1, "1.net.2.bias"))
    return F.layer_norm(x, (WIDTH,), weights["norm.weight"], weights["norm.bias"])


def test_bert(tmp_path):
    torch.manual_seed(1)
    shapes = {"token_emb.weight": (len(WORDS), WIDTH), "pos_emb.emb.weight": (LENGTH, WIDTH)}
    for i in (0, 2):
        inner = {f"1.to_{n}.weight": (512, WIDTH) for n in "qkv"}
        inner |= {"1.to_out.weight": (WIDTH, 512), "1.to_out.bias": (WIDTH,)}
        forward = {"1.net.0.0.weight": (4 * WIDTH, WIDTH), "1.net.0.0.bias": (4 * WIDTH,)}
        forward |= {"1.net.2.weight": (WIDTH, 4 * WIDTH), "1.net.2.bias": (WIDTH,)}
        for j, own in enumerate((inner, forward)):
            own |= {"0.weight": (WIDTH,), "0.bias": (WIDTH,)}
            shapes |= {f"attn_layers.layers.{i + j}.{name}": shape for name, shape in own.items()}
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    shapes |= {"to_logits.weight": (len(WORDS), WIDTH), "to_logits.bias": (len(WORDS),)}
    weights = {name: torch.randn(shape) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
    stage = {
        "target": "ldm.modules.encoders.modules.BERTEmbedder",
        "params": {"n_embed": WIDTH, "n_layer": 2, "vocab_size": len(WORDS), "max_seq_len": LENGTH},
    }
    reference = checkpoint(tmp_path, WIDTH, stage, {f"transformer.{name}": value for name, value in weights.items()})
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    pipe = converted(tmp_path, BertTokenizerFast(str(tmp_path / "vocab.txt")))
    ids = torch.tensor([[2, 8, 5, 6, 3, 0, 0], [2, 6, 7, 8, 9, 5, 3], [2, 3, 0, 0, 0, 0, 0]])
    states = bert(ids, weights)
    compare(pipe, reference, ["A red heart", "heart on a tile red a a a"], states[:2], states[2:])


def test_clip(tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1,
        max_position_embeddings=LENGTH, hidden_act="quick_gelu", bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    text = CLIPTextModel(config).eval()
    stage = {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "params": {"version": "openai/clip-vit-large-patch14", "max_length": LENGTH},
    }
    weights = {f"transformer.text_model.{name}": value for name, value in text.state_dict().items()}
    reference = checkpoint(tmp_path, 64, stage, weights)
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    pipe = converted(tmp_path, tokenizer)
    # the end of the text is also the padding, and is read
    ids = torch.tensor([[52, 26, 3, 40, 53, 53, 53], [52, 2, 0, 45, 53, 53, 53], [52, *[53] * 6]])
    with torch.no_grad():
        states = text(input_ids=ids).last_hidden_state
    compare(pipe, reference, ["a do", "cat"], states[:2], states[2:])
