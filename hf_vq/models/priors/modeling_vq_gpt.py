"""The autoregressive prior over code indices: transformers' GPT-2 with a condition prefix."""

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, GPT2Model, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple

from ..checked_loading import CheckedLoadingMixin
from .code_decoding import CodeDecoder, continued
from .code_sequences import CodeSequenceMixin
from .configuration_vq_gpt import VQGPTConfig


class VQGPTPreTrainedModel(CheckedLoadingMixin, GPT2PreTrainedModel):
    """Weight initialisation (N(0, 0.02), residual projections scaled by depth) and capabilities are GPT-2's."""

    config: VQGPTConfig


def _bidirectional_prefix(n_unmasked: int):
    """Mask function: the first `n_unmasked` positions see each other."""

    def allowed(batch_idx, head_idx, q_idx, kv_idx):
        return (q_idx < n_unmasked) & (kv_idx < n_unmasked)

    return allowed


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says; Accelerate's hooks take the place of `forward`."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class VQGPTForCausalLM(CodeSequenceMixin, VQGPTPreTrainedModel, GenerationMixin):
    """
    GPT prior over code indices (Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021, eq. 9
    and 10): `p(s | c) = prod_i p(s_i | s_<i, c)`, with `c` a prefix of ids, see [`VQGPTConfig`].

    ```python
    inputs = prior.prepare_inputs(indices, class_labels)          # training: indices (B, h, w)
    loss = prior(**inputs).loss
    sequences = prior.generate(prior.prepare_condition([3, 7]), do_sample=True, guidance_scale=2.0)
    indices = prior.extract_indices(sequences)                    # (2, h, w)
    ```
    """

    def __init__(self, config: VQGPTConfig):
        super().__init__(config)
        self.transformer = GPT2Model(config)
        if config.input_vocab_size != config.vocab_size:
            self.transformer.set_input_embeddings(nn.Embedding(config.input_vocab_size, config.n_embd))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids (int64 `(B, T)`): a prefix of condition ids, then codes.
            labels (int64 `(B, T)`, *optional*): the code wanted at each position; the model shifts them. The prefix
                and positions with -100 do not count, so that `labels=input_ids` is fine. The last token predicts
                nothing and is not run: `logits` then have `T - 1` positions.
            attention_mask, past_key_values, inputs_embeds `(B, T, n_embd)`, position_ids, use_cache, logits_to_keep:
                as in every causal LM of transformers.

        Returns:
            `CausalLMOutputWithPast` with `logits` `(B, T, vocab_size)`.

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`, ids that are not integers, more positions than
                `config.n_positions`, labels of another shape than the inputs.
        """
        if inputs_embeds is None and self.is_whole_image(input_ids, labels, past_key_values, use_cache):
            return self.read_whole_image(
                input_ids,
                logits_to_keep,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **kwargs,
            )
        inputs = self.check_inputs(input_ids, inputs_embeds, labels)
        if labels is not None:
            use_cache = bool(use_cache)  # by default none, since nothing is sampled
            if self.training and (self.config.pkeep < 1 or self.config.condition_dropout > 0):
                if input_ids is None:
                    raise ValueError(
                        "`pkeep` and `condition_dropout` act on `input_ids`, got `inputs_embeds` in training."
                    )
                inputs = self.corrupt_inputs(input_ids)
            inputs = inputs[:, :-1]
            attention_mask = attention_mask[:, :-1] if attention_mask is not None else None
            position_ids = position_ids[:, :-1] if position_ids is not None else None

        inputs_embeds = self.transformer.wte(inputs) if input_ids is not None else inputs
        self._check_length(inputs_embeds.shape[1], past_key_values, use_cache)
        outputs = self.transformer(
            inputs_embeds=inputs_embeds,
            attention_mask=self._mask_with_open_prefix(inputs_embeds, attention_mask, past_key_values),
            past_key_values=past_key_values,
            position_ids=position_ids,
            use_cache=use_cache,
            **{name: value for name, value in kwargs.items() if name != "num_items_in_batch"},
        )
        hidden_states = outputs.last_hidden_state
        if labels is None:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden_states = hidden_states[:, keep]
        logits = self.lm_head(hidden_states)

        loss = None
        if labels is not None:
            loss = self.code_loss(logits, labels, kwargs.get("num_items_in_batch"))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _check_length(self, length: int, past_key_values, use_cache):
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        self.check_length(length, past)
        if not isinstance(past, int):
            return
        if past_key_values is None and not use_cache:
            return
        if past < self.config.n_unmasked and (past or length < self.config.n_unmasked):
            raise ValueError(
                f"`input_ids` must hold the {self.config.n_unmasked} bidirectional positions in one "
                f"call when a cache is "
                f"used, got {length} after {past}."
            )

    # ------------------------------------------------------------------------------------------------ masks

    def _mask_with_open_prefix(self, inputs_embeds, attention_mask, past_key_values):
        """The attention mask that GPT-2 gets: a full one only where the bidirectional prefix needs it."""
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        n_unmasked = self.config.n_unmasked
        if n_unmasked < 2 or (attention_mask is not None and attention_mask.ndim == 4):
            return attention_mask
        if isinstance(past, int) and past >= n_unmasked:
            return attention_mask
        if self.config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"`n_unmasked` needs attn_implementation 'sdpa' or 'eager', got "
                f"{self.config._attn_implementation!r}, which "
                "takes no mask of its own."
            )
        return create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            or_mask_function=_bidirectional_prefix(n_unmasked),
        )

    # ------------------------------------------------------------------------------------------------ sampling

    def code_decoder(
        self,
        batch_size: int,
        length: int,
        positions: torch.LongTensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        **inputs: Any,
    ):
        """[`GPTDecoder`], where GPT-2's blocks are called as they are; else what runs `forward`."""
        config = self.config
        as_usual = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
        as_usual = as_usual and not config.reorder_and_upcast_attn
        as_usual = as_usual and config._attn_implementation in ("sdpa", "eager")
        blocks = [part for block in self.transformer.h for part in (block, block.attn)]
        as_usual = as_usual and not any(map(_is_hooked, blocks)) and prompt_mask is None
        is_offloaded = self.transformer.wte.weight.is_meta or len(set(getattr(self, "hf_device_map", {}).values())) > 1
        if as_usual and not is_offloaded:
            return GPTDecoder(self, batch_size, length, positions)
        return CodeDecoder(self, length, positions, prompt_mask, **inputs)

    @staticmethod
    def create_masks_for_generate(config: PreTrainedConfig, **kwargs: Any):
        """Called by `generate` before a compiled step: the same masks as above."""
        if config.n_unmasked > 1:
            kwargs["or_mask_function"] = _bidirectional_prefix(config.n_unmasked)
        return create_masks_for_generate(config=config, **kwargs)


class GPTDecoder:
    """
    A `VQGPTForCausalLM` that reads a sequence part by part, with all keys and values in memory of the final length:
    called with the ids `(B, L)` that follow those it has read, it returns the logits `(B, vocab_size)` of what comes
    next. The layers are called, so that adapters and quantized weights act; what stands between them in `GPT2Model` is
    done once, or not at all. After some codes, the feed-forward networks of a model on a CPU become
    [`FeedForwardOfCodes`].
    """

    codes_before_copies = 16
    """A copy of the feed-forward weights takes as long as it saves in some ten codes."""

    def __init__(
        self, model: VQGPTForCausalLM, batch_size: int, length: int, positions: torch.LongTensor | None = None
    ):
        self.model, config = model, model.config
        self.num_heads, self.num_open = config.n_head, config.n_unmasked
        weight = model.transformer.wte.weight
        shape = (2, batch_size, config.n_head, length, config.n_embd // config.n_head)
        self.memory = [weight.new_empty(shape) for _ in range(config.n_layer)]
        self.order = torch.arange(length, device=weight.device)
        self.positions = self.order if positions is None else continued(positions.to(weight.device), length)
        self.past, self.ids = 0, None
        self.num_single_codes, self.feed_forwards = 0, None

    def __call__(self, ids: torch.LongTensor) -> torch.FloatTensor:
        ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        # as long as the first positions see each other, a new one changes what has been read
        is_open = self.past + ids.shape[1] < self.num_open
        self.ids = ids if is_open else None
        transformer, end = self.model.transformer, self.past + ids.shape[1]
        hidden_states = transformer.wte(ids) + transformer.wpe(self.positions[..., self.past : end])
        mask = self._mask(end) if ids.shape[1] > 1 else None
        feed_forwards = self._feed_forwards_of(ids)
        for block, memory, feed_forward in zip(transformer.h, self.memory, feed_forwards, strict=True):
            hidden_states = hidden_states + self._attend(block.attn, block.ln_1(hidden_states), memory, mask)
            hidden_states = hidden_states + feed_forward(block.ln_2(hidden_states))
        self.past = 0 if is_open else end
        return self.model.lm_head(transformer.ln_f(hidden_states[:, -1]))

    def _feed_forwards_of(self, ids: torch.LongTensor) -> list:
        """What reads `ids` behind each block's attention: the blocks' own networks, or copies for a single code."""
        networks = [block.mlp for block in self.model.transformer.h]
        if ids.shape[1] > 1:
            return networks
        self.num_single_codes += 1
        if self.num_single_codes == self.codes_before_copies:
            self.feed_forwards = [
                FeedForwardOfCodes(network, len(ids)) if FeedForwardOfCodes.replaces(network) else network
                for network in networks
            ]
        return self.feed_forwards or networks

    def _mask(self, end: int) -> torch.BoolTensor:
        """Which positions `(L, end)` the last L see: those up to their own, and all of an open prefix each other."""
        queries, keys = self.order[self.past : end, None], self.order[:end]
        return (keys <= queries) | ((queries < self.num_open) & (keys < self.num_open))

    def _attend(self, attention, hidden_states, memory, mask) -> torch.Tensor:
        batch_size, length, channels = hidden_states.shape
        end = self.past + length
        # (B, L, 3, heads, d) to (3, B, heads, L, d)
        projected = attention.c_attn(hidden_states).view(batch_size, length, 3, self.num_heads, -1)
        projected = projected.permute(2, 0, 3, 1, 4)
        memory[:, :, :, self.past : end] = projected[1:]
        keys, values = memory[:, :, :, :end]
        attended = nn.functional.scaled_dot_product_attention(projected[0], keys, values, attn_mask=mask)
        return attention.c_proj(attended.transpose(1, 2).reshape(batch_size, length, channels))


class FeedForwardOfCodes:
    """
    What a `GPT2MLP` on a CPU computes for the `batch_size` rows of one position, `(B, 1, n_embd)`, with copies of its
    weights in the order in which so few rows are multiplied fastest (measured in `benchmarks/README.md`). The copies
    take a third of the memory of the layers' weights, and two thirds for 4 to 8 rows.
    """

    def __init__(self, mlp: GPT2MLP, batch_size: int):
        self.mlp, self.bias = mlp, mlp.c_proj.bias
        self.contract = mlp.c_proj.weight.t().contiguous()
        # of fewer rows, and of more, the first product is faster as it is
        self.expand = mlp.c_fc.weight.t().contiguous() if 4 <= batch_size <= 8 else None

    @staticmethod
    def replaces(mlp: nn.Module) -> bool:
        """Whether nothing else acts on the network or its layers: no adapter, hook, quantization or parallelism."""
        if type(mlp) is not GPT2MLP:
            return False
        parts = (mlp, mlp.c_fc, mlp.c_proj)
        if any(map(_is_hooked, parts)):
            return False
        return all(
            type(layer) is Conv1D
            and type(layer.weight) is nn.Parameter
            and (layer.weight.device.type, layer.weight.dtype) == ("cpu", torch.float32)
            for layer in parts[1:]
        )

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states[:, 0]
        if self.expand is None:
            hidden = self.mlp.act(self.mlp.c_fc(rows))
            return self.mlp.dropout(torch.addmm(self.bias[:, None], self.contract, hidden.t()).t()[:, None])
        hidden = self.mlp.act(torch.addmm(self.mlp.c_fc.bias[:, None], self.expand, rows.t()).t())
        return self.mlp.dropout(nn.functional.linear(hidden, self.contract, self.bias)[:, None])


__all__ = ["FeedForwardOfCodes", "GPTDecoder", "VQGPTForCausalLM", "VQGPTPreTrainedModel"]
