"""Trained for a moment, a prior over pairs draws what its label map says: the quarters that are coloured."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_vq import VQAutoregressivePipeline
from hf_vq.evaluation.agreement import LabelAgreement, object_mask
from tests.examples.test_training_scripts import script


def quarters(count, seed):
    """Pictures with each quarter, of 2×2 codes, white or in the picture's one of three colours; maps say which."""
    generator = np.random.default_rng(seed)
    columns = {"image": [], "mask": []}
    for _ in range(count):
        mask = generator.integers(0, 2, (2, 2), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        image = np.full((16, 16, 3), 255, np.uint8)
        image[mask == 1] = generator.choice([[200, 30, 30], [30, 30, 200], [30, 160, 30]])
        columns["image"].append(Image.fromarray(image))
        columns["mask"].append(Image.fromarray(mask))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(dict.fromkeys(columns, datasets.Image())))


@pytest.mark.slow
def test_samples_follow_their_own_condition_and_not_another(tmp_path):
    data = tmp_path / "data"
    quarters(512, 0).to_parquet(data / "train.parquet")
    unseen = quarters(32, 1)
    unseen.to_parquet(data / "validation.parquet")
    run = f"--dataset_name_or_path {data} --resolution 16 --cpu true --validation_steps 0 --min_codebook_perplexity 0 "
    run += "--cache_images true --train_batch_size 12 --lr_scheduler cosine "
    model = (
        "--base_channels 32 --channel_multiplier 1 1 1 --num_res_blocks 1 --attn_resolutions 4 --latent_channels 32 "
        "--embed_dim 8 --num_embeddings 16 --perceptual none --disc_weight 0 --max_train_steps 80 "
        "--learning_rate 3e-3 "
    )
    condition = "--condition segmentation --num_labels 2 --conditioning_image_column mask"
    script("vqgan").main(f"{run} {model} --output_dir {tmp_path / 'image'}".split())
    script("vqgan").main(f"{run} {model} {condition} --output_dir {tmp_path / 'labels'}".split())
    prior = "--num_hidden_layers 2 --hidden_size 64 --num_attention_heads 4 --n_unmasked 16 --max_train_steps 240 "
    prior += "--learning_rate 3e-3 --dropout 0 --condition_dropout 0 --sample_classes 1 "
    prior += f"--tokenizer {tmp_path / 'image/tokenizer'} "
    prior += f"--condition_tokenizer {tmp_path / 'labels/tokenizer'} --conditioning_image_column mask"
    script("vq_gpt").main(f"{run} {prior} --output_dir {tmp_path / 'prior'}".split())

    pipe = VQAutoregressivePipeline.from_pretrained(str(tmp_path / "prior/pipeline"))
    masks = unseen["mask"][:]
    images = pipe(condition_image=masks, generator=torch.Generator().manual_seed(0), output_type="pt", top_k=8).images
    wanted = torch.from_numpy(np.stack([np.asarray(mask) for mask in masks])).long()
    scores = []
    for reference in (wanted, wanted.roll(16, dims=0)):
        agreement = LabelAgreement(2)
        agreement.update(object_mask(images * 2 - 1, threshold=0.5).long(), reference)
        scores.append(agreement.compute()["mean_iou"])
    assert scores[0] > 0.8 and scores[1] < 0.5  # 0.95 and 0.44
