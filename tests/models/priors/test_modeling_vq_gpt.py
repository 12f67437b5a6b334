"""VQGPT: sequences, masks, likelihood, training noise, and generate() against a hand-written loop."""

import itertools

import pytest
import torch
from accelerate import disk_offload
from transformers import GPT2Model, set_seed
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from hf_vq.models.linear_layers import as_linear
from hf_vq.models.priors.configuration_vq_gpt import VQGPTConfig
from hf_vq.models.priors.modeling_vq_gpt import FeedForwardOfCodes, GPTDecoder, VQGPTForCausalLM
from tests.models.model_testing import ModelCase, ModelTests
from tests.models.priors.code_prior_testing import check_lora, check_scores_of_generation
from tests.models.priors.gpt_parts import KINDS, TINY, make, make_indices, null_prompt, sample_by_hand


def make_condition(model, batch_size=2):
    config = model.config
    if config.condition_type == "unconditional":
        return None
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.condition_vocab_size, (batch_size, config.condition_length), generator=generator)


@pytest.mark.parametrize("batch_size", [-1, 0, 1.5, True])
def test_a_number_of_rows_is_positive(batch_size):
    with pytest.raises(ValueError, match="`batch_size` must be an int of at least 1"):
        make("class").prepare_condition(None, batch_size=batch_size)
    with pytest.raises(ValueError, match="`batch_size` must be an int of at least 1"):
        make("class").prepare_condition([1], batch_size=batch_size)


@pytest.fixture(params=["unconditional", "n_unmasked", "shared", "noisy"])
def case(request):
    noisy = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "pkeep": 0.8, "condition_dropout": 0.3, "order": "spiral-in"}
    kind = "class" if request.param == "noisy" else request.param
    plain = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    config = VQGPTConfig(**{**TINY, **KINDS[kind], **(noisy if request.param == "noisy" else plain)})

    def inputs():
        model = VQGPTForCausalLM(config)
        return model.prepare_inputs(make_indices(model), make_condition(model))

    return ModelCase(VQGPTForCausalLM, config, inputs, checkpointed=(GPT2Block,))


class TestVQGPT(ModelTests):
    @torch.no_grad()
    def test_scores_of_generation_are_as_wide_as_the_vocabulary(self, case):
        check_scores_of_generation(case.make(), case.inputs())

    def test_lora_attaches_trains_and_samples(self, case):
        check_lora(case.make(), case.inputs(), ["c_attn", "c_fc"])


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "none": {"use_cache": False},
}


# ---------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_equals_the_loop(kind, cache, attention):
    model = make(kind)
    model.set_attn_implementation(attention)
    prompt = model.prepare_condition(make_condition(model), batch_size=2)
    expected = sample_by_hand(model, prompt, 12)
    assert expected[:, prompt.shape[1] :].unique().numel() > 3, "the loop must have something to get wrong"
    assert torch.equal(model.generate(prompt, do_sample=False, **CACHES[cache]), expected)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["class", "codes", "n_unmasked", "open", "wide"])
def test_guidance_equals_the_loop(kind, cache):
    model = make(kind)
    prompt = model.prepare_condition(make_condition(model))
    expected = sample_by_hand(model, prompt, 12, guidance_scale=3.0)
    assert not torch.equal(expected, sample_by_hand(model, prompt, 12))
    options = {"do_sample": False, "guidance_scale": 3.0, **CACHES[cache]}
    assert torch.equal(model.generate(prompt, **options), expected)
    assert torch.equal(model.generate(prompt, negative_prompt_ids=null_prompt(prompt, model), **options), expected)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    "filters",
    [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 5, "top_p": 0.9, "guidance_scale": 2.0}],
)
def test_sampling_equals_the_loop(filters, cache):
    model = make("class")
    prompt = model.prepare_condition([0, 2, 1])
    set_seed(5)
    expected = sample_by_hand(model, prompt, 12, do_sample=True, **filters)
    set_seed(5)
    sequences = model.generate(prompt, do_sample=True, **{"top_k": 0, **filters}, **CACHES[cache])
    assert torch.equal(sequences, expected)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_generation_continues_given_codes(kind, cache):
    model = make(kind)
    prefix = model.prepare_condition(make_condition(model), batch_size=2)
    prompt = torch.cat([prefix, make_indices(model).flatten(1)[:, :5]], dim=1)
    expected = sample_by_hand(model, prompt, 7)
    assert torch.equal(model.generate(prompt, do_sample=False, **CACHES[cache]), expected)


def plain_generation(model, prompt, **options):
    """transformers' loop, which runs guidance in a second pass and grows its cache."""
    with_scores = {"return_dict_in_generate": True, "output_scores": True}
    return model.generate(prompt, **options, **with_scores).sequences


@pytest.mark.parametrize("kind", ["class", "n_unmasked", "open", "wide"])
@pytest.mark.parametrize(
    "filters", [{}, {"guidance_scale": 2.5}, {"top_k": 4, "temperature": 0.8, "guidance_scale": 0.5}]
)
def test_the_loop_for_codes_draws_what_transformers_draws(kind, filters, monkeypatch):
    model = make(kind)
    prompt = model.prepare_condition(make_condition(model)).repeat_interleave(3, dim=0)
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 2, **filters}
    set_seed(11)
    expected = plain_generation(model, prompt, **options)
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    set_seed(11)
    assert torch.equal(model.generate(prompt, **options), expected)
    assert not calls, "the decoder calls the layers"
    # a hook on a block makes it call `forward`, with the same codes
    model.transformer.h[0].register_forward_hook(lambda *args: None)
    set_seed(11)
    assert torch.equal(model.generate(prompt, **options), expected)
    assert len(calls) == 12


def decode_one_by_one(model, batch_size):
    """The decoder after a sequence read id by id, its last logits, and those of the whole sequence at once."""
    ids = model.prepare_inputs(make_indices(model, batch_size), make_condition(model, batch_size))["input_ids"][:, :-1]
    decoder = model.code_decoder(batch_size, ids.shape[1])
    logits = [decoder(each) for each in ids.split(1, dim=1)][-1]
    return decoder, logits, model(input_ids=ids, use_cache=False).logits[:, -1]


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 4, 9])
@pytest.mark.parametrize("kind", ["class", "n_unmasked", "open"])
def test_copied_weights_give_the_logits_of_the_layers(kind, batch_size, monkeypatch):
    monkeypatch.setattr(GPTDecoder, "codes_before_copies", 2)
    model = make(kind)
    for block in model.transformer.h:
        block.mlp.c_fc.bias.normal_()
        block.mlp.c_proj.bias.normal_()
    decoder, logits, expected = decode_one_by_one(model, batch_size)
    assert all(type(each) is FeedForwardOfCodes for each in decoder.feed_forwards)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def double_output(layer):
    layer.register_forward_hook(lambda layer, inputs, output: 2 * output)


def replace_forward(layer):
    forward = layer.forward
    layer.forward = lambda hidden_states: 2 * forward(hidden_states)


CHANGES = {
    "another forward": lambda model: [replace_forward(block.mlp.c_proj) for block in model.transformer.h],
    "a hook on a layer": lambda model: [double_output(block.mlp.c_proj) for block in model.transformer.h],
    "a hook on the network": lambda model: [double_output(block.mlp) for block in model.transformer.h],
    "linear layers": as_linear,
    "double precision": lambda model: model.double(),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_what_acts_on_a_layer_acts_on_each_code(change, monkeypatch):
    monkeypatch.setattr(GPTDecoder, "codes_before_copies", 2)
    model = make("class")
    CHANGES[change](model)
    decoder, logits, expected = decode_one_by_one(model, 2)
    assert not any(type(each) is FeedForwardOfCodes for each in decoder.feed_forwards)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_copied_weights_keep_the_dropout_and_its_hooks(monkeypatch):
    monkeypatch.setattr(GPTDecoder, "codes_before_copies", 2)
    model = make("class")
    for block in model.transformer.h:
        double_output(block.mlp.dropout)
    decoder, logits, expected = decode_one_by_one(model, 2)
    assert all(type(each) is FeedForwardOfCodes for each in decoder.feed_forwards)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_weights_on_the_disk_are_read_for_each_code(tmp_path):
    model = make("class")
    prompt = model.prepare_condition([0, 1])
    expected = model.generate(prompt, do_sample=False)
    indices, condition = make_indices(model), make_condition(model)
    likelihood = model.log_likelihood(indices, condition)
    disk_offload(model, str(tmp_path), torch.device("cpu"))
    assert torch.equal(model.generate(prompt, do_sample=False), expected)
    torch.testing.assert_close(model.log_likelihood(indices, condition), likelihood)


@torch.no_grad()
def test_another_forward_of_a_block_is_called():
    model = make("class")
    for block in model.transformer.h:
        replace_forward(block.attn.c_proj)
        forward = block.forward
        block.forward = lambda hidden_states, *args, forward=forward, **kwargs: (
            2 * forward(hidden_states, *args, **kwargs)
        )
    _, logits, expected = decode_one_by_one(model, 2)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_stopping_criteria_and_processors_see_each_code():
    model, seen = make("class"), []
    prompt = model.prepare_condition([0, 1])

    def stop(input_ids, scores, **kwargs):
        seen.append(input_ids.clone())
        return torch.full((2,), input_ids.shape[1] == 6)

    def process(input_ids, scores):
        assert torch.equal(input_ids, seen[-1] if seen else prompt)
        return scores.roll(1, dims=1)

    sequences = model.generate(prompt, do_sample=False, stopping_criteria=[stop], logits_processor=[process])
    assert sequences.shape == (2, 6) and len(seen) == 5 and torch.equal(seen[-1], sequences)
    first = model(prompt).logits[:, -1].argmax(-1)
    assert torch.equal(sequences[:, 1], (first + 1) % 11)


def test_guidance_of_a_continued_prompt_keeps_its_codes():
    model = make("class")
    prefix, codes = model.prepare_condition([1, 2]), make_indices(model).flatten(1)[:, :5]
    negative = torch.cat([null_prompt(prefix, model), codes], dim=1)
    prompt = torch.cat([prefix, codes], dim=1)
    expected = model.generate(prompt, negative_prompt_ids=negative, guidance_scale=3.0)
    assert torch.equal(model.generate(prompt, guidance_scale=3.0), expected)


def test_guidance_with_several_sequences():
    model = make("class")
    prompt = model.prepare_condition([1, 2])
    expected = model.generate(prompt.repeat_interleave(2, dim=0), guidance_scale=3.0)
    set_seed(0)
    sampled = model.generate(prompt, guidance_scale=3.0, num_return_sequences=2, do_sample=True, top_k=1)
    assert torch.equal(sampled, expected)


@pytest.mark.parametrize("kind", ["class", "n_unmasked"])
def test_generation_from_embeddings(kind):
    model = make(kind)
    prompt = model.prepare_condition(make_condition(model))
    codes = model.generate(inputs_embeds=model.transformer.wte(prompt), do_sample=False)
    assert torch.equal(codes, model.generate(prompt, do_sample=False)[:, prompt.shape[1] :])


def test_unconditional_generation_needs_no_prompt():
    model = make("unconditional")
    expected = model.generate(model.prepare_condition(), do_sample=False)
    assert expected.shape == (1, 13)
    assert torch.equal(model.generate(do_sample=False), expected)
    assert model.extract_indices(expected).shape == (1, 3, 4)


def test_beam_search_finds_no_less_likely_sequences():
    model = make("class")
    prompt = model.prepare_condition([0, 1, 2])
    greedy = model.extract_indices(model.generate(prompt, do_sample=False))
    beam = model.extract_indices(model.generate(prompt, do_sample=False, num_beams=4))
    with torch.no_grad():
        gain = model.log_likelihood(beam, [0, 1, 2]) - model.log_likelihood(greedy, [0, 1, 2])
    assert gain.sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["class", "n_unmasked"])
def test_compiled_generation_equals_the_loop(kind):
    from transformers import CompileConfig

    model = make(kind)
    prompt = model.prepare_condition(make_condition(model))
    # transformers compiles on accelerators only, unless a compile config says otherwise
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True
    options = {"cache_implementation": "static", "do_sample": False, "compile_config": compile_config}
    assert torch.equal(model.generate(prompt, **options), sample_by_hand(model, prompt, 12))
    assert hasattr(model, "_compiled_call")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["class", "n_unmasked"])
def test_compiled_forward(kind):
    model = make(kind)
    inputs = model.prepare_inputs(make_indices(model), make_condition(model))
    with torch.no_grad():
        expected = model(**inputs)
        compiled = torch.compile(model, fullgraph=True)(**inputs)
    torch.testing.assert_close(compiled.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled.loss, expected.loss, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- masks


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_which_logits_see_which_tokens(kind, attention):
    model = make(kind)
    model.set_attn_implementation(attention)
    ids = model.prepare_inputs(make_indices(model), make_condition(model))["input_ids"][:, :-1]
    before = model(input_ids=ids).logits
    n_unmasked, length = model.config.n_unmasked, ids.shape[1]
    for position in range(length):
        changed = ids.clone()
        changed[:, position] = (ids[:, position] + 1) % model.config.codebook_size
        moved = (model(input_ids=changed).logits - before).abs().amax(dim=(0, 2)) > 1e-4
        first = 0 if position < n_unmasked else position
        assert moved.tolist() == [i >= first for i in range(length)]


def test_bidirectional_prefix_refuses_what_would_break_it():
    model = make("n_unmasked")
    prompt = model.prepare_condition(make_condition(model))
    with pytest.raises(ValueError, match="in one call"):
        model(input_ids=prompt[:, :2], use_cache=True)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="n_unmasked"):
        model(input_ids=prompt)


@torch.no_grad()
def test_padding_is_invisible():
    model = make("class")
    ids = model.prepare_inputs(make_indices(model), [0, 1])["input_ids"][:, :-1]
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    padded = model(input_ids=ids, attention_mask=mask).logits[:, :8]
    torch.testing.assert_close(padded, model(input_ids=ids[:, :8]).logits, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------- likelihood, loss


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_all_images_sum_to_one(kind):
    smaller = {"start": {"bos_token_id": 2}, "wide": {"vocab_size": 5}}.get(kind, {})
    model = make(kind, codebook_size=3, grid_size=(2, 3), **smaller)
    every = torch.tensor(list(itertools.product(range(3), repeat=6)))
    condition = make_condition(model, batch_size=1)
    log_likelihood = model.log_likelihood(every, condition)
    assert log_likelihood.shape == (3**6,) and log_likelihood.std() > 0.5
    total = log_likelihood.exp().sum().item()
    assert total < 0.9 if kind == "wide" else total == pytest.approx(1, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_log_likelihood_by_hand(kind):
    model = make(kind)
    indices, condition = make_indices(model), make_condition(model)
    prompt = model.prepare_condition(condition, batch_size=2)
    expected = torch.zeros(2)
    for code in indices.flatten(1).T:
        log_probs = model(input_ids=prompt).logits[:, -1].log_softmax(-1)
        expected += log_probs.gather(1, code[:, None])[:, 0]
        prompt = torch.cat([prompt, code[:, None]], dim=1)
    torch.testing.assert_close(model.log_likelihood(indices, condition), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.log_likelihood(indices.flatten(1), condition), expected, atol=1e-4, rtol=0)
    if kind != "open":  # where codes see themselves, the loss of a pass is no likelihood
        loss = model(**model.prepare_inputs(indices, condition)).loss
        torch.testing.assert_close(loss, -expected.mean() / 12, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_loss_counts_index_positions_only(kind):
    model = make(kind)
    inputs = model.prepare_inputs(make_indices(model), make_condition(model))
    assert (inputs["labels"] != -100).sum(1).tolist() == [12, 12]
    expected = model(**inputs)
    assert expected.logits.shape == (2, inputs["input_ids"].shape[1] - 1, model.config.vocab_size)
    # the usual labels=input_ids of transformers means the same, and so does a mean over items counted elsewhere
    torch.testing.assert_close(model(inputs["input_ids"], labels=inputs["input_ids"]).loss, expected.loss)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=48).loss, expected.loss / 2)
    ignored = inputs["labels"].clone()
    ignored[:, -6:] = -100
    partial = model(inputs["input_ids"], labels=ignored).loss
    logits = expected.logits[:, -12:-6].transpose(1, 2)
    by_hand = torch.nn.functional.cross_entropy(logits, inputs["labels"][:, -12:-6])
    torch.testing.assert_close(partial, by_hand)


def test_logits_to_keep():
    model = make("class")
    ids = model.prepare_inputs(make_indices(model), [0, 1])["input_ids"][:, :-1]
    logits = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, logits_to_keep=2).logits, logits[:, -2:])
    assert torch.equal(model(input_ids=ids, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])


# ---------------------------------------------------------------------------------------------------- training


def test_pkeep_corrupts_the_codes_and_nothing_else():
    model = make("codes", pkeep=0.7, codebook_size=50).train()
    indices = torch.randint(50, (2000, 3, 4))
    inputs = model.prepare_inputs(indices, torch.randint(7, (2000, 4)))
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    corrupted = model.corrupt_inputs(inputs["input_ids"])
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)
    assert torch.equal(corrupted[:, :4], inputs["input_ids"][:, :4])
    changed = corrupted[:, 4:] != inputs["input_ids"][:, 4:]
    # a random code is the old one once in 50; 24000 draws have a standard deviation of 0.003
    assert changed.float().mean().item() == pytest.approx(0.3 * 49 / 50, abs=0.012)
    new_codes = corrupted[:, 4:][changed]
    assert new_codes.min() == 0 and new_codes.max() == 49
    assert torch.bincount(new_codes, minlength=50).float().std() < 0.3 * new_codes.numel() / 50


def test_condition_dropout_replaces_whole_prefixes():
    model = make("codes", condition_dropout=0.25).train()
    inputs = model.prepare_inputs(torch.randint(11, (4000, 3, 4)), torch.randint(7, (4000, 4)))["input_ids"]
    corrupted = model.corrupt_inputs(inputs)
    dropped = (corrupted[:, :4] == model.config.null_class_token_id).sum(1)
    assert set(dropped.tolist()) == {0, 4}
    assert (dropped == 4).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(corrupted[dropped == 0], inputs[dropped == 0])
    assert torch.equal(corrupted[:, 4:], inputs[:, 4:])


def test_noise_acts_in_training_with_labels_only():
    model = make("class", pkeep=0.0, condition_dropout=1.0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    inputs = model.prepare_inputs(make_indices(model), [0, 1])
    clean = model(**inputs).loss
    assert torch.equal(model(**inputs).loss, clean)
    model.train()
    noisy = model(**inputs)
    assert not torch.equal(noisy.loss, clean)
    set_seed(3)
    first = model(**inputs)
    set_seed(3)
    ids = model.corrupt_inputs(inputs["input_ids"])
    torch.testing.assert_close(first.logits, model(input_ids=ids[:, :-1]).logits)
    by_hand = torch.nn.functional.cross_entropy(first.logits.transpose(1, 2), inputs["labels"][:, 1:])
    torch.testing.assert_close(first.loss, by_hand)
    unlabelled = model(input_ids=inputs["input_ids"][:, :-1]).logits
    torch.testing.assert_close(unlabelled, model.eval()(input_ids=inputs["input_ids"][:, :-1]).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_and_checkpointing_changes_nothing(kind):
    def gradients(checkpointing):
        model = make(kind, attn_pdrop=0.1).train()
        if checkpointing:
            # gradient_checkpointing_enable is the name in older transformers, deprecated in later ones
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        set_seed(4)
        model(**model.prepare_inputs(make_indices(model), make_condition(model))).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)


def test_a_few_steps_learn_an_image():
    model = make("class", initializer_range=0.02, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    indices = make_indices(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(**model.prepare_inputs(indices, [0, 2])).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    sequences = model.eval().generate(model.prepare_condition([0, 2]), do_sample=False)
    assert torch.equal(model.extract_indices(sequences), indices)


# ---------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_are_bit_equal(kind, dtype, tmp_path):
    model = make(kind).to(dtype)
    model.save_pretrained(tmp_path)
    loaded, report = VQGPTForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ignored = {"_name_or_path": None}
    assert {**loaded.config.to_dict(), **ignored} == {**model.config.to_dict(), **ignored}
    saved = model.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, saved[name]), name
    ids = model.prepare_condition(make_condition(model), batch_size=2)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_low_precision_is_close():
    model = make("class", initializer_range=0.1)
    indices = make_indices(model)
    with torch.no_grad():
        expected = model.log_likelihood(indices, [0, 1])
        result = model.to(torch.bfloat16).log_likelihood(indices, [0, 1])
        sequences = model.generate(model.prepare_condition([0, 1]), do_sample=True)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, atol=0.3, rtol=0)
    assert sequences[:, 1:].max() < 11


def test_initialisation_is_gpt2s():
    config = VQGPTConfig(codebook_size=200, grid_size=8, n_embd=128, n_layer=2, n_head=2)
    set_seed(0)
    model, gpt2 = VQGPTForCausalLM(config), GPT2Model(config)
    for name, parameter in gpt2.named_parameters():
        ours = model.transformer.get_parameter(name)
        if parameter.ndim == 1:
            assert torch.equal(ours, parameter), name
        else:
            assert ours.std().item() == pytest.approx(parameter.std().item(), rel=0.05), name
    for weight in (model.lm_head.weight, model.transformer.wte.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_head_holds_codes_only():
    model = make("class")
    assert model.lm_head.weight.shape == (11, 16) and model.transformer.wte.weight.shape == (15, 16)
    assert model.lm_head.weight.data_ptr() != model.transformer.wte.weight.data_ptr()
    assert model.lm_head.bias is None


# ---------------------------------------------------------------------------------------------------- conditions


def test_condition_ids():
    model = make("class", id2label={0: "cat", 1: "dog", 2: "owl"})
    assert model.prepare_condition([0, 2]).tolist() == [[11], [13]]
    assert model.prepare_condition(torch.tensor([[1]]), batch_size=3).tolist() == [[12]] * 3
    assert model.prepare_condition(1).tolist() == model.prepare_condition("dog").tolist() == [[12]]
    assert model.prepare_condition(["owl", 0]).tolist() == [[13], [11]]
    assert model.prepare_condition(None, batch_size=2).tolist() == [[14], [14]]
    assert make("unconditional").prepare_condition(batch_size=2).tolist() == [[11], [11]]
    assert make("shared").prepare_condition([12]).tolist() == [[12]]
    codes = make("codes")
    assert codes.prepare_condition(torch.tensor([[[0, 1], [2, 6]]])).tolist() == [[11, 12, 13, 17]]
    assert codes.prepare_condition().tolist() == [[18] * 4]


@pytest.mark.parametrize(
    "kind, condition, message",
    [
        ("class", [3], "0 … 2"),
        ("class", [-1], "0 … 2"),
        ("class", [0.5], "integers"),
        ("class", ["cat"], "id2label"),
        ("class", [0, 1, 2], "1 or 2 rows"),
        ("class", [[0, 1], [1, 2]], "1 ids"),
        ("unconditional", [0], "must be None"),
        ("codes", [1, 2], "4 ids"),
        ("codes", torch.zeros(2, 3, 3, dtype=torch.long), "4 ids"),
        ("shared", None, "no null condition"),
    ],
)
def test_bad_conditions(kind, condition, message):
    model = make(kind)
    for call in (model.prepare_inputs, model.log_likelihood):
        with pytest.raises(ValueError, match=message):
            call(make_indices(model), condition)


def test_bad_indices_and_inputs():
    model = make("class")
    indices = make_indices(model)
    for bad, message in (
        (indices + 11, "0 … 10"),
        (indices - 11, "0 … 10"),
        (indices.float(), "integers"),
        (indices[:, :2], r"\(B, 3, 4\)"),
        (indices.flatten(), r"\(B, 3, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.prepare_inputs(bad, [0, 1])
        with pytest.raises(ValueError, match=message):
            model.log_likelihood(bad, [0, 1])
    inputs = model.prepare_inputs(indices, [0, 1])
    with pytest.raises(ValueError, match="Exactly one"):
        model()
    with pytest.raises(ValueError, match="input_ids"):
        model(input_ids=inputs["input_ids"].float())
    with pytest.raises(ValueError, match="labels"):
        model(input_ids=inputs["input_ids"], labels=inputs["labels"][:, 1:])
    with pytest.raises(ValueError, match="sequences"):
        model.extract_indices(inputs["input_ids"][:, 1:])


def test_overrun_is_a_value_error():
    model = make("class")
    inputs = model.prepare_inputs(make_indices(model), [0, 1])
    with pytest.raises(ValueError, match="P \\+ N - 1"):
        model(input_ids=inputs["input_ids"], use_cache=True)
    cache = model(input_ids=inputs["input_ids"][:, :-1], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="P \\+ N - 1"):
        model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache, use_cache=True)
    prompt = model.prepare_condition([0, 1])
    assert model.generate(prompt, max_new_tokens=12).shape == (2, 13)
    with pytest.raises(ValueError, match="`inputs` is required: .* `prepare_condition`"):
        model.generate(do_sample=False)
    full = model.prepare_inputs(make_indices(model), [0, 1])["input_ids"]
    with pytest.raises(ValueError, match="`inputs` must leave a code to sample: 13 of 13 ids are given"):
        model.generate(full)
    for options in CACHES.values():
        for length in ({"max_new_tokens": 13}, {"max_length": 14}):
            with pytest.raises(ValueError, match="positions"):
                model.generate(prompt, **length, **options)
    with pytest.raises(ValueError, match="inputs"):
        model.generate(torch.tensor([[15]]))
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(prompt, num_beams=2, guidance_scale=2.0)
    with pytest.raises(ValueError, match="negative_prompt_ids"):
        make("shared").generate(torch.tensor([[3]]), guidance_scale=2.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"condition_type": "text"}, "condition_type"),
        ({"condition_type": "class"}, "condition_vocab_size"),
        ({"num_classes": 3}, "condition_vocab_size"),
        ({"condition_type": "class", "num_classes": 3, "condition_length": 2}, "condition_length"),
        ({"condition_type": "class", "num_classes": 3, "n_unmasked": 13}, "n_unmasked"),
        ({"n_positions": 10}, "n_positions"),
        ({"vocab_size": 10}, "vocab_size"),
        ({"input_vocab_size": 11}, "input_vocab_size"),
        (
            {"condition_type": "class", "num_classes": 20, "share_condition_embedding": True, "input_vocab_size": 19},
            "input_vocab_size",
        ),
        ({"bos_token_id": 3}, "bos_token_id"),
        ({"condition_type": "class", "num_classes": 3, "bos_token_id": 3}, "bos_token_id"),
        ({"order": "hilbert"}, "order"),
        ({"permutation": list(range(12))}, "permutation"),
        ({"order": "random", "permutation": [0] * 12}, "permutation"),
        ({"grid_size": (1, 2, 3)}, "grid_size"),
        ({"grid_size": 0}, "grid_size"),
        ({"codebook_size": 0}, "codebook_size"),
        ({"pkeep": 1.5}, "pkeep"),
        ({"condition_dropout": 0.1}, "condition_dropout"),
        ({"condition_type": "class", "num_classes": 3, "id2label": {0: "a", 1: "b"}}, "id2label"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_bad_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        VQGPTConfig(**{**TINY, **arguments})


def test_configuration_round_trip(tmp_path):
    config = VQGPTConfig(
        codebook_size=5, grid_size=4, condition_type="class", num_classes=2, id2label={0: "a", 1: "b"}, hidden_size=64
    )
    assert (config.n_embd, config.n_positions, config.image_seq_length) == (64, 16, 16)
    assert (config.vocab_size, config.input_vocab_size) == (5, 8)
    config.save_pretrained(tmp_path)
    loaded = VQGPTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.grid_size == [4, 4] and loaded.id2label == {0: "a", 1: "b"} and loaded.num_classes == 2
    assert loaded.bos_token_id is None and loaded.eos_token_id is None and loaded.pad_token_id is None
