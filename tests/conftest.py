"""Parts that many tests need: real ones, small enough for seconds."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `save_pretrained` AutoencoderKL of seeded, untrained weights: 4 latent channels, downsampling 4."""
    import torch
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("tiny-vae")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            norm_num_groups=4,
            latent_channels=4,
            layers_per_block=1,
            mid_block_add_attention=False,
            scaling_factor=1.0,
        )
    vae.save_pretrained(folder)
    return folder
