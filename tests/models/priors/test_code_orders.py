"""The orders of the original VQGAN's permuters, against constructions of another kind, and priors that read in
them.
"""

import itertools

import numpy as np
import pytest
import torch

from hf_vq.models.priors.code_orders import CODE_ORDERS, code_order
from hf_vq.models.priors.configuration_vq_gpt import VQGPTConfig
from hf_vq.models.priors.modeling_vq_gpt import VQGPTForCausalLM
from tests.models.priors.gpt_parts import make, make_indices, sample_by_hand


GRIDS = ((1, 1), (2, 2), (4, 4), (8, 8), (3, 5), (5, 5), (1, 7), (6, 1), (16, 16))


def by_quadrants(side):
    """The z-curve as the concatenation of the curves of four quadrants."""
    if side == 1:
        return [(0, 0)]
    half = side // 2
    smaller = by_quadrants(half)
    return [(r + i * half, c + j * half) for i in (0, 1) for j in (0, 1) for r, c in smaller]


def by_subsampling(rows, columns):
    """Every second row and column, recursively: the four shifted grids one after another."""
    if len(rows) == 1:
        return [(rows[0], columns[0])]
    return [place for i in (0, 1) for j in (0, 1) for place in by_subsampling(rows[i::2], columns[j::2])]


def outwards(side):
    """Rings of growing squares around the middle, each entered where the one before it ended."""
    row, column = side // 2, side // 2 - 1
    seen, place, heading = [(row, column)], (row, column), 0
    turns = [(-1, 0), (0, 1), (1, 0), (0, -1)]
    move = turns[heading]
    while len(seen) < side * side:
        place = (place[0] + move[0], place[1] + move[1])
        seen.append(place)
        # turn right as soon as the cell on the right is free
        right = turns[(turns.index(move) + 1) % 4]
        if (place[0] + right[0], place[1] + right[1]) not in seen:
            move = right
    return seen


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", CODE_ORDERS)
def test_every_order_visits_every_position_once(name, grid):
    assert sorted(code_order(name, *grid)) == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_orders_by_their_construction(side):
    def flat(places):
        return [row * side + column for row, column in places]

    assert code_order("raster", side, side) == list(range(side * side))
    assert code_order("z-curve", side, side) == flat(by_quadrants(side))
    assert code_order("subsample", side, side) == flat(by_subsampling(range(side), range(side)))
    assert code_order("spiral-out", side, side) == flat(outwards(side))
    assert code_order("spiral-in", side, side) == flat(outwards(side))[::-1]
    snake = [(r, c if r % 2 == 0 else side - 1 - c) for r in range(side) for c in range(side)]
    assert code_order("alternate", side, side) == flat(snake)
    assert code_order("random", side, side) == np.random.RandomState(1).permutation(side * side).tolist()


def test_orders_of_a_small_grid():
    assert code_order("z-curve", 4, 4) == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert code_order("subsample", 4, 4) == [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]
    assert code_order("spiral-out", 4, 4) == [9, 5, 6, 10, 14, 13, 12, 8, 4, 0, 1, 2, 3, 7, 11, 15]
    assert code_order("alternate", 2, 3) == [0, 1, 2, 5, 4, 3]


def make_ordered(order, **overrides):
    return make("class", order=order, **overrides)


@torch.no_grad()
@pytest.mark.parametrize("order", CODE_ORDERS[1:])
def test_a_prior_reads_in_its_order(order):
    model, raster = make_ordered(order, grid_size=(4, 4)), make("class", grid_size=(4, 4))
    indices, positions = make_indices(model), torch.tensor(model.config.code_order)
    permuted = indices.flatten(1)[:, positions]
    inputs = model.prepare_inputs(indices, [0, 1])
    assert torch.equal(inputs["input_ids"][:, 1:], permuted)
    assert torch.equal(model.extract_indices(inputs["input_ids"]), indices)
    # the same weights that read row by row what has been put in this order
    likelihood = model.log_likelihood(indices, [0, 1])
    torch.testing.assert_close(likelihood, raster.log_likelihood(permuted, [0, 1]), atol=0, rtol=0)
    prompt = model.prepare_condition([0, 1])
    expected = sample_by_hand(model, prompt, 16)
    sequences = model.generate(prompt, do_sample=False)
    assert torch.equal(sequences, expected)
    grid = model.extract_indices(sequences)
    for place, position in enumerate(positions.tolist()):
        assert torch.equal(grid[:, position // 4, position % 4], expected[:, 1 + place])
    torch.testing.assert_close(model.from_reading_order(model.to_reading_order(grid)), grid)
    with pytest.raises(ValueError, match="`grid` must have shape"):
        model.to_reading_order(grid[:, :2])


@torch.no_grad()
def test_probabilities_of_all_images_sum_to_one_in_another_order():
    model = make("class", order="spiral-in", codebook_size=3, grid_size=(2, 3))
    every = torch.tensor(list(itertools.product(range(3), repeat=6)))
    assert model.log_likelihood(every, [1]).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_random_order_is_saved(tmp_path):
    permutation = [3, 1, 0, 2, 11, 10, 9, 8, 7, 6, 5, 4]
    model = make_ordered("random", permutation=permutation)
    model.save_pretrained(tmp_path)
    assert VQGPTForCausalLM.from_pretrained(tmp_path).config.code_order == permutation
    config = VQGPTConfig(grid_size=4, order="random")
    assert config.to_dict()["permutation"] == np.random.RandomState(1).permutation(16).tolist()
