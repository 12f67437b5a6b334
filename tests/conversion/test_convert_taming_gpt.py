"""The GPT of the original VQGAN code against what that code computed (tests/fixtures/golden)."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_vq.conversion.convert_taming import convert_gpt_state_dict
from hf_vq.models.priors.configuration_vq_gpt import VQGPTConfig
from hf_vq.models.priors.modeling_vq_gpt import VQGPTForCausalLM


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
CONDITIONS = {
    "taming_gpt_uncond": {"condition_type": "unconditional"},
    "taming_gpt_class": {"condition_type": "class", "num_classes": 10},
    "taming_gpt_segmentation": {"condition_type": "codes", "condition_vocab_size": 32, "condition_length": 16},
}


@pytest.fixture(scope="module", params=CONDITIONS)
def golden(request):
    """The converted model, the original's tensors, the condition as hf_vq takes it, and the tolerances."""
    folder = GOLDEN / request.param
    state_dict = torch.load(folder / "checkpoint.ckpt", weights_only=True)["state_dict"]
    params = yaml.safe_load((folder / "config.yaml").read_text())["model"]["params"]["transformer_config"]["params"]
    kwargs, weights = convert_gpt_state_dict(state_dict)
    config = VQGPTConfig(**kwargs, n_head=params["n_head"], grid_size=4, **CONDITIONS[request.param])
    model = VQGPTForCausalLM(config).eval()
    model.load_state_dict(weights, strict=True)
    tensors = load_file(folder / "io.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())["tensors"]
    atol = {name: entry.get("suggested_atol") for name, entry in manifest.items()}
    condition = None if config.condition_type == "unconditional" else tensors["c_indices"]
    return model, tensors, condition, atol


def test_prefix_is_the_originals(golden):
    model, tensors, condition, _ = golden
    assert torch.equal(model.prepare_condition(condition, batch_size=2), tensors["c_indices"])


def test_logits(golden):
    model, tensors, condition, atol = golden
    inputs = model.prepare_inputs(tensors["z_indices"], condition)
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"][:, :-1]).logits
    torch.testing.assert_close(logits, tensors["all_logits"], rtol=0, atol=atol["all_logits"])
    index_logits = logits[:, model.config.condition_length - 1 :]
    torch.testing.assert_close(index_logits, tensors["logits"], rtol=0, atol=atol["logits"])


def test_loss_and_log_likelihood(golden):
    model, tensors, condition, atol = golden
    with torch.no_grad():
        loss = model(**model.prepare_inputs(tensors["z_indices"], condition)).loss
        log_likelihood = model.log_likelihood(tensors["z_indices"], condition)
    torch.testing.assert_close(loss, tensors["loss"], rtol=0, atol=atol["loss"])
    torch.testing.assert_close(-log_likelihood.mean() / 16, tensors["loss"], rtol=0, atol=atol["loss"])


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"do_sample": True, "top_k": 1}]
)
def test_greedy_samples_are_equal(golden, options):
    model, tensors, condition, _ = golden
    prompt = model.prepare_condition(condition, batch_size=2)
    options = {"do_sample": False, "disable_compile": True, **options}
    greedy = model.generate(prompt, **options)[:, prompt.shape[1] :]
    assert torch.equal(greedy, tensors["greedy"])
    prompt = torch.cat([prompt, tensors["z_indices"][:, :8]], dim=1)
    assert torch.equal(model.generate(prompt, **options)[:, -16:], tensors["greedy_half"])


def test_top_k_distribution(golden):
    model, tensors, condition, atol = golden
    with torch.no_grad():
        inputs = model.prepare_inputs(tensors["z_indices"], condition)["input_ids"]
        logits = model(input_ids=inputs[:, :-1]).logits[:, -1] / 0.7
    kept = torch.full_like(logits, float("-inf")).scatter(1, logits.topk(5).indices, logits.topk(5).values)
    torch.testing.assert_close(kept.softmax(-1), tensors["topk_probs"], rtol=0, atol=atol["topk_probs"])


def test_bidirectional_prefix_is_read_from_the_mask():
    state_dict = torch.load(GOLDEN / "taming_gpt_segmentation" / "checkpoint.ckpt", weights_only=True)["state_dict"]
    for i in range(2):
        state_dict[f"transformer.blocks.{i}.attn.mask"][..., :5, :5] = 1
    assert convert_gpt_state_dict(state_dict)[0]["n_unmasked"] == 5
    state_dict["transformer.blocks.1.attn.mask"][..., 2, 3] = 0
    with pytest.raises(ValueError, match="blocks.1.attn.mask that is not causal after the first 5"):
        convert_gpt_state_dict(state_dict)
    del state_dict["transformer.blocks.1.attn.mask"]
    with pytest.raises(ValueError, match="lacks the key transformer.blocks.1.attn.mask"):
        convert_gpt_state_dict(state_dict)


def test_head_keeps_what_is_beyond_the_codebook(golden):
    model, tensors, condition, atol = golden
    state_dict = torch.load(GOLDEN / "taming_gpt_class" / "checkpoint.ckpt", weights_only=True)["state_dict"]
    kwargs, weights = convert_gpt_state_dict(state_dict, codebook_size=20)
    assert kwargs["codebook_size"] == 20 and kwargs["input_vocab_size"] == kwargs["vocab_size"] == 40
    VQGPTForCausalLM(
        VQGPTConfig(**kwargs, n_head=4, grid_size=4, condition_type="class", num_classes=10)
    ).load_state_dict(weights)


def test_every_key_counts():
    state_dict = torch.load(GOLDEN / "taming_gpt_uncond" / "checkpoint.ckpt", weights_only=True)["state_dict"]
    with pytest.raises(ValueError, match="no original GPT has"):
        convert_gpt_state_dict({**state_dict, "transformer.blocks.0.extra": torch.zeros(1)})
    del state_dict["transformer.blocks.1.mlp.2.bias"]
    with pytest.raises(ValueError, match="blocks.1.mlp.2.bias"):
        convert_gpt_state_dict(state_dict)
    with pytest.raises(ValueError, match="codebook_size"):
        convert_gpt_state_dict({**state_dict, "transformer.blocks.1.mlp.2.bias": torch.zeros(32)}, codebook_size=33)
