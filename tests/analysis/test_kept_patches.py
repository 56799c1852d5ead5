"""Which pixels are shown as kept."""

import pytest
import torch
from families import build

import pcx
from pcx.analysis.kept_patches import draw_kept, kept_masks


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 96)])
def test_masks_are_the_kept_patches(height, width):
    model = build("deit-distilled", dtype=torch.float32)
    model.patch_embed.strict_img_size = False
    model.pos_embed = torch.nn.Parameter(torch.randn(1, 2 + height * width // 256, 48))
    pruning = pcx.zero_tprune(model, layers=(1, 3), keep=(0.75, 0.5), iters=2)
    model(torch.randn(3, 3, height, width))
    first, second = kept_masks(pruning, height, width)
    assert first.shape == second.shape == (3, height, width)
    for mask, places in zip((first, second), pruning.kept, strict=True):
        for b in range(3):
            patches = {
                2 + y * (width // 16) + x
                for y in range(height // 16)
                for x in range(width // 16)
                if mask[b, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16].all()
            }
            assert patches | {0, 1} == set(places[b].tolist())
        assert (mask.sum((1, 2)) == (places.shape[1] - 2) * 256).all()


def test_a_drawing_of_a_batch(tmp_path):
    model = build("vit", dtype=torch.float32)
    pruning = pcx.zero_tprune(model, layers=(1, 2), keep=0.5, iters=2)
    images = torch.rand(2, 3, 64, 64)
    model(images)
    draw_kept(images, pruning, tmp_path / "new" / "kept.png")
    assert (tmp_path / "new" / "kept.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="height, width: 32 x 32 has 4 patches"):
        kept_masks(pruning, 32, 32)
    with pytest.raises(ValueError, match="128 x 128 has 64 patches"):
        kept_masks(pruning, 128, 128)
