"""Label smoothing of `transformers.Trainer`, which calls a model without its labels."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hf_vq import (
    PixelCNNConfig,
    PixelCNNForCausalLM,
    PixelSNAILConfig,
    PixelSNAILForCausalLM,
    VQGPTConfig,
    VQGPTForCausalLM,
    VQLlamaConfig,
    VQLlamaForCausalLM,
)


CONDITION = {"condition_type": "class", "condition_vocab_size": 3}
GPT_SIZES = {"n_layer": 1, "n_embd": 16, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA_SIZES = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "embd_pdrop": 0.0,
}
CNN_SIZES = {"hidden_size": 16, "num_layers": 2, "dropout": 0.0}
PRIORS = {
    "gpt": lambda: VQGPTForCausalLM(VQGPTConfig(codebook_size=8, grid_size=(3, 4), **GPT_SIZES, **CONDITION)),
    "llama": lambda: VQLlamaForCausalLM(VQLlamaConfig(codebook_size=8, grid_size=(3, 4), **LLAMA_SIZES, **CONDITION)),
    "pixelcnn": lambda: PixelCNNForCausalLM(
        PixelCNNConfig(codebook_size=8, grid_size=(3, 4), **CNN_SIZES, **CONDITION)
    ),
    "pixelsnail": lambda: PixelSNAILForCausalLM(
        PixelSNAILConfig(codebook_size=8, grid_size=(3, 4), hidden_size=16, num_layers=1, dropout=0.0, **CONDITION)
    ),
}


class Inputs(Dataset):
    """Four images, of each the prefix and the first `length` codes."""

    def __init__(self, prior, length):
        indices = torch.randint(0, 8, (4, 3, 4), generator=torch.Generator().manual_seed(0))
        inputs = prior.prepare_inputs(indices, torch.tensor([0, 1, 2, 1]))
        self.inputs = {name: value[:, : length + 1] for name, value in inputs.items()}

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.inputs.items()}


def train(prior, data, folder, micro_batches=1):
    """The loss of one step at a learning rate of 0."""
    arguments = TrainingArguments(
        str(folder),
        label_smoothing_factor=0.3,
        max_steps=1,
        per_device_train_batch_size=4 // micro_batches,
        gradient_accumulation_steps=micro_batches,
        learning_rate=0.0,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    return Trainer(prior, arguments, train_dataset=data).train().training_loss


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("length", [7, 12], ids=["beginning", "whole"])
@pytest.mark.parametrize("name", PRIORS)
def test_labels_are_smoothed(name, length, micro_batches, tmp_path):
    """As torch's cross-entropy smooths, each code against what the position before it predicts."""
    torch.manual_seed(0)
    prior = PRIORS[name]()
    data = Inputs(prior, length)
    codes = data.inputs["input_ids"][:, 1:]
    with torch.no_grad():
        logits = prior.eval()(data.inputs["input_ids"][:, :-1]).logits
    expected = F.cross_entropy(logits.reshape(-1, 8), codes.reshape(-1), label_smoothing=0.3)
    unshifted = F.cross_entropy(logits[:, 1:].reshape(-1, 8), codes[:, :-1].reshape(-1), label_smoothing=0.3)
    loss = train(prior, data, tmp_path, micro_batches)
    assert loss == pytest.approx(float(expected), rel=1e-5) and abs(loss - float(unshifted)) > 1e-3


@pytest.mark.parametrize("name", PRIORS)
def test_a_whole_image_has_logits_of_nothing_after_it(name):
    torch.manual_seed(0)
    prior = PRIORS[name]().eval()
    ids = Inputs(prior, 12).inputs["input_ids"]
    with torch.no_grad():
        logits = prior(ids).logits
        torch.testing.assert_close(logits[:, :-1], prior(ids[:, :-1]).logits)
        assert torch.equal(prior(ids, logits_to_keep=2).logits, logits[:, -2:])
    assert logits.shape[1] == 13 and not logits[:, -1].any()
    with pytest.raises(ValueError, match="reach position 13, but the model has 12"):
        prior(ids, use_cache=True)


def test_the_training_noise_acts_without_labels():
    torch.manual_seed(0)
    prior = PRIORS["gpt"]()
    prior.config.condition_dropout = 1.0
    ids = Inputs(prior, 12).inputs["input_ids"]
    null = ids.clone()
    null[:, 0] = prior.config.null_class_token_id
    for module in prior.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert torch.equal(prior.train()(ids).logits, prior.train()(null).logits)
    assert not torch.equal(prior.eval()(ids).logits, prior.eval()(null).logits)
