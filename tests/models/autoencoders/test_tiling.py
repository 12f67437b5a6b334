"""Tiled encoding and decoding: the blend against direct computation, seams, and errors."""

import pytest
import torch
from torch import nn

from hf_vq import VQGANConfig, VQGANModel, VQVAEConfig, VQVAEModel
from hf_vq.models.autoencoders.tiling import map_tiles, tile_starts


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(100, 32, 8), (32, 32, 8), (20, 32, 8), (33, 32, 0), (97, 16, 8)]
)
def test_tiles_cover_the_length_and_overlap(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    covered = [position for start in starts for position in range(start, min(start + tile, length))]
    assert set(covered) == set(range(length))
    assert all(after - before <= tile - overlap for before, after in zip(starts, starts[1:], strict=False))
    assert starts[-1] + tile == length or length < tile


@pytest.mark.parametrize("scale", [1, 2, 0.5])
def test_a_local_function_is_computed_exactly(scale):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 48, 80, dtype=torch.float64)
    functions = {
        1: lambda v: v.square(),
        2: lambda v: nn.functional.interpolate(v, scale_factor=2.0, mode="nearest"),
        0.5: lambda v: nn.functional.avg_pool2d(v, 2),
    }
    out = map_tiles(functions[scale], x, tile=16, overlap=4, scale=scale)
    torch.testing.assert_close(out, functions[scale](x))


def test_an_overlap_wider_than_the_receptive_field_leaves_only_blended_borders():
    """A 3×3 convolution sees one position around it, so a tile is wrong in its outermost position only, where the ramp
    of an overlap of 8 gives it 1/16 of the weight."""
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    x = torch.randn(1, 1, 40, 16, dtype=torch.float64)
    error = (map_tiles(conv, x, tile=16, overlap=8, scale=1) - conv(x)).abs()
    rows = error.amax(dim=(0, 1, 3)) > 1e-12
    edges = {edge for start in tile_starts(40, 16, 8)[1:] for edge in (start, start - 1 + 8)}
    assert set(rows.nonzero().flatten().tolist()) <= edges
    assert error.max() < conv.weight.abs().sum() * x.abs().max() / 16


@pytest.fixture(scope="module")
def vqvae():
    torch.manual_seed(0)
    config = VQVAEConfig(hidden_size=16, residual_hidden_size=8, embed_dim=4, num_embeddings=32, resolution=32)
    return VQVAEModel(config).eval()


@torch.no_grad()
def test_tiled_vqvae_is_close_to_the_whole(vqvae):
    x = torch.rand(2, 3, 160, 96) * 2 - 1
    whole = vqvae.encode(x)
    image = vqvae.decode_indices(whole.indices).sample
    vqvae.enable_tiling(tile_size=64, overlap=32)
    try:
        tiled = vqvae.encode(x)
        assert tiled.latents.shape == whole.latents.shape
        assert (tiled.indices == whole.indices).float().mean() > 0.98
        tiled_image = vqvae.decode_indices(whole.indices).sample
    finally:
        vqvae.disable_tiling()
    assert (tiled_image - image).abs().max() < 0.1 * image.std()
    torch.testing.assert_close(vqvae.decode_indices(whole.indices).sample, image)


@torch.no_grad()
def test_no_seams_in_a_vqgan():
    """Across the borders of tiles, the gradient of the tiled image is like elsewhere; without an overlap it is not."""
    torch.manual_seed(0)
    config = VQGANConfig(
        base_channels=32, channel_multiplier=(1, 2), num_res_blocks=1, attn_resolutions=(), latent_channels=16,
        embed_dim=8, num_embeddings=64, resolution=32,
    )  # fmt: skip
    model = VQGANModel(config).eval()
    # smooth latents whose statistics differ from place to place, so that tiles are normalised differently
    latents = nn.functional.interpolate(torch.randn(1, 8, 4, 4), size=(32, 32), mode="bicubic")
    latents = latents * torch.linspace(0.2, 3, 32)

    def seam_ratio(overlap):
        model.enable_tiling(tile_size=32, overlap=overlap)
        image = model.decode(latents, quantize=False).sample
        model.disable_tiling()
        step = (image[..., 1:] - image[..., :-1]).abs().mean(dim=(0, 1, 2))
        borders = [2 * start - 1 for start in tile_starts(32, 16, overlap // 2)[1:]]
        elsewhere = torch.ones_like(step, dtype=torch.bool)
        elsewhere[borders] = False
        return float(step[borders].mean() / step[elsewhere].mean())

    assert seam_ratio(16) < 1.25
    assert seam_ratio(0) > 1.5


@torch.no_grad()
def test_slicing_changes_nothing(vqvae):
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    whole = vqvae.encode(x).latents
    vqvae.enable_slicing()
    try:
        torch.testing.assert_close(vqvae.encode(x).latents, whole)
    finally:
        vqvae.disable_slicing()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"tile_size": 30}, "tile_size"), ({"tile_size": 4}, "tile_size"), ({"tile_size": 64, "overlap": 6}, "overlap"),
     ({"tile_size": 64, "overlap": 40}, "overlap")],
)  # fmt: skip
def test_errors_name_the_argument(vqvae, arguments, name):
    with pytest.raises(ValueError, match=name):
        vqvae.enable_tiling(**arguments)
