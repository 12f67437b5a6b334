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
    with pytest.raises(ValueError, match="must have a VQConditionProcessor beside it.*got 'VQImageProcessor'"):
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


def test_a_prior_of_boxes(tokenizers, tmp_path):
    """Objects in pixels, in the form of a dict of lists, to a pipeline that is called with boxes."""
    pictures = [Image.new("RGB", (32, 16), colour) for colour in ("red", "green", "blue", "white")]
    objects = {
        "bbox": [[[8.0, 0.0, 8.0, 16.0]], [[16.0, 8.0, 8.0, 8.0], [0.0, 0.0, 4.0, 4.0]], [], [[20.0, 4.0, 99.0, 4.0]]],
        "category": [[1], [0, 1], [], [0]],
    }
    rows = [{"bbox": bbox, "category": kind} for bbox, kind in zip(*objects.values(), strict=True)]
    item = {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
        "category": datasets.List(datasets.ClassLabel(names=["ball", "box"])),
    }
    features = datasets.Features({"image": datasets.Image(), "objects": item})
    data = datasets.Dataset.from_dict({"image": pictures, "objects": rows}, features=features)
    for split in ("train", "validation"):
        data.to_parquet(tmp_path / f"data/{split}.parquet")
    argv = f"--dataset_name_or_path {tmp_path / 'data'} --output_dir {tmp_path} --tokenizer {tokenizers['image']} "
    argv += f"{PRIOR} {LENGTH} --condition boxes --max_objects 2 --box_tokens 81 --random_flip_codes true "
    script("vq_gpt").main([*argv.split(), "--boxes_column", "objects"])

    # 81 ids: a lattice of 9×9 points; the centre crop of 16×16 begins at column 8; "none" is 80
    codes = load_indices(tmp_path / "indices/train")
    assert [codes[row]["condition_codes"].tolist() for row in range(4)] == [
        [1, 0, 8 * 9 + 4, 80, 80, 80],
        [0, 4 * 9 + 4, 8 * 9 + 8, 80, 80, 80],  # the small object lies beyond the crop
        [80] * 6,
        [0, 2 * 9 + 6, 4 * 9 + 8, 80, 80, 80],  # cut off at the border of the picture
    ]
    flipped = load_indices(tmp_path / "indices/train", random_flip=True)
    seen = {tuple(flipped.sample(0, epoch)["condition_codes"].tolist()) for epoch in range(8)}
    assert seen == {(1, 0, 76, 80, 80, 80), (1, 4, 80, 80, 80, 80)}

    pipe = VQAutoregressivePipeline.from_pretrained(str(tmp_path / "pipeline"))
    assert pipe.prior.config.bounding_boxes["num_classes"] == 2
    ids = pipe.prepare_boxes([[("box", (0.0, 0.0, 0.5, 1.0))], []])
    assert ids.tolist() == [[1, 0, 76, 80, 80, 80], [80] * 6]
    drawn = [
        pipe(generator=torch.Generator().manual_seed(0), output_type="indices", **given).indices
        for given in ({"boxes": [("box", (0.0, 0.0, 0.5, 1.0))]}, {"condition": ids[:1]})
    ]
    assert torch.equal(*drawn)
    wide = pipe(boxes=[(1, (0.0, 0.0, 0.25, 1.0))], width=32, height=16, output_type="pt").images
    assert wide.shape == (1, 3, 16, 32)
    for given, message in (
        ({"boxes": []}, "`boxes` must be a list of objects"),
        ({"boxes": [("cat", (0.0, 0.0, 1.0, 1.0))]}, r"`boxes` must have labels of \['ball', 'box'\], got 'cat'"),
        ({"boxes": [(0, (0.0, 0.0, 9.0, 1.0))]}, r"`box` must be a number in \[0, 1\], got 9"),
        ({"boxes": [0.5, 0.5]}, r"`boxes` must hold objects \(label, box\)"),
        ({"boxes": [(0, (0.0, 0.0, 1.0, 1.0))], "condition": ids}, "Only one of `boxes`"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**given)

    for options, message in (
        (["--boxes_column", "boxes"], "boxes_column='boxes': the data set has no such column"),
        (["--boxes_column", "image"], "boxes_column='image' must hold objects with `bbox` and `category`"),
        ([], "boxes_column=None: it must be given with condition='boxes' alone"),
        (["--boxes_column", "objects", "--num_box_classes", "3"], "num_box_classes=3: 'objects' has 2 classes"),
        (["--boxes_column", "objects", "--box_format", "xyxy", "--output_dir", str(tmp_path / "b")],
         r"boxes_column='objects', row 1: `bbox` must be left, top, right, bottom"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            script("vq_gpt").main([*argv.split(), *options])
