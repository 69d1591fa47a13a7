"""Tiled decoding: exact where one tile suffices, without seams, nearer to the whole than diffusers' tiles."""

from itertools import pairwise

import pytest
import torch

from mmdit.config import ShapesConfig, VAEConfig
from mmdit.data import make_dataset
from mmdit.encoders.autoencoder import AutoencoderKL
from mmdit.encoders.tiling import blend_tiles, tile_starts
from mmdit.encoders.vae import load_vae, to_pixels
from mmdit.weights.vae import to_diffusers


@pytest.mark.parametrize(("length", "tile"), [(64, 64), (65, 64), (100, 32), (33, 32), (200, 16), (20, 64)])
def test_tiles_cover_everything_and_share_a_quarter(length, tile):
    starts = tile_starts(length, tile, tile // 4)
    assert starts[0] == 0
    assert max(starts) == max(0, length - tile)
    assert all(0 < b - a <= tile - tile // 4 for a, b in pairwise(starts))


@pytest.mark.parametrize("size", [(16, 16), (23, 40), (40, 17), (9, 31)])
def test_a_decoder_without_neighbours_gives_the_whole_exactly(size):
    """Where each pixel depends on its own latent alone, tiles must join without a trace."""
    hidden = torch.randn(2, 3, *size, dtype=torch.float64).float()

    def decode(part):
        return part.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3).sin()

    torch.testing.assert_close(blend_tiles(decode, hidden, 12, 4), decode(hidden), atol=1e-6, rtol=0)


def test_one_tile_is_the_whole_bit_for_bit():
    vae, latents = load_vae("tiny"), torch.randn(1, 16, 12, 9)
    assert torch.equal(vae.decode(latents, tile=12), vae.decode(latents))


def test_memory_is_bounded_because_no_tile_is_larger_than_said():
    seen = []

    def decode(part):
        seen.append(tuple(part.shape[-2:]))
        return part[:, :3].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    blend_tiles(decode, torch.randn(1, 4, 50, 20), 16, 2)
    assert set(seen) == {(16, 16)}
    assert len(seen) == 4 * 2


def test_a_trained_decoder_in_tiles_stays_near_the_whole():
    """Four scenes side by side: 128 x 128 pixels, in tiles of 16 x 16 latents out of 16 x 32."""
    vae = load_vae("tiny")
    images = to_pixels(make_dataset(ShapesConfig(seed=5), "heldout").pixels(range(8)))
    rows = [torch.cat(list(images[i : i + 4]), dim=2) for i in (0, 4)]
    with torch.no_grad():
        latents = vae.encode(torch.cat(rows, dim=1)[None])
        whole, tiled = vae.decode(latents), vae.decode(latents, tile=12)
    assert latents.shape[-2:] == (16, 32)
    difference = (tiled - whole).abs()
    assert 0 < difference.mean() < 0.02  # of a range of 2: not even 3 of 256 grey levels
    assert (difference > 0.2).float().mean() < 0.005


def test_our_tiles_are_nearer_to_the_whole_than_those_of_diffusers():
    """The attention and norms at the latents' resolution see everything here; diffusers cuts them too."""
    from diffusers import AutoencoderKL as Theirs

    torch.manual_seed(0)
    widths = (8, 16, 16, 16)
    vae = AutoencoderKL(VAEConfig(block_channels=widths, norm_groups=4, num_res_blocks=1)).eval()
    theirs = Theirs(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=16,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=128,
    ).eval()
    theirs.load_state_dict(to_diffusers(vae.state_dict()))
    raw = torch.randn(1, 16, 40, 24)
    smooth = torch.nn.functional.interpolate(torch.randn(1, 16, 5, 3), (40, 24), mode="bicubic")
    theirs.enable_tiling()
    with torch.no_grad():
        for latents, ratio in ((raw, 0.6), (smooth, 0.95)):  # what norms see differs little, or much, between tiles
            whole, ours = vae.decode_raw(latents), vae.decode_raw(latents, tile=16)
            cut = theirs.decode(latents).sample
            assert cut.shape == whole.shape
            assert 0 < (ours - whole).abs().mean() < ratio * (cut - whole).abs().mean()


def test_a_tile_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="at least 8 latents"):
        load_vae("tiny").decode(torch.randn(1, 16, 32, 32), tile=4)
