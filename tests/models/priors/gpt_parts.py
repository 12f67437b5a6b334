"""Tiny GPT priors, and sampling from them with the whole sequence each time."""

import torch

from hf_vq.models.priors.configuration_vq_gpt import VQGPTConfig
from hf_vq.models.priors.modeling_vq_gpt import VQGPTForCausalLM


TINY = {"codebook_size": 11, "grid_size": (3, 4), "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.5}
KINDS = {
    "unconditional": {"condition_type": "unconditional"},
    "class": {"condition_type": "class", "num_classes": 3},
    "codes": {"condition_type": "codes", "condition_vocab_size": 7, "condition_length": 4},
    "n_unmasked": {"condition_type": "codes", "condition_vocab_size": 7, "condition_length": 4, "n_unmasked": 3},
    "shared": {"condition_type": "class", "num_classes": 13, "share_condition_embedding": True},
    "start": {"share_condition_embedding": True, "bos_token_id": 7},
    "coordinates": {"condition_type": "coordinates", "condition_vocab_size": 9, "condition_length": 2},
    "open": {"condition_type": "class", "num_classes": 3, "n_unmasked": 6},
    "wide": {"condition_type": "class", "num_classes": 3, "vocab_size": 14},
}


def make(kind, seed=5, **overrides):
    """
    A tiny model whose weights are large enough that its distributions are far from uniform and differ by position.
    They are drawn here, so that they do not change with the order in which transformers draws them.
    """
    model = VQGPTForCausalLM(VQGPTConfig(**{**TINY, **KINDS[kind], **overrides})).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=model.config.initializer_range, generator=generator)
    model.transformer.wpe.weight.data.mul_(2)
    return model


def make_indices(model, batch_size=2):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(model.config.codebook_size, (batch_size, *model.config.grid_size), generator=generator)


def null_prompt(prompt, model):
    return torch.full_like(prompt, model.config.null_class_token_id)


@torch.no_grad()
def sample_by_hand(model, prompt, steps, guidance_scale=1.0, do_sample=False, temperature=1.0, top_k=0, top_p=1.0):
    """The whole sequence again for every code; the filters are written out."""
    sequence, guide = prompt, null_prompt(prompt, model) if guidance_scale != 1 else None
    for _ in range(steps):
        logits = model(input_ids=sequence, use_cache=False).logits[:, -1].log_softmax(-1)
        if guide is not None:
            null = model(input_ids=guide, use_cache=False).logits[:, -1].log_softmax(-1)
            logits = null + guidance_scale * (logits - null)
        logits[:, model.config.codebook_size :] = float("-inf")
        logits = logits / temperature
        if top_k:
            logits[logits < logits.topk(top_k).values[:, -1:]] = float("-inf")
        if top_p < 1:
            ordered, order = logits.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            logits = logits.scatter(1, order, ordered.masked_fill(before >= top_p, float("-inf")))
        code = logits.softmax(-1).multinomial(1) if do_sample else logits.argmax(-1, keepdim=True)
        sequence = torch.cat([sequence, code], dim=1)
        guide = torch.cat([guide, code], dim=1) if guide is not None else None
    return sequence
