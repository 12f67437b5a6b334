"""The denoiser of VQ-Diffusion in its variants; `tests/conversion` compares it with the original programs."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from peft import LoraConfig
from transformers import set_seed

from hf_vq import VQDiffusionTransformer2DModel
from hf_vq.models.priors.transformer_vq_diffusion import (
    AdaptiveNorm,
    CodeEmbedding,
    SinusoidalEmbedding,
    VQDiffusionTransformerBlock,
    VQDiffusionTransformerOutput,
)
from tests.models.model_testing import ModelCase, ModelTests, all_tensors, assert_equal_tensors, cast_inputs


CODES, STEPS, BATCH = 11, 10, 3
SMALL = {
    "num_embeddings": CODES,
    "sample_size": (3, 4),
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_train_timesteps": STEPS,
}
VARIANTS = {
    "unconditional": {"mlp_type": "conv", "position_embedding_size": 8},
    "class": {"condition_type": "class", "num_classes": 4, "null_class": True, "mlp_type": "conv"},
    "class_fc": {"condition_type": "class", "num_classes": 5, "class_norm": "instance", "activation": "gelu"},
    "sinusoidal": {
        "condition_type": "class",
        "num_classes": 4,
        "null_class": True,
        "timestep_embedding": "sinusoidal",
        "class_embedding": "sinusoidal",
        "mlp_ratio": 2.5,
        "mlp_type": "conv",
    },
    "text": {
        "condition_type": "text",
        "cross_attention_dim": 6,
        "learnable_null_embedding": True,
        "text_length": 7,
    },
}


def make(variant: str, **changes) -> VQDiffusionTransformer2DModel:
    """With larger weights than at the start of training, so that every input matters."""
    model = make_new(variant, **changes)
    for parameter in model.parameters():
        parameter.data.mul_(10)
    return model


def make_new(variant: str, **changes) -> VQDiffusionTransformer2DModel:
    set_seed(0)
    return VQDiffusionTransformer2DModel(**{**SMALL, **VARIANTS[variant], **changes}).eval()


def make_inputs(variant: str) -> dict:
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "indices": torch.randint(CODES + 1, (BATCH, 3, 4), generator=generator),
        "timestep": torch.tensor([0, 4, STEPS - 1]),
    }
    if "condition_type" in VARIANTS[variant] and variant != "text":
        inputs["class_labels"] = torch.tensor([1, 4, 0])
    if variant == "text":
        inputs["encoder_hidden_states"] = torch.randn(BATCH, 7, 6, generator=generator)
    return inputs


class DenoiserWithLoss(VQDiffusionTransformer2DModel):
    """As a training script calls it; the last text is the null one where it is learned."""

    def forward(self, **inputs):
        if self.null_embedding is not None:
            given = inputs["encoder_hidden_states"]
            is_null = torch.tensor([False, False, True])[:, None, None]
            inputs["encoder_hidden_states"] = torch.where(is_null, self.null_embedding.to(given.dtype), given)
        logits = super().forward(**inputs).sample
        loss = F.cross_entropy(logits.flatten(0, 2), inputs["indices"].flatten() % CODES)
        return LossOutput(sample=logits, loss=loss)


@dataclass
class LossOutput(VQDiffusionTransformerOutput):
    loss: torch.Tensor = None


@dataclass
class DenoiserCase(ModelCase):
    def make(self):
        model = super().make()
        for parameter in model.parameters():
            parameter.data.mul_(10)
        return model


@pytest.fixture(params=list(VARIANTS))
def variant(request):
    return request.param


# ------------------------------------------------------------------------------------------- as every model


def test_logits_are_contiguous_with_the_codes_last(variant):
    logits = make(variant)(**make_inputs(variant)).sample
    assert logits.shape == (BATCH, 3, 4, CODES) and logits.is_contiguous() and torch.isfinite(logits).all()
    (again,) = make(variant)(**make_inputs(variant), return_dict=False)
    assert torch.equal(again, logits)


class TestDenoiser(ModelTests):
    @pytest.fixture
    def case(self, variant):
        return DenoiserCase(
            DenoiserWithLoss,
            {**SMALL, **VARIANTS[variant], "dropout": 0.3, "attention_dropout": 0.2},
            lambda: make_inputs(variant),
            checkpointed=(VQDiffusionTransformerBlock,),
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.3), (torch.float16, 0.04)])
def test_half_precision_is_close(variant, dtype, tolerance):
    expected = make(variant)(**make_inputs(variant)).sample
    logits = make(variant).to(dtype)(**cast_inputs(make_inputs(variant), dtype)).sample
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, atol=tolerance, rtol=0)


@pytest.mark.slow
def test_a_masked_text_compiles_to_one_graph():
    inputs = {**make_inputs("text"), "encoder_attention_mask": torch.arange(7) < torch.tensor([[7], [1], [4]])}
    torch._dynamo.reset()
    compiled = torch.compile(make("text"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).sample, make("text")(**inputs).sample, atol=1e-5, rtol=1e-5)


def test_lora_attaches_to_attention_and_feed_forward(variant, tmp_path):
    """By diffusers' own interface: an adapter that is off, then trained, saved and loaded again."""
    model, inputs = make(variant), make_inputs(variant)
    before = model(**inputs).sample
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    torch.testing.assert_close(model(**inputs).sample, before, atol=0, rtol=0)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora" in name)
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    after = model(**inputs).sample
    assert not torch.allclose(after, before, atol=1e-2)
    model.save_lora_adapter(tmp_path)
    other = make(variant)
    other.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(other(**inputs).sample, after, atol=1e-6, rtol=1e-5)
    model.disable_adapters()
    torch.testing.assert_close(model(**inputs).sample, before, atol=0, rtol=0)


# ------------------------------------------------------------------------------------------- what it computes


def test_each_example_has_its_own_timestep_and_condition(variant):
    model, inputs = make(variant), make_inputs(variant)
    with torch.no_grad():
        together = model(**inputs).sample
        for i in range(BATCH):
            alone = {name: value[i : i + 1] for name, value in inputs.items()}
            torch.testing.assert_close(model(**alone).sample[0], together[i], atol=2e-5, rtol=0)
            alone["timestep"] = int(inputs["timestep"][i])
            torch.testing.assert_close(model(**alone).sample[0], together[i], atol=2e-5, rtol=0)
        for name in inputs.keys() - {"indices"}:
            changed = {**inputs, name: inputs[name].roll(1, 0)}
            assert not torch.allclose(model(**changed).sample, together, atol=1e-3), name


def sinusoid(places, dim):
    """The original's: sin and cos of 4000 times the place, at frequencies 10000^(-i / (dim/2 - 1))."""
    rows = []
    for place in places:
        angles = [4000 * place * 10000 ** (-i / (dim // 2 - 1)) for i in range(dim // 2)]
        rows.append([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
    return torch.tensor(rows)


def reference_norm(module, x, embedded, over):
    """Scale and shift after a norm over the channels (-1) or over the positions (1)."""
    sigmoid = 1 / (1 + (-embedded).exp())
    scale, shift = ((embedded * sigmoid) @ module.linear.weight.T + module.linear.bias).split(8, dim=1)
    centred = x - x.mean(over, keepdim=True)
    normed = centred / (centred.square().mean(over, keepdim=True) + 1e-5).sqrt()
    return normed * (1 + scale[:, None]) + shift[:, None]


def reference_attention(module, x, source):
    found = []
    for head in (slice(0, 4), slice(4, 8)):
        q = x @ module.to_q.weight[head].T + module.to_q.bias[head]
        k = source @ module.to_k.weight[head].T + module.to_k.bias[head]
        v = source @ module.to_v.weight[head].T + module.to_v.bias[head]
        found.append((q @ k.mT / 2).softmax(-1) @ v)
    return torch.cat(found, -1) @ module.to_out[0].weight.T + module.to_out[0].bias


def reference_mlp(ff, x, activation):
    def act(h):
        return h * (1 + torch.erf(h / 2**0.5)) / 2 if activation == "gelu" else h / (1 + (-1.702 * h).exp())

    if hasattr(ff, "conv_in"):
        grid = x.reshape(-1, 3, 4, 8).permute(0, 3, 1, 2)
        hidden = act(F.conv2d(grid, ff.conv_in.weight, ff.conv_in.bias, padding=1))
        hidden = F.conv2d(hidden, ff.conv_out.weight, ff.conv_out.bias, padding=1)
        return hidden.permute(0, 2, 3, 1).reshape(-1, 12, 8)
    hidden = act(x @ ff.net[0].proj.weight.T + ff.net[0].proj.bias)
    return hidden @ ff.net[2].weight.T + ff.net[2].bias


@torch.no_grad()
def test_a_block_is_the_formula_written_out(variant):
    """Against plain matrix products: pre-norms, heads side by side, the activation by its definition."""
    model, inputs = make(variant, num_layers=1), make_inputs(variant)
    block, config, timestep = model.transformer_blocks[0], model.config, inputs["timestep"]
    x, labels = torch.randn(BATCH, 12, 8), inputs.get("class_labels")

    def time(norm):
        if config.timestep_embedding == "sinusoidal":
            return sinusoid((timestep / STEPS).tolist(), 8)
        return norm.emb.weight[timestep]

    expected = x + (lambda h: reference_attention(block.attn1, h, h))(
        reference_norm(block.norm1, x, time(block.norm1), -1)
    )
    text = inputs.get("encoder_hidden_states")
    if text is not None:
        normed = reference_norm(block.norm2, expected, time(block.norm2), -1)
        expected = expected + reference_attention(block.attn2, normed, text)
    if labels is None:
        normed = F.layer_norm(expected, (8,), block.norm3.weight, block.norm3.bias)
    else:
        sinusoidal = config.class_embedding == "sinusoidal"
        classes = sinusoid((labels / 4).tolist(), 8) if sinusoidal else block.norm3.emb.weight[labels]
        normed = reference_norm(block.norm3, expected, classes, 1 if config.class_norm == "instance" else -1)
    expected = expected + reference_mlp(block.ff, normed, config.activation)
    actual = block(x, timestep, (3, 4), text, None, labels)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_a_null_class_among_sinusoids_lies_where_it_is_told():
    embedding = SinusoidalEmbedding(4, 8, null_position=10)
    torch.testing.assert_close(embedding(torch.tensor([2, 4])), sinusoid([0.5, 2.5], 8), atol=2e-3, rtol=0)
    model = make("sinusoidal", null_class_position=1000)
    assert model.transformer_blocks[0].norm3.emb.null_position == 1000 and model.null_class_id == 4


def test_dropout_of_attention_is_active_in_training_only():
    model, inputs = make("class", attention_dropout=0.5), make_inputs("class")
    torch.testing.assert_close(model(**inputs).sample, make("class")(**inputs).sample)
    model.train()
    assert not torch.allclose(model(**inputs).sample, make("class")(**inputs).sample, atol=1e-3)


@pytest.mark.parametrize(("position_size", "rows"), [((3, 4), 4), ((8, 8), 8)])
def test_positions_are_read_by_flat_index(position_size, rows):
    """A grid as large as the table has its own rows and columns; a smaller one takes the table's first entries."""
    set_seed(0)
    embedding = CodeEmbedding(CODES + 1, position_size, 8)
    embedded = embedding(torch.full((1, 12), CODES))[0]
    for i in range(12):
        place = embedding.height_emb.weight[i // rows] + embedding.width_emb.weight[i % rows]
        torch.testing.assert_close(embedded[i], embedding.emb.weight[CODES] + place)


def test_a_masked_text_is_a_shorter_text():
    model, inputs = make("text"), make_inputs("text")
    text = inputs.pop("encoder_hidden_states")
    mask = torch.arange(7).expand(BATCH, 7) < 4
    masked = model(**inputs, encoder_hidden_states=text, encoder_attention_mask=mask).sample
    short = model(**inputs, encoder_hidden_states=text[:, :4]).sample
    torch.testing.assert_close(masked, short, atol=2e-5, rtol=0)
    assert not torch.allclose(masked, model(**inputs, encoder_hidden_states=text).sample, atol=1e-4)


def test_attention_back_ends_and_fused_projections(variant):
    model, inputs = make(variant), make_inputs(variant)
    expected = model(**inputs).sample
    with attention_backend("native"):  # what was active is so again afterwards
        model.set_attention_backend("_native_math")
    for block in model.transformer_blocks:
        assert block.attn1.processor._attention_backend == AttentionBackendName._NATIVE_MATH
    torch.testing.assert_close(model(**inputs).sample, expected, atol=2e-5, rtol=0)
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(**inputs).sample, expected, atol=2e-5, rtol=0)
    model.unfuse_qkv_projections()
    assert_equal_tensors(all_tensors(model), all_tensors(make(variant)))


def test_initial_weights():
    model = make_new("text", num_attention_heads=16, attention_head_dim=8, cross_attention_dim=64, text_length=50)
    for name, value in all_tensors(model).items():
        if name.endswith(("norm_out.weight", "norm3.weight")):
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert not value.any(), name
        elif name == "null_embedding":
            assert value.norm(dim=1).mean().item() == pytest.approx(1, abs=0.1)
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.1), name


def test_null_conditions():
    assert make("class").null_class_id == 4 and make("class").config.num_classes == 4
    assert make("class", null_class=False).null_class_id is None
    assert make("text").null_embedding.shape == (7, 6)
    for name in ("unconditional", "class"):
        assert make(name).null_embedding is None
    assert make("text", learnable_null_embedding=False).null_embedding is None


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("unconditional", {"indices": torch.zeros(3, 12).long()}, r"`indices` must be int64 of shape \(any, 3, 4\)"),
        ("unconditional", {"indices": torch.zeros(3, 4, 3).long()}, r"`indices` must be .*\(3, 4, 3\)"),
        ("unconditional", {"indices": torch.zeros(3, 3, 4)}, "`indices` must be int64 .* got torch.float32"),
        ("unconditional", {"indices": None}, "`indices` must be a tensor, got a NoneType"),
        ("unconditional", {"timestep": torch.tensor([0, 1])}, r"`timestep` must be .*\(3\), got .*\(2,\)"),
        ("unconditional", {"timestep": torch.tensor(0.5)}, "`timestep` must be an int .* got torch.float32"),
        ("unconditional", {"timestep": 0.5}, "`timestep` must be an int, got 0.5"),
        ("unconditional", {"class_labels": torch.zeros(3).long()}, "`class_labels` must be None.*'unconditional'"),
        ("unconditional", {"encoder_hidden_states": torch.zeros(3, 7, 6)}, "`encoder_hidden_states` must be None"),
        ("unconditional", {"encoder_attention_mask": torch.ones(3, 7).bool()}, "needs `encoder_hidden_states`"),
        ("class", {"class_labels": None}, "`class_labels` are needed: this model's condition is 'class'"),
        ("class", {"class_labels": [0, 1, 4]}, "`class_labels` must be a tensor, got a list"),
        (
            "class",
            {"class_labels": torch.tensor([0, 1])},
            r"`class_labels` must be int64 of shape \(3\), got .*\(2,\)",
        ),
        ("class", {"class_labels": torch.zeros(3)}, "`class_labels` must be int64 of shape .* got torch.float32"),
        ("text", {"encoder_hidden_states": None}, "`encoder_hidden_states` are needed"),
        ("text", {"encoder_hidden_states": torch.zeros(3, 7, 5)}, r"of shape \(3, any, 6\), got .* \(3, 7, 5\)"),
        ("text", {"encoder_hidden_states": torch.zeros(2, 7, 6)}, r"of shape \(3, any, 6\), got .* \(2, 7, 6\)"),
        ("text", {"encoder_hidden_states": torch.zeros(3, 7, 6).long()}, "must be floating .* got torch.int64"),
        ("text", {"encoder_attention_mask": torch.ones(3, 7)}, "must be bool .* got torch.float32"),
        ("text", {"encoder_attention_mask": torch.ones(3, 6).bool()}, r"shape \(3, 7\), got .*\(3, 6\)"),
    ],
)
def test_inputs_that_are_refused(variant, changes, message):
    with pytest.raises(ValueError, match=message):
        make(variant)(**{**make_inputs(variant), **changes})


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("unconditional", {"condition_type": "codes"}, "`condition_type` must be one of .* got 'codes'"),
        ("unconditional", {"mlp_type": "swiglu"}, "`mlp_type` must be one of .* got 'swiglu'"),
        ("unconditional", {"activation": "relu"}, "`activation` must be one of .* got 'relu'"),
        ("class", {"class_norm": "batch"}, "`class_norm` must be one of .* got 'batch'"),
        ("unconditional", {"position_embedding_size": 3}, r"must hold the 12 positions .* got \(3, 3\)"),
        ("unconditional", {"sample_size": (3,)}, r"`sample_size` must be an int or two .* got \(3,\)"),
        ("unconditional", {"sample_size": 0}, "`sample_size` must be an int of at least 1, got 0"),
        ("unconditional", {"position_embedding_size": 8.0}, "`position_embedding_size` must be an int .* got 8.0"),
        ("unconditional", {"num_attention_heads": 0}, "`num_attention_heads` must be an int of at least 1, got 0"),
        ("unconditional", {"num_layers": 2.0}, "`num_layers` must be an int of at least 1, got 2.0"),
        ("unconditional", {"mlp_ratio": float("nan")}, "`mlp_ratio` must be a finite number above 0, got nan"),
        ("unconditional", {"dropout": 1.0}, r"`dropout` must be a number in \[0, 1\), got 1.0"),
        ("class", {"num_classes": -1}, "`num_classes` must be an int of at least 1, got -1"),
        ("unconditional", {"num_classes": 3}, "`num_classes` must be given if and only if"),
        ("class", {"num_classes": None}, "`num_classes` must be given if and only if"),
        ("text", {"cross_attention_dim": None}, "`cross_attention_dim` must be given if and only if"),
        ("text", {"null_class": True}, "`null_class` needs `condition_type` 'class', got 'text'"),
        ("class", {"learnable_null_embedding": True}, "`learnable_null_embedding` needs `condition_type` 'text'"),
        ("class", {"null_class_position": 9.0}, "`null_class_position` needs `null_class` and `class_embedding` 'sin"),
        ("sinusoidal", {"attention_head_dim": 1}, "must be even and at least 4 for sinusoidal embeddings, got 2"),
    ],
)
def test_configurations_that_are_refused(variant, changes, message):
    with pytest.raises(ValueError, match=message):
        make(variant, **changes)


def test_numbers_of_numpy_and_torch(tmp_path):
    """In the configuration, which becomes a file, and as a timestep."""
    numbers = {"num_layers": np.int64(2), "sample_size": [np.int32(3), torch.tensor(4)], "dropout": np.float32(0.25)}
    model, inputs = make_new("class", **numbers), make_inputs("class")
    model.save_pretrained(tmp_path)
    assert VQDiffusionTransformer2DModel.from_pretrained(tmp_path).config.dropout == 0.25
    expected = model(**{**inputs, "timestep": 4}).sample
    for timestep in (np.int64(4), torch.tensor(4), torch.tensor([4]), torch.tensor(4, dtype=torch.int32)):
        assert torch.equal(model(**{**inputs, "timestep": timestep}).sample, expected)


def test_arguments_are_not_changed(variant):
    inputs = make_inputs(variant)
    before = copy.deepcopy(inputs)
    make(variant)(**inputs)
    assert_equal_tensors(inputs, before)


def test_adaptive_norm_without_scale_and_shift_is_a_norm():
    norm = AdaptiveNorm(torch.nn.Embedding(3, 8), 8)
    torch.nn.init.zeros_(norm.linear.weight)
    torch.nn.init.zeros_(norm.linear.bias)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(norm(x, torch.tensor([0, 2])), F.layer_norm(x, (8,)))
