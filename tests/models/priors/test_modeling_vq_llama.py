"""VQLlama: against a plain implementation of the original's network, and generate() against a loop without a cache."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, set_seed
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_vq.hub import save_with_code
from hf_vq.models.priors.configuration_vq_llama import VQLlamaConfig
from hf_vq.models.priors.modeling_vq_llama import VQLlamaForCausalLM
from tests.models.model_testing import ModelCase, ModelTests
from tests.models.priors.code_prior_testing import check_lora, check_scores_of_generation, draw, make_indices


TINY = {
    "codebook_size": 11,
    "grid_size": (3, 4),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "embd_pdrop": 0.0,
}
KINDS = {
    "unconditional": {},
    "class": {"condition_type": "class", "num_classes": 3},
    "text": {"condition_type": "text", "condition_length": 5, "text_embed_dim": 6},
    "grouped": {"condition_type": "class", "num_classes": 3, "num_key_value_heads": 1, "order": "z-curve"},
}


def make(kind, seed=5, **overrides):
    """A tiny model far from uniform."""
    model = VQLlamaForCausalLM(VQLlamaConfig(**{**TINY, **KINDS[kind], **overrides})).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.5, generator=generator)
        else:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model


def make_condition(model, batch_size=2):
    config = model.config
    if config.condition_type == "unconditional":
        return None
    if config.condition_type == "class":
        return draw(config.condition_vocab_size, batch_size, seed=1)
    size = (batch_size, config.condition_length, config.text_embed_dim)
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def given(model, condition):
    """What `generate` and `forward` get besides ids."""
    return {"condition_states": condition} if model.config.condition_type == "text" else {}


@pytest.fixture(params=[*KINDS, "noisy"])
def case(request):
    noisy = {"embd_pdrop": 0.1, "attention_dropout": 0.1, "pkeep": 0.8, "condition_dropout": 0.5}
    kind = "text" if request.param == "noisy" else request.param
    config = VQLlamaConfig(**{**TINY, **KINDS[kind], **(noisy if request.param == "noisy" else {})})

    def inputs():
        model = VQLlamaForCausalLM(config)
        return model.prepare_inputs(make_indices(model), make_condition(model))

    return ModelCase(VQLlamaForCausalLM, config, inputs, checkpointed=(LlamaDecoderLayer,))


class TestVQLlama(ModelTests):
    @torch.no_grad()
    def test_scores_of_generation_are_as_wide_as_the_vocabulary(self, case):
        check_scores_of_generation(case.make(), case.inputs())

    def test_lora_attaches_trains_and_samples(self, case):
        model = case.make()
        if model.config.pkeep == 1:
            check_lora(model, case.inputs(), ["q_proj", "v_proj", "down_proj"])


# ---------------------------------------------------------------------------------------------------- the network


def interleaved(weight, heads):
    """From channels paired half a head apart to the original's neighbouring pairs."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def original_rotary(x, angles):
    """`x` `(B, T, heads, d)` in neighbouring pairs, as complex numbers turned by `angles` `(T, d / 2)`; nan means
    times 0.
    """
    turn = torch.polar(torch.ones_like(angles), angles.nan_to_num())
    turn[angles.isnan()] = 0
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2)


def original_angles(config):
    """A table over the sequence: nothing for the condition, then the turns of each code's row and column."""
    quarter = config.hidden_size // config.num_attention_heads // 4
    table = torch.full(
        (config.condition_length + config.image_seq_length, 2 * quarter), float("nan"), dtype=torch.float64
    )
    for number, place in enumerate(config.code_order):
        row, column = divmod(place, config.grid_size[1])
        for pair in range(quarter):
            frequency = config.rope_base ** (-2 * pair / (2 * quarter))
            table[config.condition_length + number, pair] = row * frequency
            table[config.condition_length + number, quarter + pair] = column * frequency
    return table


def original_logits(model, input_ids, condition_states=None):
    """The network as LlamaGen writes it: joined projections in neighbouring pairs, a table of angles, plain
    attention.
    """
    config, state = model.config, {k: v.double() for k, v in model.state_dict().items()}
    heads, groups, length = config.num_attention_heads, config.num_key_value_heads, input_ids.shape[1]
    h = state["model.embed_tokens.weight"][input_ids]
    if config.condition_type == "text":
        null = (input_ids[:, :5] == config.codebook_size + 1)[..., None]
        features = torch.where(null, state["text_projection.null"], condition_states.double())
        hidden = F.gelu(features @ state["text_projection.fc1.weight"].T, approximate="tanh")
        h[:, :5] = hidden @ state["text_projection.fc2.weight"].T
    angles = original_angles(config)[:length]
    mask = torch.ones(length, length, dtype=torch.bool).tril()

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * weight

    for i in range(config.num_hidden_layers):
        layer = {
            k.removeprefix(f"model.layers.{i}."): v for k, v in state.items() if k.startswith(f"model.layers.{i}.")
        }
        x = norm(h, layer["input_layernorm.weight"])
        q = x @ interleaved(layer["self_attn.q_proj.weight"], heads).T
        k = x @ interleaved(layer["self_attn.k_proj.weight"], groups).T
        v = x @ layer["self_attn.v_proj.weight"].T
        q, k, v = (y.unflatten(-1, (n, -1)) for y, n in ((q, heads), (k, groups), (v, groups)))
        q, k = original_rotary(q, angles), original_rotary(k, angles)
        q, k, v = (y.transpose(1, 2).repeat_interleave(heads // y.shape[2], dim=1) for y in (q, k, v))
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf")).softmax(-1)
        h = h + (weights @ v).transpose(1, 2).flatten(2) @ layer["self_attn.o_proj.weight"].T
        x = norm(h, layer["post_attention_layernorm.weight"])
        gated = F.silu(x @ layer["mlp.gate_proj.weight"].T) * (x @ layer["mlp.up_proj.weight"].T)
        h = h + gated @ layer["mlp.down_proj.weight"].T
    return norm(h, state["model.norm.weight"]) @ state["lm_head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_originals(kind):
    model = make(kind).double()
    condition = make_condition(model)
    condition = condition.double() if kind == "text" else condition
    inputs = model.prepare_inputs(make_indices(model), condition)
    ids = inputs["input_ids"][:, :-1]
    expected = original_logits(model, ids, inputs.get("condition_states"))
    assert expected.std(dim=1).min() > 0.1
    actual = model(ids, **given(model, condition)).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)  # the angles are float32
    null = torch.cat([model.prepare_condition(None, 2), ids[:, model.config.condition_length :]], dim=1)
    torch.testing.assert_close(
        model(null).logits, original_logits(model, null, inputs.get("condition_states")), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["class", "text"])
def test_probabilities_of_all_images_sum_to_one(kind):
    model = make(kind, codebook_size=3, grid_size=(2, 3))
    every = torch.tensor(list(itertools.product(range(3), repeat=6)))
    condition = make_condition(model, 1)
    condition = condition.expand(len(every), *condition.shape[1:])
    assert model.log_likelihood(every, condition).exp().sum().item() == pytest.approx(1, abs=1e-4)


# ---------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample_by_hand(model, condition, guidance_scale=1.0):
    sequence = model.prepare_condition(condition, batch_size=2)
    guide = model.prepare_condition(None, batch_size=2)
    for _ in range(model.config.image_seq_length):
        logits = model(sequence, use_cache=False, **given(model, condition)).logits[:, -1].log_softmax(-1)
        null = model(guide, use_cache=False).logits[:, -1].log_softmax(-1)
        code = (null + guidance_scale * (logits - null)).argmax(-1, keepdim=True)
        sequence, guide = torch.cat([sequence, code], dim=1), torch.cat([guide, code], dim=1)
    return sequence


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_equals_the_loop(kind, options):
    model = make(kind)
    condition = make_condition(model)
    prompt = model.prepare_condition(condition, batch_size=2)
    sequences = model.generate(prompt, do_sample=False, **options, **given(model, condition))
    assert torch.equal(sequences, sample_by_hand(model, condition))


@pytest.mark.parametrize("kind", ["class", "text"])
def test_guidance_equals_the_loop(kind):
    model = make(kind)
    condition = make_condition(model)
    prompt = model.prepare_condition(condition)
    expected = sample_by_hand(model, condition, guidance_scale=3.0)
    assert not torch.equal(expected, sample_by_hand(model, condition))
    options = {"do_sample": False, "guidance_scale": 3.0, **given(model, condition)}
    assert torch.equal(model.generate(prompt, **options), expected)
    if kind == "class":
        again = model.generate(prompt, return_dict_in_generate=True, **options).sequences
        assert torch.equal(again, expected)


def test_a_few_steps_learn_an_image():
    set_seed(0)
    model = VQLlamaForCausalLM(VQLlamaConfig(**{**TINY, **KINDS["text"]})).train()
    indices, features = make_indices(model), make_condition(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = model(**model.prepare_inputs(indices, features)).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    prompt = model.eval().prepare_condition(features)
    sequences = model.generate(prompt, condition_states=features, do_sample=False)
    assert torch.equal(model.extract_indices(sequences), indices)


def test_auto_class_and_round_trip(tmp_path):
    model = make("text")
    save_with_code(model, tmp_path)
    foreign = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    prompt, features = model.prepare_condition(make_condition(model)), make_condition(model)
    expected = model.generate(prompt, condition_states=features, do_sample=False)
    assert torch.equal(foreign.generate(prompt, condition_states=features, do_sample=False), expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is VQLlamaForCausalLM
    saved = {k: v for k, v in loaded.config.to_dict().items() if k not in ("_name_or_path", "auto_map")}
    assert saved == {k: v for k, v in model.config.to_dict().items() if k in saved}
    assert torch.equal(loaded.text_projection.null, model.text_projection.null)
    config = VQLlamaConfig()
    assert (config.vocab_size, config.input_vocab_size, config.intermediate_size) == (16384, 16385, 2048)


def test_bad_inputs():
    model, text = make("class"), make("text")
    indices, features = make_indices(text), make_condition(text)
    prompt = text.prepare_condition(features)
    for call, message in (
        (lambda: text(prompt), "`condition_states` is required"),
        (lambda: text(prompt, condition_states=features[:1]), "`condition_states` must have shape"),
        (lambda: text(prompt[:, :2], condition_states=features), "condition ids in one call"),
        (lambda: text.prepare_condition(features[:, 1:]), "`condition` must be a text's features"),
        (lambda: text.prepare_condition(features, batch_size=3), "3 rows"),
        (lambda: model(prompt[:, :1] * 0 + 11, condition_states=features), "`condition_states` must be None"),
        (lambda: model(**model.prepare_inputs(indices, [0, 1]), position_ids=None, inputs_embeds=features), "one of"),
        (lambda: VQLlamaConfig(**{**TINY, "hidden_size": 12}), "head_dim"),
        (lambda: VQLlamaConfig(**{**TINY, "condition_type": "codes"}), "condition_type"),
        (lambda: VQLlamaConfig(**{**TINY, "condition_length": 2}), "condition_length"),
        (lambda: VQLlamaConfig(**{**TINY, "vocab_size": 12}), "vocab_size"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
