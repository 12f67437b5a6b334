"""Mask-and-replace diffusion written out with (K+1) x (K+1) matrices, and exact sampling of a toy distribution by
it.
"""

import itertools
import math

import torch


PAPER = ((0.99999, 9e-6), (9e-6, 0.99999))  # ᾱ and γ̄ at the first and the last timestep


def one_step_matrices(num_embeddings: int, num_steps: int, schedule: str = "linear", ends=PAPER) -> list[torch.Tensor]:
    """`[from, to]`, float64, of each step from timestep t-1 to t."""
    (first_keep, last_keep), (first_mask, last_mask) = ends
    matrices, before = [], (1.0, 0.0)
    for t in range(num_steps):
        u = t / (num_steps - 1)
        if schedule == "cosine":
            u = (1 - math.cos(math.pi * u)) / 2
        keep, mask = first_keep + u * (last_keep - first_keep), first_mask + u * (last_mask - first_mask)
        mask = {"mask_only": 1 - keep, "uniform_only": 0.0}.get(schedule, mask)
        alpha, gamma = keep / before[0], 1 - (1 - mask) / (1 - before[1])
        beta = (1 - alpha - gamma) / num_embeddings
        matrix = torch.full((num_embeddings + 1, num_embeddings + 1), beta, dtype=torch.float64)
        matrix += alpha * torch.eye(num_embeddings + 1, dtype=torch.float64)
        matrix[:, -1] = gamma
        matrix[-1] = torch.eye(num_embeddings + 1, dtype=torch.float64)[-1]
        matrices.append(matrix)
        before = keep, mask
    return matrices


def product(matrices: list[torch.Tensor]) -> torch.Tensor:
    result = torch.eye(len(matrices[0]), dtype=torch.float64)
    for matrix in matrices:
        result = result @ matrix
    return result


def bayes_posterior(matrices: list[torch.Tensor], s: int, t: int) -> torch.Tensor:
    """q(x_s | x_t, x_0) as `[x_0, x_t, x_s]`, x_0 a code; 0 where x_0 cannot lead to x_t. -1 is the data."""
    num_classes = len(matrices[0])
    until_s = product(matrices[: s + 1]) if s >= 0 else torch.eye(num_classes, dtype=torch.float64)
    from_s = product(matrices[s + 1 : t + 1])
    joint = until_s[:-1, None, :] * from_s.T[None]
    total = joint.sum(-1, keepdim=True)
    return torch.where(total > 1e-14, joint / total, 0.0)


class ToyDistribution:
    """
    A random joint distribution of `positions` codes out of K, and the denoiser that knows it.

    A state is one of the (K+1) ** positions combinations, in the order of `itertools.product`.
    """

    def __init__(self, num_embeddings: int, positions: int, matrices: list[torch.Tensor], seed: int = 0):
        self.num_embeddings, self.positions, self.matrices = num_embeddings, positions, matrices
        generator = torch.Generator().manual_seed(seed)
        weights = torch.rand(num_embeddings**positions, generator=generator, dtype=torch.float64) ** 4
        self.joint = weights / weights.sum()
        self.data = torch.tensor(list(itertools.product(range(num_embeddings), repeat=positions)))
        self.states = torch.tensor(list(itertools.product(range(num_embeddings + 1), repeat=positions)))

    def index(self, samples: torch.Tensor) -> torch.Tensor:
        """The state of each row of `samples` `(B, positions)`."""
        base = self.num_embeddings + 1
        return (samples * base ** torch.arange(self.positions - 1, -1, -1)).sum(-1)

    def denoise(self, t: int) -> torch.Tensor:
        """p(x_0^i | x_t) of every state, float64 `(states, positions, K)`, by Bayes' rule; uniform where x_t is
        impossible.
        """
        chain = product(self.matrices[: t + 1])
        likelihood = torch.ones(len(self.states), len(self.data), dtype=torch.float64)
        for i in range(self.positions):
            likelihood *= chain[self.data[:, i]][:, self.states[:, i]].T
        posterior = likelihood * self.joint
        total = posterior.sum(1, keepdim=True)
        possible = total > 1e-300
        posterior = torch.where(possible, posterior / total.clamp_min(1e-300), 1 / len(self.data))
        codes = torch.nn.functional.one_hot(self.data, self.num_embeddings).double()
        return torch.einsum("xd,dik->xik", posterior, codes)

    def start(self, masked: bool = True) -> torch.Tensor:
        """The distribution of the states in which all is masked, or random codes."""
        chosen = self.states == self.num_embeddings if masked else self.states < self.num_embeddings
        distribution = chosen.all(dim=1).double()
        return distribution / distribution.sum()

    def independent(self, per_position: torch.Tensor) -> torch.Tensor:
        """`[state, next state]` of positions that move independently, from `(states, positions, K + 1)`."""
        kernel = torch.ones(len(self.states), len(self.states), dtype=torch.float64)
        for i in range(self.positions):
            kernel *= per_position[:, i][:, self.states[:, i]]
        return kernel

    def step_kernel(self, t: int, s: int) -> torch.Tensor:
        """`[x_t, x_s]` of a step by the exact posterior; the denoiser is told `t`."""
        posterior = bayes_posterior(self.matrices, s, t)
        prediction = self.denoise(t)
        moved = torch.stack(
            [
                torch.einsum("xk,kxs->xs", prediction[:, i], posterior[:, self.states[:, i]])
                for i in range(self.positions)
            ],
            dim=1,
        )
        return self.independent(moved / moved.sum(-1, keepdim=True).clamp_min(1e-300))

    def reveal_kernel(self, t: int, count_of, rule: int, weight: float) -> torch.Tensor:
        """`[x_t, x_s]` of the purity prior, which reveals `count_of(masked positions)` codes, one after the other."""
        mask, prediction = self.num_embeddings, self.denoise(t)
        score = prediction.amax(-1) if rule == 2 else torch.ones(self.states.shape, dtype=torch.float64)
        score = score / score.amax(1, keepdim=True)
        power = 1 + weight * score[..., None] if rule == 2 else 1.0
        drawn = prediction**power
        drawn = drawn / drawn.sum(-1, keepdim=True)
        kernel = torch.zeros(len(self.states), len(self.states), dtype=torch.float64)
        for x, state in enumerate(self.states):
            masked = [i for i in range(self.positions) if state[i] == mask]
            for picked in itertools.permutations(masked, count_of(len(masked))):
                probability, left = 1.0, sum(float(score[x, i]) for i in masked)
                for i in picked:
                    probability *= float(score[x, i]) / left
                    left -= float(score[x, i])
                moves = torch.nn.functional.one_hot(state, mask + 1).double()
                for i in picked:
                    moves[i, :mask], moves[i, mask] = drawn[x, i], 0
                outcome = torch.ones(len(self.states), dtype=torch.float64)
                for i in range(self.positions):
                    outcome *= moves[i][self.states[:, i]]
                kernel[x] += probability * outcome
        return kernel

    def of_data(self, distribution: torch.Tensor) -> torch.Tensor:
        """The probabilities of the states without a mask, in the order of `data`."""
        return distribution[self.index(self.data)]
