"""What the autoregressive priors share: sequences of a condition prefix and codes, their likelihood, and `generate`."""

import numpy as np
import torch
from torch import nn


def _integers(values, name: str) -> torch.LongTensor:
    """`values` as an int64 tensor, or a ValueError that names the argument."""
    tensor = values if isinstance(values, torch.Tensor) else torch.as_tensor(np.asarray(values))
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"`{name}` must hold integers, got {tensor.dtype}.")
    return tensor.long()


def check_range(values: torch.LongTensor, size: int, name: str, first: int = 0, meaning: str = ""):
    """A ValueError that names the argument unless `values` lie in `first` … `size - 1`; `meaning` says what these are."""
    if not values.numel():
        return
    least, most = (bound.item() for bound in values.aminmax())
    if least < first or most >= size:
        raise ValueError(f"`{name}` must lie in {first} … {size - 1}{meaning}, got values from {least} to {most}.")


class CodeSequenceMixin:
    """
    Sequences `(B, condition_length + h * w)` of a causal LM over codes: a prefix of condition ids, then the codes of an
    image row by row. Comes before `GenerationMixin` among the bases.

    The model's config has `codebook_size`, `grid_size`, `image_seq_length`, `condition_type`, `condition_length`,
    `condition_vocab_size`, `condition_token_offset`, `null_class_token_id`, `vocab_size`, `n_positions` (the longest input;
    the last code is never one) and, for names of classes, `id2label`.
    """

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
        check_range(ids, config.condition_vocab_size, "condition")
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
            condition: see [`~CodeSequenceMixin.prepare_condition`]; `None` is the null condition.

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
        check_range(codes, self.config.codebook_size, "indices")
        return codes.flatten(1).to(self.device)

    def log_likelihood(self, indices, condition=None, **inputs) -> torch.FloatTensor:
        """
        `log p(indices | condition)` in nats, summed over the codes, in float32. Call it in `eval()` mode.

        Args:
            indices: int `(B, h, w)` or `(B, h * w)`.
            condition: see [`~CodeSequenceMixin.prepare_condition`]; `None` is the null condition.
            inputs: what else `forward` takes, such as the codes of an upper level.

        Returns:
            `torch.FloatTensor` of shape `(B,)`.
        """
        codes = self._flat_codes(indices)
        prefix = self.prepare_condition(condition, batch_size=codes.shape[0])
        input_ids = torch.cat([prefix, codes[:, :-1]], dim=1)
        logits = self(input_ids=input_ids, use_cache=False, logits_to_keep=codes.shape[1], **inputs).logits
        return -nn.functional.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none").sum(1)

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """
        transformers' `generate`, with three defaults of an image prior: it ends with the grid, `guidance_scale` guides
        against the null condition unless `negative_prompt_ids` are given, and a prompt out of range is a ValueError.

        Args:
            inputs (int64 `(B, T)`): a prefix from [`~CodeSequenceMixin.prepare_condition`], and any first codes. An
                unconditional prior needs none.

        Returns:
            int64 `(B, condition_length + h * w)` unless `kwargs` ask for another length or output.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        if prompt is not None:
            if not len(prompt):
                raise ValueError("`inputs` must not be empty, got a prompt of 0 rows.")
            check_range(_integers(prompt, "inputs"), self.config.vocab_size, "inputs")
        source = embeds if embeds is not None else prompt
        length = source.shape[1] if source is not None else 1
        settings = generation_config if generation_config is not None else self.generation_config

        def setting(name):
            return kwargs[name] if kwargs.get(name) is not None else getattr(settings, name, None)

        if source is None and setting("bos_token_id") is None:
            raise ValueError("`inputs` is required: this prior has a condition, see `prepare_condition`.")
        total = self.config.condition_length + self.config.image_seq_length
        if setting("max_new_tokens") is not None:
            total = length + setting("max_new_tokens")
        elif setting("max_length") is not None:
            total = setting("max_length")
        else:
            if length >= total:
                raise ValueError(f"`inputs` must leave a code to sample: {length} of {total} ids are given.")
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


__all__ = ["CodeSequenceMixin", "check_range"]
