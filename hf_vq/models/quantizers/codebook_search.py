"""Search in a codebook: the nearest codes, k-means, and vectors drawn alike by every process."""

from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ...distributed import all_reduced, is_distributed, num_processes
from .codebook_statistics import are_finite, code_counts


@contextmanager
def _full_float32():
    """No TF32 inside, whatever the program's setting: its 10 bits of mantissa move indices as half precision does."""
    if torch.compiler.is_compiling():
        yield
        return
    matmul = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


@torch.no_grad()
def nearest_codes(
    vectors: torch.Tensor, codebook: torch.Tensor, chunk_bytes: int | None = None, inner_product: bool = False
) -> torch.Tensor:
    """Index of the nearest code of each vector by Euclidean distance; of equal scores, the lowest index.

    argmin |z - e|² = argmax (z·e - |e|²/2), always in float32, whatever the autocast or TF32 setting: half-precision
    distances move several per cent of the indices. The N×K scores are made in chunks of `chunk_bytes` (16 MB on a CPU,
    128 MB elsewhere) and never held whole. Under `torch.compile` they are (the loop would be unrolled), and TF32 is as
    the program has set it.

    Args:
        vectors: `(N, D)`.
        codebook: `(K, D)`.
        chunk_bytes: of one chunk of scores; None for the defaults above.
        inner_product: take the largest z·e, whatever the lengths of the codes.

    Returns:
        int64 `(N,)`.
    """
    if vectors.shape[-1] != codebook.shape[-1]:
        raise ValueError(
            f"`vectors` have {vectors.shape[-1]} channels but the codes have {codebook.shape[-1]}: they must be equal."
        )
    with torch.autocast(vectors.device.type, enabled=False), _full_float32():
        vectors, codebook = vectors.float(), codebook.float()
        bias = codebook.new_zeros(len(codebook)) if inner_product else codebook.square().sum(dim=1).mul_(-0.5)
        rows = vectors.shape[0]
        if not torch.compiler.is_compiling():
            if chunk_bytes is None:
                chunk_bytes = 2**24 if vectors.device.type == "cpu" else 2**27
            rows = max(1, chunk_bytes // (4 * codebook.shape[0]))
        if rows >= vectors.shape[0]:
            return torch.addmm(bias, vectors, codebook.t()).argmax(dim=1)
        indices = torch.empty(vectors.shape[0], dtype=torch.int64, device=vectors.device)
        scores = torch.empty(rows, codebook.shape[0], dtype=torch.float32, device=vectors.device)
        for start in range(0, vectors.shape[0], rows):
            chunk = vectors[start : start + rows]
            torch.addmm(bias, chunk, codebook.t(), out=scores[: chunk.shape[0]])
            indices[start : start + rows] = first_of_largest(scores[: chunk.shape[0]])
    return indices


_BLOCK = 64


def first_of_largest(scores: torch.Tensor) -> torch.LongTensor:
    """`scores.argmax(dim=1)` of `(N, K)`; of equal scores the lowest index.

    On a CPU the largest of many scores is found sooner than its place, so that the place is sought in one block only.
    """
    rows, count = scores.shape
    if scores.device.type != "cpu" or count < _BLOCK**2 or count % _BLOCK:
        return scores.argmax(dim=1)
    blocks = scores.unflatten(1, (-1, _BLOCK))
    block = blocks.amax(dim=2).argmax(dim=1)
    within = blocks[torch.arange(rows), block].argmax(dim=1)
    return block * _BLOCK + within


def _hash(numbers: torch.Tensor) -> torch.Tensor:
    """An integer hash, int64 to 32 bits, in place of a generator: two rounds of xor-shift and multiply."""
    for _ in range(2):
        numbers = ((numbers ^ (numbers >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return numbers ^ (numbers >> 16)


def has_finite_vectors(vectors: torch.Tensor) -> bool:
    """Whether any of the vectors `(N, D)` of all processes is finite."""
    return all_reduced(are_finite(vectors).sum()).item() > 0


def _rows_of_all(vectors: torch.Tensor, counted: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The rows that have these `numbers` among the finite vectors of all processes; `counted` `(N,)` rises by one at
    each finite vector of this process, and is its number there.
    """
    if vectors.shape[0] == 0:
        rows = vectors.new_zeros(numbers.shape[0], vectors.shape[1])
    else:
        # the row with a number is the first that has it
        row = torch.searchsorted(counted, numbers).clamp_max(vectors.shape[0] - 1)
        mine = (counted[row] == numbers) & are_finite(vectors)[row]
        rows = torch.where(mine.unsqueeze(1), vectors[row], 0)
    if is_distributed():
        dist.all_reduce(rows)
    return rows


@torch.no_grad()
def draw_vectors(
    vectors: torch.Tensor, count: int, seed: torch.Tensor | int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """`count` pseudo-random finite rows of the vectors `(N, D)` of all processes, the same on every process.

    No row is drawn twice while there are enough, and the first of those drawn are a draw of fewer. Which rows are
    drawn is a function of `seed`, the finite vectors' number and the weights alone: not of the global generator, so
    that a resumed run draws the same, and not of the number of processes among which the same vectors are divided.
    Nothing is read from the device, not even a `seed` that lies there.

    With weights w, each next row is drawn with a chance of w over the sum of those left: they are the rows with the
    largest log(u) / w of uniform u (Efraimidis & Spirakis 2006, "Weighted Random Sampling with a Reservoir").

    Args:
        vectors: `(N, D)`, each process its own.
        count: how many to draw.
        seed: an integer.
        weights: `(N,)`, at least 0; all alike by default. A row of weight 0 is drawn when no other is left.

    Returns:
        `(count, D)`; zeros if no vector is finite.
    """
    device, finite = vectors.device, are_finite(vectors)
    rank = dist.get_rank() if is_distributed() else 0
    sizes = torch.zeros(num_processes(), dtype=torch.int64, device=device)
    sizes[rank] = finite.sum()
    if is_distributed():
        dist.all_reduce(sizes)
    total = sizes.sum().clamp_min(1)
    counted = finite.cumsum(0) - 1 + sizes[:rank].sum()
    noise = _hash(counted + total * torch.as_tensor(seed, device=device))  # of 32 bits
    if weights is None:
        keys = torch.where(finite, -noise, -(2**33))
    else:
        uniform = ((noise.float() + 0.5) / 2**32).clamp_max(1 - 2**-24)
        # the smallest weight keeps the quotient of a finite row finite
        keys = torch.where(finite, uniform.log() / weights.float().clamp_min(1e-30), -torch.inf)
    numbers = _with_largest_keys(counted, keys, count)
    # fewer rows than asked for are repeated in their order
    numbers = numbers[torch.arange(count, device=device) % total.clamp_max(count)]
    return _rows_of_all(vectors, counted, numbers)


def _with_largest_keys(numbers: torch.Tensor, keys: torch.Tensor, count: int) -> torch.Tensor:
    """Those `count` of the `numbers` `(N,)` of all processes with the largest keys; zeros where there are fewer."""
    keys, rows = keys.topk(min(count, len(keys)))
    numbers, padding = numbers[rows], (0, count - len(keys))
    lowest = -torch.inf if keys.is_floating_point() else torch.iinfo(keys.dtype).min
    keys, numbers = F.pad(keys, padding, value=lowest), F.pad(numbers, padding)
    if not is_distributed():
        return numbers
    all_keys, all_numbers = ([torch.empty_like(own) for _ in range(num_processes())] for own in (keys, numbers))
    dist.all_gather(all_keys, keys)
    dist.all_gather(all_numbers, numbers)
    return torch.cat(all_numbers)[torch.cat(all_keys).topk(count).indices]


@torch.no_grad()
def kmeans(vectors: torch.Tensor, num_clusters: int, iterations: int = 10, seed: int = 0) -> torch.Tensor:
    """Lloyd's algorithm on the finite ones of the vectors `(N, D)` of all processes, whose result is the same on each.

    Starts from vectors drawn by `draw_vectors`, with repeats only where there are fewer than K. A cluster that loses
    all its members keeps its centre.

    Args:
        vectors: `(N, D)`, each process its own.
        num_clusters: K.
        iterations: of Lloyd's algorithm; 0 gives the vectors that it starts from.
        seed: of the draw.

    Returns:
        The centres `(K, D)`.

    Raises:
        ValueError: no process has a finite vector.
    """
    if not has_finite_vectors(vectors):
        raise ValueError(f"`vectors` must hold at least one finite vector, got none among {vectors.shape[0]}.")
    vectors = vectors[are_finite(vectors)]
    centres = draw_vectors(vectors, num_clusters, seed)
    for _ in range(iterations):
        nearest = nearest_codes(vectors, centres)
        counts = code_counts(nearest, num_clusters)
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        if is_distributed():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        centres = torch.where((counts > 0).unsqueeze(1), sums / counts.clamp_min(1).unsqueeze(1), centres)
    return centres


__all__ = ["draw_vectors", "first_of_largest", "has_finite_vectors", "kmeans", "nearest_codes"]
