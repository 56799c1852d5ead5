"""Models load onto backbones that take images of another size."""

import pytest
import timm
import torch

import pcx


def backbone_for(size, **more):
    torch.manual_seed(0)
    arguments = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **arguments, **more).double().eval()
    torch.nn.init.normal_(model.pos_embed)
    if size != 32:
        model.set_input_size(size)  # resamples position embeddings
    return model


@pytest.mark.parametrize("method", [lambda b: pcx.VPT(b, 2), pcx.Linear, pcx.Full])
def test_a_model_loads_at_another_size(tmp_path, method):
    model = method(backbone_for(32)).eval()
    pcx.save(model, tmp_path / "m")
    large = pcx.load(tmp_path / "m", backbone_for(64))
    expected = method(backbone_for(64)).eval()
    for name, tensor in model.own_state().items():
        if not name.endswith("pos_embed"):
            expected.own_state()[name].data.copy_(tensor)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(large(x), expected(x), rtol=1e-6, atol=1e-8)
    assert list(large.record.transform["input_size"]) == [3, 64, 64]
    pcx.save(large, tmp_path / "again")
    assert torch.equal(pcx.load(tmp_path / "again", backbone_for(64))(x), large(x))


def test_other_weights_at_another_size_are_refused(tmp_path):
    pcx.save(pcx.VPT(backbone_for(32), 2), tmp_path / "m")
    other = backbone_for(64)
    with torch.no_grad():
        other.blocks[1].mlp.fc1.bias[0] += 1
    with pytest.raises(ValueError, match="give the same pretrained weights"):
        pcx.load(tmp_path / "m", other)
    other = backbone_for(32)
    with torch.no_grad():
        other.pos_embed[0, 0, 0] += 1
    with pytest.raises(ValueError, match="give the same pretrained weights"):
        pcx.load(tmp_path / "m", other)
