"""What other libraries do with our models: PEFT, transformers' Trainer, torchao, ONNX and torch.compile.

vLLM is out of scope: it serves text, by classes of its own for each architecture and a text tokenizer, and knows no
prefix of condition ids, no head that is narrower than the embedding, and no grid of codes.
"""

import copy
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import hf_vq
from hf_vq.models.linear_layers import as_linear
from hf_vq.models.priors.lora_merging import merge_lora
from tests.pipelines import vq_diffusion_parts
from tests.pipelines.autoregressive_parts import make_tiny_tokenizer


COMMON = {"codebook_size": 16, "grid_size": 4, "condition_type": "class", "condition_vocab_size": 3}
CONDITIONED = {"condition_dropout": 0.0}
PRIORS = {
    "gpt": lambda: hf_vq.VQGPTForCausalLM(
        hf_vq.VQGPTConfig(
            n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **COMMON, **CONDITIONED
        )
    ),
    "llama": lambda: hf_vq.VQLlamaForCausalLM(
        hf_vq.VQLlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **COMMON, **CONDITIONED)
    ),
    "pixelcnn": lambda: hf_vq.PixelCNNForCausalLM(
        hf_vq.PixelCNNConfig(hidden_size=16, num_hidden_layers=2, head_hidden_size=16, **COMMON, **CONDITIONED)
    ),
    "pixelsnail": lambda: hf_vq.PixelSNAILForCausalLM(
        hf_vq.PixelSNAILConfig(
            hidden_size=16,
            num_blocks=1,
            num_res_blocks=1,
            res_channels=8,
            num_attention_heads=2,
            dropout=0.0,
            **COMMON,
            **CONDITIONED,
        )
    ),
}


def make_prior(name):
    torch.manual_seed(0)
    return PRIORS[name]().eval()


def codes(count=6):
    return torch.randint(16, (count, 4, 4), generator=torch.Generator().manual_seed(1))


def targets(model):
    """The layers that a LoRA adapts: every one of weights `(out, in, …)` but the head."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and "lm_head" not in name]


@pytest.mark.parametrize("name", PRIORS)
def test_lora_is_trained_saved_loaded_and_merged(name, tmp_path):
    prior = make_prior(name)
    base, inputs = copy.deepcopy(prior), prior.prepare_inputs(codes(4), [0, 1, 2, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of GPT-2's Conv1D, which PEFT has understood
        adapted = get_peft_model(prior, LoraConfig(r=4, lora_alpha=8, target_modules=targets(prior)))
        optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = adapted(**inputs).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.95 * losses[0]
        adapted.eval().save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        plain, expected = base(**inputs).logits, adapted(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, expected)
        assert (expected - plain).abs().max() > 0.1
        merged = merge_lora(loaded)
        assert type(merged) is type(base) and {n for n, _ in merged.named_parameters()} == {
            n for n, _ in base.named_parameters()
        }
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
        prompt = base.prepare_condition([0, 1])
        merged.save_pretrained(tmp_path / "merged")
        again = type(base).from_pretrained(tmp_path / "merged")
        sequences = again.generate(prompt, do_sample=False)
        assert torch.equal(sequences, merged.generate(prompt, do_sample=False))
        assert torch.equal(again.extract_indices(sequences), sequences[:, 1:].view(2, 4, 4))


def test_lora_of_a_denoiser_is_trained_saved_loaded_and_merged(tmp_path):
    torch.manual_seed(0)
    model = vq_diffusion_parts.make_transformer("unconditional").eval()
    base, x, t = copy.deepcopy(model), codes(2), torch.tensor([1, 3])
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x, t).sample.flatten(0, 2), x.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_lora_adapter(tmp_path)
    loaded = copy.deepcopy(base)
    loaded.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        expected = model(x, t).sample
        torch.testing.assert_close(loaded(x, t).sample, expected)
        assert (expected - base(x, t).sample).abs().max() > 1e-2
        loaded.fuse_lora()
        torch.testing.assert_close(loaded(x, t).sample, expected, atol=1e-4, rtol=1e-4)
        pipeline = vq_diffusion_parts.make_pipeline(transformer=loaded)
        assert pipeline(output_type="indices", num_inference_steps=2).indices.shape == (1, 4, 4)


class Rows(torch.utils.data.Dataset):
    """Samples by row; those of a prior as it makes its training inputs itself."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(next(iter(self.samples.values())))

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.samples.items()}


def trainer_of(model, samples, folder):
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=2,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = Rows(samples)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("name", PRIORS)
def test_trainer_trains_and_evaluates_a_prior(name, tmp_path):
    prior = make_prior(name)
    samples = prior.prepare_inputs(codes(), [0, 1, 2, 0, 1, 2])
    before = copy.deepcopy(prior.state_dict())
    trainer = trainer_of(prior, samples, tmp_path)
    trainer.train()
    figure = trainer.evaluate()["eval_loss"]
    likelihood = prior.eval().log_likelihood(codes(), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert figure == pytest.approx(-likelihood.mean().item() / 16, rel=1e-4)  # nats a code
    assert any(not torch.equal(before[name], value) for name, value in prior.state_dict().items())


TOKENIZERS = {
    "vqvae": lambda: hf_vq.VQVAEModel(
        hf_vq.VQVAEConfig(hidden_size=8, residual_hidden_size=4, embed_dim=4, num_embeddings=8, resolution=8)
    ),
    "vqvae2": lambda: hf_vq.VQVAE2Model(
        hf_vq.VQVAE2Config(hidden_size=8, residual_hidden_size=4, embed_dim=4, num_embeddings=8, resolution=16)
    ),
    "vqgan": lambda: make_tiny_tokenizer(num_embeddings=8).train(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_trainer_trains_and_evaluates_a_tokenizer(name, tmp_path):
    torch.manual_seed(0)
    model = TOKENIZERS[name]()
    side = model.config.resolution
    images = torch.rand(6, 3, side, side, generator=torch.Generator().manual_seed(2)) * 2 - 1
    trainer = trainer_of(model, {"pixel_values": images}, tmp_path)
    trainer.train()
    figure = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        losses = [model.eval()(images[start : start + 2]).loss.item() for start in (0, 2, 4)]
    assert figure == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_the_linear_layers_of_a_gpt_compute_the_same():
    prior, inputs = make_prior("gpt"), make_prior("gpt").prepare_inputs(codes(2), [0, 1])
    linear = as_linear(copy.deepcopy(prior))
    assert not any(isinstance(module, Conv1D) for module in linear.modules())
    assert sum(isinstance(module, torch.nn.Linear) for module in linear.modules()) == 2 * 4 + 1
    assert linear.num_parameters() == prior.num_parameters()
    with torch.no_grad():
        torch.testing.assert_close(linear(**inputs).logits, prior(**inputs).logits)
    prompt = prior.prepare_condition([0, 1])
    assert torch.equal(linear.generate(prompt, do_sample=False), prior.generate(prompt, do_sample=False))


def num_bytes(model):
    """Of the weights; those of torchao without their scales."""
    weights = [getattr(weight, "qdata", weight) for weight in model.parameters()]
    return sum(weight.numel() * weight.element_size() for weight in weights)


@pytest.mark.slow
def test_torchao_makes_the_weights_int8():
    """Of the denoiser and of Llama as they are; of GPT only after `as_linear`, since it passes over `Conv1D`."""
    pytest.importorskip("torchao", reason="the extra `quantization` is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for name in ("gpt", "llama"):
        prior, inputs = make_prior(name), make_prior(name).prepare_inputs(codes(4), [0, 1, 2, 0])
        with torch.no_grad():
            before, size = prior(**inputs).logits, num_bytes(prior)
            if name == "gpt":
                untouched = copy.deepcopy(prior)
                quantize_(untouched, Int8WeightOnlyConfig())
                assert num_bytes(untouched) > 0.9 * size  # the head alone
                as_linear(prior)
            quantize_(prior, Int8WeightOnlyConfig())
            linear = [module for module in prior.modules() if isinstance(module, torch.nn.Linear)]
            assert all(module.weight.qdata.dtype == torch.int8 for module in linear) and num_bytes(prior) < 0.5 * size
            after = prior(**inputs).logits
            assert 0 < (after - before).abs().max() < 0.05 * before.abs().max()
            sequences = prior.generate(prior.prepare_condition([0, 1]), do_sample=False)
            assert prior.extract_indices(sequences).shape == (2, 4, 4)
    denoiser, x, t = vq_diffusion_parts.make_transformer("unconditional").eval(), codes(2), torch.tensor([1, 3])
    with torch.no_grad():
        before = denoiser(x, t).sample
        quantize_(denoiser, Int8WeightOnlyConfig())
        linear = [module for module in denoiser.modules() if isinstance(module, torch.nn.Linear)]
        assert linear and all(module.weight.qdata.dtype == torch.int8 for module in linear)
        assert 0 < (denoiser(x, t).sample - before).abs().max() < 0.05 * before.abs().max()


@pytest.mark.slow
def test_a_step_of_pixelsnail_is_one_graph():
    """One position after the others, from the cache."""
    prior = make_prior("pixelsnail")
    prompt = prior.prepare_condition([0, 1])

    def step(ids, cache):
        return prior(input_ids=ids, past_key_values=cache, use_cache=True).logits

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with torch.no_grad():
        caches = [prior(input_ids=prompt, use_cache=True).past_key_values for _ in range(2)]
        for ids in (torch.tensor([[1], [2]]), torch.tensor([[5], [3]])):
            expected, found = step(ids, caches[0]), compiled(ids, caches[1])
            torch.testing.assert_close(found, expected)


def check_onnx(model, folder, capsys):
    from hf_vq.cli import main

    model.save_pretrained(folder / "tokenizer")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Exporting a model while it is in training mode")
        assert main(["export", str(folder / "tokenizer"), "--output", str(folder / "onnx")]) == 0
    assert "equal indices" in capsys.readouterr().out
    import onnxruntime

    encoder, decoder = (
        onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("encoder", "decoder")
    )
    side = model.config.resolution
    images = torch.rand(5, 3, side, side, generator=torch.Generator().manual_seed(4)) * 2 - 1  # another number of them
    indices = encoder.run(None, {"pixel_values": images.numpy()})
    (sample,) = decoder.run(None, {one.name: codes for one, codes in zip(decoder.get_inputs(), indices, strict=True)})
    with torch.no_grad():
        expected = model.eval().encode(images).indices
        levels = expected if isinstance(expected, tuple) else (expected,)
        for found, level in zip(indices, levels, strict=True):
            np.testing.assert_array_equal(found, level.numpy())
        torch.testing.assert_close(torch.from_numpy(sample), model.decode_indices(expected).sample)


@pytest.mark.parametrize(
    "name", ["vqvae", pytest.param("vqgan", marks=pytest.mark.slow), pytest.param("vqvae2", marks=pytest.mark.slow)]
)
def test_onnx_gives_equal_indices(name, tmp_path, capsys):
    torch.manual_seed(0)
    check_onnx(TOKENIZERS[name](), tmp_path, capsys)
