import json
import math

import pytest
import torch

from hf_vq import VQGPTConfig, VQGPTForCausalLM, VQVAEConfig, VQVAEModel
from hf_vq.evaluation.evaluate import evaluate_prior, evaluate_tokenizer
from hf_vq.evaluation.features import extract_features
from hf_vq.evaluation.generation import kernel_distance
from hf_vq.evaluation.reconstruction import psnr


class AbsoluteDistance(torch.nn.Module):
    name = "absolute"

    def forward(self, images, references):
        return (images - references).abs().amax((1, 2, 3))


class PixelMeans:
    name = "pixel_means"

    def pooled(self, images):
        return images.mean((2, 3))


def tokenizer(**kwargs):
    torch.manual_seed(0)
    config = VQVAEConfig(
        hidden_size=16, residual_hidden_size=8, num_embeddings=16, embed_dim=4, resolution=16, **kwargs
    )
    return VQVAEModel(config).eval()


def pictures(n=11):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def loader(images, batch_size=4):
    return [{"pixel_values": batch} for batch in images.split(batch_size)]


def evaluate(model, images, **kwargs):
    return evaluate_tokenizer(model, loader(images), progress=False, **kwargs)


def test_tokenizer_figures_are_those_of_the_whole_set_at_once(tmp_path):
    model, images = tokenizer(), pictures()
    with torch.no_grad():
        model.get_last_layer().mul_(30)  # so that some of the decoder's values leave [-1, 1]
        assert model(images).sample.abs().amax() > 1.2
    result = evaluate(
        model,
        images,
        perceptual=AbsoluteDistance(),
        feature_extractors=[PixelMeans()],
        usage_plot=tmp_path / "usage.png",
    )
    with torch.no_grad():
        indices = model.encode(images).indices
        sample = model.decode_indices(indices).sample.clamp(-1, 1)
    assert result["psnr"] == pytest.approx(float(psnr(sample, images).mean()), rel=1e-5)
    assert result["l1"] == pytest.approx(float((sample - images).abs().mean()), rel=1e-5)
    assert result["perceptual"] == pytest.approx(float((sample - images).abs().amax((1, 2, 3)).mean()), rel=1e-5)
    assert result["perceptual_network"] == "absolute"
    counts = torch.bincount(indices.flatten(), minlength=16).double()
    entropy = -sum(p * math.log(p) for p in (counts / counts.sum()).tolist() if p > 0)
    assert result["codebook_perplexity"] == pytest.approx(math.exp(entropy), rel=1e-5)
    assert result["codebook_usage"] == pytest.approx(float((counts > 0).double().mean()))
    assert result["codebook_dead_codes"] == int((counts == 0).sum())
    assert result["num_images"] == 11 and result["images_per_second"] > 0
    distances = {entry["label"]: entry for entry in result["distances"]}
    sets = [extract_features([x], PixelMeans(), progress=False).features for x in (images, sample)]
    assert distances["kernel_distance[pixel_means]"]["value"] == pytest.approx(kernel_distance(*sets)[0], rel=1e-4)
    assert (tmp_path / "usage.png").stat().st_size > 0
    json.dumps(result)


def test_modes_and_codebook_are_left_as_they_were():
    model = tokenizer().train()
    model.decoder.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, pictures())
    assert model.training and model.quantize.training and not model.decoder.training
    for name, value in model.state_dict().items():  # an EMA codebook learns in training mode only
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    with pytest.raises(ValueError, match="dataloader"):
        evaluate_tokenizer(model, [], progress=False)
    assert model.training


def test_each_codebook_of_a_residual_quantizer_counts(tmp_path):
    model = tokenizer(quantizer="residual", quantizer_kwargs={"depth": 2})
    images = pictures()
    result = evaluate(model, images, usage_plot=tmp_path / "usage.png")
    with torch.no_grad():
        used = [len(level.unique()) for level in model.encode(images).indices.unbind(-1)]
    assert [one["codebook_usage"] for one in result["codebooks"]] == pytest.approx([n / 16 for n in used])
    assert result["codebook_usage"] == pytest.approx(sum(used) / 32)
    assert result["codebook_dead_codes"] == 32 - sum(used)
    assert (tmp_path / "usage_0.png").exists() and (tmp_path / "usage_1.png").exists()


def prior(**kwargs):
    torch.manual_seed(0)
    config = VQGPTConfig(codebook_size=8, grid_size=(2, 3), n_embd=16, n_layer=1, n_head=2, **kwargs)
    return VQGPTForCausalLM(config)


def test_prior_costs_the_sum_of_its_conditional_probabilities():
    model = prior(condition_type="class", condition_vocab_size=3).train()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform
    indices = torch.randint(8, (5, 2, 3), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 1])
    data = [{"indices": indices[:3], "label": labels[:3]}, {"indices": indices[3:], "label": labels[3:]}]
    result = evaluate_prior(model, data, condition_key="label", pixel_dims=3 * 8 * 12, progress=False)
    assert model.training
    model.eval()
    bits = 0.0
    for codes, label in zip(indices.flatten(1).tolist(), labels.tolist(), strict=True):
        for position, code in enumerate(codes):
            ids = torch.tensor([[8 + label, *codes[:position]]])
            with torch.no_grad():
                bits -= float(model(input_ids=ids).logits[0, -1].log_softmax(0)[code]) / math.log(2)
    assert result["bits_per_index"] == pytest.approx(bits / 30, rel=1e-5)
    assert result["bits_per_pixel_dim"] == pytest.approx(bits / 5 / 288, rel=1e-5)
    assert result["uniform_bits_per_index"] == 3
    unconditional = evaluate_prior(model, data, progress=False)
    assert unconditional["bits_per_index"] != pytest.approx(result["bits_per_index"], rel=1e-3)


def test_untrained_prior_without_head_knows_nothing():
    model = prior()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = evaluate_prior(model, [{"indices": torch.zeros(2, 6, dtype=torch.long)}], progress=False)
    assert result["bits_per_index"] == pytest.approx(result["uniform_bits_per_index"])
