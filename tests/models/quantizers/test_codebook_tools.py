"""Nearest codes, k-means, statistics and remapping."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_vq.models.quantizers.build import build_quantizer
from hf_vq.models.quantizers.codebook_search import draw_vectors, first_of_largest, kmeans, nearest_codes
from hf_vq.models.quantizers.codebook_statistics import code_counts, codebook_statistics
from hf_vq.models.quantizers.index_remap import IndexRemap, RemappedQuantizer
from hf_vq.models.quantizers.quantizer import look_up
from tests.models.quantizers.brute_force import brute_force, plain_lloyd, randn


# -------------------------------------------------------------------------------------------------------- nearest
# codes


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 300 * 7, 4 * 300 * 250, 4 * 300 * 500, None])
def test_nearest_codes_is_brute_force(chunk_bytes):
    vectors, codebook = randn(500, 8), randn(300, 8, seed=1)
    indices = nearest_codes(vectors, codebook, chunk_bytes)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, brute_force(vectors, codebook))


@pytest.mark.parametrize("num_codes", [1, 2, 3, 5, 8, 17, 33, 64, 100])
def test_ties_go_to_the_lowest_index(num_codes):
    # small integers: every order of summation gives the same score
    generator = torch.Generator().manual_seed(0)
    codebook, vectors = (torch.randint(-4, 5, (n, 5), generator=generator).float() for n in (num_codes, 200))
    assert torch.equal(nearest_codes(vectors, codebook), brute_force(vectors, codebook))
    assert torch.equal(nearest_codes(vectors, codebook.repeat(7, 1)), brute_force(vectors, codebook))


@pytest.mark.parametrize("count", [64, 4096, 4096 + 64, 5000])
def test_the_first_of_the_largest(count):
    scores = torch.randint(3, (50, count), generator=torch.Generator().manual_seed(0)).float()
    scores[1], scores[2, 70::5], scores[3, 40] = -math.inf, math.inf, math.nan
    scores[4, 9::1000] = math.nan
    scores[5:] += randn(45, count)
    largest = torch.where(scores.isnan(), math.inf, scores)  # what is not a number counts as the largest
    expected = [row.index(max(row)) for row in largest.tolist()]
    assert first_of_largest(scores).tolist() == expected
    assert first_of_largest(scores[:0]).shape == (0,)


def test_nearest_codes_stays_in_float32_under_autocast():
    vectors, codebook = randn(2000, 16), randn(500, 16, seed=1)
    exact = brute_force(vectors, codebook)
    rounded = torch.addmm(-codebook.square().sum(1).bfloat16() / 2, vectors.bfloat16(), codebook.bfloat16().T).argmax(
        1
    )
    assert (rounded != exact).float().mean() > 0.01
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_codes(vectors, codebook), exact)
    half = nearest_codes(vectors.bfloat16(), codebook)
    assert torch.equal(half, brute_force(vectors.bfloat16(), codebook))


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="the older switch of torch")
def test_tf32_is_off_inside_and_restored(monkeypatch):
    matmul, addmm, seen = torch.backends.cuda.matmul, torch.addmm, []
    monkeypatch.setattr(
        torch, "addmm", lambda *args, **kwargs: seen.append(matmul.fp32_precision) or addmm(*args, **kwargs)
    )
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        nearest_codes(randn(4, 2), randn(3, 2))
        assert seen == ["ieee"] and matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements of any tensor that an operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("name", ["vq", "ema", "cosine", "cosine-entropy", "simvq", "fsq", "lfq", "bsq"])
def test_no_tensor_has_a_row_for_every_vector_and_a_column_for_every_code(name):
    codes = 2**14
    special = {"fsq": (7, {"levels": (4,) * 7}), "lfq": (14, {}), "bsq": (14, {})}
    dim, kwargs = special.get(name, (2, {"entropy_weight": 0.1} if name == "cosine-entropy" else {}))
    quantizer = build_quantizer(name.split("-")[0], codes, dim, **kwargs).train()
    width = 16 if name == "cosine-entropy" else 64
    latents = randn(1, dim, 64, width).requires_grad_()
    with LargestTensor() as largest:
        output = quantizer(latents)
        (output.loss + output.quantized.sum()).backward()
    # 2**22 float32 scores are the 16 MB of a chunk
    assert largest.numel <= 2**22 < 64 * width * codes


def test_nearest_codes_refuses_other_widths():
    with pytest.raises(ValueError, match="`vectors` have 3 channels but the codes have 4"):
        nearest_codes(torch.zeros(2, 3), torch.zeros(5, 4))


# --------------------------------------------------------------------------------------------------------------
# k-means


@pytest.mark.parametrize("iterations", [0, 1, 8])
def test_kmeans_is_lloyds_algorithm(iterations):
    vectors = randn(200, 3)
    start = draw_vectors(vectors, 12, seed=5)
    centres = kmeans(vectors, 12, iterations, seed=5)
    torch.testing.assert_close(centres.double(), plain_lloyd(vectors, start, iterations), atol=1e-5, rtol=1e-5)


def test_kmeans_with_fewer_vectors_than_clusters():
    vectors = randn(3, 2)
    centres = kmeans(vectors, 8)
    assert centres.shape == (8, 2)
    assert {tuple(c) for c in centres.tolist()} == {tuple(v) for v in vectors.tolist()}


@pytest.mark.parametrize("name", ["vq", "ema", "cosine", "residual"])
def test_kmeans_sets_the_codebook_at_the_first_training_step_only(name):
    quantizer = build_quantizer(
        name, 6, 2, kmeans_init=True, **({"depth": 2, "base": "vq"} if name == "residual" else {})
    )
    layers = quantizer.layers if name == "residual" else [quantizer]
    latents = 5 + randn(4, 2, 4, 4)  # away from where the codes start
    before = [layer.codebook.clone() for layer in layers]
    quantizer.eval()(latents)
    assert all(torch.equal(layer.codebook, b) for layer, b in zip(layers, before, strict=True))
    assert all(layer.is_at_start() for layer in layers)

    error = (quantizer(latents).quantized - latents).square().mean()
    output = quantizer.train()(latents)
    assert not any(layer.is_at_start() for layer in layers)
    assert not any(torch.equal(layer.codebook, b) for layer, b in zip(layers, before, strict=True))
    if name != "cosine":
        assert (output.quantized - latents).square().mean() < 0.1 * error
    after = [layer.codebook.clone() for layer in layers]
    if name != "ema":
        quantizer(latents + 100)
        assert all(torch.equal(layer.codebook, a) for layer, a in zip(layers, after, strict=True))


@pytest.mark.parametrize("name", ["vq", "ema", "cosine"])
def test_kmeans_leaves_codes_that_were_set(name):
    options = {"restart_threshold": 0} if name == "ema" else {}
    quantizer = build_quantizer(name, 6, 2, kmeans_init=True, **options).train()
    quantizer.set_codebook(100 + randn(6, 2))
    before = quantizer.codebook.clone()
    quantizer(randn(1, 2, 1, 1) + 100)
    assert not quantizer.is_at_start()
    assert (quantizer.codebook == before).all(dim=1).sum() >= 5


# ------------------------------------------------------------------------------------------------ statistics,
# remapping


@pytest.mark.parametrize(
    ("counts", "perplexity", "usage", "dead"),
    [
        ([3, 3, 3, 3], 4, 1, 0),
        ([7, 0, 0, 0], 1, 0.25, 3),
        ([0, 0, 0, 0], 1, 0, 4),
        ([1, 1, 0, 2], 2 ** 1.5, 0.75, 1),
    ],
)  # fmt: skip
def test_codebook_statistics(counts, perplexity, usage, dead):
    for dtype in (torch.float32, torch.int64):
        statistics = codebook_statistics(torch.tensor(counts, dtype=dtype))
        assert statistics.perplexity.item() == pytest.approx(perplexity, rel=1e-6)
        assert statistics.usage.item() == usage
        assert statistics.dead_codes.item() == dead


def test_code_counts():
    indices = torch.randint(9, (4, 5, 6), generator=torch.Generator().manual_seed(0))
    assert code_counts(indices, 12).tolist() == [(indices == code).sum().item() for code in range(12)]


def test_remap_there_and_back():
    used = torch.tensor([5, 0, 9])
    remap = IndexRemap(used, 10)
    indices = used[torch.randint(3, (2, 4, 4))]
    mapped = remap.to_used(indices)
    assert remap.num_indices == 3 and mapped.max() < 3
    assert torch.equal(remap.to_full(mapped), indices)
    assert torch.equal(remap.to_full(torch.arange(3)), used)
    with pytest.raises(ValueError, match=r"not among the 3 used ones, such as \[4\]"):
        remap.to_used(torch.tensor([[5, 4]]))


def test_a_compiled_remap_refuses_unknown_codes_too():
    remap = IndexRemap(torch.tensor([3, 5, 9]), 12)
    compiled = torch.compile(remap.to_used, fullgraph=True, backend="eager")
    assert compiled(torch.tensor([9, 3])).tolist() == [2, 0]
    with pytest.raises(RuntimeError, match="must hold the 3 used codes alone"):
        compiled(torch.tensor([9, 4]))


def test_remap_of_unknown_codes():
    used, every = torch.tensor([5, 0, 9]), torch.arange(10)
    missing = torch.tensor([code not in (0, 5, 9) for code in range(10)])
    extra = IndexRemap(used, 10, unknown="extra")
    assert extra.num_indices == 4 and (extra.to_used(every)[missing] == 3).all()
    assert torch.equal(extra.to_used(used), torch.arange(3))
    # as in the original, which sets the extra index to the first used code
    assert extra.to_full(torch.arange(4)).tolist() == [5, 0, 9, 5]
    with pytest.raises(ValueError, match=r"`indices` must lie in \[0, 4\)"):
        extra.to_full(torch.tensor([4]))
    chosen = IndexRemap(used, 10, unknown=2)
    assert torch.equal(chosen.to_used(every), torch.tensor([1, 2, 2, 2, 2, 0, 2, 2, 2, 2]))

    drawn = IndexRemap(used, 10, unknown="random").to_used(every.repeat(50))
    assert torch.equal(drawn[:10][~missing], torch.tensor([1, 0, 2]))
    assert set(drawn.reshape(50, 10)[:, missing].flatten().tolist()) == {0, 1, 2}

    codebook = randn(10, 3)
    nearest = IndexRemap(used, 10, unknown="nearest", codebook=codebook)
    assert torch.equal(nearest.to_used(every), brute_force(codebook, codebook[used]))


@pytest.mark.parametrize("unknown", ["random", "extra", 1])
def test_a_remapped_quantizer_gives_renumbered_indices_of_the_same_codes(unknown):
    plain = build_quantizer("vq", 10, 3)
    plain.set_codebook(randn(10, 3, seed=1))
    quantizer = RemappedQuantizer(plain, 3, unknown)
    quantizer.remap.set_used(torch.tensor([5, 0, 9]))
    latents = randn(2, 3, 4, 4)
    full, output = plain(latents), quantizer(latents)
    assert torch.equal(output.quantized, full.quantized) and torch.equal(output.loss, full.loss)
    assert quantizer.num_embeddings == (4 if unknown == "extra" else 3)
    for code, index in zip(full.indices.flatten().tolist(), output.indices.flatten().tolist(), strict=True):
        if code in (5, 0, 9):
            assert index == [5, 0, 9].index(code)
        elif unknown != "random":
            assert index == (3 if unknown == "extra" else 1)
    vectors = quantizer.indices_to_latents(output.indices)
    assert torch.equal(vectors, look_up(output.indices, quantizer.codebook))
    known = torch.isin(full.indices, torch.tensor([5, 0, 9]))
    assert known.any() and torch.equal(vectors.movedim(1, -1)[known], full.quantized.movedim(1, -1)[known])


def test_statistics_hold_for_a_geometric_distribution():
    """H of p_k = 2^-k: 2 ln 2 in the limit."""
    counts = torch.tensor([2.0**-k for k in range(1, 40)])
    assert codebook_statistics(counts * 2**40).perplexity.item() == pytest.approx(math.exp(2 * math.log(2)), rel=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: codebook_statistics(torch.ones(2, 2)), r"`counts` must have shape \(num_embeddings,\), got \(2, 2\)"),
        (lambda: kmeans(torch.zeros(0, 3), 4), "`vectors` must hold at least one finite vector"),
        (lambda: IndexRemap(torch.tensor([1, 1]), 4), "`used` must be a non-empty list of distinct codes"),
        (lambda: IndexRemap(torch.tensor([], dtype=torch.int64), 4), "`used` must be a non-empty list"),
        (lambda: IndexRemap(torch.tensor([1]), 4, unknown=1), "`unknown` must be an int in 0…0, got 1"),
        (lambda: IndexRemap(2, 4).set_used(torch.tensor([1])), "`used` must hold 2 codes, got 1"),
        (lambda: IndexRemap(5, 4), "`used` must be an int in 1…4, got 5"),
        (lambda: IndexRemap(torch.tensor([4]), 4), r"`indices` must lie in \[0, 4\)"),
        (lambda: IndexRemap(torch.tensor([1]), 4, unknown="zero"), "`unknown` must be an index"),
        (lambda: IndexRemap(torch.tensor([1]), 4, unknown="nearest"), r"`codebook` of shape \(4, D\), got None"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
