"""A tuned model in a LightningModule: modes, what the optimiser gets, Lightning's checkpoint."""

import pytest
import torch
import torch.nn.functional as F
from own_states import assert_same, weights

import pcx

lightning = pytest.importorskip("lightning", reason="lightning is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of loaders without workers


class Module(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model, self.modes = model, []

    def seen(self, step):
        model = self.model
        self.modes.append((step, model.training, model.heads[0].training, model.backbone.training))

    def training_step(self, batch, batch_idx):
        self.seen("train")
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.seen("validate")

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.param_groups(1e-3), lr=0.1)


def trainer(**more):
    return lightning.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **more,
    )  # fmt: skip


def model_of(backbone, seed):
    torch.manual_seed(seed)
    return pcx.VPT(backbone, 2, dropout=0.5)


def test_lightning_trains_what_pcx_would_and_keeps_the_backbone_in_eval_mode(
    backbone, loader, tmp_path
):
    model = model_of(backbone, 0)
    module, before = Module(model), weights(model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in model.trainable()}
    running = trainer()
    module.train()  # Lightning trains in the modes that it finds
    running.fit(module, loader, loader)
    (optimizer,) = running.optimizers
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for p in model.trainable().values()}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 1e-3}
    assert len(module.modes) > 12  # of two epochs, and Lightning's own trial
    for step, *modes in module.modes:
        assert modes == [step == "train", step == "train", False]
    assert all(not torch.equal(before[name], after) for name, after in weights(model).items())
    assert_same({n: p for n, p in model.named_parameters() if n in frozen}, frozen)

    running.save_checkpoint(tmp_path / "lightning.ckpt")
    again = model_of(backbone, 1)
    Module.load_from_checkpoint(tmp_path / "lightning.ckpt", model=again, weights_only=False)
    assert_same(weights(again), weights(model))
    pcx.save(model, tmp_path / "m.safetensors")
    assert_same(weights(pcx.load(tmp_path / "m.safetensors", backbone)), weights(model))
