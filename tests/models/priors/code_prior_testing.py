"""What the tests of the convolutional priors over grids of codes share."""

import warnings

import pytest
import torch
from accelerate import disk_offload
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import WatermarkingConfig, set_seed

from hf_vq.models.priors.modeling_code_prior import IncrementalCache
from tests.models.model_testing import ModelTests


def draw(high, *shape, seed=2):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def make_indices(model, batch_size=2, seed=2):
    return draw(model.config.codebook_size, batch_size, *model.config.grid_size, seed=seed)


def classes(model, batch_size=2):
    return None if model.config.condition_type == "unconditional" else [i % 3 for i in range(batch_size)]


def operations(function):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


class CodePriorTests(ModelTests):
    """`ModelTests`, and what `CodePriorForCausalLM` checks; the inputs of `case` have labels."""

    @pytest.mark.parametrize("use_cache", [False, True])
    def test_ids_must_be_a_prefix_and_codes(self, case, use_cache):
        model, inputs = case.make(), case.inputs()
        ids = inputs.pop("input_ids")
        labels = inputs.pop("labels")
        num_codes, num_ids = model.config.codebook_size, model.config.input_vocab_size
        for place, value in ((0, -1), (0, 0), (0, num_codes - 1), (0, num_ids), (1, -1), (2, num_codes)):
            wrong = ids[:, :3].clone()
            wrong[1, place] = value
            part, first, last = ("0", num_codes, num_ids - 1) if place == 0 else ("1:", 0, num_codes - 1)
            with pytest.raises(ValueError, match=rf"`input_ids\[:, {part}\]` must lie in {first} … {last} "):
                model(wrong, use_cache=use_cache, **inputs)
            with pytest.raises(ValueError, match=rf"`input_ids\[:, {part}\]` must lie in {first} … {last} "):
                model(wrong, labels=labels[:, :3], **inputs)

    def test_ids_after_a_cache_must_be_codes(self, case):
        model, inputs = case.make(), case.inputs()
        inputs.pop("labels")
        ids, num_codes = inputs.pop("input_ids"), model.config.codebook_size
        for value in (-1, num_codes, model.config.input_vocab_size):
            cache = model(ids[:, :2], use_cache=True, **inputs).past_key_values
            codes = ids[:, 2:4].clone()
            codes[1, 1] = value
            with pytest.raises(ValueError, match=f"`input_ids` must lie in 0 … {num_codes - 1} .codes., got"):
                model(codes, past_key_values=cache)
            assert cache.get_seq_length() == 2

    def test_labels_must_be_codes_or_ignored(self, case):
        model, inputs = case.make(), case.inputs()
        labels, num_codes = inputs.pop("labels"), model.config.codebook_size
        for value in (-1, -99, num_codes):
            wrong = labels.clone()
            wrong[1, 3] = value
            with pytest.raises(ValueError, match=rf"`labels\[:, 1:\]` must lie in 0 … {num_codes - 1} or be -100"):
                model(**inputs, labels=wrong)
        for wrong, message in (
            (labels.float(), "int64.*float32"),
            (labels.tolist(), "got list"),
            (labels[0], "shape"),
        ):
            with pytest.raises(ValueError, match=f"`labels` must be .*{message}"):
                model(**inputs, labels=wrong)
        ignored = labels.clone()
        ignored[:, 3] = -100
        assert model(**inputs, labels=ignored).loss.isfinite()

    def test_32_bit_ids_are_as_good(self, case):
        model, inputs = case.make(), case.inputs()
        expected = model(**inputs).loss
        ids, labels = inputs.pop("input_ids").int(), inputs.pop("labels").int()
        torch.testing.assert_close(model(ids, labels=labels, **inputs).loss, expected, atol=0, rtol=0)
        cache = model(ids[:, :2], use_cache=True, **inputs).past_key_values
        step = model(ids[:, 2:4], past_key_values=cache).logits
        torch.testing.assert_close(step, model(ids[:, :4], **inputs).logits[:, 2:])

    def test_empty_batches_are_refused(self, case):
        model, inputs = case.make(), {name: value[:0] for name, value in case.inputs().items()}
        with pytest.raises(ValueError, match="`input_ids` must be .* not empty"):
            model(**inputs)
        del inputs["labels"]
        prompt = inputs.pop("input_ids")[:, :1]
        with pytest.raises(ValueError, match="`inputs` must not be empty"):
            model.generate(prompt, **inputs)

    @torch.no_grad()
    def test_weights_on_the_disk_are_read_without_a_cache(self, case, tmp_path):
        model, inputs = case.make(), case.inputs()
        loss = model(**inputs).loss
        del inputs["labels"]
        prompt = inputs.pop("input_ids")[:, :4]
        expected = model.generate(prompt, do_sample=False, **inputs)
        disk_offload(model, str(tmp_path), torch.device("cpu"))
        assert model.device == torch.device("cpu")
        torch.testing.assert_close(model(**case.inputs()).loss, loss)
        assert torch.equal(model.generate(prompt, do_sample=False, use_cache=False, **inputs), expected)
        with pytest.raises(ValueError, match="`use_cache=True` needs all weights of .* got offloaded ones"):
            model.generate(prompt, **inputs)

    def test_generation_from_a_cache_by_its_usual_name(self, case):
        model, inputs = case.make(), case.inputs()
        del inputs["labels"]
        prompt = inputs.pop("input_ids")[:, :4]
        expected = model.generate(prompt, do_sample=False, **inputs)
        options = {"cache_implementation": "dynamic", "return_dict_in_generate": True}
        output = model.generate(prompt, do_sample=False, **options, **inputs)
        assert torch.equal(output.sequences, expected)
        assert isinstance(output.past_key_values, IncrementalCache)
        for name in ("static", "offloaded"):
            with pytest.raises(ValueError, match=f"`cache_implementation` must be None or 'dynamic'.*got '{name}'"):
                model.generate(prompt, cache_implementation=name, **inputs)

    def test_one_hot_embeddings_are_the_ids(self, case):
        model, inputs = case.make(), case.inputs()
        expected = model(**inputs)
        ids = inputs.pop("input_ids")
        embeds = model.get_input_embeddings()(ids).requires_grad_()
        assert embeds.shape == (*ids.shape, model.config.input_vocab_size)
        output = model(inputs_embeds=embeds, **inputs)
        torch.testing.assert_close(output.logits, expected.logits)
        torch.testing.assert_close(output.loss, expected.loss)
        output.loss.backward()
        assert embeds.grad[:, 1:-1].any() and not embeds.grad[:, -1].any()
        labels = inputs.pop("labels")
        short = embeds.detach()[:, :-1]
        for arguments, message in (
            ({"inputs_embeds": short, "use_cache": True}, "`inputs_embeds` exclude a cache"),
            ({"inputs_embeds": short, "input_ids": ids[:, :-1]}, "Exactly one"),
            ({}, "Exactly one"),
            ({"inputs_embeds": short[..., :-1]}, "`inputs_embeds` must be weights"),
            ({"inputs_embeds": embeds.detach(), "labels": labels[:, 1:]}, "`labels` must have the shape"),
        ):
            with pytest.raises(ValueError, match=message):
                model(**arguments, **inputs)
        with pytest.raises(ValueError, match="`inputs_embeds` must be None"):
            model.generate(inputs_embeds=short[:, :1], **inputs)

    def test_what_every_causal_lm_takes(self, case):
        model, inputs = case.make(), case.inputs()
        expected = model(**inputs)
        labels = inputs["labels"]
        positions = torch.arange(labels.shape[1]).expand(len(labels), -1)
        output = model(**inputs, position_ids=positions, return_dict=None, output_attentions=False)
        torch.testing.assert_close(output.loss, expected.loss, atol=0, rtol=0)
        loss, logits, *rest = model(**inputs, return_dict=False)
        assert not rest and torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits)
        for arguments, message in (
            ({"position_ids": positions + 1}, "`position_ids` must be 0 … "),
            ({"position_ids": positions[:, 1:]}, "`position_ids` must be 0 … "),
            ({"output_attentions": True}, "`output_attentions` must be False"),
            ({"token_type_ids": positions}, "`token_type_ids` must not be given"),
        ):
            with pytest.raises(ValueError, match=message):
                model(**inputs, **arguments)

    @torch.no_grad()
    def test_hidden_states_lead_to_the_logits(self, case):
        model, inputs = case.make(), case.inputs()
        labels = inputs.pop("labels")
        ids, length = inputs.pop("input_ids")[:, :-1], labels.shape[1] - 1
        expected = model(ids, **inputs)
        output = model(ids, output_hidden_states=True, **inputs)
        assert expected.hidden_states is None and torch.equal(output.logits, expected.logits)
        assert len(output.hidden_states) > model.config.num_hidden_layers
        size = (len(ids), length, model.config.hidden_size)
        assert all(state.shape == size for state in output.hidden_states)
        torch.testing.assert_close(model.head(output.hidden_states[-1]), expected.logits)
        start = model(ids[:, :3], use_cache=True, output_hidden_states=True, **inputs)
        step = model(ids[:, 3:5], past_key_values=start.past_key_values, output_hidden_states=True)
        for whole, first, second in zip(output.hidden_states, start.hidden_states, step.hidden_states, strict=True):
            torch.testing.assert_close(first, whole[:, :3], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(second, whole[:, 3:5], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
    def test_the_loop_for_codes_draws_what_transformers_draws(self, case, guidance_scale):
        model, inputs = case.make(), case.inputs()
        del inputs["labels"]
        prompt = inputs.pop("input_ids")[:, :3]
        if guidance_scale != 1 and model.config.condition_type == "unconditional":
            return
        options = {"do_sample": True, "top_k": 0, "num_return_sequences": 2, "guidance_scale": guidance_scale}
        set_seed(4)
        expected = model.generate(prompt, return_dict_in_generate=True, **options, **inputs).sequences
        set_seed(4)
        assert torch.equal(model.generate(prompt, **options, **inputs), expected)

    @torch.no_grad()
    def test_scores_of_generation_are_as_wide_as_the_vocabulary(self, case):
        check_scores_of_generation(case.make(), case.inputs())

    def test_lora_attaches_trains_and_samples(self, case):
        inputs = case.inputs()
        check_lora(case.make(), inputs, "all-linear")
        check_lora(case.make(), inputs, [name for name, _ in convolutions(case.make())])


def convolutions(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]


@torch.no_grad()
def check_scores_of_generation(model, inputs):
    """Samples', beams' and watermarked scores; `inputs` are those of `forward` in training."""
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    ids = inputs.pop("input_ids")
    prompt, width = ids[:, : model.config.condition_length], model.config.vocab_size
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True, "top_k": 0}
    output = model.generate(prompt, do_sample=True, **options, **inputs)
    assert all(scores.shape == (len(prompt), width) for scores in output.scores)
    scores = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    logits = model(output.sequences[:, :-1], **inputs).logits[:, -4:].log_softmax(-1)
    expected = logits.gather(2, output.sequences[:, -4:, None])[..., 0]
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    # the score of a beam is the mean log-likelihood of its codes
    beams = model.generate(prompt, num_beams=3, do_sample=False, use_cache=False, **options, **inputs)
    logits = model(beams.sequences[:, :-1], **inputs).logits[:, -4:].log_softmax(-1)
    expected = logits.gather(2, beams.sequences[:, -4:, None])[..., 0]
    torch.testing.assert_close(beams.sequences_scores, expected.mean(dim=1), atol=1e-4, rtol=1e-4)
    scores = model.compute_transition_scores(beams.sequences, beams.scores, beams.beam_indices)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    marked = WatermarkingConfig(bias=50.0, seeding_scheme="lefthash", greenlist_ratio=0.5)
    generator = marked.construct_processor(width, "cpu")
    watermarked = model.generate(prompt, do_sample=False, max_new_tokens=4, watermarking_config=marked, **inputs)
    for place in range(prompt.shape[1], watermarked.shape[1]):
        for row in watermarked:
            assert row[place] in generator._get_greenlist_ids(row[:place])


def check_lora(model, inputs, target_modules):
    """An adapter trains, acts on sampling with a cache as without one, and can be switched off."""
    if not target_modules:
        return
    prompt = inputs["input_ids"][:, : model.config.condition_length]
    others = {name: value for name, value in inputs.items() if name not in ("input_ids", "labels")}
    before = model(**inputs).logits.detach()
    with warnings.catch_warnings():
        # PEFT asks for a name that transformers is about to drop, and says that it has understood GPT-2's Conv1D
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=target_modules, init_lora_weights=False))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    adapted.train()
    adapted(**inputs).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    adapted.eval()
    with torch.no_grad():
        after = adapted(**inputs).logits
        assert (after - before).abs().max() > 1e-3
        expected = adapted.generate(input_ids=prompt, do_sample=False, use_cache=False, **others)
        assert torch.equal(adapted.generate(input_ids=prompt, do_sample=False, **others), expected)
        # a position's logits still know the codes before it only
        last = inputs["input_ids"].clone()
        last[:, -2] = (last[:, -2] + 1) % model.config.codebook_size
        changed = adapted(**{**inputs, "input_ids": last}).logits
        torch.testing.assert_close(changed[:, :-1], after[:, :-1])
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(**inputs).logits, before)
