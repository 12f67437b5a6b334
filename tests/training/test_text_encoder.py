"""Text encoders are loaded whatever model they are a part of."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from hf_vq.pipelines.conditioning import encode_text
from hf_vq.training.text_encoder import load_text_encoder


SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 4}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 4}
VISION = {**{k: v for k, v in SMALL.items() if k != "vocab_size"}, "image_size": 8, "patch_size": 4}
MODELS = {
    "clip": lambda: CLIPModel(CLIPConfig(text_config=SMALL, vision_config=VISION)),
    "t5": lambda: T5Model(T5Config(**T5)),
    "bert": lambda: BertModel(BertConfig(**SMALL)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_part_that_encodes_text(tmp_path, name, load_reports):
    model = MODELS[name]().eval()
    model.half().save_pretrained(tmp_path)
    model.float()
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    encoder, tokenizer = load_text_encoder(str(tmp_path), torch.device("cpu"))
    load_reports.messages.clear()  # the other parts are left out
    assert not any(parameter.requires_grad for parameter in encoder.parameters()) and encoder.config.hidden_size == 8
    condition = encode_text(encoder, tokenizer, "a", max_length=3)
    part = {"clip": lambda: model.text_model, "t5": lambda: model.encoder, "bert": lambda: model}[name]()
    ids, mask = torch.tensor([[2, 0, 0]]), torch.tensor([[1, 0, 0]])
    with torch.no_grad():
        expected = part(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(condition.embeddings, expected)


def test_a_model_without_text_is_refused(tmp_path):
    ViTModel(ViTConfig(**VISION)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        load_text_encoder(str(tmp_path), torch.device("cpu"))
