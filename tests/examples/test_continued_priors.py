"""Training that goes on with a trained prior, on data of the same classes or of others."""

import json
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UNet2DModel,
)
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image

from hf_vq import (
    LatentUNet2DModel,
    MaskReplaceScheduler,
    PixelCNNForCausalLM,
    PixelSNAILConfig,
    PixelSNAILForCausalLM,
    VQAutoregressivePipeline,
    VQDiffusionImagePipeline,
    VQDiffusionTransformer2DModel,
    VQGPTConfig,
    VQGPTForCausalLM,
    VQImageProcessor,
    VQLatentDiffusionPipeline,
    VQLlamaConfig,
    VQLlamaForCausalLM,
    VQVAE2Config,
    VQVAE2Model,
    VQVAE2Pipeline,
    VQVAEModel,
)
from hf_vq.training.fine_tuning import StartingPoint
from hf_vq.training.scripts import train_pixelcnn
from tests.examples.runs import places_and_length, script


SIZES = {
    "gpt": "--num_hidden_layers 1 --hidden_size 8 --num_attention_heads 1".split(),
    "llama": "--architecture llama --num_hidden_layers 1 --hidden_size 8 --num_attention_heads 1".split(),
    "pixelcnn": ["--hidden_size", "8", "--prior_kwargs", '{"num_hidden_layers": 2, "head_hidden_size": 8}'],
    "pixelsnail": [
        "--prior", "pixelsnail", "--hidden_size", "8", "--kernel_size", "3", "--prior_kwargs",
        '{"num_blocks": 1, "num_res_blocks": 1, "res_channels": 8, "num_attention_heads": 2}',
    ],
    "vq_diffusion": ["--num_layers", "1", "--num_attention_heads", "2", "--attention_head_dim", "4"],
    "latent_diffusion": [
        "--block_out_channels", "8", "16", "--layers_per_block", "1", "--attention_levels", "1",
        "--attention_head_dim", "4", "--norm_num_groups", "4", "--prediction_type", "epsilon", "--beta_end", "0.03",
    ],
}  # fmt: skip
SCRIPTS = {"gpt": "vq_gpt", "llama": "vq_gpt", "pixelsnail": "pixelcnn", "latent_diffusion": "vq_latent_diffusion"}
STILL = ["--learning_rate", "1e-12"]  # what is loaded stays what it is


@pytest.fixture(scope="module")
def others(inputs, tmp_path_factory):
    """Images of the classes b and d; `inputs` has a caption for each class."""
    pixels = np.random.default_rng(1).integers(0, 255, (8, 16, 16, 3), np.uint8)
    columns = {"image": [Image.fromarray(image) for image in pixels], "caption": ["a picture of 1", "a dog"] * 4}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = datasets.Dataset.from_dict(columns, features=features)
    folder = tmp_path_factory.mktemp("others") / "images"
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(folder)
    return folder


def train(kind, inputs, output, *options):
    places = [*places_and_length(inputs, 1), "--output_dir", str(output), "--sample_classes", "1"]
    script(SCRIPTS.get(kind, kind)).main([*places, *options])
    kinds = {"vq_diffusion": VQDiffusionImagePipeline, "latent_diffusion": VQLatentDiffusionPipeline}
    return kinds.get(kind, VQAutoregressivePipeline).from_pretrained(output / "pipeline")


@torch.no_grad()
def predicted(pipe, label):
    """What the pipeline's network predicts of the class of a name, or of none."""
    torch.manual_seed(0)
    if isinstance(pipe, VQAutoregressivePipeline):
        indices = torch.randint(8, (2, 4, 4))
        return pipe.prior.log_likelihood(indices, condition=label)
    names = {name: int(number) for number, name in pipe.id2label.items()}
    null = pipe.config.null_class_id if isinstance(pipe, VQLatentDiffusionPipeline) else pipe.transformer.null_class_id
    labels, timesteps = torch.full((2,), null if label is None else names[label]), torch.tensor([3, 7])
    if isinstance(pipe, VQLatentDiffusionPipeline):
        return pipe.unet(torch.randn(2, 4, 4, 4), timesteps, class_labels=labels).sample
    return pipe.transformer(torch.randint(9, (2, 4, 4)), timesteps, class_labels=labels).sample


@pytest.mark.parametrize("kind", SIZES)
def test_weights_go_on_and_classes_are_told_by_their_names(inputs, others, tmp_path, kind):
    labels = ["--label_column", "caption"]
    first = train(
        kind, inputs, tmp_path / "first", *labels, *SIZES[kind], *"--learning_rate 0.05 --train_batch_size 8".split()
    )
    start = ["--model_name_or_path", str(tmp_path / "first/pipeline")]
    same = train(kind, inputs, tmp_path / "same", *labels, *start, *STILL)
    other = train(kind, inputs, tmp_path / "other", *labels, *start, *STILL, "--dataset_name_or_path", str(others))
    names = ["a picture of 0", "a picture of 1", "a picture of 2"]
    for name in [None, *names]:
        torch.testing.assert_close(predicted(same, name), predicted(first, name), atol=1e-5, rtol=1e-5)
    for name in (None, "a picture of 1"):
        torch.testing.assert_close(predicted(other, name), predicted(first, name), atol=1e-5, rtol=1e-5)
    new = predicted(other, "a dog")
    assert all(not torch.allclose(new, predicted(first, name)) for name in names)
    if kind == "latent_diffusion":  # the noise and the scale that the denoiser knows
        assert other.scheduler.config.prediction_type == "epsilon" and other.scheduler.config.beta_end == 0.03
        assert other.vqvae.config.scaling_factor == first.vqvae.config.scaling_factor


def test_a_prior_alone(inputs, tmp_path):
    train("gpt", inputs, tmp_path / "first", *SIZES["gpt"])
    start = ["--model_name_or_path", str(tmp_path / "first/pipeline/prior")]
    again = train("gpt", inputs, tmp_path / "again", *start, *STILL, "--dropout", "0.3").prior
    before = VQGPTForCausalLM.from_pretrained(tmp_path / "first/pipeline/prior")
    assert again.config.n_embd == 8 and again.config.resid_pdrop == 0.3
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["unconditional", "class"])
def test_a_prior_goes_on_with_a_map_as_its_condition(tmp_path, kind):
    """Where no position attends to its condition, codes are predicted as before: attention is taken off here."""
    shape = {"codebook_size": 8, "grid_size": (2, 2), "n_layer": 2, "n_embd": 4, "n_head": 1}
    torch.manual_seed(0)
    first = VQGPTForCausalLM(VQGPTConfig(condition_type=kind, num_classes=3 if kind == "class" else 0, **shape)).eval()
    for block in first.transformer.h:
        block.attn.c_proj.weight.data.zero_()
    first.save_pretrained(tmp_path)
    start = StartingPoint(str(tmp_path), "prior", (VQGPTForCausalLM,))
    fields = {"condition_type": "codes", "condition_vocab_size": 5, "condition_length": 4, "n_unmasked": 4}
    second = start.remake(fields, 5).eval()
    codes = torch.randint(8, (3, 4))
    before = first(torch.cat([first.prepare_condition(None, batch_size=3), codes[:, :3]], 1)).logits[:, 1:]
    after = second(torch.cat([second.prepare_condition(torch.zeros(3, 2, 2).long()), codes[:, :3]], 1)).logits[:, 4:]
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    "kind,options,message",
    [
        ("gpt", ["--resolution", "8"], r"its `grid_size` must be \(2, 2\)"),
        ("gpt", ["--positions_from_grid", "true"], "positions_from_grid=True: with model_name_or_path"),
        ("pixelcnn", [], "must be a PixelCNNForCausalLM or PixelSNAILForCausalLM, .* got a VQAutoregressivePipeline"),
        ("vq_diffusion", [], "must be a VQDiffusionTransformer2DModel, .* got a VQAutoregressivePipeline without one"),
        ("latent_diffusion", [], "must be a UNet2DModel or UNet2DConditionModel"),
    ],
)
def test_what_cannot_go_on(inputs, tmp_path_factory, kind, options, message):
    folder = tmp_path_factory.getbasetemp() / "of-classes"
    if not folder.exists():
        train("gpt", inputs, folder, *SIZES["gpt"], "--label_column", "caption")
    start = ["--model_name_or_path", str(folder / "pipeline")]
    with pytest.raises(ValueError, match=message):
        train(kind, inputs, folder.with_name("refused"), *start, *options)
    assert not (folder.with_name("refused") / "indices").exists()  # before anything was encoded


def gpt_start(folder, wanted=None, **fields):
    """A small GPT with these fields of its config, saved and read as a start."""
    shape = {"codebook_size": 8, "grid_size": (2, 2), "n_layer": 1, "n_embd": 4, "n_head": 1}
    torch.manual_seed(0)
    VQGPTForCausalLM(VQGPTConfig(**{**shape, **fields})).save_pretrained(folder)
    return StartingPoint(str(folder), "prior", (VQGPTForCausalLM,))


@torch.no_grad()
def code_logits(prior, prefix):
    """Of all codes of a grid, behind a prefix of ids."""
    codes = torch.arange(3)[None]
    return prior.eval()(torch.cat([prefix, codes], 1)).logits[:, prefix.shape[1] - 1 :, :8]


@pytest.mark.parametrize("kind", ["unconditional", "class"])
def test_classes_and_start_of_a_converted_prior_get_rows_of_their_own(tmp_path, kind):
    """The original's priors give class c the row of code c, and their start token that of a code; a table of positions
    may be longer than needed. Here they are told from codes, there is a null class, and what was predicted stays."""
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "condition_vocab_size": 3} if kind == "class" else {}
    start = gpt_start(tmp_path, condition_type=kind, share_condition_embedding=True, n_positions=9, **labels)
    fields = {"condition_type": "class", "condition_vocab_size": 2, "condition_dropout": 0.1}
    model = start.remake(fields | {"id2label": {0: "b", 1: "d"}}, 2, ["b", "d"])
    assert model.config.input_vocab_size == 11 and model.config.null_class_token_id == 10
    if kind == "class":
        before, after = start.model.prepare_condition("b"), model.prepare_condition("b")
    else:
        before, after = start.model.prepare_condition(), model.prepare_condition()  # the start token and no class
    torch.testing.assert_close(code_logits(model, after), code_logits(start.model, before))
    free = start.remake({"condition_type": "unconditional"})
    assert len(free.transformer.wte.weight) == 9 and len(free.transformer.wpe.weight) == (4 if kind == "class" else 9)
    if kind == "unconditional":
        torch.testing.assert_close(code_logits(free, free.prepare_condition()), code_logits(start.model, before))


def test_names_of_classes_are_those_of_the_data(tmp_path):
    start = gpt_start(tmp_path, condition_type="class", num_classes=2, id2label={0: "a", 1: "b"})
    model = start.remake({"condition_type": "class", "condition_vocab_size": 2}, 2)  # without names
    assert model.config.id2label in (None, {0: "LABEL_0", 1: "LABEL_1"})
    with pytest.raises(ValueError, match="not one name"):
        model.prepare_condition("a")


def test_from_boxes_to_a_map_and_to_other_boxes(tmp_path):
    boxes = {"num_classes": 2, "max_objects": 1, "num_tokens": 9}
    codes = {"condition_type": "codes", "condition_vocab_size": 9}
    start = gpt_start(
        tmp_path, **codes, condition_length=3, bounding_boxes=boxes, id2label={0: "a", 1: "b"}, n_unmasked=3
    )
    model = start.remake({**codes, "condition_length": 4}, 9)
    assert model.config.bounding_boxes is None and model.config.n_unmasked == 0
    rows = model.transformer.wte.weight[8:16], start.model.transformer.wte.weight[8:16]
    assert not torch.isclose(*rows).any()  # another condition's ids
    fields = {**codes, "condition_length": 3, "bounding_boxes": boxes}
    same = start.remake({**fields, "id2label": {0: "a", 1: "c"}}, 9, ["a", "c"])
    assert torch.equal(same.transformer.wte.weight, start.model.transformer.wte.weight)
    with pytest.raises(ValueError, match="the class 'b' of objects must be number 1, as the prior has it, got 0"):
        start.remake({**fields, "id2label": {0: "b", 1: "c"}}, 9, ["b", "c"])


def test_a_llama_of_texts_goes_on_with_classes(tmp_path):
    shape = {"codebook_size": 8, "grid_size": (2, 2), "num_hidden_layers": 1, "hidden_size": 8}
    config = VQLlamaConfig(condition_type="text", text_embed_dim=4, num_attention_heads=2, **shape)
    VQLlamaForCausalLM(config).save_pretrained(tmp_path)
    start = StartingPoint(str(tmp_path), "prior", (VQLlamaForCausalLM,))
    model = start.remake({"condition_type": "class", "condition_vocab_size": 2}, 2)
    assert model.config.max_position_embeddings == 4 and model.config.condition_length == 1
    assert torch.equal(model.lm_head.weight, start.model.lm_head.weight)


@torch.no_grad()
def test_classes_that_are_waves_keep_them_under_other_numbers(tmp_path):
    shape = {"num_embeddings": 8, "sample_size": (2, 2), "num_layers": 1, "attention_head_dim": 4}
    kind = {"condition_type": "class", "class_embedding": "sinusoidal", "null_class": True}
    first = VQDiffusionTransformer2DModel(
        **shape, num_attention_heads=2, num_classes=3, null_class_position=-100.0, **kind
    )
    pipe = VQDiffusionImagePipeline(None, first, MaskReplaceScheduler(8), id2label={"0": "a", "1": "b", "2": "c"})
    pipe.save_pretrained(tmp_path)
    start = StartingPoint(str(tmp_path), "transformer", (VQDiffusionTransformer2DModel,))
    names = ["z", "c", "b", "y", "x"]
    model = start.remake({"condition_type": "class", "num_classes": 5, "null_class": True}, 5, names).eval()
    indices, steps = torch.randint(9, (3, 2, 2)), torch.tensor([1, 2, 3])
    before = first.eval()(indices, steps, class_labels=torch.tensor([1, 2, 3])).sample
    torch.testing.assert_close(model(indices, steps, class_labels=torch.tensor([2, 1, 5])).sample, before)


UNET = {
    "sample_size": 4, "in_channels": 4, "out_channels": 4, "block_out_channels": (4,), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 2,
    "attention_head_dim": 4,
}  # fmt: skip


@pytest.mark.parametrize("null", [None, 1])
def test_the_null_class_of_a_denoiser_is_the_one_of_its_pipeline(inputs, tmp_path, null):
    unet = UNet2DModel(**UNET, num_class_embeds=3)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    tokenizer = VQVAEModel.from_pretrained(inputs / "tokenizer")
    VQLatentDiffusionPipeline(tokenizer, unet, scheduler, null_class_id=null).save_pretrained(tmp_path)
    start = StartingPoint(str(tmp_path), "unet", (UNet2DModel,))
    rows = start.remake({"num_class_embeds": 5}, 4).class_embedding.weight
    own = unet.class_embedding.weight
    kept = {None: {0: 0, 1: 1, 2: 2}, 1: {0: 0, 2: 2, 4: 1}}[null]  # row 4 is the new null class
    for number in range(5):
        if number in kept:
            assert torch.equal(rows[number], own[kept[number]])
        else:
            assert not torch.isclose(rows[number], own).all(1).any()


def latent_start(folder, inputs, unet, scheduler=None, **options):
    scheduler = DDIMScheduler(beta_schedule="scaled_linear") if scheduler is None else scheduler
    tokenizer = VQVAEModel.from_pretrained(inputs / "tokenizer")
    VQLatentDiffusionPipeline(tokenizer, unet, scheduler, **options).save_pretrained(folder)
    return ["--model_name_or_path", str(folder)]


CAPTIONS = ["--caption_column", "caption"]


def refuses(kind, inputs, folder, message, *options):
    with pytest.raises(ValueError, match=message):
        train(kind, inputs, folder / "refused", *options)
    assert not any((folder / "refused" / name).exists() for name in ("indices", "latents"))


def test_denoisers_that_cannot_go_on(inputs, tmp_path):
    texts = [*CAPTIONS, "--text_encoder", str(inputs / "text")]
    classes = UNet2DModel(**UNET, num_class_embeds=3)
    start = latent_start(tmp_path / "classes", inputs, classes)
    refuses("latent_diffusion", inputs, tmp_path, "its condition must be text, .* got class", *start, *texts)
    odd = UNET | {"block_out_channels": (4,) * 4, "down_block_types": ("DownBlock2D",) * 4}
    start = latent_start(tmp_path / "odd", inputs, UNet2DModel(**odd | {"up_block_types": ("UpBlock2D",) * 4}))
    refuses("latent_diffusion", inputs, tmp_path, r"^model_name.*block_out_channels=\[4, 4, 4, 4\]: 4 levels", *start)
    scheduler = DDIMScheduler(trained_betas=[0.1, 0.2], beta_schedule="scaled_linear")
    start = latent_start(tmp_path / "betas", inputs, UNet2DModel(**UNET), scheduler)
    refuses("latent_diffusion", inputs, tmp_path, "got the 'trained_betas' of a DDIMScheduler", *start)
    start = latent_start(tmp_path / "heun", inputs, UNet2DModel(**UNET), FlowMatchHeunDiscreteScheduler())
    refuses("latent_diffusion", inputs, tmp_path, "got the None of a FlowMatchHeunDiscreteScheduler", *start)


def test_the_scheduler_of_a_pipeline_stays(inputs, tmp_path):
    schedulers = [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample_range=3.0),
    ]
    for number, scheduler in enumerate(schedulers):
        start = latent_start(tmp_path / f"start-{number}", inputs, UNet2DModel(**UNET), scheduler)
        after = train("latent_diffusion", inputs, tmp_path / f"on-{number}", *start, *STILL, "--sample_steps", "2")
        assert type(after.scheduler) is type(scheduler)
        own = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        assert {name: after.scheduler.config[name] for name in own} == own


def test_a_denoiser_of_another_class_names_its_blocks(inputs, tmp_path, monkeypatch):
    sizes = {**UNET, "block_out_channels": (32,)}  # its groups are 32
    del sizes["norm_num_groups"]
    start = latent_start(tmp_path / "start", inputs, LatentUNet2DModel(**sizes))
    module = script("vq_latent_diffusion")
    build, made = module.build_unet, []
    monkeypatch.setattr(module, "build_unet", lambda *arguments: made.append(build(*arguments)) or made[-1])
    after = train("latent_diffusion", inputs, tmp_path / "on", *start, *STILL, "--sample_steps", "2")
    assert type(after.unet) is LatentUNet2DModel
    assert made[-1]._no_split_modules == ["ResnetBlock2D", "Attention"]  # fsdp cuts at them


@pytest.mark.parametrize("kind", ["vq_diffusion", "latent_diffusion"])
def test_captions_are_read_as_the_pipeline_reads_them(inputs, tmp_path, kind):
    options = [*CAPTIONS, "--text_encoder", str(inputs / "text"), "--text_max_length", "6", "--sample_steps", "1"]
    options += SIZES[kind]
    train(kind, inputs, tmp_path / "first", *options)
    pipe = tmp_path / "first/pipeline"
    index = json.loads((pipe / "model_index.json").read_text())
    own = {"text_lower_case": True, "text_normalize": True, "text_mask": False, "text_pad_token_id": 1}
    (pipe / "model_index.json").write_text(json.dumps(index | own))
    after = train(kind, inputs, tmp_path / "on", *options, "--model_name_or_path", str(pipe), *STILL)
    assert {name: after.config[name] for name in own} == own
    module = script(SCRIPTS.get(kind, kind))
    if kind == "vq_diffusion":
        given = module.Condition(after, "caption").inputs(["a Picture of 1"])
    else:
        arguments = module.LatentDiffusionArguments(str(inputs / "tokenizer"), text_encoder=str(inputs / "text"))
        arguments.text_max_length = 6
        given = module.Condition(arguments, "caption", 0, torch.device("cpu"), own).inputs(
            {"caption": ["a Picture of 1"]}
        )
    wanted = after.encode_prompt(["a Picture of 1"])
    assert given.keys() == {"encoder_hidden_states"}
    torch.testing.assert_close(given["encoder_hidden_states"], wanted.embeddings)


def test_levels_of_a_whole_hierarchy_go_on(inputs, tmp_path):
    shape = {"hidden_size": 8, "kernel_size": 3, "num_blocks": 1, "num_res_blocks": 1, "res_channels": 8}
    shape |= {"codebook_size": 8, "num_attention_heads": 2, "conditioning_channels": 4}
    above = {"conditioning_codebook_size": 8, "conditioning_grid_size": (2, 2)}
    torch.manual_seed(0)
    tokenizer = VQVAE2Model(VQVAE2Config(resolution=16, hidden_size=8, num_embeddings=8, embed_dim=4))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    VQImageProcessor(size=16).save_pretrained(tmp_path / "tokenizer")
    priors = {
        "top_prior": PixelSNAILForCausalLM(PixelSNAILConfig(grid_size=(2, 2), **shape)),
        "bottom_prior": PixelSNAILForCausalLM(PixelSNAILConfig(grid_size=(4, 4), **shape, **above)),
    }
    VQVAE2Pipeline(tokenizer, **priors).save_pretrained(tmp_path / "pipeline")
    start = ["--model_name_or_path", str(tmp_path / "pipeline"), "--tokenizer", str(tmp_path / "tokenizer"), *STILL]
    for level, other in (("top", "bottom"), ("bottom", "top")):
        places = [*places_and_length(inputs, 1), *start, "--level", level, "--sample_classes", "1"]
        script("pixelcnn").main([*places, "--output_dir", str(tmp_path / level)])
        after = PixelSNAILForCausalLM.from_pretrained(tmp_path / level / "prior").state_dict()
        for name, weight in priors[f"{level}_prior"].state_dict().items():
            torch.testing.assert_close(after[name], weight, atol=1e-5, rtol=1e-5)
        alone = ["--model_name_or_path", str(tmp_path / f"pipeline/{other}_prior")]
        with pytest.raises(ValueError, match="its `(grid_size|conditioning_codebook_size)` must be"):
            script("pixelcnn").main([*places, *alone, "--output_dir", str(tmp_path / "refused")])
    level = train_pixelcnn.Level(["indices"], [(4, 4)])
    arguments = train_pixelcnn.PriorArguments("tokenizer")
    bottom = StartingPoint(str(tmp_path / "pipeline/bottom_prior"), "prior", (PixelSNAILForCausalLM,))
    with pytest.raises(ValueError, match="its `conditioning_codebook_size` must be None, .* got 8"):
        train_pixelcnn.build_prior(arguments, 8, level, 0, None, bottom)


def test_a_pixelcnn_has_no_level_above(inputs, tmp_path):
    train("pixelcnn", inputs, tmp_path / "first", *SIZES["pixelcnn"])
    start = StartingPoint(str(tmp_path / "first/pipeline"), "prior", (PixelCNNForCausalLM,))
    level = train_pixelcnn.Level(["top", "bottom"], [(2, 2), (4, 4)])
    arguments = train_pixelcnn.PriorArguments("tokenizer", level="bottom", prior="pixelsnail")
    with pytest.raises(ValueError, match="level='bottom' needs prior=pixelsnail: the PixelCNN of model_name_or_path="):
        train_pixelcnn.build_prior(arguments, 8, level, 0, None, start)


def test_what_a_llama_cannot_follow(inputs, tmp_path):
    train("llama", inputs, tmp_path / "first", *SIZES["llama"])
    start = ["--model_name_or_path", str(tmp_path / "first/pipeline")]
    refuses(
        "gpt",
        inputs,
        tmp_path,
        "n_unmasked=2: it needs a GPT, got the Llama of model_name",
        *start,
        "--n_unmasked",
        "2",
    )
    crops = ["--condition", "coordinates", "--picture_size", "16", "--crop", "random", "--resolution", "16"]
    refuses("gpt", inputs, tmp_path, "condition='coordinates': it needs a GPT, got the Llama", *start, *crops)


def test_steps_are_checked_against_the_noise_of_the_pipeline(inputs, tmp_path):
    few = ["--num_train_timesteps", "5", "--sample_steps", "5", "--validation_timesteps", "5"]
    train("vq_diffusion", inputs, tmp_path / "first", *SIZES["vq_diffusion"], *few)
    start = ["--model_name_or_path", str(tmp_path / "first/pipeline")]
    message = "sample_steps=25: it must be at most num_train_timesteps=5"
    refuses("vq_diffusion", inputs, tmp_path, message, *start)


def test_errors_of_a_start_name_the_argument(inputs, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for place, message in {
        tmp_path / "empty": "must hold one of model_index.json",
        tmp_path / "file": "must be a folder or the name of a repository, got a file",
        tmp_path / "none/at/all": "does not exist",
        inputs / "tokenizer": "it must be a VQGPTForCausalLM, .* got a VQVAEModel",
        inputs / "text": "got a BertModel",
        "": "must hold one of",
    }.items():
        with pytest.raises(ValueError, match=f"^model_name_or_path='{place}'.*{message}"):
            StartingPoint(str(place), "prior", (VQGPTForCausalLM,))

    latent_start(tmp_path / "cut", inputs, UNet2DModel(**UNET))
    weights = next((tmp_path / "cut/unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-9])
    for place in ("cut", "cut/unet"):
        with pytest.raises(ValueError, match=f"^model_name_or_path=.*`{weights}` must have .* got a truncated file"):
            StartingPoint(str(tmp_path / place), "unet", (UNet2DModel,))

    def no_such_repository(*arguments, **options):
        raise RepositoryNotFoundError("401 Client Error.\nInvalid username or password.", response=Mock())

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_such_repository)
    with pytest.raises(ValueError, match="the Hub has no repository of this name that you may read.$"):
        StartingPoint("user/no-such", "prior", (VQGPTForCausalLM,))
