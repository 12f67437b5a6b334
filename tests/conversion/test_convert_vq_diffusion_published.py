"""Every key of the published VQ-Diffusion models, their texts, and what the converter refuses."""

import copy
import json

import pytest
import torch
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import hf_vq.conversion.vq_diffusion_codec
import hf_vq.conversion.vq_diffusion_network
import hf_vq.conversion.vq_diffusion_text
from hf_vq.conversion.checkpoints import check_keys
from hf_vq.conversion.convert_vq_diffusion import convert, convert_model, read_model
from hf_vq.conversion.reading import load_checkpoint
from hf_vq.conversion.vq_diffusion_codec import first_codes
from hf_vq.pipelines.pipeline_vq_diffusion import VQDiffusionImagePipeline
from tests.conversion.golden import GOLDEN, Golden, published


F16 = {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0}
F16 |= {"double_z": False, "z_channels": 256, "resolution": 256, "in_channels": 3, "out_ch": 3}
IMAGENET_CODEC = {"target": "vqgan.VQModel", "params": {"embed_dim": 256, "n_embed": 16384, "ddconfig": F16}}
FFHQ_STAGE = {"target": "vqgan.VQModel", "params": {"embed_dim": 256, "n_embed": 1024, "ddconfig": F16}}
FFHQ_CODEC = {"target": "cond_transformer.Net2NetTransformer", "params": {"first_stage_config": FFHQ_STAGE}}
F8 = {**F16, "ch_mult": [1, 1, 2, 4], "attn_resolutions": [32]}
COCO_CODEC = {"target": "vqgan.GumbelVQ", "params": {"embed_dim": 256, "n_embed": 8192, "ddconfig": F8}}
PATCH = {"ch": 64, "ch_mult": [1, 2, 4, 8], "num_res_blocks": 2, "attn_resolutions": [[32, 32]], "dropout": 0.0}
PATCH |= {"in_channels": 3, "out_ch": 3, "resolution": [256, 256], "z_channels": 256}
ITHQ_CODEC = {
    "target": "patch_vqgan.PatchVQGAN",
    "params": {
        "encoder_config": {"target": "patch_vqgan.Encoder", "params": {**PATCH, "activate_output": False}},
        "decoder_config": {"target": "patch_vqgan.Decoder", "params": PATCH},
        "embed_dim": 128,
        "n_embed": 4096,
        "quantizer_type": "EMAVQ",
        "trainable": True,
    },
}
CODECS = {"coco": COCO_CODEC, "config_text": COCO_CODEC, "ffhq": FFHQ_CODEC, "ithq": ITHQ_CODEC}
CODECS |= dict.fromkeys(["config_imagenet", "imagenet", "imagenet_cf1001"], IMAGENET_CODEC)


@pytest.fixture
def only_keys(monkeypatch):
    for module in (
        hf_vq.conversion.vq_diffusion_codec,
        hf_vq.conversion.vq_diffusion_network,
        hf_vq.conversion.vq_diffusion_text,
    ):
        monkeypatch.setattr(module, "load_exactly", check_keys)


@pytest.mark.parametrize("name", CODECS)
def test_every_key_of_a_published_model(name, only_keys):
    model, weights = published(f"vqdiff__{name}")
    averages = {
        key.removeprefix("transformer."): value for key, value in weights.items() if "content_codec" not in key
    }
    params = model["params"]["content_codec_config"]["params"]
    used, mapping = params.get("quantize_number", 0), None
    if used:
        mapping = torch.cat([torch.zeros(params["num_tokens"] - used, dtype=torch.int64), torch.arange(used)])
    checkpoint = {"model": weights, "ema": averages}
    pipe, dropped = convert_model(model, checkpoint, CODECS[name], mapping)

    network = model["params"]["diffusion_config"]["params"]["transformer_config"]["params"]
    grid = tuple(network["content_spatial_size"])
    transformer = pipe.transformer
    assert transformer.sample_size == grid and transformer.config.position_embedding_size == (32, 32)
    assert len(transformer.transformer_blocks) == network["n_layer"]
    assert pipe.vqvae.config.num_embeddings == transformer.config.num_embeddings
    assert pipe.image_size == (256, 256)
    assert set(dropped) <= {*weights, *(f"ema.{key}" for key in averages)}
    if "imagenet" in name:
        assert transformer.config.num_classes == 1000 and transformer.null_class_id == 1000
    else:
        assert transformer.null_class_id is None
    assert (pipe.text_encoder is not None) == (transformer.config.condition_type == "text")
    assert (transformer.null_embedding is not None) == (name == "ithq")


# ------------------------------------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """The beginning of CLIP's vocabulary (OpenAI, MIT licence), which the original's small text model was made
    with.
    """
    folder = tmp_path_factory.mktemp("vocabulary")
    merges = (GOLDEN.parent / "clip_merges.txt").read_text().splitlines()
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair.split()) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder


def files_of(name: str) -> dict:
    folder = GOLDEN / name
    found = {"checkpoint": folder / "checkpoint.ckpt", "config": folder / "config.yaml"}
    found["codec_config"] = folder / "codec_config.yaml"
    return {**found, "mapping": folder / "codec_mapping.pt"} if (folder / "codec_mapping.pt").exists() else found


def test_prompts_are_read_as_the_original_reads_them(vocabulary, tmp_path):
    golden = Golden("vqdiff_text_clip")
    convert(**files_of(golden.name), output=tmp_path, tokenizer=vocabulary)
    pipe = VQDiffusionImagePipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["Teddy bear playing in the POOL", ""]
    golden.compare("cond_emb_fp32", pipe.encode_prompt(prompts).embeddings)
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")
    golden.compare("condition_token", tokens.input_ids.masked_fill(tokens.attention_mask == 0, 0))

    arguments = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "indices"}
    by_prompt = pipe(prompts[0], generator=torch.Generator().manual_seed(0), **arguments).indices
    embeds = {"prompt_embeds": golden["cond_emb_fp32"][:1], "negative_prompt_embeds": golden["cond_emb_fp32"][1:]}
    by_embeds = pipe(**embeds, generator=torch.Generator().manual_seed(0), **arguments).indices
    assert torch.equal(by_prompt, by_embeds)


# ------------------------------------------------------------------------------------------- what is refused


def pieces_of(name: str) -> dict:
    found = files_of(name)
    return {
        "model": read_model(found["config"], "config"),
        "checkpoint": load_checkpoint(found["checkpoint"]),
        "codec": read_model(found["codec_config"], "codec_config"),
        "mapping": load_checkpoint(found["mapping"]) if "mapping" in found else None,
    }


def changed(pieces: dict, path: str, value) -> dict:
    pieces = copy.deepcopy(pieces)
    *parents, last = path.split("/")
    entry = pieces
    for name in parents:
        entry = entry[name]
    entry[last] = value
    return pieces


DIFFUSION = "model/params/diffusion_config/params"
NETWORK = f"{DIFFUSION}/transformer_config/params"
WEIGHTS = "checkpoint/model"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{NETWORK}/block_activate", "ReLU", "must have block_activate=GELU or GELU2, got 'ReLU'"),
        (f"{NETWORK}/timestep_type", "adainsnorm", "must have timestep_type=adalayernorm or adalayernorm_abs"),
        (
            f"{NETWORK}/content_seq_len",
            17,
            r"positions in content_spatial_size or spatial_size as content_seq_len=17, got \(4, 4\) and \(4, 4",
        ),
        (f"{NETWORK}/class_number", 13, "has 12 classes in .*ln2.emb.weight, but `config` says class_number=13"),
        (f"{NETWORK}/n_head", 3, "must have n_embd a multiple of n_head=3, got 16"),
        (f"{NETWORK}/n_embd", 32, "must have one width, got n_embd=32 .* embed_dim=16"),
        (
            f"{DIFFUSION}/transformer_config/target",
            "UnCondition2ImageTransformer",
            "names in .* not known: .'class_number'",
        ),
        (f"{DIFFUSION}/condition_emb_config/params/identity", False, "a ClassEmbedding with identity=True"),
        (f"{DIFFUSION}/surprise", 1, r"names in diffusion_config that are not known: \['surprise'\]"),
        ("model/params/surprise", 1, r"names in model that are not known: \['surprise'\]"),
        (
            "model/params/content_codec_config/params/token_shape",
            [2, 2],
            r"grid \(4, 4\) as token_shape .* got \(2, 2\)",
        ),
        ("model/params/content_codec_config/params/quantize_number", 15, "got quantize_number=15 .* num_embed=16"),
        ("model/target", "GPT_DALLE", "has the model 'GPT_DALLE'|has the model ''"),
        (f"{NETWORK}/surprise", 1, r"not known: \['surprise'\]"),
        (
            f"{NETWORK}/attn_type",
            "cross",
            "must have attn_type=selfcondition for Condition2ImageTransformer, got 'cross'",
        ),
        (f"{NETWORK}/n_layer", 3, "lacks transformer.transformer.blocks.2.ln2.emb.weight, the classes"),
        (
            f"{DIFFUSION}/content_emb_config/params/pos_emb_type",
            "sine",
            "must have pos_emb_type=embedding or parameter",
        ),
        (
            f"{DIFFUSION}/alpha_init_type",
            "cos",
            "must have alpha_init_type=alpha1, the original's only one, got 'cos'",
        ),
        (f"{DIFFUSION}/diffusion_step", 50, "has another log_cumprod_at than `config` says"),
        ("checkpoint", {"state_dict": {}}, r"must hold the entry `model`, got \['state_dict'\]"),
        (f"{WEIGHTS}/transformer.surprise", torch.zeros(1), "has surprise only in one of `model` and `ema`"),
        (f"{WEIGHTS}/surprise", torch.zeros(1), "the key surprise, which starts with none of"),
        (f"{WEIGHTS}/content_codec.dec.quantize.embedding.weight", torch.zeros(40, 8), "that is not enc.quantize"),
        (f"{WEIGHTS}/content_codec.enc.more", torch.zeros(1), "does not fit VQGANModel: it has the unknown key more"),
        ("mapping", None, "`mapping` is needed: the model knows 16 of the codec's 40 codes, .*taming_vqvae_974.pt"),
        ("mapping", torch.zeros(39, dtype=torch.int64), "`mapping` must hold 40 integers, .* shape .39"),
        ("mapping", torch.zeros(40, dtype=torch.int64), "`mapping` must hold every index from 0 to 15"),
        ("codec/target", "taming.Unknown", "of the class taming.Unknown; known"),
        ("tokenizer", "a tokenizer", "`tokenizer` must not be given: `checkpoint` has no text encoder"),
    ],
)
def test_what_is_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        convert_model(**changed(pieces_of("vqdiff_class"), path, value))


def test_tables_are_not_taken_on_trust():
    pieces = pieces_of("vqdiff_uncond")
    pieces["checkpoint"].pop("ema")
    pieces["checkpoint"]["model"].pop("transformer.log_cumprod_at")
    with pytest.raises(ValueError, match="lacks log_cumprod_at, the noise schedule"):
        convert_model(**pieces)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("quantizer_type", "VQ", "must have quantizer_type=EMAVQ in model.params, got 'VQ'"),
        ("quantizer_dis_type", "sinkhorn", "must have quantizer_dis_type=euclidean or cosine in model.params"),
        ("surprise", 1, r"options in model.params that are not known: \['surprise'\]"),
        ("encoder_config/params/scale_by_2", [True], "must have scale_by_2=None"),
        (
            "encoder_config/params/surprise",
            1,
            r"in model.params.encoder_config.params that are not known: \['surprise'\]",
        ),
        ("encoder_config/params/resolution", [8], r"an int or \[height, width\] as resolution, got \[8\]"),
        ("encoder_config/params/resolution", [8, 5], r"`resolution` must be a multiple of 2 .* got \[8, 5\]"),
        ("encoder_config/params/attn_resolutions", [[4, 0]], r"as attn_resolutions, got \[4, 0\]"),
        ("encoder_config/params/z_channels", 4, "has encoder.conv_out.weight"),
        ("encoder_config/params/resamp_with_conv", False, r"they differ in \['resamp_with_conv'\]"),
    ],
)
def test_codecs_that_are_refused(path, value, message):
    with pytest.raises(ValueError, match=message):
        convert_model(**changed(pieces_of("vqdiff_text_ithq"), f"codec/params/{path}", value))


def test_texts_that_are_refused(vocabulary):
    pieces = pieces_of("vqdiff_text_clip")
    wrong = changed(pieces, f"{DIFFUSION}/condition_emb_config/params/pick_last_embedding", True)
    with pytest.raises(ValueError, match="must have keep_seq_len_dim=True with pick_last_embedding=True"):
        convert_model(**wrong)
    codec = "model/params/condition_codec_config/params"
    for name, value in (("add_start_and_end", False), ("clip_embedding", True)):
        with pytest.raises(ValueError, match=f"must have {name}={not value} in condition_codec_config, got {value}"):
            convert_model(**changed(pieces, f"{codec}/{name}", value))
    tokenizer = CLIPTokenizer.from_pretrained(vocabulary)
    tokenizer.add_tokens("<new>")
    with pytest.raises(ValueError, match="must have the text encoder's 1280 tokens, got 1281"):
        convert_model(**pieces, tokenizer=tokenizer)
    key = "transformer.condition_emb.transformer.resblocks.0.attn.surprise"
    wrong = changed(pieces, f"{WEIGHTS}/{key}", torch.zeros(1))
    wrong["checkpoint"].pop("ema")
    with pytest.raises(ValueError, match=f"unknown key {key}"):
        convert_model(**wrong)
    with pytest.raises(ValueError, match="`mapping` must not be given: `config` has no quantize_number"):
        convert_model(**{**pieces_of("vqdiff_uncond"), "mapping": torch.arange(16)})


def test_the_first_code_of_an_index_is_decoded():
    mapping = torch.tensor([0, 2, 0, 1, 2, 0, 3])
    assert first_codes(mapping, 7, 4).tolist() == [0, 3, 1, 6]
