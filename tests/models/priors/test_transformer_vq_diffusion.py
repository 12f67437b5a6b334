"""The denoiser of VQ-Diffusion in its variants; `tests/conversion` compares it with the original programs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from transformers import set_seed

from hf_vq import VQDiffusionTransformer2DModel
from hf_vq.models.priors.vq_diffusion_blocks import AdaptiveLayerNorm, CodeEmbedding, VQDiffusionTransformerBlock
from tests.models.model_testing import all_tensors, assert_equal_tensors, cast_inputs


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
    "class": {"condition_type": "class", "num_classes": 5, "null_class": True, "mlp_type": "conv"},
    "class_fc": {"condition_type": "class", "num_classes": 5},
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
    if variant.startswith("class"):
        inputs["class_labels"] = torch.tensor([1, 4, 0])
    if variant == "text":
        inputs["encoder_hidden_states"] = torch.randn(BATCH, 7, 6, generator=generator)
    return inputs


def training_step(model, variant: str) -> tuple[torch.Tensor, dict]:
    """The logits and the gradient of each parameter; the last text is the null one where it is learned."""
    inputs = make_inputs(variant)
    if model.null_embedding is not None:
        given, is_null = inputs["encoder_hidden_states"], torch.tensor([False, False, True])
        inputs["encoder_hidden_states"] = torch.where(is_null[:, None, None], model.null_embedding, given)
    model.train()
    model.zero_grad()
    logits = model(**inputs).sample
    F.cross_entropy(logits.flatten(0, 2), inputs["indices"].flatten() % CODES).backward()
    return logits, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(params=list(VARIANTS))
def variant(request):
    return request.param


# ------------------------------------------------------------------------------------------- as every model


def test_logits_are_contiguous_with_the_codes_last(variant):
    logits = make(variant)(**make_inputs(variant)).sample
    assert logits.shape == (BATCH, 3, 4, CODES) and logits.is_contiguous() and torch.isfinite(logits).all()
    (again,) = make(variant)(**make_inputs(variant), return_dict=False)
    assert torch.equal(again, logits)


def test_saved_and_loaded_model_is_equal_to_the_bit(variant, tmp_path):
    model = make(variant)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = VQDiffusionTransformer2DModel.from_pretrained(tmp_path)
    assert_equal_tensors(all_tensors(loaded), all_tensors(model))
    assert torch.equal(loaded(**make_inputs(variant)).sample, model(**make_inputs(variant)).sample)
    assert loaded.sample_size == model.sample_size and loaded.null_class_id == model.null_class_id


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.3), (torch.float16, 0.04)])
def test_half_precision_load(variant, dtype, tolerance, tmp_path):
    model = make(variant)
    model.save_pretrained(tmp_path)
    loaded = VQDiffusionTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    expected = {name: value.to(dtype) for name, value in all_tensors(model).items()}
    assert_equal_tensors(all_tensors(loaded), expected)
    logits = loaded(**cast_inputs(make_inputs(variant), dtype)).sample
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), model(**make_inputs(variant)).sample, atol=tolerance, rtol=0)


def test_gradients_reach_every_parameter(variant):
    _, gradients = training_step(make(variant), variant)
    for name, gradient in gradients.items():
        assert gradient is not None and torch.isfinite(gradient).all() and gradient.any(), name


def test_gradient_checkpointing_changes_nothing(variant):
    plain, checkpointed = make(variant, dropout=0.3), make(variant, dropout=0.3)
    checkpointed.enable_gradient_checkpointing()
    calls = []
    for block in checkpointed.transformer_blocks:
        block.norm1.register_forward_hook(lambda *arguments: calls.append(1))
    results = []
    for model in (plain, checkpointed):
        set_seed(2)
        results.append(training_step(model, variant))
    assert len(calls) == 2 * SMALL["num_layers"]
    assert torch.equal(results[0][0], results[1][0])
    assert_equal_tensors(results[1][1], results[0][1])


def test_model_is_built_on_the_meta_device(variant):
    with torch.device("meta"):
        empty = make(variant)
    assert all(tensor.is_meta for tensor in all_tensors(empty).values())
    empty.load_state_dict(make(variant).state_dict(), assign=True)
    assert torch.equal(empty(**make_inputs(variant)).sample, make(variant)(**make_inputs(variant)).sample)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiles_to_one_graph(variant, mode):
    model, other = make(variant), make(variant)
    torch._dynamo.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(variant)
    if variant == "text":
        inputs["encoder_attention_mask"] = torch.arange(7) < torch.tensor([[7], [1], [4]])
    with torch.set_grad_enabled(mode == "train"):
        expected, actual = model(**inputs).sample, compiled(**inputs).sample
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    if mode == "train":
        for logits in (expected, actual):
            logits.square().sum().backward()
        for name, parameter in other.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad, atol=1e-5, rtol=1e-4)


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


def test_a_block_is_the_formula_written_out():
    """Against plain matrix products: pre-norms, heads side by side, x σ(1.702 x)."""
    set_seed(0)
    block = VQDiffusionTransformerBlock(8, 2, 4, STEPS, 5, 6, "conv", 3, 0.0).eval()
    x, text = torch.randn(2, 12, 8), torch.randn(2, 7, 6)
    timestep, labels = torch.tensor([3, 9]), torch.tensor([4, 1])

    def norm(module, x, ids):
        scale, shift = (F.silu(module.emb.weight[ids]) @ module.linear.weight.T + module.linear.bias).split(8, dim=1)
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return normed * (1 + scale[:, None]) + shift[:, None]

    def attend(module, x, source):
        found = []
        for head in (slice(0, 4), slice(4, 8)):
            q = x @ module.to_q.weight[head].T + module.to_q.bias[head]
            k = source @ module.to_k.weight[head].T + module.to_k.bias[head]
            v = source @ module.to_v.weight[head].T + module.to_v.bias[head]
            found.append((q @ k.mT / 2).softmax(-1) @ v)
        return torch.cat(found, -1) @ module.to_out[0].weight.T + module.to_out[0].bias

    with torch.no_grad():
        expected = x + (lambda h: attend(block.attn1, h, h))(norm(block.norm1, x, timestep))
        expected = expected + attend(block.attn2, norm(block.norm2, expected, timestep), text)
        grid = norm(block.norm3, expected, labels).reshape(2, 3, 4, 8).permute(0, 3, 1, 2)
        hidden = F.conv2d(grid, block.ff.conv_in.weight, block.ff.conv_in.bias, padding=1)
        hidden = hidden / (1 + (-1.702 * hidden).exp())
        hidden = F.conv2d(hidden, block.ff.conv_out.weight, block.ff.conv_out.bias, padding=1)
        expected = expected + hidden.permute(0, 2, 3, 1).reshape(2, 12, 8)
        actual = block(x, timestep, (3, 4), text, None, labels)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


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
    assert make("class").null_class_id == 4
    assert make("class", null_class=False).null_class_id is None
    assert make("text").null_embedding.shape == (7, 6)
    for name in ("unconditional", "class"):
        assert make(name).null_embedding is None
    assert make("text", learnable_null_embedding=False).null_embedding is None


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("unconditional", {"indices": torch.full((3, 3, 4), CODES + 1)}, "`indices` must lie in 0 … 11, got .* to 12"),
        ("unconditional", {"indices": torch.full((3, 3, 4), -1)}, "`indices` must lie in 0 … 11, got values from -1"),
        ("unconditional", {"indices": torch.zeros(3, 12, dtype=torch.int64)}, r"`indices` must be int64 .*\(3, 12\)"),
        ("unconditional", {"indices": torch.zeros(3, 4, 3, dtype=torch.int64)}, r"`indices` must be .*\(3, 4, 3\)"),
        ("unconditional", {"indices": torch.zeros(3, 3, 4)}, "`indices` must be int64 .* got torch.float32"),
        ("unconditional", {"timestep": STEPS}, "`timestep` must lie in 0 … 9, got values from 10"),
        ("unconditional", {"timestep": torch.tensor([0, 1, -1])}, "`timestep` must lie in 0 … 9, got values from -1"),
        ("unconditional", {"timestep": torch.tensor([0, 1])}, r"`timestep` must be .*\(3,\), got .*\(2,\)"),
        ("unconditional", {"timestep": 0.5}, "`timestep` must be an integer .* got torch.float32"),
        ("unconditional", {"indices": None}, "`indices` must be a tensor, got a NoneType"),
        ("unconditional", {"class_labels": torch.zeros(3).long()}, "`class_labels` must be None.*'unconditional'"),
        ("unconditional", {"encoder_hidden_states": torch.zeros(3, 7, 6)}, "`encoder_hidden_states` must be None"),
        ("unconditional", {"encoder_attention_mask": torch.ones(3, 7).bool()}, "needs `encoder_hidden_states`"),
        ("class", {"class_labels": None}, "`class_labels` are needed: this model's condition is 'class'"),
        ("class", {"class_labels": [0, 1, 4]}, "`class_labels` must be a tensor, got a list"),
        ("class", {"class_labels": torch.tensor([0, 1, 5])}, "`class_labels` must lie in 0 … 4, got .* to 5"),
        (
            "class",
            {"class_labels": torch.tensor([0, 1])},
            r"`class_labels` must be int64 of shape \(3,\), got .* \(2,\)",
        ),
        ("class", {"class_labels": torch.zeros(3)}, "`class_labels` must be int64 of shape .* got torch.float32"),
        ("text", {"encoder_hidden_states": None}, "`encoder_hidden_states` are needed"),
        ("text", {"encoder_hidden_states": torch.zeros(3, 7, 5)}, r"have shape \(3, S, 6\), got .* \(3, 7, 5\)"),
        ("text", {"encoder_hidden_states": torch.zeros(2, 7, 6)}, r"have shape \(3, S, 6\), got .* \(2, 7, 6\)"),
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
        ("unconditional", {"position_embedding_size": 3}, r"must hold the \(3, 4\) positions .* got \(3, 3\)"),
        ("unconditional", {"sample_size": (3,)}, r"`sample_size` must be a positive int, or two .* got \(3,\)"),
        ("unconditional", {"sample_size": 0}, "`sample_size` must be a positive int, or two .* got 0"),
        ("unconditional", {"position_embedding_size": 8.0}, "`position_embedding_size` must be .* got 8.0"),
        ("unconditional", {"num_attention_heads": 0}, "`num_attention_heads` must be a positive int, got 0"),
        ("unconditional", {"num_layers": 2.0}, "`num_layers` must be a positive int, got 2.0"),
        ("class", {"num_classes": -1}, "`num_classes` must be a positive int, got -1"),
        ("unconditional", {"num_classes": 3}, "`num_classes` must be given if and only if"),
        ("class", {"num_classes": None}, "`num_classes` must be given if and only if"),
        ("text", {"cross_attention_dim": None}, "`cross_attention_dim` must be given if and only if"),
        ("text", {"null_class": True}, "`null_class` needs `condition_type` 'class', got 'text'"),
        ("class", {"learnable_null_embedding": True}, "`learnable_null_embedding` needs `condition_type` 'text'"),
    ],
)
def test_configurations_that_are_refused(variant, changes, message):
    with pytest.raises(ValueError, match=message):
        make(variant, **changes)


def test_arguments_are_not_changed(variant):
    inputs = make_inputs(variant)
    before = copy.deepcopy(inputs)
    make(variant)(**inputs)
    assert_equal_tensors(inputs, before)


def test_adaptive_norm_without_scale_and_shift_is_a_norm():
    norm = AdaptiveLayerNorm(3, 8)
    torch.nn.init.zeros_(norm.linear.weight)
    torch.nn.init.zeros_(norm.linear.bias)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(norm(x, torch.tensor([0, 2])), F.layer_norm(x, (8,)))
