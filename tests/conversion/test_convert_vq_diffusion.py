"""Original VQ-Diffusion models as pipelines, against what the original program computed."""

import pytest
import torch

from hf_vq.conversion.convert_vq_diffusion import convert, convert_model, main, read_model
from hf_vq.conversion.reading import load_checkpoint
from hf_vq.pipelines.pipeline_vq_diffusion import VQDiffusionImagePipeline
from tests.conversion.golden import Golden


CASES = ["vqdiff_class", "vqdiff_text_clip", "vqdiff_text_ithq", "vqdiff_uncond"]
GUIDANCE = {"vqdiff_class": 2.0, "vqdiff_text_clip": 3.0, "vqdiff_text_ithq": 3.0, "vqdiff_uncond": 1.0}
TRUNCATION = {"vqdiff_uncond": 0.85}
AUXILIARY = {"vqdiff_class": 1e-3, "vqdiff_text_clip": 5e-4, "vqdiff_text_ithq": 5e-4, "vqdiff_uncond": 1e-3}
# What the tests of the scheduler and of the training loss compare, and the original's fast sampling, which is wrong.
ELSEWHERE = ("tab.", "p_pred", "q_", "kl.", "decoder_nll", "p_sample", "trunc.", "fast.")
ELSEWHERE += tuple(f"train.{name}" for name in ("log_model", "vb_", "Lt_", "acc_", "keep_", "imp_"))


def arguments_of(golden: Golden) -> dict:
    found = {"checkpoint": golden.folder / "checkpoint.ckpt", "config": golden.folder / "config.yaml"}
    found["codec_config"] = golden.folder / "codec_config.yaml"
    mapping = golden.folder / "codec_mapping.pt"
    return {**found, "mapping": mapping} if mapping.exists() else found


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    return Golden(request.param)


@pytest.fixture(scope="module")
def pipe(golden, tmp_path_factory):
    """With the averages, saved and loaded again."""
    output = tmp_path_factory.mktemp(golden.name)
    convert(**arguments_of(golden), output=output)
    return VQDiffusionImagePipeline.from_pretrained(output)


@pytest.fixture
def pieces(golden):
    """The arguments of `convert_model`."""
    found = arguments_of(golden)
    mapping = found.get("mapping")
    return {
        "model": read_model(found["config"], "config"),
        "checkpoint": load_checkpoint(found["checkpoint"]),
        "codec": read_model(found["codec_config"], "codec_config"),
        "mapping": None if mapping is None else load_checkpoint(mapping),
    }


def condition(golden: Golden) -> dict:
    if golden.name == "vqdiff_class":
        return {"class_labels": golden["label"]}
    return {"encoder_hidden_states": golden["cond_emb"]} if "text" in golden.name else {}


def guided_condition(golden: Golden, pipe, label=None) -> tuple[dict, dict]:
    """The condition of the first example, twice, and the null condition, twice."""
    if golden.name == "vqdiff_class":
        label = golden["label"][:1] if label is None else label
        return pipe.prepare_condition(2, class_labels=label, guided=True)
    texts = {"prompt_embeds": golden["cond_emb"][:1]}
    if pipe.transformer.null_embedding is None:
        texts["negative_prompt_embeds"] = golden["cf_cond_emb"]
    return pipe.prepare_condition(2, **texts, guided=True)


def log_x_start(logits: torch.Tensor) -> torch.Tensor:
    """As the original has it: `(B, K + 1, L)`, normalised in float64, floored at -70, and no probability of the
    mask.
    """
    log_probs = logits.double().flatten(1, 2).log_softmax(dim=-1).float().mT
    mask = torch.full_like(log_probs[:, :1], -70)
    return torch.cat([log_probs, mask], dim=1).clamp(-70, 0)


def logits_of(golden: Golden, pipe, which: str, **changes) -> torch.Tensor:
    inputs = {**condition(golden), **changes}
    return pipe.transformer(golden[f"x_t.{which}"].view(2, 4, 4), golden[f"t.{which}"], **inputs).sample


@torch.no_grad()
def test_predictions(golden, pipe):
    for which in "ab":
        logits = logits_of(golden, pipe, which)
        golden.compare(f"logits.{which}", logits.flatten(1, 2).mT)
        golden.compare(f"log_x_start.{which}", log_x_start(logits))


@torch.no_grad()
def test_weights_before_averaging(golden, pieces):
    live, dropped = convert_model(**pieces, use_ema=False)
    golden.compare("raw.log_x_start.a", log_x_start(logits_of(golden, live, "a")))
    assert any(key.startswith("ema.") for key in dropped)


@torch.no_grad()
def test_guidance(golden, pipe):
    if golden.name == "vqdiff_uncond":
        return
    x, t = golden["x_t.b"].view(2, 4, 4), golden["t.b"].repeat(2)
    if golden.name != "vqdiff_class":
        guided = pipe.predict(x, t, *guided_condition(golden, pipe), 3.0)
        golden.compare("guided_top1.0r.log_x_start.b", log_x_start(guided))
        return
    null = torch.full((2,), pipe.transformer.null_class_id)
    golden.compare("null.log_x_start.b", log_x_start(logits_of(golden, pipe, "b", class_labels=null)))
    guided = pipe.predict(x, t, *guided_condition(golden, pipe, golden["label"]), 2.0)
    kept = pipe.scheduler.predict_original(guided, truncation_rate=0.9).flatten(1, 2).mT > 0
    kept = torch.cat([kept, torch.zeros_like(kept[:, :1])], dim=1)
    # the original does not normalise what is kept
    golden.compare("guided.log_x_start.b", torch.where(kept, log_x_start(guided), -70.0))


@torch.no_grad()
def test_text_encoder(golden, pipe):
    if golden.name != "vqdiff_text_clip":
        assert pipe.text_encoder is None
        return
    states = pipe.text_encoder(golden["condition_token"]).last_hidden_state
    states = states / states.norm(dim=-1, keepdim=True)
    golden.compare("cond_emb_fp32", states)
    golden.compared.add("cond_emb")  # in half precision
    torch.testing.assert_close(states, golden["cond_emb"], atol=2e-3, rtol=0)
    torch.testing.assert_close(states[1:], golden["cf_cond_emb"], atol=2e-3, rtol=0)
    assert pipe.config.text_max_length == golden["condition_token"].shape[1]
    assert pipe.config.text_lower_case and pipe.config.text_normalize and not pipe.config.text_mask
    assert pipe.config.text_pad_token_id == 0


@torch.no_grad()
def test_codec(golden, pipe, pieces):
    """The tokens that the original diffuses: those of its search among all codes, renumbered by its table."""
    pixels, tokens = golden["img"] / 127.5 - 1, golden["codec_tokens"].view(2, 4, 4)
    encoded, num_codes = pipe.vqvae.encode(pixels), pipe.vqvae.config.remapped_from
    quantizer = pipe.vqvae.quantize
    if "text_clip" in golden.name:
        golden.compare("codec_logits", quantizer.quantizer.proj(encoded.latents))
        golden.compare("codec_argmax_full", quantizer.quantizer(encoded.latents).indices)
        golden.compare("codec_tokens_argmax", encoded.indices)
        golden.compare("codec_tokens", quantizer(encoded.latents, noise=golden["codec_gumbel_noise"]).indices)
    else:
        golden.compare("codec_tokens", encoded.indices)
    assert pipe.vqvae.config.num_embeddings == len(quantizer.codebook) == 16
    mapping = pieces["mapping"]
    assert num_codes == (None if mapping is None else 40)
    if mapping is not None:
        weights = pieces["checkpoint"]["model"]
        name = "embed" if "text_clip" in golden.name else "embedding"
        first = [mapping.tolist().index(i) for i in range(16)]
        assert torch.equal(quantizer.codebook, weights[f"content_codec.enc.quantize.{name}.weight"][first])

    golden.compare("codec_decoded", to_bytes(pipe.vqvae.decode_indices(tokens).sample))
    golden.compare("gen.content", to_bytes(pipe.vqvae.decode_indices(golden["gen.tokens"].view(2, 4, 4)).sample))


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    return (images.clamp(-1, 1) + 1) * 127.5


@torch.no_grad()
def test_moving_averages_of_the_codebook(golden, pipe):
    if golden.name != "vqdiff_text_ithq":
        assert pipe.vqvae.config.quantizer in ("vq", "gumbel")
        return
    model = pipe.vqvae
    names = {"embedding": "embedding", "cluster_size": "cluster_size", "embedding_avg": "embed_avg"}
    for name, own in names.items():
        golden.compare(f"ema_before.{name}", getattr(model.quantize, own))
    latents = model.encode(golden["img"] / 127.5 - 1).latents
    golden.compare("patch.h", latents)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.quantize.train()
    output = model.quantize(latents)
    model.quantize.eval()
    golden.compare("patch.quantize", output.quantized)
    golden.compare("patch.quantize_loss", output.loss)
    golden.compare("patch.index", output.indices)
    golden.compare("patch.used", torch.tensor(float(len(output.indices.unique()))))
    for name, own in names.items():
        golden.compare(f"ema_after.{name}", getattr(model.quantize, own))
    model.load_state_dict(before)


@torch.no_grad()
def test_chain_of_samples(golden, pipe):
    """Each step from the original's own state, with its noise: the largest of log-probability plus Gumbel noise."""
    rate, scale = TRUNCATION.get(golden.name, 0.86), GUIDANCE[golden.name]
    inputs = ({}, None) if scale == 1 else guided_condition(golden, pipe)
    states, gaps = [pipe.scheduler.initial_sample((2, 4, 4))], []
    for i, u in enumerate(golden["gen.uniforms"]):
        t = 99 - i
        logits = pipe.predict(states[-1], torch.tensor(t), *inputs, scale)
        original = pipe.scheduler.predict_original(logits, truncation_rate=rate)
        posterior = pipe.scheduler.q_posterior(original, states[-1], t, t - 1).flatten(1, 2).mT
        perturbed = posterior.log().clamp_min(-70) - (-(u + 1e-30).log() + 1e-30).log()
        drawn = perturbed.argmax(dim=1)
        top = perturbed.topk(2, dim=1).values
        gaps.append((top[:, 0] - top[:, 1]).min())
        assert torch.equal(drawn, golden["gen.tokens_per_step"][i]), i
        states.append(drawn.view(2, 4, 4))
    golden.compare("gen.tokens_per_step", torch.stack(states[1:]).flatten(2))
    golden.compare("gen.tokens", states[-1].flatten(1))
    golden.compare("gen.min_gap", torch.stack(gaps).min())


def noised(golden: Golden, scheduler) -> torch.Tensor:
    """x_t `(2, 4, 4)` of `train_t`, by the original's noise: the closed form of q(x_t | x_0), and Gumbel noise."""
    t, x0 = golden["train_t"], golden["x0"]
    alpha, beta, gamma = (
        table[t].view(2, 1, 1)
        for table in (scheduler.alphas_cumprod, scheduler.betas_cumprod, scheduler.gammas_cumprod)
    )
    codes = alpha * torch.nn.functional.one_hot(x0, 16).mT + beta
    probabilities = torch.cat([codes, gamma.expand(2, 1, 16)], dim=1)
    drawn = probabilities.log() - (-(golden["u"] + 1e-30).log() + 1e-30).log()
    return drawn.argmax(dim=1).view(2, 4, 4)


def training_loss(golden: Golden, pipe, inputs: dict) -> torch.Tensor:
    t, x0, scheduler = golden["train_t"], golden["x0"].view(2, 4, 4), pipe.scheduler
    x = noised(golden, scheduler)
    logits = pipe.transformer(x, t, **inputs).sample
    auxiliary = scheduler.auxiliary_loss(logits, x0, t) * AUXILIARY[golden.name]
    terms = scheduler.vlb_terms(logits, x0, x, t) + auxiliary
    return (terms.flatten(1).sum(dim=1) / golden["train_pt"]).sum() / x0.numel()


def test_gradient_of_the_training_loss(golden, pipe):
    loss = training_loss(golden, pipe, condition(golden))
    golden.compare("train.loss_mean", loss)
    (gradient,) = torch.autograd.grad(loss, pipe.transformer.out.weight)
    golden.compare("train.grad_to_logits_weight", gradient)


def test_learned_null_text(golden, pipe):
    """Captions without a word are replaced by the learned embedding."""
    learned = pipe.transformer.null_embedding
    if golden.name != "vqdiff_text_ithq":
        assert learned is None
        return
    golden.compare("cf.empty_text_embed", learned)
    is_empty = ~golden["condition_mask"][:, 2].bool()
    golden.compare("cf.is_empty", is_empty.long())
    states = torch.where(is_empty.view(-1, 1, 1), learned, golden["cond_emb"])
    loss = training_loss(golden, pipe, {"encoder_hidden_states": states})
    golden.compare("cf.loss", loss)
    (gradient,) = torch.autograd.grad(loss, learned)
    golden.compare("cf.grad_empty_text_embed", gradient)


def test_nothing_is_left_out(golden):
    if "gen.tokens" not in golden.compared:
        pytest.skip("the tests above have not run")
    golden.assert_all_compared(
        {name for name in golden.manifest if name.startswith(ELSEWHERE)} - set(inputs_of(golden))
    )


def inputs_of(golden: Golden) -> list[str]:
    return [name for name, entry in golden.manifest.items() if entry["role"] == "input"]


def test_command_line(tmp_path, capsys):
    golden = Golden("vqdiff_class")
    main([*(f"--{name}={path}" for name, path in arguments_of(golden).items()), f"--output={tmp_path}", "--live"])
    printed = capsys.readouterr().out
    for reason in ("the quantizer once more", "the noise schedule", "averages, which are taken without --live"):
        assert reason in printed
    pipe = VQDiffusionImagePipeline.from_pretrained(tmp_path)
    images = pipe(class_labels=[3, 7], num_inference_steps=2, guidance_scale=2.0, output_type="pt").images
    assert images.shape == (2, 3, 8, 8)
