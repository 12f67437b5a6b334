"""What the autoregressive priors share: sequences of a condition prefix and codes, their likelihood, and
`generate`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from ...argument_checks import check_integer, check_real, check_tensor
from .code_decoding import CodeDecoder, preallocated_cache, sample_codes


def too_many_positions(reached: int, n_positions: int) -> str:
    """What an error says of ids that reach further than the positions of a model."""
    return (
        f"`input_ids` reach position {reached}, but the model has {n_positions}: a prefix of P ids and N codes takes "
        "P + N - 1, since the last code is never an input."
    )


def _integers(values, name: str) -> torch.LongTensor:
    """`values` as an int64 tensor, or a ValueError that names the argument."""
    try:
        tensor = values if isinstance(values, torch.Tensor) else torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError) as error:  # of several shapes, or no numbers
        raise ValueError(f"`{name}` must hold integers, got a {type(values).__name__} that is no array.") from error
    if not tensor.numel():
        raise ValueError(f"`{name}` must hold at least one integer, got shape {tuple(tensor.shape)}.")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"`{name}` must hold integers, got {tensor.dtype}.")
    return tensor.long()


def check_range(values: torch.LongTensor, size: int, name: str, first: int = 0, meaning: str = ""):
    """A ValueError that names the argument unless `values` lie in `first` … `size - 1`; `meaning` says what these
    are.
    """
    if not values.numel():
        return
    least, most = (bound.item() for bound in values.aminmax())
    if least < first or most >= size:
        raise ValueError(f"`{name}` must lie in {first} … {size - 1}{meaning}, got values from {least} to {most}.")


class CodesOnly(LogitsProcessor):
    """Forbids what is no code, where a head is wider than the codebook."""

    def __init__(self, codebook_size: int):
        self.codebook_size = codebook_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        scores[:, self.codebook_size :] = float("-inf")
        return scores


class CodeSequenceMixin:
    """
    Sequences `(B, condition_length + h * w)` of a causal LM over codes: a prefix of condition ids, then the codes of
    an image in the order of `config.code_order`. Comes before `GenerationMixin` among the bases.

    The model's config is a `CodeSequenceConfigMixin`, with `codebook_size`, `grid_size`, `condition_type`,
    `condition_length`, `condition_vocab_size`, `input_vocab_size`, `vocab_size` (the width of the logits),
    `n_positions` (the longest input; the last code is never one) and, for names of classes, `id2label`.
    """

    @property
    def device(self) -> torch.device:
        """Where the model computes; its weights may wait elsewhere between the calls of their layers."""
        device = next(self.parameters()).device  # a `super().device` would end the graph of torch.compile
        if device.type != "meta":
            return device
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((place for place in places if place is not None), device))

    def prepare_condition(
        self,
        condition: int | str | Sequence[int] | Sequence[str] | torch.Tensor | None = None,
        batch_size: int | None = None,
    ) -> torch.LongTensor:
        """
        The prefix of ids for a condition, on the model's device.

        Args:
            condition: `None` for the start token or the null condition; else one class, or one per example, as an
                `int`, a name of `config.id2label`, a list of these, or a tensor `(B,)`; for `condition_type="codes"` a
                tensor or array of condition codes `(B, condition_length)` or `(B, h', w')`.
            batch_size (`int`, *optional*): how many rows are wanted, at least 1; a single condition is repeated.

        Returns:
            `torch.LongTensor` of shape `(B, condition_length)`.

        Raises:
            ValueError: condition out of range, of the wrong shape or type, or missing where there is no null
                condition.
        """
        config = self.config
        batch_size = None if batch_size is None else check_integer("batch_size", batch_size, 1)
        if condition is None:
            token = config.null_class_token_id
            if token is None and config.condition_type != "unconditional":
                raise ValueError(
                    "`condition` is required: with share_condition_embedding=True there is no null condition."
                )
            token = config.bos_token_id if token is None else token
            return torch.full((batch_size or 1, config.condition_length), token, device=self.device)
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
        # transformers names classes without names "LABEL_0", …
        found = [i for i, name in names.items() if name == label != f"LABEL_{i}"]
        if self.config.condition_type != "class" or len(found) != 1:
            raise ValueError(
                f"`condition` {label!r} is not one name of `config.id2label`: {list(names.values())[:10]}."
            )
        return found[0]

    def prepare_inputs(
        self,
        indices: torch.LongTensor,
        condition: int | str | Sequence[int] | Sequence[str] | torch.Tensor | None = None,
    ) -> dict[str, torch.LongTensor]:
        """
        What `forward` takes in training.

        Args:
            indices: the codes of images, int `(B, h, w)` or `(B, h * w)`.
            condition: see [`~CodeSequenceMixin.prepare_condition`]; `None` is the null condition.

        Returns:
            `dict` with `input_ids` and `labels`, both int64 `(B, condition_length + h * w)`; the prefix is labelled
            -100.

        Raises:
            ValueError: indices of the wrong shape, type or range; condition as in `prepare_condition`.
        """
        codes = self._flat_codes(indices)
        prefix = self.prepare_condition(condition, batch_size=codes.shape[0])
        return {
            "input_ids": torch.cat([prefix, codes], dim=1),
            "labels": torch.cat([torch.full_like(prefix, -100), codes], dim=1),
        }

    def extract_indices(self, sequences: torch.LongTensor | ModelOutput) -> torch.LongTensor:
        """The grid `(B, h, w)` of codes in full sequences `(B, condition_length + h * w)`, such as `generate`
        returns, also by `return_dict_in_generate=True`.
        """
        sequences = getattr(sequences, "sequences", sequences)
        check_tensor("sequences", sequences)
        start, length = self.config.condition_length, self.config.image_seq_length
        if sequences.ndim != 2 or sequences.shape[1] != start + length:
            raise ValueError(f"`sequences` must have shape (B, {start + length}), got {tuple(sequences.shape)}.")
        return self.from_reading_order(sequences[:, start:])

    def to_reading_order(self, grid: torch.Tensor) -> torch.Tensor:
        """
        What belongs to the positions of the grid, in the order in which the model reads them.

        Args:
            grid (`(B, h, w, ...)`): codes, a mask of known ones, or anything else.

        Returns:
            `torch.Tensor` of shape `(B, h * w, ...)`.

        Raises:
            ValueError: another grid than the model's.
        """
        if tuple(grid.shape[1:3]) != tuple(self.config.grid_size):
            raise ValueError(f"`grid` must have shape (B, {self._sides}, ...), got {tuple(grid.shape)}.")
        flat = grid.flatten(1, 2)
        return flat if self.config.order == "raster" else flat[:, self._order(grid.device)]

    def from_reading_order(self, sequence: torch.Tensor) -> torch.Tensor:
        """The grid `(B, h, w, ...)` of what [`~CodeSequenceMixin.to_reading_order`] has given, `(B, h * w, ...)`."""
        if self.config.order != "raster":
            sequence = sequence[:, self._order(sequence.device).argsort()]
        return sequence.unflatten(1, tuple(self.config.grid_size))

    def _order(self, device: torch.device) -> torch.LongTensor:
        return torch.tensor(self.config.code_order, device=device)

    @property
    def _sides(self) -> str:
        return ", ".join(map(str, self.config.grid_size))

    def _flat_codes(self, indices) -> torch.LongTensor:
        codes = _integers(indices, "indices")
        height, width = self.config.grid_size
        if tuple(codes.shape[1:]) not in ((height, width), (height * width,)):
            raise ValueError(
                f"`indices` must have shape (B, {height}, {width}) or (B, {height * width}), got {tuple(codes.shape)}."
            )
        check_range(codes, self.config.codebook_size, "indices")
        return self.to_reading_order(codes.reshape(-1, height, width).to(self.device))

    def corrupt_inputs(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """
        The training noise of `config.pkeep`, where the prior has it, on the codes and of `config.condition_dropout` on
        the prefix of `input_ids` `(B, T)`; the argument is left unchanged. `forward` calls it in training mode when
        labels are given.
        """
        config, start = self.config, self.config.condition_length
        prefix, codes = input_ids[:, :start], input_ids[:, start:]
        if getattr(config, "pkeep", 1) < 1:
            keep = torch.rand(codes.shape, device=codes.device) < config.pkeep
            codes = torch.where(keep, codes, torch.randint_like(codes, config.codebook_size))
        if config.condition_dropout > 0:
            drop = torch.rand((len(prefix), 1), device=prefix.device) < config.condition_dropout
            prefix = prefix.masked_fill(drop, config.null_class_token_id)
        return torch.cat([prefix, codes], dim=1)

    def code_loss(
        self,
        logits: torch.FloatTensor,
        labels: torch.LongTensor,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> torch.FloatTensor:
        """
        The mean cross-entropy in nats of the codes among `labels`.

        Args:
            logits (`(B, T - 1, vocab_size)`): those of all inputs but the last.
            labels (int64 `(B, T)`): shifted here. Neither the prefix nor -100 counts.
            num_items_in_batch (`int`, *optional*): what the sum is divided by, instead of the number of codes.
        """
        targets = labels[:, 1:].long().clone()
        targets[:, : self.config.condition_length - 1] = -100
        return self.loss_function(
            logits=logits,
            labels=None,
            vocab_size=self.config.vocab_size,
            num_items_in_batch=num_items_in_batch,
            shift_labels=targets,
        )

    def check_inputs(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        labels: torch.LongTensor | None,
    ) -> torch.Tensor:
        """The one of `input_ids` and `inputs_embeds` that is given, or a ValueError."""
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

    def is_whole_image(
        self,
        input_ids: torch.LongTensor | None,
        labels: torch.LongTensor | None,
        past_key_values: Any,
        use_cache: bool | None,
    ) -> bool:
        """Whether `input_ids` are a prefix and all codes of an image, the last of which no position is left for."""
        if not isinstance(input_ids, torch.Tensor) or labels is not None or past_key_values is not None or use_cache:
            return False
        whole = self.config.condition_length + self.config.image_seq_length
        return input_ids.ndim == 2 and input_ids.shape[1] == whole == self.config.n_positions + 1

    def read_whole_image(
        self, input_ids: torch.LongTensor, logits_to_keep: int | torch.Tensor = 0, **inputs: Any
    ) -> CausalLMOutputWithPast:
        """
        What `forward` returns of a whole image without labels, as a trainer asks for that computes the loss itself
        (label smoothing): logits `(B, T, vocab_size)`, those of the last position 0, since nothing follows it. The
        training noise acts as it does with labels.
        """
        output = self(input_ids=input_ids, labels=input_ids, return_dict=True, **inputs)
        logits = nn.functional.pad(output.logits, (0, 0, 0, 1))
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            logits=logits[:, keep], hidden_states=output.hidden_states, attentions=output.attentions
        )

    def check_length(self, length: int, past: int | torch.Tensor) -> None:
        """A ValueError if `length` ids after the `past` ones are more than the model has positions for."""
        if not isinstance(past, int):
            return  # a static cache counts on the device, and reading it there would stall: `generate` has checked
        if past + length > self.config.n_positions:
            raise ValueError(too_many_positions(past + length, self.config.n_positions))

    def log_likelihood(
        self,
        indices: torch.LongTensor,
        condition: int | str | Sequence[int] | Sequence[str] | torch.Tensor | None = None,
        **inputs: Any,
    ) -> torch.FloatTensor:
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
        # a code among positions that see each other must not see itself: a pass for each
        alone = min(max(getattr(self.config, "n_unmasked", 0) - prefix.shape[1], 0), codes.shape[1])
        logits = [
            self(input_ids=input_ids[:, : prefix.shape[1] + i], use_cache=False, logits_to_keep=1, **inputs).logits
            for i in range(alone)
        ]
        if alone < codes.shape[1]:
            keep = codes.shape[1] - alone
            logits.append(self(input_ids=input_ids, use_cache=False, logits_to_keep=keep, **inputs).logits)
        logits = torch.cat(logits, dim=1)
        return -nn.functional.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none").sum(1)

    def generate(
        self, inputs: torch.LongTensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ):
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
            check_range(_integers(prompt, "inputs"), self.config.input_vocab_size, "inputs")
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
                f"`max_new_tokens` leads to {total} tokens, but the model has positions for "
                f"{self.config.n_positions + 1}."
            )
        if setting("guidance_scale") is not None:
            check_real("guidance_scale", setting("guidance_scale"))
        if setting("guidance_scale") not in (None, 1, 1.0):
            kwargs["negative_prompt_ids"] = self._negative_prompt(prompt, kwargs.get("negative_prompt_ids"), setting)
        if self.config.vocab_size > self.config.codebook_size:
            processors = kwargs.get("logits_processor") or []
            kwargs["logits_processor"] = LogitsProcessorList([CodesOnly(self.config.codebook_size), *processors])
        placed = {"positions": kwargs.get("position_ids"), "prompt_mask": kwargs.get("attention_mask")}
        placed = {name: value for name, value in placed.items() if value is not None}
        if self._is_drawn_plainly(prompt, kwargs, setting) and (self.reads_in_places or not placed):
            kwargs["custom_generate"] = sample_codes
            if placed:
                kwargs |= placed
                kwargs.pop("position_ids", None)
                kwargs.pop("attention_mask", None)
            if kwargs.get("negative_prompt_ids") is not None:
                kwargs["null_prompt"] = kwargs.pop("negative_prompt_ids").to(prompt.device)
                kwargs["null_scale"], kwargs["guidance_scale"] = setting("guidance_scale"), 1.0
        elif kwargs.get("position_ids") is not None and kwargs.get("negative_prompt_ids") is not None:
            # transformers' guidance counts positions from 0
            raise ValueError(
                "`position_ids` and `guidance_scale` exclude each other but with the cache of the prior's own."
            )
        elif length < getattr(self.config, "n_unmasked", 0):
            kwargs["use_cache"] = False  # what has been read changes with each code among the first positions
        return super().generate(inputs, generation_config=generation_config, **kwargs)

    prompt_inputs = ()
    """The arguments of `forward` that belong to the prompt, a row for each example."""

    reads_in_places = True
    """Whether `position_ids` may leave out places of the grid, and `attention_mask` ids of the prefix."""

    def new_cache(self, length: int):
        """The cache of a sequence of `length` ids at most; `None` if the model makes its own."""
        return preallocated_cache(self.config.num_hidden_layers, length)

    def code_decoder(self, batch_size: int, length: int, **inputs: Any):
        """What reads sequences of `length` ids at most, code by code: see [`CodeDecoder`], whose arguments it has."""
        return CodeDecoder(self, length, **inputs)

    def _is_drawn_plainly(self, prompt, kwargs: dict, setting) -> bool:
        """
        Whether `sample_codes` does what `generate` is asked for: one code of each row after another, with nothing but
        the sequences returned. All else is transformers' own loop.
        """
        if prompt is None or self.training or setting("eos_token_id") is not None or setting("use_cache") is False:
            return False
        others = (
            "cache_implementation past_key_values inputs_embeds streamer assistant_model "
            "custom_generate negative_prompt_attention_mask stop_strings prompt_lookup_num_tokens synced_gpus "
            "return_dict_in_generate penalty_alpha dola_layers constraints force_words_ids prefill_chunk_size"
        )
        if any(setting(name) is not None and setting(name) is not False for name in others.split()):
            return False
        negative = kwargs.get("negative_prompt_ids")
        if negative is not None and negative.shape != (
            len(prompt) * (setting("num_return_sequences") or 1),
            prompt.shape[1],
        ):
            return False
        return (setting("num_beams") or 1) == 1

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


__all__ = ["CodeSequenceMixin", "CodesOnly", "check_range"]
