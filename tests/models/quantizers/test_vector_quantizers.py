"""Gradient estimators, and the codebooks trained by gradients and by moving averages."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hf_vq.models.quantizers.build import build_quantizer
from hf_vq.models.quantizers.codebook_search import draw_vectors, kmeans
from hf_vq.models.quantizers.gradient_estimators import rotation_trick, straight_through
from hf_vq.models.quantizers.vector_quantizers import EMAVectorQuantizer, VectorQuantizer
from tests.models.quantizers.brute_force import brute_force, plain_lloyd, randn, rows


# -------------------------------------------------------------------------------------------------- gradient
# estimators


@pytest.mark.parametrize("estimator", [straight_through, rotation_trick])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
def test_the_value_is_the_quantized_vector_to_the_bit(estimator, scale):
    latents, quantized = scale * randn(3, 4, 5, 5), randn(3, 4, 5, 5, seed=1)
    latents[0], latents[1] = -quantized[0] * (1 + 1e-7), 0
    assert torch.equal(estimator(latents, quantized), quantized)


def jacobian(estimator, latent, code):
    """Of one vector: `(D, D)`."""
    shape = (1, -1, 1, 1)
    return torch.autograd.functional.jacobian(
        lambda z: estimator(z.reshape(shape), code.reshape(shape)).flatten(), latent
    )


def rotation_between(a, b):
    """The rotation in the plane of two vectors that takes the direction of a to that of b; the identity elsewhere."""
    u = a / a.norm()
    v = b - (b @ u) * u
    v = v / v.norm()
    cosine = (a @ b) / (a.norm() * b.norm())
    sine = (1 - cosine**2).sqrt()
    plane = torch.outer(u, u) + torch.outer(v, v)
    return torch.eye(len(a), dtype=a.dtype) + (cosine - 1) * plane + sine * (torch.outer(v, u) - torch.outer(u, v))


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_rotation_trick_is_a_rotation_and_a_scaling(dim):
    for seed in range(5):
        latent, code = randn(dim, seed=seed, dtype=torch.float64), 3 * randn(dim, seed=seed + 50, dtype=torch.float64)
        rotation = rotation_between(latent, code)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(dim, dtype=torch.float64))
        assert torch.linalg.det(rotation).item() == pytest.approx(1)
        expected = code.norm() / latent.norm() * rotation
        torch.testing.assert_close(expected @ latent, code)
        torch.testing.assert_close(jacobian(rotation_trick, latent, code), expected)


def test_rotation_trick_of_vectors_without_a_rotation():
    code = randn(4)
    assert torch.equal(jacobian(rotation_trick, torch.zeros(4), code), torch.eye(4))
    assert not jacobian(rotation_trick, code, torch.zeros(4)).any()
    # opposite: lengths are kept, up to |e|/|z|
    opposite = jacobian(rotation_trick, -2 * code, code)
    torch.testing.assert_close(opposite @ opposite.T, torch.eye(4) / 4)
    nearly = jacobian(rotation_trick, -code * (1 + 1e-7) + 1e-7, code)
    assert torch.linalg.matrix_norm(nearly, 2) <= 3.01


def test_straight_through_gradient_is_the_identity():
    assert torch.equal(jacobian(straight_through, randn(4), randn(4, seed=1)), torch.eye(4))


# -------------------------------------------------------------------------------------- a codebook trained by
# gradients


@pytest.mark.parametrize("legacy", [False, True])
def test_losses_and_their_gradients(legacy):
    beta, quantizer = 0.3, VectorQuantizer(6, 3, 0.3, legacy_beta=legacy)
    quantizer.set_codebook(randn(6, 3, seed=1))
    latents = randn(2, 3, 4, 5).requires_grad_()
    output = quantizer(latents)
    output.loss.backward()

    z, e = rows(latents.detach()), quantizer.embedding.weight.detach()
    nearest = brute_force(z, e)
    assert torch.equal(output.indices.flatten(), nearest)
    squared = (z - e[nearest]).square().mean()
    torch.testing.assert_close(output.codebook_loss, squared)
    torch.testing.assert_close(output.commitment_loss, squared)
    torch.testing.assert_close(output.loss, (1 + beta) * squared)
    # d/dz β·mean|z - e|² = 2β(z - e)/(N·D); a code collects 2(e - z)/(N·D) of its users. The legacy order swaps β.
    encoder_weight, codebook_weight = (1, beta) if legacy else (beta, 1)
    torch.testing.assert_close(rows(latents.grad), encoder_weight * 2 * (z - e[nearest]) / z.numel())
    expected = torch.zeros_like(e)
    for vector, code in zip(z, nearest, strict=True):
        expected[code] += codebook_weight * 2 * (e[code] - vector) / z.numel()
    torch.testing.assert_close(quantizer.embedding.weight.grad, expected)


def test_quantized_vectors_give_no_gradient_to_the_codebook():
    quantizer = VectorQuantizer(6, 3)
    latents = randn(2, 3, 4, 5).requires_grad_()
    output = quantizer(latents)
    assert torch.equal(rows(output.quantized), quantizer.embedding.weight[output.indices.flatten()])
    output.quantized.backward(randn(2, 3, 4, 5, seed=1))
    assert quantizer.embedding.weight.grad is None
    assert torch.equal(latents.grad, randn(2, 3, 4, 5, seed=1))


def test_indices_to_latents_and_dtype():
    quantizer = VectorQuantizer(6, 3)
    output = quantizer(randn(2, 3, 4, 5).bfloat16())
    assert output.quantized.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    vectors = quantizer.indices_to_latents(output.indices.to(torch.int32))
    assert torch.equal(vectors.bfloat16(), output.quantized)
    assert torch.equal(vectors[1, :, 2, 3], quantizer.codebook[output.indices[1, 2, 3]])


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_the_memory_layout_is_that_of_the_latents(estimator):
    quantizer = EMAVectorQuantizer(6, 3, gradient_estimator=estimator).eval()
    latents = randn(2, 3, 4, 5)
    expected = quantizer(latents)
    assert expected.quantized.is_contiguous()
    assert quantizer.indices_to_latents(expected.indices).is_contiguous()
    output = quantizer(latents.to(memory_format=torch.channels_last))
    assert torch.equal(output.indices, expected.indices) and torch.equal(output.quantized, expected.quantized)
    assert output.quantized.is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------- moving-average
# codebook


def run_ema(quantizer, batches):
    """The indices that each training step gave."""
    quantizer.train()
    return [quantizer(batch).indices.flatten() for batch in batches]


def plain_ema(codes, batches, steps, decay, zero_debias):
    """The definition, for every code in float64: counts, sums, vectors."""
    count, total = [1.0] * len(codes), [code.double() for code in codes]
    for t, (batch, indices) in enumerate(zip(batches, steps, strict=True), start=1):
        rate = (1 - decay) / (1 - decay**t) if zero_debias else 1 - decay
        z = rows(batch).double()
        for k in range(len(codes)):
            mine = z[indices == k]
            count[k] += rate * (len(mine) - count[k])
            total[k] = total[k] + rate * (mine.sum(0) - total[k])
    vectors = [total[k] / count[k] if count[k] else codes[k].double() for k in range(len(codes))]
    return torch.tensor(count, dtype=torch.float64), torch.stack(total), torch.stack(vectors)


@pytest.mark.parametrize("zero_debias", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_ema_update_is_its_definition(zero_debias, decay):
    quantizer = EMAVectorQuantizer(7, 3, decay=decay, zero_debias=zero_debias, restart_threshold=0)
    codes = randn(7, 3, seed=9)
    quantizer.set_codebook(codes)
    assert torch.equal(quantizer.cluster_size, torch.ones(7)) and torch.equal(quantizer.embed_avg, codes)
    batches = [randn(2, 3, 3, 3, seed=seed) for seed in range(5)]
    steps = run_ema(quantizer, batches)
    assert len(torch.cat(steps).unique()) > 3
    count, total, vectors = plain_ema(codes, batches, steps, decay, zero_debias)
    torch.testing.assert_close(quantizer.cluster_size.double(), count, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(quantizer.embed_avg.double(), total, atol=1e-5, rtol=1e-5)
    if decay:  # without memory, an unused code has a count of 0 and the vector it had, which this definition forgets
        torch.testing.assert_close(quantizer.embedding.double(), vectors, atol=1e-5, rtol=1e-5)
    assert quantizer.num_updates == 5


@pytest.mark.parametrize("kmeans_init", [True, False])
def test_a_new_codebook_has_counts_of_one(kmeans_init):
    quantizer = EMAVectorQuantizer(7, 3, kmeans_init=kmeans_init)
    assert torch.equal(quantizer.cluster_size, torch.ones(7))
    assert torch.equal(quantizer.embed_avg, quantizer.embedding)
    assert quantizer.num_updates == (-1 if kmeans_init else 0)


def test_a_codebook_that_was_saved_before_or_after_its_start():
    """Only one that has never been trained awaits k-means, whatever the object held before."""
    new, latents = EMAVectorQuantizer(7, 3), randn(2, 3, 4, 4)
    trained = EMAVectorQuantizer(7, 3, kmeans_init=False, restart_threshold=0)
    run_ema(trained, [latents])
    resumed = EMAVectorQuantizer(7, 3, restart_threshold=0)
    resumed.load_state_dict(trained.state_dict())
    assert torch.equal(resumed.train()(latents).indices, trained.train()(latents).indices)
    for name, value in trained.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    resumed.load_state_dict(new.state_dict())
    run_ema(resumed, [latents])
    centres = kmeans(rows(latents), 7, 10)
    torch.testing.assert_close(
        resumed.indices_to_latents(resumed.eval()(latents).indices), centres_of(latents, centres)
    )


def centres_of(latents, centres):
    """One update after k-means, each used code is the mean of its latents."""
    nearest = brute_force(rows(latents), centres)
    means = torch.stack([rows(latents)[nearest == k].mean(0) for k in range(len(centres))])
    return means[brute_force(rows(latents), means)].reshape(2, 4, 4, 3).permute(0, 3, 1, 2)


def test_zero_debiased_codes_are_weighted_means_of_the_data_alone():
    quantizer = EMAVectorQuantizer(2, 3, decay=0.9, restart_threshold=0)
    quantizer.set_codebook(torch.stack([torch.full((3,), 5.0), torch.full((3,), -500.0)]))
    batches = [randn(1, 3, 2, 2 + seed, seed=seed) for seed in range(6)]
    run_ema(quantizer, batches)
    weights = torch.cat([torch.full((len(rows(b)),), 0.9 ** (5 - t)) for t, b in enumerate(batches)]).double()
    z = torch.cat([rows(b) for b in batches]).double()
    expected = (weights[:, None] * z).sum(0) / weights.sum()
    torch.testing.assert_close(quantizer.embedding[0].double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(quantizer.embedding[1], torch.full((3,), -500.0))


@pytest.mark.parametrize("zero_debias", [True, False])
def test_an_unused_code_keeps_its_vector_to_the_bit(zero_debias):
    quantizer = EMAVectorQuantizer(3, 2, decay=0.9, zero_debias=zero_debias, restart_threshold=0)
    never = torch.tensor([777.7, 0.1])
    quantizer.set_codebook(torch.stack([torch.zeros(2), never, torch.tensor([99.0, 99.0])]))
    # the third code is used once, then left for so long that its count has only few bits
    run_ema(quantizer, [torch.cat([randn(1, 2, 3, 3), 100 + randn(1, 2, 3, 3, seed=1)])])
    used_once = quantizer.embedding[2].clone()
    assert not torch.equal(used_once, torch.tensor([99.0, 99.0]))
    run_ema(quantizer, [randn(1, 2, 3, 3, seed=seed) for seed in range(1200)])
    assert quantizer.cluster_size[2] < 1e-43
    assert torch.equal(quantizer.embedding[1], never) and torch.equal(quantizer.embedding[2], used_once)


def test_laplace_smoothing_is_sonnets():
    latents, codes = randn(2, 2, 4, 4), randn(5, 2, seed=3)
    for smoothing in ("laplace", "laplace_stored"):
        quantizer = EMAVectorQuantizer(
            5, 2, decay=0.8, zero_debias=False, restart_threshold=0, count_smoothing=smoothing, epsilon=0.1
        )
        quantizer.set_codebook(codes)
        steps = run_ema(quantizer, [latents])
        count, total, _ = plain_ema(codes, [latents], steps, 0.8, False)
        smoothed = (count + 0.1) / (count.sum() + 5 * 0.1) * count.sum()
        torch.testing.assert_close(quantizer.embedding.double(), total / smoothed[:, None], atol=1e-6, rtol=1e-6)
        stored = smoothed if smoothing == "laplace_stored" else count
        torch.testing.assert_close(quantizer.cluster_size.double(), stored, atol=1e-6, rtol=1e-6)


def test_the_original_vqgan_codes_ema_update():
    """Counts that start at 0, every code divided by its smoothed count, used or not; written out."""
    codes, batches = randn(5, 2, seed=3), [randn(2, 2, 2, 2, seed=seed) for seed in range(3)]
    codes[4] = 50.0
    quantizer = EMAVectorQuantizer(
        5, 2, decay=0.9, zero_debias=False, restart_threshold=0, count_smoothing="laplace", keep_unused=False
    )
    quantizer.set_codebook(codes)
    quantizer.cluster_size.zero_()
    count, average, table = torch.zeros(5).double(), codes.double(), codes.double()
    for batch in batches:
        z = rows(batch).double()
        one_hot = torch.nn.functional.one_hot(brute_force(z, table), 5).double()
        count = 0.9 * count + 0.1 * one_hot.sum(0)
        average = 0.9 * average + 0.1 * one_hot.T @ z
        total, unused = count.sum(), count == 0
        if batch is batches[0]:
            assert unused.any() and not unused.all()
        table = average / ((count + 1e-5) / (total + 5 * 1e-5) * total)[:, None]
        quantizer.train()(batch)
        torch.testing.assert_close(quantizer.embedding.double(), table, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(quantizer.cluster_size.double(), count)
    torch.testing.assert_close(quantizer.embed_avg.double(), average)


def test_smoothing_does_not_send_a_code_without_count_away():
    quantizer = EMAVectorQuantizer(2, 2, count_smoothing="laplace", restart_threshold=0)
    quantizer.set_codebook(torch.tensor([[0.0, 0.0], [50.0, 50.0]]))
    run_ema(quantizer, [randn(2, 2, 4, 4)])
    assert torch.equal(quantizer.embedding[1], torch.tensor([50.0, 50.0]))


def test_dead_codes_restart_at_latents_of_the_batch():
    torch.manual_seed(0)
    latents = torch.cat([randn(1, 2, 4, 4), 20 + randn(1, 2, 4, 4, seed=1)])
    codes = torch.tensor([[0.0, 0.0], [20.0, 20.0], [900.0, 0.0], [0.0, 900.0]])
    kept, restarted = (EMAVectorQuantizer(4, 2, restart_threshold=threshold) for threshold in (0, 0.02))
    for quantizer in (kept, restarted):
        quantizer.set_codebook(codes)
        run_ema(quantizer, [latents])
    assert torch.equal(kept.embedding[2:], codes[2:])
    for name in ("embedding", "embed_avg", "cluster_size"):
        assert torch.equal(getattr(restarted, name)[:2], getattr(kept, name)[:2]), name
    for code in restarted.embedding[2:]:
        assert (rows(latents) == code).all(dim=1).any()
    # 32 latents over 4 codes
    assert restarted.cluster_size.tolist() == [16, 16, 8, 8]
    torch.testing.assert_close(restarted.embed_avg[2:], 8 * restarted.embedding[2:])
    assert not torch.equal(restarted.embedding[2], restarted.embedding[3])


def test_dead_codes_restart_where_the_codes_are_far():
    """Of a flat image with two spots, at the spots: another code on the ground would stay without use."""
    quantizer = EMAVectorQuantizer(4, 1)
    quantizer.set_codebook(torch.tensor([[1.0], [50.0], [60.0], [70.0]]))
    latents = torch.ones(1, 1, 8, 8)
    latents[0, 0, 2, 3], latents[0, 0, 5, 1] = 3.0, -4.0
    run_ema(quantizer, [latents])
    assert {-4.0, 3.0} < {float(code) for code in quantizer.embedding[1:]}


@pytest.mark.parametrize(("threshold", "restarts"), [(0.1, False), (0.2, True)])
def test_restart_threshold_is_relative_to_the_mean_count(threshold, restarts):
    quantizer = EMAVectorQuantizer(2, 1, restart_threshold=threshold)
    quantizer.set_codebook(torch.tensor([[0.0], [10.0]]))
    latents = torch.zeros(1, 1, 1, 16)
    latents[..., 0] = 10.5
    # counts 15 and 1, their mean 8: the rare code has 0.125 of it
    run_ema(quantizer, [latents])
    assert quantizer.cluster_size.tolist() == ([15.0, 8.0] if restarts else [15.0, 1.0])


def test_only_the_commitment_term_has_a_gradient_and_evaluation_updates_nothing():
    quantizer = EMAVectorQuantizer(6, 3, commitment_cost=0.7).eval()
    before = {name: buffer.clone() for name, buffer in quantizer.named_buffers()}
    latents = randn(2, 3, 4, 5).requires_grad_()
    output = quantizer(latents)
    output.loss.backward()
    difference = latents.detach() - quantizer.indices_to_latents(output.indices)
    torch.testing.assert_close(latents.grad, 0.7 * 2 * difference / difference.numel())
    torch.testing.assert_close(output.loss, 0.7 * difference.square().mean())
    assert output.codebook_loss is None
    for name, buffer in quantizer.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_training_step_quantizes_with_the_codes_before_its_update():
    quantizer = EMAVectorQuantizer(6, 3, kmeans_init=False)
    before, latents = quantizer.embedding.clone(), randn(2, 3, 4, 5)
    output = quantizer.train()(latents)
    assert torch.equal(rows(output.quantized), before[output.indices.flatten()])
    assert not torch.equal(quantizer.embedding, before)


# ------------------------------------------------------------------------------------------------- non-finite latents


BAD = [float("nan"), float("inf"), -float("inf"), 3e38]  # of the last, a few add up to infinity


def with_bad(latents, seed=0):
    """The same with every third vector spoilt in one channel."""
    spoilt = latents.clone()
    flat = spoilt.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    for i in range(seed, len(flat), 3):
        flat[i, i % latents.shape[1]] = BAD[i % 4]
    return flat.reshape(latents.shape[0], *latents.shape[2:], -1).permute(0, 3, 1, 2).contiguous()


def finite_part(latents):
    """The finite vectors alone, as `(1, D, 1, n)`."""
    flat = rows(latents)
    return flat[flat.square().isfinite().all(1)].T.reshape(1, latents.shape[1], 1, -1)


@pytest.mark.parametrize("options", [{"restart_threshold": 0}, {"restart_threshold": 0.5}, {"kmeans_init": True}])
def test_latents_that_are_not_finite_leave_no_trace(options):
    spoilt, clean = (EMAVectorQuantizer(8, 3, decay=0.9, **options).train() for _ in range(2))
    codes = randn(8, 3, seed=99)
    for quantizer in (spoilt, clean):
        if "kmeans_init" not in options:
            quantizer.set_codebook(codes)
    for step in range(4):
        batch = with_bad(randn(2, 3, 4, 4, seed=step), step % 3)
        output = spoilt(batch)
        clean(finite_part(batch))
        assert 0 <= output.indices.min() and output.indices.max() < 8
    for name, value in clean.state_dict().items():
        torch.testing.assert_close(spoilt.state_dict()[name], value, atol=1e-6, rtol=1e-6)
        assert value.isfinite().all()


@pytest.mark.parametrize("name", ["vq", "ema", "cosine", "residual"])
def test_a_batch_without_a_finite_latent_changes_no_code(name):
    quantizer = build_quantizer(name, 6, 2, kmeans_init=True).train()
    before = {key: value.clone() for key, value in quantizer.state_dict().items() if "num_updates" not in key}
    decayed = ("cluster_size", "embed_avg")
    quantizer(torch.full((1, 2, 2, 2), float("nan")))
    for key, value in before.items():
        if not key.endswith(decayed):
            assert torch.equal(quantizer.state_dict()[key], value), key
    quantizer(randn(2, 2, 4, 4))
    layers = quantizer.layers if name == "residual" else [quantizer]
    assert not any(layer.is_at_start() for layer in layers)
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())


@pytest.mark.parametrize("name", ["vq", "ema", "cosine", "gumbel", "simvq", "ibq", "fsq", "lfq", "bsq"])
@pytest.mark.parametrize("bad", BAD)
def test_indices_of_latents_that_are_not_finite_are_in_range(name, bad):
    dim, options = {"fsq": (2, {"levels": (4, 4)}), "lfq": (4, {}), "bsq": (4, {})}.get(name, (3, {}))
    quantizer = build_quantizer(name, 16, dim, **options)
    latents = randn(1, dim, 3, 3)
    expected = quantizer.eval()(latents).indices
    latents[0, 0, 1, 1] = bad
    for mode in (True, False):
        indices = quantizer.train(mode)(latents).indices
        assert 0 <= indices.min() and indices.max() < 16
    others = torch.ones(1, 3, 3, dtype=torch.bool)
    others[0, 1, 1] = False
    if name != "ema":
        assert torch.equal(indices[others], expected[others])


# ----------------------------------------------------------------------------------------------------------
# distributed


def latents_of(rank, step):
    # processes hold batches of different sizes
    return randn(1 + rank, 3, 4, 4, seed=10 * step + rank)


def train_on_one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(rank)
    state = {}
    for name, kwargs in {
        "plain": {"restart_threshold": 0},
        "restarts": {"restart_threshold": 0.5},
        "kmeans": {"kmeans_init": True},
    }.items():
        quantizer = EMAVectorQuantizer(8, 3, decay=0.9, **kwargs)
        if name != "kmeans":
            quantizer.set_codebook(randn(8, 3, seed=99))
        run_ema(quantizer, [latents_of(rank, step) for step in range(4)])
        state[name] = quantizer.state_dict()
    spoilt = EMAVectorQuantizer(8, 3, decay=0.9, restart_threshold=0.5)
    spoilt.set_codebook(randn(8, 3, seed=99))
    # the first process has not one finite latent in the last step
    batches = [with_bad(latents_of(rank, step)) for step in range(3)]
    run_ema(spoilt, [*batches, latents_of(rank, 3) if rank else torch.full((1, 3, 4, 4), float("nan"))])
    state["spoilt"] = spoilt.state_dict()
    torch.manual_seed(rank)
    state["centres"] = {"": kmeans(rows(latents_of(rank, 0)), 6, 3)}
    torch.save(state, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_end_with_the_same_codebook(tmp_path):
    mp.spawn(train_on_one_of_two, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in first:
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), (name, key)
    assert not torch.equal(first["plain"]["embedding"], first["restarts"]["embedding"])

    both = rows(torch.cat([latents_of(0, 0), latents_of(1, 0)]))
    centres = plain_lloyd(both, draw_vectors(both, 6, seed=0), 3)
    torch.testing.assert_close(first["centres"][""].double(), centres, atol=1e-5, rtol=1e-5)

    alone = EMAVectorQuantizer(8, 3, decay=0.9, restart_threshold=0.5)
    alone.set_codebook(randn(8, 3, seed=99))
    both = [[with_bad(latents_of(rank, step)) for rank in range(2)] for step in range(3)]
    run_ema(alone, [*(torch.cat([finite_part(a), finite_part(b)], dim=3) for a, b in both), latents_of(1, 3)])
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(first["spoilt"][key], value, atol=1e-5, rtol=1e-5)

    # one process with the batches of both ends with the same codes, those that restarted among them
    for name, threshold in (("plain", 0), ("restarts", 0.5)):
        alone = EMAVectorQuantizer(8, 3, decay=0.9, restart_threshold=threshold)
        alone.set_codebook(randn(8, 3, seed=99))
        run_ema(alone, [torch.cat([latents_of(0, step), latents_of(1, step)]) for step in range(4)])
        for key, value in alone.state_dict().items():
            torch.testing.assert_close(first[name][key], value, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VectorQuantizer(0, 4), "`num_embeddings` must be an int of at least 1, got 0"),
        (lambda: VectorQuantizer(4, 4, gradient_estimator="none"), "`gradient_estimator` must be one of"),
        (lambda: VectorQuantizer(4, 3)(torch.zeros(1, 4, 2, 2)), r"`latents` must have shape \(B, 3, " r"h, w\), got \(1, 4"),  # noqa: E501
        (lambda: VectorQuantizer(4, 3).set_codebook(torch.zeros(4, 2)), r"`codes` must have shape \(4, 3\)"),
        (lambda: VectorQuantizer(4, 3).indices_to_latents(torch.tensor([[[4]]])), r"\[0, 4\), got values from 4 to 4"),
        (lambda: VectorQuantizer(4, 3).indices_to_latents(torch.tensor([[[0.0]]])), "must be an integer tensor"),
        (lambda: EMAVectorQuantizer(4, 3, decay=1.0), r"`decay` must be a number in \[0, 1\), got 1.0"),
        (lambda: EMAVectorQuantizer(4, 3, restart_threshold=-0.1), r"`restart_threshold` must be a " r"number in \[0, 1\)"),  # noqa: E501
        (lambda: EMAVectorQuantizer(4, 3, keep_unused=False), "`keep_unused=False` divides by counts of 0"),
        (lambda: EMAVectorQuantizer(4, 3, decay=float("nan")), "`decay` must be .* got nan"),
        (lambda: VectorQuantizer(4, 3, commitment_cost=float("nan")), "`commitment_cost` must be .* got nan"),
        (lambda: EMAVectorQuantizer(4, 3, count_smoothing="add"), "`count_smoothing` must be None, 'laplace'"),
        (lambda: build_quantizer("vqvae", 4, 3), "`quantizer` must be one of"),
        (lambda: build_quantizer("ema", 4, 3, beta=1), r"`quantizer_kwargs` of 'ema' have no \['beta'\]"),
        (lambda: build_quantizer("ema", 4, 3, legacy_beta=True), r"have no \['legacy_beta'\]"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
