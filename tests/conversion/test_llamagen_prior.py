"""LlamaGen's priors: their layout with random weights, converted, against a plain implementation of the original's
network.
"""

import json

import pytest
import torch
import torch.nn.functional as F

from hf_vq import VQAutoregressivePipeline, VQLlamaForCausalLM
from hf_vq.cli import main
from hf_vq.conversion.convert_llamagen import convert
from hf_vq.conversion.llamagen_prior import convert_prior
from tests.conversion.golden import GOLDEN
from tests.models.priors.test_modeling_vq_llama import original_angles, original_rotary


TOKENIZER = GOLDEN / "llamagen_vq"  # 64 codes, 4 pixels per code
WIDTH, DEPTH, HEADS, CODES, CLASSES, INNER = 16, 2, 4, 64, 3, 24


def original(kind="class", kv_heads=HEADS, seed=0):
    """Random weights under the original's names, float64, far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    joined = WIDTH + 2 * kv_heads * WIDTH // HEADS
    shapes = {"tok_embeddings": (CODES, WIDTH), "output": (CODES, WIDTH), "norm": (WIDTH,)}
    for i in range(DEPTH):
        shapes |= {
            f"layers.{i}.attention.wqkv": (joined, WIDTH),
            f"layers.{i}.attention.wo": (WIDTH, WIDTH),
            f"layers.{i}.feed_forward.w1": (INNER, WIDTH),
            f"layers.{i}.feed_forward.w3": (INNER, WIDTH),
            f"layers.{i}.feed_forward.w2": (WIDTH, INNER),
            f"layers.{i}.attention_norm": (WIDTH,),
            f"layers.{i}.ffn_norm": (WIDTH,),
        }
    if kind == "class":
        shapes["cls_embedding.embedding_table"] = (CLASSES + 1, WIDTH)
    else:
        shapes |= {"cls_embedding.cap_proj.fc1": (WIDTH, 6), "cls_embedding.cap_proj.fc2": (WIDTH, WIDTH)}
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        weights[f"{name}.weight"] = 0.4 * noise if len(shape) == 2 else 1 + 0.2 * noise
    if kind == "text":
        weights["cls_embedding.uncond_embedding"] = torch.randn((5, 6), generator=generator)
    return weights


ARGUMENTS = {"n_head": HEADS, "block_size": 16}


def original_logits(weights, condition, codes, config):
    """Of a condition `(B,)` or `(B, L, 6)`, None in a text's place for the null one, and codes `(B, n)`, float64."""
    w = {name: value.double() for name, value in weights.items()}
    if "cls_embedding.embedding_table.weight" in w:
        prefix = w["cls_embedding.embedding_table.weight"][condition][:, None]
    else:
        features = w["cls_embedding.uncond_embedding"].expand(len(codes), -1, -1) if condition is None else condition
        hidden = F.gelu(features.double() @ w["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
        prefix = hidden @ w["cls_embedding.cap_proj.fc2.weight"].T
    h = torch.cat([prefix, w["tok_embeddings.weight"][codes]], dim=1)
    angles = original_angles(config)[: h.shape[1]]
    mask = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    for i in range(DEPTH):
        layer = {name.removeprefix(f"layers.{i}."): value for name, value in w.items()}
        joined = norm(h, layer["attention_norm.weight"]) @ layer["attention.wqkv.weight"].T
        kv = (joined.shape[-1] - WIDTH) // 2
        q, k, v = (part.unflatten(-1, (-1, WIDTH // HEADS)) for part in joined.split([WIDTH, kv, kv], dim=-1))
        q, k = original_rotary(q, angles), original_rotary(k, angles)
        q, k, v = (part.transpose(1, 2).repeat_interleave(HEADS // part.shape[2], dim=1) for part in (q, k, v))
        attention = (q @ k.mT / (WIDTH // HEADS) ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        h = h + (attention @ v).transpose(1, 2).flatten(2) @ layer["attention.wo.weight"].T
        x = norm(h, layer["ffn_norm.weight"])
        gated = F.silu(x @ layer["feed_forward.w1.weight"].T) * (x @ layer["feed_forward.w3.weight"].T)
        h = h + gated @ layer["feed_forward.w2.weight"].T
    return norm(h, w["norm.weight"]) @ w["output.weight"].T


CODES_GIVEN = torch.randint(0, CODES, (2, 15), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_logits_of_classes(kv_heads):
    weights = original("class", kv_heads)
    model, dropped = convert_prior({**weights, "freqs_cis": torch.zeros(17, 2, 2)}, ARGUMENTS)
    config = model.config
    assert list(dropped) == ["freqs_cis"]
    assert (config.condition_vocab_size, config.num_key_value_heads, list(config.grid_size)) == (3, kv_heads, [4, 4])
    for classes, prompt in ((torch.tensor([2, 0]), [2, 0]), (torch.tensor([3, 3]), None)):
        ids = torch.cat([model.prepare_condition(prompt, batch_size=2), CODES_GIVEN], dim=1)
        expected = original_logits(weights, classes, CODES_GIVEN, config)
        assert expected.std(dim=1).min() > 0.1
        torch.testing.assert_close(model.double()(ids).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_of_texts():
    weights = original("text")
    model, _ = convert_prior(weights, {**ARGUMENTS, "cls_token_num": 5, "caption_dim": 6, "model_type": "t2i"})
    model.double()
    features = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ids = torch.cat([model.prepare_condition(features), CODES_GIVEN], dim=1)
    expected = original_logits(weights, features, CODES_GIVEN, model.config)
    torch.testing.assert_close(model(ids, condition_states=features).logits, expected, atol=1e-5, rtol=1e-5)
    null = torch.cat([model.prepare_condition(None, batch_size=2), CODES_GIVEN], dim=1)
    expected = original_logits(weights, None, CODES_GIVEN, model.config)
    torch.testing.assert_close(model(null).logits, expected, atol=1e-5, rtol=1e-5)


def test_heads_of_the_published_sizes():
    shapes = {"tok_embeddings.weight": (16384, 768), "layers.0.attention.wqkv.weight": (3 * 768, 768)}
    shapes |= {f"layers.{i}.feed_forward.w1.weight": (2048, 768) for i in range(12)}
    shapes["cls_embedding.embedding_table.weight"] = (1001, 768)
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.self_attn\.o_proj\.weight"):
        convert_prior(weights)  # it has read the 12 heads
    with pytest.raises(ValueError, match="must have n_head"):
        convert_prior({name: value for name, value in weights.items() if ".11." not in name})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": None}, "must have n_head"),
        ({"n_head": 3}, "must have n_head"),
        ({"num_classes": 4}, "num_classes=4, but the weights in `checkpoint` are of 3"),
        ({"n_layer": 3}, "n_layer=3"),
        ({"block_size": 15}, "block_size"),
        ({"model_type": "t2i"}, "model_type=c2i"),
        ({"surprise": 1}, r"not known: \['surprise'\]"),
    ],
)
def test_arguments_that_contradict_the_weights(changes, message):
    with pytest.raises(ValueError, match=message):
        convert_prior(original(), {**ARGUMENTS, **changes})


def test_a_prior_without_a_null_class_gets_the_mean():
    weights = original()
    model, dropped = convert_prior(weights, {**ARGUMENTS, "class_dropout_prob": 0.0, "num_classes": CLASSES + 1})
    rows = model.get_input_embeddings().weight
    assert model.config.condition_vocab_size == 4 and "--config class_dropout_prob" in dropped
    torch.testing.assert_close(rows[-1], weights["cls_embedding.embedding_table.weight"].mean(dim=0))


def test_every_key_counts():
    weights = original()
    with pytest.raises(ValueError, match="unknown key layers.0.surprise"):
        convert_prior({**weights, "layers.0.surprise": torch.zeros(1)}, ARGUMENTS)
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight"):
        convert_prior({name: value for name, value in weights.items() if name != "norm.weight"}, ARGUMENTS)


def test_the_command_makes_a_prior_and_a_pipeline(tmp_path, capsys):
    weights = original()
    torch.save({"model": weights, "steps": 7}, tmp_path / "c2i.pt")
    (tmp_path / "arguments.json").write_text(json.dumps({"n_head": HEADS, "num_classes": CLASSES}))
    given = ["--checkpoint", str(tmp_path / "c2i.pt"), "--config", str(tmp_path / "arguments.json")]
    files = ["--tokenizer", str(TOKENIZER / "checkpoint.pt"), "--codec_config", str(TOKENIZER / "config.json")]
    assert main(["convert", *given, *files, "--resolution", "16", "--output", str(tmp_path / "pipeline")]) == 0
    assert "this looks like a llamagen checkpoint" in capsys.readouterr().out
    pipeline = VQAutoregressivePipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert list(pipeline.prior.config.grid_size) == [4, 4]
    images = pipeline(
        class_labels=[2, 0], guidance_scale=2.0, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images
    assert images.shape == (2, 3, 16, 16)

    assert main(["convert", *given, "--part", "prior", "--output", str(tmp_path / "prior")]) == 0
    prior = VQLlamaForCausalLM.from_pretrained(tmp_path / "prior")
    assert list(prior.config.grid_size) == [16, 16]
    assert torch.equal(prior.lm_head.weight, weights["output.weight"])
    assert main(["convert", *given, "--part", "tokenizer", "--output", str(tmp_path / "other")]) == 1
    assert "makes a prior, got 'tokenizer'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`--tokenizer` goes with a prior"):
        convert(TOKENIZER / "checkpoint.pt", tmp_path / "other", tokenizer=TOKENIZER / "checkpoint.pt")
