import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import hf_vq
from hf_vq.evaluation.codebook import PositionCounts
from hf_vq.evaluation.evaluate import evaluate_prior, evaluate_tokenizer
from hf_vq.evaluation.evaluate_pipeline import applicable_metrics, draw_images, evaluate_model
from hf_vq.training.data.image_datasets import collate
from tests.pipelines.autoregressive_parts import make_pipeline, make_tiny_prior, make_tiny_tokenizer, seeded
from tests.pipelines.test_condition_images import make_conditional
from tests.process_groups import in_processes


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    vqvae = make_tiny_tokenizer(resolution=12)
    return hf_vq.VQAutoregressivePipeline(vqvae, make_tiny_prior(grid_size=6, condition_type="class", num_classes=3))


@pytest.fixture(scope="module")
def dataset():
    values = torch.rand(20, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return [{"pixel_values": image, "label": torch.tensor(number % 3)} for number, image in enumerate(values)]


class Means:
    name = "means"

    def pooled(self, images):
        return images.mean((2, 3))


def test_the_figures_are_those_of_each_evaluation_alone(pipeline, dataset):
    found = evaluate_model(
        pipeline,
        dataset,
        ["reconstruction", "codebook", "likelihood"],
        batch_size=7,
        label_key="label",
        progress=False,
    )
    tokenizer = evaluate_tokenizer(pipeline.vqvae, DataLoader(dataset, 20, collate_fn=collate), progress=False)
    for name in ("psnr", "ssim", "l1", "codebook_perplexity", "codebook_usage", "codebook_dead_codes"):
        assert found[name] == pytest.approx(tokenizer[name], rel=1e-5)
    with torch.no_grad():
        indices = torch.cat([pipeline.vqvae.encode(row["pixel_values"][None]).indices for row in dataset])
    labels = torch.stack([row["label"] for row in dataset])
    batch = {"indices": indices, "label": labels}
    prior = evaluate_prior(pipeline.prior, [batch], "label", pixel_dims=3 * 12 * 12, progress=False)
    for name, value in prior.items():
        assert found[name] == pytest.approx(value, rel=1e-5)
    columns = indices.flatten(1).T.tolist()
    entropies = [-sum(n / 20 * math.log2(n / 20) for n in Counter(column).values()) for column in columns]
    assert found["codebook_entropy_per_position"] == pytest.approx(sum(entropies) / 36, rel=1e-6)


def figures_of_a_process(pipeline, dataset):
    torch.manual_seed(0)
    return evaluate_model(
        pipeline,
        dataset,
        extractor=Means(),
        classifier=lambda images: images.mean((2, 3)),
        num_samples=9,
        batch_size=4,
        label_key="label",
        progress=False,
    )


def test_two_processes_measure_what_one_does(pipeline, dataset, tmp_path):
    expected = figures_of_a_process(pipeline, dataset)
    for found in in_processes(2, tmp_path, figures_of_a_process, pipeline, dataset):
        for name, value in expected.items():
            if name.endswith("distances"):
                for one, other in zip(value, found[name], strict=True):
                    assert one["num_generated"] == other["num_generated"] and one["num_real"] == other["num_real"]
                    assert other["value"] == pytest.approx(one["value"], rel=1e-4, abs=1e-7)
            elif name != "images_per_second":
                assert found[name] == pytest.approx(value, rel=1e-5)


def test_drawn_images_do_not_depend_on_the_batch(pipeline, dataset):
    draws = [
        torch.cat(list(draw_images(pipeline, dataset, 7, size, label_key="label", progress=False))) for size in (2, 7)
    ]
    torch.testing.assert_close(*draws, atol=1e-5, rtol=0)
    labels = [int(dataset[number]["label"]) for number in range(7)]
    generators = [torch.Generator().manual_seed(number) for number in range(7)]
    expected = pipeline(class_labels=labels, generator=generators, output_type="pt").images * 2 - 1
    torch.testing.assert_close(draws[0], expected, atol=1e-5, rtol=0)


def test_generation_is_compared_with_the_data(pipeline, dataset):
    def classifier(images):
        return images.mean((2, 3))

    found = evaluate_model(
        pipeline,
        dataset,
        ["generation"],
        extractor=Means(),
        classifier=classifier,
        num_samples=9,
        label_key="label",
        progress=False,
    )
    assert [figure["metric"] for figure in found["distances"]][0] == "frechet_distance"
    assert found["distances"][0]["num_generated"] == 9 and found["distances"][0]["num_real"] == 20
    assert found["num_samples"] == 9 and 1 <= found["classifier_score"] < 3 and "psnr" not in found


def test_what_does_not_apply_is_refused(pipeline, dataset):
    assert applicable_metrics(pipeline.vqvae) == ["reconstruction", "codebook"]
    with pytest.raises(ValueError, match="`metrics` must be among .* for a VQGANModel, got 'likelihood'"):
        evaluate_model(pipeline.vqvae, dataset, ["likelihood"])
    with pytest.raises(ValueError, match="`label_key` must name what holds the class"):
        evaluate_model(pipeline, dataset, ["likelihood"], progress=False)
    with pytest.raises(ValueError, match="`extractor` or `classifier` must be given"):
        evaluate_model(pipeline, dataset, ["generation"], progress=False)


def test_data_that_lack_something_are_refused_before_the_work(pipeline, dataset):
    class Tokenizer(torch.nn.Module):
        def encode(self, pixel_values):
            raise AssertionError("the work has begun")

    model = SimpleNamespace(vqvae=Tokenizer(), priors=(pipeline.prior,), prior=pipeline.prior, components={})
    with pytest.raises(ValueError, match="`label_key` must name what holds the class of each image"):
        evaluate_model(model, dataset, progress=False)
    measured = {"label_key": "label", "extractor": Means(), "progress": False}
    for metrics in (["codebook"], ["generation"]):
        with pytest.raises(ValueError, match="`dataset` must have at least 8 images for distances of features, got 7"):
            evaluate_model(model, dataset[:7], metrics, **measured)
    with pytest.raises(ValueError, match="`num_samples` must be at least 4 for distances of features, got 3"):
        evaluate_model(model, dataset, ["generation"], num_samples=3, **measured)


def test_entropy_of_each_position():
    counts = PositionCounts(4)
    counts.update(torch.tensor([[[0, 0], [0, 1]], [[0, 1], [1, 2]]]))
    counts.update(torch.tensor([[[0, 0], [2, 3]], [[0, 1], [3, 0]]]))
    torch.testing.assert_close(counts.entropy(), torch.tensor([0.0, 1.0, 2.0, 2.0]).double())
    with pytest.raises(ValueError, match="4 positions as before, got 9"):
        counts.update(torch.zeros(1, 3, 3, dtype=torch.int64))


def test_a_prior_over_conditions_is_measured_with_them():
    pipeline = make_conditional("segmentation")
    generator = torch.Generator().manual_seed(2)
    rows = [
        {
            "pixel_values": torch.rand(3, 8, 8, generator=generator) * 2 - 1,
            "condition": torch.randint(0, 3, (8, 8), generator=generator),
        }
        for _ in range(6)
    ]
    one_hot = torch.stack([F.one_hot(row["condition"], 3).permute(2, 0, 1).float() for row in rows])
    with torch.no_grad():
        codes = pipeline.condition_tokenizer.encode(one_hot).indices
        indices = pipeline.vqvae.encode(torch.stack([row["pixel_values"] for row in rows])).indices
        bits = -pipeline.prior.log_likelihood(indices, codes).mean().item() / 16 / math.log(2)
        without = -pipeline.prior.log_likelihood(indices).mean().item() / 16 / math.log(2)
    assert applicable_metrics(pipeline)[-1] == "agreement"
    found = evaluate_model(
        pipeline,
        rows,
        ["likelihood", "agreement"],
        batch_size=4,
        progress=False,
        annotator=lambda pictures: [np.asarray(picture)[..., 0].astype(np.int64) // 86 for picture in pictures],
    )
    assert found["bits_per_index"] == pytest.approx(bits, rel=1e-5) and abs(bits - without) > 1e-3
    assert 0 < found["condition_mean_iou"] < 1
    with pytest.raises(ValueError, match="`annotator` must be given"):
        evaluate_model(pipeline, rows, ["agreement"], progress=False)
    bare = [{"pixel_values": row["pixel_values"]} for row in rows]
    with pytest.raises(ValueError, match="`dataset` must have the entry 'condition'"):
        evaluate_model(pipeline, bare, ["likelihood"], progress=False)


@torch.no_grad()
def test_a_prior_of_coordinates_is_measured_with_those_of_the_whole_picture():
    pipeline = make_pipeline("coordinates")
    rows = [{"pixel_values": torch.rand(3, 8, 8, generator=seeded(row)) * 2 - 1} for row in range(5)]
    indices = pipeline.vqvae.encode(torch.stack([row["pixel_values"] for row in rows])).indices
    # means over cells of 2×2 pixels of (8 i + j) / 64, times 39: by hand
    cells = torch.tensor([[(8 * (2 * i + 0.5) + 2 * j + 0.5) / 64 * 39 for j in range(4)] for i in range(4)])
    given, null = (
        -pipeline.prior.log_likelihood(indices, codes).mean().item() / 16 / math.log(2)
        for codes in (cells.round().long().expand(5, -1, -1), None)
    )
    found = evaluate_model(pipeline, rows, ["likelihood"], batch_size=4, progress=False)["bits_per_index"]
    assert found == pytest.approx(given, rel=1e-5) and abs(found - null) > 1e-3
