"""What the tests of the convolutional priors over grids of codes share."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

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
    """`ModelTests`, and what `IncrementalGenerationMixin` checks; the inputs of `case` have labels."""

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["eval", "train"])
    def test_compiles_to_one_graph(self, case, mode):
        if case.config.dropout and mode == "train":
            pytest.skip("compiled dropout draws its masks in another way")
        super().test_compiles_to_one_graph(case, mode)

    @pytest.mark.parametrize("use_cache", [False, True])
    def test_ids_must_be_a_prefix_and_codes(self, case, use_cache):
        model, inputs = case.make(), case.inputs()
        ids = inputs.pop("input_ids")
        labels = inputs.pop("labels")
        num_codes, num_ids = model.config.codebook_size, model.config.vocab_size
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
        for value in (-1, num_codes, model.config.vocab_size):
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
