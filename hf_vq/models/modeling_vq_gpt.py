"""The autoregressive prior over code indices: transformers' GPT-2 with a condition prefix."""

import numpy as np
import torch
from torch import nn
from transformers import GenerationMixin, GPT2Model
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_vq_gpt import VQGPTConfig


class VQGPTPreTrainedModel(GPT2PreTrainedModel):
    """Weight initialisation (N(0, 0.02), residual projections scaled by depth) and capabilities are GPT-2's."""

    config: VQGPTConfig


def _integers(values, name: str) -> torch.LongTensor:
    """`values` as an int64 tensor, or a ValueError that names the argument."""
    tensor = values if isinstance(values, torch.Tensor) else torch.as_tensor(np.asarray(values))
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"`{name}` must hold integers, got {tensor.dtype}.")
    return tensor.long()


def _check_range(values: torch.LongTensor, size: int, name: str):
    if values.numel() and (values.min() < 0 or values.max() >= size):
        raise ValueError(
            f"`{name}` must lie in 0 … {size - 1}, got values from {values.min().item()} to {values.max().item()}."
        )


def _bidirectional_prefix(n_unmasked: int):
    """Mask function: the first `n_unmasked` positions see each other."""

    def allowed(batch_idx, head_idx, q_idx, kv_idx):
        return (q_idx < n_unmasked) & (kv_idx < n_unmasked)

    return allowed


class VQGPTForCausalLM(VQGPTPreTrainedModel, GenerationMixin):
    """
    GPT prior over code indices (Esser et al., "Taming Transformers for High-Resolution Image Synthesis", 2021, eq. 9 and
    10): `p(s | c) = prod_i p(s_i | s_<i, c)`, with `c` a prefix of ids, see [`VQGPTConfig`].

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
        self.lm_head = nn.Linear(config.n_embd, config.codebook_size, bias=False)
        self.post_init()

    # ------------------------------------------------------------------------------------------------ sequences

    def prepare_condition(self, condition=None, batch_size: int | None = None) -> torch.LongTensor:
        """
        The prefix of ids for a condition, on the model's device.

        Args:
            condition: `None` for the start token or the null condition; else one class, or one per example, as an `int`,
                a name of `config.id2label`, a list of these, or a tensor `(B,)`; for `condition_type="codes"` a tensor or
                array of condition codes `(B, condition_length)` or `(B, h', w')`.
            batch_size (`int`, *optional*): how many rows are wanted; a single condition is repeated.

        Returns:
            `torch.LongTensor` of shape `(B, condition_length)`.

        Raises:
            ValueError: condition out of range, of the wrong shape or type, or missing where there is no null condition.
        """
        config = self.config
        if condition is None:
            token = config.null_class_token_id
            if token is None and config.condition_type != "unconditional":
                raise ValueError(
                    "`condition` is required: with share_condition_embedding=True there is no null condition."
                )
            return torch.full((batch_size or 1, config.condition_length), token or 0, device=self.device)
        if config.condition_type == "unconditional":
            raise ValueError("`condition` must be None: this prior is unconditional.")
        if isinstance(condition, str):
            condition = [condition]
        if isinstance(condition, (list, tuple)) and any(isinstance(label, str) for label in condition):
            condition = [self._class_id(label) for label in condition]
        ids = _integers(condition, "condition")
        ids = ids.reshape(len(ids) if ids.ndim else 1, -1)
        if ids.shape[1] != config.condition_length:
            raise ValueError(
                f"`condition` must have {config.condition_length} ids for each example, got {ids.shape[1]}."
            )
        _check_range(ids, config.condition_vocab_size, "condition")
        if batch_size is not None and ids.shape[0] not in (1, batch_size):
            raise ValueError(f"`condition` must have 1 or {batch_size} rows, got {ids.shape[0]}.")
        if batch_size is not None:
            ids = ids.expand(batch_size, -1)
        return ids.to(self.device) + config.condition_token_offset

    def _class_id(self, label) -> int:
        if not isinstance(label, str):
            return label
        names = self.config.id2label or {}
        found = [i for i, name in names.items() if name == label]
        if self.config.condition_type != "class" or len(found) != 1:
            raise ValueError(
                f"`condition` {label!r} is not one name of `config.id2label`: {list(names.values())[:10]}."
            )
        return found[0]

    def prepare_inputs(self, indices, condition=None) -> dict[str, torch.LongTensor]:
        """
        What `forward` takes in training.

        Args:
            indices: the codes of images, int `(B, h, w)` or `(B, h * w)`.
            condition: see [`~VQGPTForCausalLM.prepare_condition`]; `None` is the null condition.

        Returns:
            `dict` with `input_ids` and `labels`, both int64 `(B, condition_length + h * w)`; the prefix is labelled -100.

        Raises:
            ValueError: indices of the wrong shape, type or range; condition as in `prepare_condition`.
        """
        codes = self._flat_codes(indices)
        prefix = self.prepare_condition(condition, batch_size=codes.shape[0])
        return {
            "input_ids": torch.cat([prefix, codes], dim=1),
            "labels": torch.cat([torch.full_like(prefix, -100), codes], dim=1),
        }

    def extract_indices(self, sequences: torch.LongTensor) -> torch.LongTensor:
        """The grid `(B, h, w)` of codes in full sequences `(B, condition_length + h * w)`, such as `generate` returns."""
        start, length = self.config.condition_length, self.config.image_seq_length
        if sequences.ndim != 2 or sequences.shape[1] != start + length:
            raise ValueError(f"`sequences` must have shape (B, {start + length}), got {tuple(sequences.shape)}.")
        return sequences[:, start:].reshape(-1, *self.config.grid_size)

    def _flat_codes(self, indices) -> torch.LongTensor:
        codes = _integers(indices, "indices")
        height, width = self.config.grid_size
        if tuple(codes.shape[1:]) not in ((height, width), (height * width,)):
            raise ValueError(
                f"`indices` must have shape (B, {height}, {width}) or (B, {height * width}), got {tuple(codes.shape)}."
            )
        _check_range(codes, self.config.codebook_size, "indices")
        return codes.flatten(1).to(self.device)

    def log_likelihood(self, indices, condition=None) -> torch.FloatTensor:
        """
        `log p(indices | condition)` in nats, summed over the codes, in float32. Call it in `eval()` mode.

        Args:
            indices: int `(B, h, w)` or `(B, h * w)`.
            condition: see [`~VQGPTForCausalLM.prepare_condition`]; `None` is the null condition.

        Returns:
            `torch.FloatTensor` of shape `(B,)`.
        """
        codes = self._flat_codes(indices)
        prefix = self.prepare_condition(condition, batch_size=codes.shape[0])
        inputs = torch.cat([prefix, codes[:, :-1]], dim=1)
        logits = self(input_ids=inputs, use_cache=False, logits_to_keep=codes.shape[1]).logits
        return -nn.functional.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none").sum(1)

    # ------------------------------------------------------------------------------------------------ training

    def corrupt_inputs(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """
        The training noise of `config.pkeep` on the codes and of `config.condition_dropout` on the prefix of
        `input_ids` `(B, T)`; the arguments are left unchanged. `forward` calls it in training mode when labels are given.
        """
        config, start = self.config, self.config.condition_length
        prefix, codes = input_ids[:, :start], input_ids[:, start:]
        if config.pkeep < 1:
            keep = torch.rand(codes.shape, device=codes.device) < config.pkeep
            codes = torch.where(keep, codes, torch.randint_like(codes, config.codebook_size))
        if config.condition_dropout > 0:
            drop = torch.rand((len(prefix), 1), device=prefix.device) < config.condition_dropout
            prefix = prefix.masked_fill(drop, config.null_class_token_id)
        return torch.cat([prefix, codes], dim=1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids (int64 `(B, T)`): a prefix of condition ids, then codes.
            labels (int64 `(B, T)`, *optional*): the code wanted at each position; the model shifts them. The prefix and
                positions with -100 do not count, so that `labels=input_ids` is fine. The last token predicts nothing and
                is not run: `logits` then have `T - 1` positions.
            attention_mask, past_key_values, inputs_embeds `(B, T, n_embd)`, position_ids, use_cache, logits_to_keep: as
                in every causal LM of transformers.

        Returns:
            `CausalLMOutputWithPast` with `logits` `(B, T, codebook_size)`.

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`, ids that are not integers, more positions than
                `config.n_positions`, labels of another shape than the inputs.
        """
        inputs = self._check_inputs(input_ids, inputs_embeds, labels)
        if labels is not None:
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
            targets = labels[:, 1:].clone()
            targets[:, : self.config.condition_length - 1] = -100
            loss = self.loss_function(
                logits=logits,
                labels=None,
                vocab_size=self.config.codebook_size,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
                shift_labels=targets,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _check_inputs(self, input_ids, inputs_embeds, labels):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        if input_ids is not None and (input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32)):
            raise ValueError(
                f"`input_ids` must be int64 of shape (B, T), got {input_ids.dtype} of shape {tuple(input_ids.shape)}."
            )
        inputs = input_ids if input_ids is not None else inputs_embeds
        if labels is not None and labels.shape != inputs.shape[:2]:
            raise ValueError(f"`labels` must have shape {tuple(inputs.shape[:2])}, got {tuple(labels.shape)}.")
        if labels is not None and labels.shape[1] <= self.config.condition_length:
            raise ValueError(f"`labels` must reach beyond the {self.config.condition_length} condition ids.")
        return inputs

    def _check_length(self, length: int, past_key_values, use_cache):
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if not isinstance(past, int):
            return  # a static cache counts on the device, and reading it there would stall: `generate` has checked
        if past + length > self.config.n_positions:
            raise ValueError(
                f"`input_ids` reach position {past + length}, but the model has {self.config.n_positions}: a prefix of P ids "
                "and N codes takes P + N - 1, since the last code is never an input."
            )
        if past_key_values is None and not use_cache:
            return
        if past < self.config.n_unmasked and (past or length < self.config.n_unmasked):
            raise ValueError(
                f"`input_ids` must hold the {self.config.n_unmasked} bidirectional positions in one call when a cache is "
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
                f"`n_unmasked` needs attn_implementation 'sdpa' or 'eager', got {self.config._attn_implementation!r}, which "
                "takes no mask of its own."
            )
        return create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            or_mask_function=_bidirectional_prefix(n_unmasked),
        )

    @staticmethod
    def create_masks_for_generate(config, **kwargs):
        """Called by `generate` before a compiled step: the same masks as above."""
        if config.n_unmasked > 1:
            kwargs["or_mask_function"] = _bidirectional_prefix(config.n_unmasked)
        return create_masks_for_generate(config=config, **kwargs)

    # ------------------------------------------------------------------------------------------------ generation

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """
        transformers' `generate`, with three defaults of an image prior: it ends with the grid, `guidance_scale` guides
        against the null condition unless `negative_prompt_ids` are given, and a prompt out of range is a ValueError.

        Args:
            inputs (int64 `(B, T)`, *optional*): a prefix from [`~VQGPTForCausalLM.prepare_condition`], and any first codes.

        Returns:
            int64 `(B, condition_length + h * w)` unless `kwargs` ask for another length or output.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        if prompt is not None:
            _check_range(_integers(prompt, "inputs"), self.config.vocab_size, "inputs")
        source = embeds if embeds is not None else prompt
        length = source.shape[1] if source is not None else 1
        settings = generation_config if generation_config is not None else self.generation_config

        def setting(name):
            return kwargs[name] if kwargs.get(name) is not None else getattr(settings, name, None)

        total = self.config.condition_length + self.config.image_seq_length
        if setting("max_new_tokens") is not None:
            total = length + setting("max_new_tokens")
        elif setting("max_length") is not None:
            total = setting("max_length")
        else:
            kwargs["max_new_tokens"] = total - length
        if total - 1 > self.config.n_positions:
            raise ValueError(
                f"`max_new_tokens` leads to {total} tokens, but the model has positions for {self.config.n_positions + 1}."
            )
        if setting("guidance_scale") not in (None, 1, 1.0):
            kwargs["negative_prompt_ids"] = self._negative_prompt(prompt, kwargs.get("negative_prompt_ids"), setting)
        return super().generate(inputs, generation_config=generation_config, **kwargs)

    def _negative_prompt(self, prompt, negative, setting):
        if (setting("num_beams") or 1) > 1:
            raise ValueError(
                "`guidance_scale` and `num_beams` > 1 exclude each other: the guiding cache follows no beams."
            )
        if negative is None:
            if prompt is None or self.config.null_class_token_id is None:
                raise ValueError(
                    "`guidance_scale` needs `negative_prompt_ids`: there is no prompt or no null condition."
                )
            start = self.config.condition_length
            null = torch.full_like(prompt[:, :start], self.config.null_class_token_id)
            negative = torch.cat([null, prompt[:, start:]], dim=1)
        return negative.repeat_interleave(setting("num_return_sequences") or 1, dim=0)


__all__ = ["VQGPTForCausalLM", "VQGPTPreTrainedModel"]
