"""Condition tokenizers and priors over pairs, by the training scripts, to a pipeline that is called with a
condition.
"""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_vq import VQAutoregressivePipeline, VQConditionProcessor, VQGANModel
from hf_vq.pipelines.annotators import EdgeAnnotator
from hf_vq.training.data.indices_cache import load_indices
from tests.examples.test_training_scripts import script


TINY = (
    "--base_channels 32 --channel_multiplier 1 1 --num_res_blocks 1 --attn_resolutions 4 "
    "--latent_channels 8 --embed_dim 4 "
    "--num_embeddings 8 --disc_channels 4 --disc_layers 1 --disc_start_fraction 0 --resolution 16 "
)
LENGTH = "--max_train_steps 2 --train_batch_size 4 --cpu true --min_codebook_perplexity 0 --validation_steps 0 "
PRIOR = "--num_hidden_layers 1 --hidden_size 8 --num_attention_heads 1 --sample_classes 2 --resolution 16 "


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures whose left part, of another width in each, has label 1 and its own colour."""
    folder = tmp_path_factory.mktemp("pairs")
    generator = np.random.default_rng(0)
    images, masks, depths = [], [], []
    for number in range(8):
        mask = np.zeros((16, 16), np.uint8)
        mask[:, : 4 + number] = 1
        mask[0] = 255
        image = np.where((mask == 1)[..., None], [200, 50, 50], 240).astype(np.uint8)
        images.append(Image.fromarray(image + generator.integers(0, 9, image.shape, np.uint8)))
        masks.append(Image.fromarray(mask))
        depths.append(Image.fromarray((mask * 100).astype(np.uint8)))
    columns = {"image": images, "mask": masks, "depth": depths}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(dict.fromkeys(columns, datasets.Image())))
    rows.to_parquet(folder / "train.parquet")
    rows.select(range(3)).to_parquet(folder / "validation.parquet")
    return str(folder)


def train_tokenizer(data, output, options):
    argv = f"--dataset_name_or_path {data} --output_dir {output} {TINY} {LENGTH} {options}"
    script("vqgan").main(argv.split())
    return output / "tokenizer"


@pytest.fixture(scope="module")
def tokenizers(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    segmentation = "--condition segmentation --num_labels 2 --conditioning_image_column mask"
    return {
        "image": train_tokenizer(data, folder / "image", "--perceptual none"),
        "segmentation": train_tokenizer(data, folder / "segmentation", segmentation),
        "edges": train_tokenizer(data, folder / "edges", "--condition edges --edge_sigma 1"),
    }


def rows_of(folder):
    import json

    return [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]


def test_a_tokenizer_of_label_maps(tokenizers):
    folder = tokenizers["segmentation"]
    model, processor = VQGANModel.from_pretrained(folder), VQConditionProcessor.from_pretrained(folder)
    assert (model.config.in_channels, model.config.out_channels, processor.num_labels) == (2, 2, 2)
    assert not (folder.parent / "discriminator").exists()
    (validation,) = [row for row in rows_of(folder) if "validation/mean_iou" in row]
    assert 0 <= validation["validation/mean_iou"] <= 1 and 0 < validation["validation/pixel_accuracy"] <= 1


def test_a_tokenizer_of_edges(tokenizers):
    folder = tokenizers["edges"]
    assert VQGANModel.from_pretrained(folder).config.in_channels == 1
    assert VQConditionProcessor.from_pretrained(folder).condition == "edges"
    assert (folder.parent / "discriminator").exists()
    assert any("validation/l1" in row for row in rows_of(folder))


@pytest.mark.parametrize("kind", ["segmentation", "edges"])
def test_a_prior_over_pairs(data, tokenizers, tmp_path, kind):
    column = "--conditioning_image_column mask" if kind == "segmentation" else "--edge_sigma 1"
    argv = f"--dataset_name_or_path {data} --output_dir {tmp_path} --tokenizer {tokenizers['image']} {column} {PRIOR}"
    argv += f" --condition_tokenizer {tokenizers[kind]} {LENGTH} --n_unmasked 64 --random_flip_codes true"
    script("vq_gpt").main(argv.split())

    pipe = VQAutoregressivePipeline.from_pretrained(str(tmp_path / "pipeline"))
    config = pipe.prior.config
    assert (config.condition_type, config.condition_length, config.n_unmasked) == ("codes", 64, 64)
    assert (config.condition_vocab_size, config.condition_dropout) == (8, 0.1)
    # the cached codes are those of the pipeline's own parts, mirrored together
    images = datasets.load_dataset("parquet", data_files=f"{data}/train.parquet", split="train")
    masks, photos = images["mask"][:], images["image"][:]
    codes = load_indices(tmp_path / "indices/train", random_flip=True)
    given = masks if kind == "segmentation" else EdgeAnnotator(1.0)(photos)
    values = pipe.condition_processor(given, size=16).pixel_values
    expected = pipe.condition_tokenizer.encode(values).indices
    flipped = pipe.condition_tokenizer.encode(values.flip(-1)).indices
    own = pipe.vqvae.encode(torch.stack([_pixels(photo) for photo in photos])).indices
    own_flipped = pipe.vqvae.encode(torch.stack([_pixels(photo) for photo in photos]).flip(-1)).indices
    for row in range(8):
        for epoch in range(4):
            sample = codes.sample(row, epoch)
            pair = sample["condition_codes"], sample["indices"]
            straight = torch.equal(pair[0], expected[row]) and torch.equal(pair[1], own[row])
            mirrored = torch.equal(pair[0], flipped[row]) and torch.equal(pair[1], own_flipped[row])
            assert straight or mirrored

    generator = [torch.Generator().manual_seed(number) for number in range(2)]
    by_codes = pipe(condition=expected[:2], generator=generator, output_type="indices").indices
    generator = [torch.Generator().manual_seed(number) for number in range(2)]
    options = {} if kind == "segmentation" else {"annotator": EdgeAnnotator(1.0)}
    given = masks if kind == "segmentation" else photos
    by_images = pipe(condition_image=given[:2], generator=generator, output_type="indices", **options).indices
    assert torch.equal(by_codes, by_images)
    if kind == "segmentation":
        larger = pipe(condition_image=masks[0], height=16, width=24, output_type="indices").indices
        assert larger.shape == (1, 8, 12)
        with pytest.raises(ValueError, match="`condition_image` is no condition of kind 'segmentation'.*`annotator`"):
            pipe(condition_image=np.zeros((16, 16), np.float32))


def _pixels(photo):
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--condition segmentation --conditioning_image_column mask", "num_labels must be given"),
        ("--condition depth", "conditioning_image_column must name a column for condition 'depth'"),
        (
            "--condition depth --conditioning_image_column depth --num_labels 3",
            "num_labels=3 is of condition=segmentation alone",
        ),
        ("--conditioning_image_column mask", "needs a condition tokenizer, or a `condition`"),
        ("--condition edges --in_channels 3", "in_channels=3: condition 'edges' has 1"),
        ("--condition segmentation --num_labels 2 --conditioning_image_column mask --disc_weight 1", "disc_weight=1"),
        ("--condition edges --perceptual lpips", "perceptual='lpips'"),
        ("--condition colours", "condition='colours': it must be one of"),
    ],
)
def test_what_contradicts_itself_is_refused(data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(data, tmp_path, options)


def test_a_prior_refuses_a_column_without_a_tokenizer(data, tokenizers, tmp_path):
    argv = f"--dataset_name_or_path {data} --output_dir {tmp_path} --tokenizer {tokenizers['image']} {PRIOR} {LENGTH}"
    with pytest.raises(ValueError, match="conditioning_image_column='mask' needs condition_tokenizer"):
        script("vq_gpt").main([*argv.split(), "--conditioning_image_column", "mask"])
    with pytest.raises(ValueError, match="must have a VQConditionProcessor beside it, got 'VQImageProcessor'"):
        script("vq_gpt").main([*argv.split(), "--condition_tokenizer", str(tokenizers["image"])])


def test_a_prior_of_coordinates(data, tokenizers, tmp_path):
    """Trained on crops of 8 pixels out of pictures of 16, which the pipeline then samples whole."""
    prior = PRIOR.replace("--resolution 16", "--resolution 8") + "--condition coordinates --crop random "
    prior += "--picture_size 16 --crops_per_image 3 --coordinate_scale 30 --random_flip_codes true"
    argv = f"--dataset_name_or_path {data} --output_dir {tmp_path} --tokenizer {tokenizers['image']} {LENGTH} {prior}"
    script("vq_gpt").main(argv.split())
    codes = load_indices(tmp_path / "indices/train", random_flip=True)
    assert len(codes) == 24 and codes.grids == {"indices": [4, 4], "condition_codes": [4, 4]}
    assert len({tuple(codes[row]["condition_codes"].flatten().tolist()) for row in range(24)}) > 6
    pipe = VQAutoregressivePipeline.from_pretrained(str(tmp_path / "pipeline"))
    config = pipe.prior.config
    assert (config.condition_type, config.condition_vocab_size, config.coordinate_scale) == ("coordinates", 31, 30)
    assert pipe(height=16, width=16, output_type="pt").images.shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="crop='center' and streaming=False: coordinates are those of random crops"):
        script("vq_gpt").main(argv.replace("--crop random", "").split())
