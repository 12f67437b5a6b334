"""Texts as conditions of an autoregressive prior, as LlamaGen's: at the end of the prefix, padding not seen."""

import pytest
import torch

from hf_vq import VQAutoregressivePipeline, VQLlamaConfig, VQLlamaForCausalLM
from tests.pipelines.autoregressive_parts import make_pipeline, seeded
from tests.pipelines.latent_diffusion_parts import make_text_parts


LENGTH, CHANNELS = 6, 8


def make_text_pipeline(**parts):
    torch.manual_seed(0)
    config = VQLlamaConfig(
        codebook_size=8,
        grid_size=4,
        condition_type="text",
        condition_length=LENGTH,
        text_embed_dim=CHANNELS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
    )
    encoder, tokenizer = make_text_parts(start=True)
    given = {"text_encoder": encoder, "tokenizer": tokenizer, **parts}
    pipeline = VQAutoregressivePipeline(make_pipeline().vqvae, VQLlamaForCausalLM(config).eval(), **given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_hand(prior, states, mask, scale, length=16):
    ids = prior.prepare_condition(states)
    nulls = torch.full_like(ids, prior.config.null_class_token_id)
    codes = torch.zeros(len(ids), 0, dtype=torch.long)
    for _ in range(length):
        seen = torch.cat([mask.long(), torch.ones_like(codes)], dim=1)
        with torch.no_grad():
            given, null = (
                prior(input_ids=torch.cat([prefix, codes], 1), condition_states=own, attention_mask=seen).logits[:, -1]
                for prefix, own in ((ids, states), (nulls, None))
            )
        given, null = given.log_softmax(-1), null.log_softmax(-1)
        codes = torch.cat([codes, (null + scale * (given - null)).argmax(-1, keepdim=True)], dim=1)
    return codes.view(-1, 4, 4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_prompts_by_hand(scale):
    pipeline = make_text_pipeline()
    prompts = ["a red cat", "dog"]
    text = pipeline.tokenizer(prompts, padding="max_length", max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        states = pipeline.text_encoder(**text).last_hidden_state
    mask = text["attention_mask"].bool()
    moved, seen = torch.zeros_like(states), torch.zeros_like(mask)
    for row, count in enumerate(mask.sum(dim=1).tolist()):
        moved[row, LENGTH - count :], seen[row, LENGTH - count :] = states[row, :count], True
    arguments = {"guidance_scale": scale, "top_k": 1, "output_type": "indices"}
    found = pipeline(prompts, **arguments).indices
    assert not mask.all() and torch.equal(found, by_hand(pipeline.prior, moved, seen, scale))
    assert not torch.equal(found[0], found[1])
    states[~mask] = 7.0  # nobody reads padding
    embeds = {"prompt_embeds": states, "prompt_attention_mask": mask}
    assert torch.equal(pipeline(**embeds, **arguments).indices, found)
    for row in range(2):
        assert torch.equal(pipeline(prompts[row], **arguments).indices[0], found[row])
    twice = pipeline(prompts, num_images_per_prompt=2, **arguments).indices
    assert torch.equal(twice, found.repeat_interleave(2, dim=0))


def test_padding_that_is_read_larger_images_and_no_text():
    pipeline = make_text_pipeline(text_mask=False)
    with torch.no_grad():
        tokens = pipeline.tokenizer(["dog"], padding="max_length", max_length=LENGTH, return_tensors="pt")["input_ids"]
        states = pipeline.text_encoder(input_ids=tokens).last_hidden_state
    arguments = {"top_k": 1, "output_type": "indices"}
    every = torch.ones(1, LENGTH, dtype=torch.bool)
    order = tokens[0].eq(pipeline.tokenizer.pad_token_id).logical_not().int().argsort(stable=True)
    found = pipeline("dog", **arguments).indices
    assert any(torch.equal(found, by_hand(pipeline.prior, s, every, 1.0)) for s in (states, states[:, order]))
    pipeline = make_text_pipeline()
    large = pipeline(["a cat", "dog"], height=12, width=16, generator=seeded(), **arguments).indices
    assert large.shape == (2, 6, 8)
    null = pipeline(**arguments).indices
    sequence = pipeline.prior.generate(pipeline.prior.prepare_condition(None), do_sample=False)
    assert torch.equal(null, pipeline.prior.extract_indices(sequence))


def test_saved_with_its_text_encoder(tmp_path):
    pipeline = make_text_pipeline(text_lower_case=True)
    pipeline.save_pretrained(tmp_path)
    other = VQAutoregressivePipeline.from_pretrained(tmp_path)
    other.set_progress_bar_config(disable=True)
    assert other.config.text_max_length == LENGTH and other.example_call == 'prompt="…"'
    arguments = {"top_k": 1, "output_type": "indices"}
    assert torch.equal(other("A Red Cat", **arguments).indices, pipeline("a red cat", **arguments).indices)


def test_what_is_refused():
    pipeline, classes = make_text_pipeline(), make_pipeline()
    states = torch.zeros(1, 3, CHANNELS)
    for bad, message in (
        ({"prompt": "cat", "prompt_embeds": states}, "Only one of `prompt` and `prompt_embeds`"),
        ({"prompt": "cat", "class_labels": 0}, "Only one of `prompt` and `class_labels`"),
        ({"prompt": []}, "`prompt` must be a str or a list"),
        ({"prompt": 3}, "`prompt` must be a str or a list"),
        ({"prompt_embeds": states[..., :4]}, "must have the 8 channels of the prior's text_embed_dim, got 4"),
        ({"prompt_embeds": torch.zeros(1, 9, CHANNELS)}, "`prompt_embeds` must have at most 6 tokens, got 9"),
        ({"prompt_embeds": states * float("nan")}, "`prompt_embeds` must be finite"),
        ({"prompt_embeds": states, "prompt_attention_mask": torch.zeros(1, 3)}, "must leave a token"),
        ({"prompt_embeds": states, "prompt_attention_mask": torch.ones(1, 4)}, "must have shape"),
        ({"class_labels": 0}, "`class_labels` needs a prior whose condition_type is 'class'"),
        ({"guidance_scale": 2.0}, "needs a condition"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(**bad)
    with pytest.raises(ValueError, match="`prompt` needs a prior .* 'text', got 'class': give `class_labels`"):
        classes("cat")
    with pytest.raises(ValueError, match="`prompt_embeds` needs a prior whose condition_type is 'text', got 'class'"):
        classes(prompt_embeds=states)
    with pytest.raises(ValueError, match="`text_encoder` needs a prior whose condition_type is 'text'"):
        VQAutoregressivePipeline(classes.vqvae, classes.prior, text_encoder=pipeline.text_encoder)
