"""The autoregressive prior over code indices on transformers' Llama, with rotary positions on the grid."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, LlamaModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.utils import can_return_tuple

from ..checked_loading import CheckedLoadingMixin
from .code_sequences import CodeSequenceMixin
from .configuration_vq_llama import VQLlamaConfig


class GridPositions(nn.Module):
    """
    Cosines and sines of rotary positions on a grid (Sun et al. 2024, section 2.2): half of a head's pairs turn with
    the row of the code that is read, half with its column. The condition has no place on the grid, and the original
    multiplies its queries and keys by 0.
    """

    def __init__(self, config: VQLlamaConfig):
        super().__init__()
        self.config = config

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of positions `(B, T)` in the sequence, in the dtype of `x`: `(B, T, head_dim)` each."""
        config, device = self.config, position_ids.device
        pairs = config.head_dim // 4
        exponents = torch.arange(pairs, dtype=torch.float32, device=device) / pairs
        frequencies = 1.0 / config.rope_base**exponents
        places = position_ids - config.condition_length
        is_code = (places >= 0)[..., None]
        places = places.clamp(min=0)
        if config.order != "raster":
            places = torch.tensor(config.code_order, device=device)[places]
        rows, columns = places // config.grid_size[1], places % config.grid_size[1]
        angles = torch.cat([rows[..., None] * frequencies, columns[..., None] * frequencies], dim=-1)
        angles = torch.cat([angles, angles], dim=-1)  # Llama pairs a channel with that half a head further on
        return tuple((part * is_code).to(x.dtype) for part in (angles.cos(), angles.sin()))


class TextProjection(nn.Module):
    """
    The features of a text `(B, L, text_embed_dim)` as embeddings `(B, L, hidden_size)`; those of the null condition
    are fixed noise.
    """

    def __init__(self, config: VQLlamaConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.text_embed_dim, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.register_buffer("null", torch.randn(config.condition_length, config.text_embed_dim))

    def forward(self, features: torch.Tensor | None, is_null: torch.BoolTensor) -> torch.Tensor:
        """`is_null` `(B, L)` says where the null condition stands in the place of `features`."""
        null = self.null[: is_null.shape[1]].expand(len(is_null), -1, -1)
        features = null if features is None else torch.where(is_null[..., None], null, features.to(null.dtype))
        return self.fc2(nn.functional.gelu(self.fc1(features), approximate="tanh"))


class VQLlamaPreTrainedModel(CheckedLoadingMixin, LlamaPreTrainedModel):
    """Weight initialisation (N(0, 0.02)) and capabilities are Llama's."""

    config: VQLlamaConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, TextProjection):
            init.normal_(module.null, std=module.null.shape[1] ** -0.5)


class VQLlamaForCausalLM(CodeSequenceMixin, VQLlamaPreTrainedModel, GenerationMixin):
    """
    Llama prior over code indices (Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image
    Generation", 2024): `p(s | c) = prod_i p(s_i | s_<i, c)`, with `c` a class or the features of a text, see
    [`VQLlamaConfig`].

    ```python
    inputs = prior.prepare_inputs(indices, class_labels)          # training: indices (B, h, w)
    loss = prior(**inputs).loss
    sequences = prior.generate(prior.prepare_condition([3, 7]), do_sample=True, guidance_scale=2.0)
    indices = prior.extract_indices(sequences)                    # (2, h, w)
    # a text's features (B, condition_length, text_embed_dim)
    sequences = prior.generate(prior.prepare_condition(features), condition_states=features, do_sample=True)
    ```
    """

    prompt_inputs = ("condition_states",)

    def __init__(self, config: VQLlamaConfig):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.model.set_input_embeddings(nn.Embedding(config.input_vocab_size, config.hidden_size))
        self.model.rotary_emb = GridPositions(config)
        self.text_projection = TextProjection(config) if config.condition_type == "text" else None
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    # ------------------------------------------------------------------------------------------------ conditions

    def prepare_condition(
        self,
        condition: int | str | Sequence[int] | Sequence[str] | torch.Tensor | None = None,
        batch_size: int | None = None,
    ) -> torch.LongTensor:
        """
        As of [`CodeSequenceMixin`]; with `condition_type="text"`, a text's features float `(B, condition_length,
        text_embed_dim)`, which `forward` and `generate` also get as `condition_states`.
        """
        if self.config.condition_type != "text" or condition is None:
            return super().prepare_condition(condition, batch_size)
        size = (self.config.condition_length, self.config.text_embed_dim)
        if not isinstance(condition, torch.Tensor) or condition.shape[1:] != size or not condition.is_floating_point():
            got = tuple(condition.shape) if isinstance(condition, torch.Tensor) else type(condition).__name__
            raise ValueError(f"`condition` must be a text's features, float (B, {size[0]}, {size[1]}), got {got}.")
        if batch_size is not None and len(condition) != batch_size:
            raise ValueError(f"`condition` must have {batch_size} rows, got {len(condition)}.")
        return torch.full((len(condition), size[0]), self.config.condition_token_offset, device=self.device)

    def _states(self, condition) -> dict[str, torch.Tensor]:
        is_text = self.config.condition_type == "text" and condition is not None
        return {"condition_states": condition.to(self.device)} if is_text else {}

    def prepare_inputs(
        self,
        indices: torch.LongTensor,
        condition: int | str | Sequence[int] | Sequence[str] | torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        return super().prepare_inputs(indices, condition) | self._states(condition)

    prepare_inputs.__doc__ = CodeSequenceMixin.prepare_inputs.__doc__

    def log_likelihood(
        self,
        indices: torch.LongTensor,
        condition: int | str | Sequence[int] | Sequence[str] | torch.Tensor | None = None,
        **inputs: Any,
    ) -> torch.FloatTensor:
        return super().log_likelihood(indices, condition, **self._states(condition), **inputs)

    log_likelihood.__doc__ = CodeSequenceMixin.log_likelihood.__doc__

    # ------------------------------------------------------------------------------------------------ forward

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        condition_states: torch.FloatTensor | None = None,
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
            condition_states (`(B, condition_length, text_embed_dim)`, *optional*): the features of a text for each
                prefix that is not the null condition; not needed any more with `past_key_values`.
            attention_mask, past_key_values, inputs_embeds `(B, T, hidden_size)`, position_ids, use_cache,
                logits_to_keep: as in every causal LM of transformers.

        Returns:
            `CausalLMOutputWithPast` with `logits` `(B, T, vocab_size)`.

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`, ids that are not integers, more positions than
                `config.n_positions`, labels of another shape than the inputs, a text without its features.
        """
        if inputs_embeds is None and self.is_whole_image(input_ids, labels, past_key_values, use_cache):
            return self.read_whole_image(
                input_ids,
                logits_to_keep,
                condition_states=condition_states,
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
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        self.check_length(inputs.shape[1], past)
        if input_ids is not None:
            inputs_embeds = self._embed(inputs, condition_states, past)
        else:
            inputs_embeds = inputs
        outputs = self.model(
            inputs_embeds=self.dropout(inputs_embeds),
            attention_mask=attention_mask,
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
        loss = None if labels is None else self.code_loss(logits, labels, kwargs.get("num_items_in_batch"))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _embed(self, input_ids, condition_states, past) -> torch.Tensor:
        """Embeddings `(B, T, hidden_size)`: those of ids, and in the prefix those of a text."""
        embeds = self.model.embed_tokens(input_ids)
        if self.text_projection is None:
            if condition_states is not None:
                raise ValueError(
                    f"`condition_states` must be None with condition_type={self.config.condition_type!r}."
                )
            return embeds
        length = self.config.condition_length
        if not isinstance(past, int):
            past = int(past)  # of a static cache
        if past >= length:
            return embeds
        if past or input_ids.shape[1] < length:
            raise ValueError(
                f"`input_ids` must hold the {length} condition ids in one call, got {input_ids.shape[1]} after {past}."
            )
        is_null = input_ids[:, :length] == self.config.null_class_token_id
        size = (len(input_ids), length, self.config.text_embed_dim)
        if condition_states is not None and tuple(condition_states.shape) != size:
            raise ValueError(f"`condition_states` must have shape {size}, got {tuple(condition_states.shape)}.")
        if condition_states is None and not torch.compiler.is_compiling() and not is_null.all():
            raise ValueError("`condition_states` is required: a prefix is a text, and not the null condition.")
        prefix = self.text_projection(condition_states, is_null)
        return torch.cat([prefix.to(embeds.dtype), embeds[:, length:]], dim=1)


__all__ = ["VQLlamaForCausalLM", "VQLlamaPreTrainedModel"]
