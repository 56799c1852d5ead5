"""Hugging Face's own tools on tuned models: Trainer, pipeline, folders that hold a model."""

import copy

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import Dataset

import pcx
from pcx.backbones import scenes_vit

transformers = pytest.importorskip("transformers")
PcxForImageClassification = pytest.importorskip(
    "pcx.deployment.hugging_face"
).PcxForImageClassification


def of_timm():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=3
    )


def of_hugging_face():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=32, patch_size=16, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


class Data(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(24) % 3
        self.images = torch.randn(24, 3, 32, 32, generator=generator)
        self.images += self.labels[:, None, None, None]

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return {"pixel_values": self.images[i], "labels": int(self.labels[i])}


def trainer_of(model, folder, epochs=4):
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=epochs, per_device_train_batch_size=8, learning_rate=0.01,
        save_strategy="epoch", eval_strategy="epoch", report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="epoch", seed=3,
    )  # fmt: skip

    def metrics(found):
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    return transformers.Trainer(
        model, arguments, train_dataset=Data(), eval_dataset=Data(), compute_metrics=metrics
    )


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("backbone", [of_timm, of_hugging_face])
@pytest.mark.parametrize("method", [lambda b: pcx.VPT(b, 3), pcx.Linear])
def test_trainer_trains_evaluates_and_resumes(tmp_path, backbone, method):
    torch.manual_seed(1)
    model = method(backbone())
    start, frozen = copy.deepcopy(model.state_dict()), model.frozen_state()
    frozen = {n: t.clone() for n, t in frozen.items()}
    trainer = trainer_of(model, tmp_path / "a")
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_accuracy"] > 0.6
    logits = model.eval()(Data().images)
    expected = torch.nn.functional.cross_entropy(logits, Data().labels)
    assert found["eval_loss"] == pytest.approx(float(expected), rel=1e-4)
    for name, parameter in model.trainable().items():
        assert not torch.equal(parameter, start[name]), name
    for name, tensor in model.frozen_state().items():
        assert torch.equal(tensor, frozen[name]), name
    # A run that ended after two epochs, continued by another process.
    torch.manual_seed(1)
    again = method(backbone())
    resumed = trainer_of(again, tmp_path / "a")
    checkpoints = sorted((tmp_path / "a").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    resumed.train(resume_from_checkpoint=str(checkpoints[1]))
    assert resumed.state.global_step == trainer.state.global_step
    for name, tensor in model.own_state().items():
        torch.testing.assert_close(again.own_state()[name], tensor)


def test_calls_by_name_give_outputs():
    model, images = pcx.VPT(of_timm(), 3).eval(), Data().images[:4]
    labels = torch.tensor([0, 1, 2, 0])
    logits = model(images)
    assert torch.equal(model(pixel_values=images).logits, logits)
    assert model(pixel_values=images).loss is None
    loss = model(images, labels=labels).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))
    several = torch.nn.functional.one_hot(labels, 3).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, several)
    torch.testing.assert_close(model(pixel_values=images, labels=several).loss, expected)
    number = pcx.VPT(of_timm(), 3, num_classes=1).eval()
    wanted = torch.tensor([0.1, 0.2, 0.3, 0.4])
    found = number(pixel_values=images, labels=wanted)
    torch.testing.assert_close(found.loss, (found.logits[:, 0] - wanted).square().mean())
    whole = number(pixel_values=images, labels=labels).loss  # whole numbers too, as HF has it
    torch.testing.assert_close(whole, (found.logits[:, 0] - labels).square().mean())
    with pytest.raises(ValueError, match=r"labels: floats \[4\] for logits \[4, 3\]"):
        model(pixel_values=images, labels=wanted)
    with pytest.raises(TypeError, match="x: give the images, as x or as pixel_values"):
        model(labels=labels)


@pytest.fixture
def trained():
    model = pcx.VPT(scenes_vit(), 3, num_classes=3)
    model.record.class_names = ["ant", "bee", "cat"]
    images = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(images, torch.arange(6) % 3)
    loader = torch.utils.data.DataLoader(data, 3)
    pcx.fit(model, loader, epochs=2, lr=0.1, progress=False)
    return model.eval()


@pytest.mark.filterwarnings("ignore")
def test_pipeline_gives_what_predict_does(trained, tmp_path):
    generator = np.random.default_rng(0)
    files = []
    for i, size in enumerate([(90, 60), (64, 64), (50, 120)]):
        files.append(str(tmp_path / f"{i}.png"))
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(files[-1])
    classifier = PcxForImageClassification(trained)
    pipe = transformers.pipeline(
        "image-classification", model=classifier, image_processor=classifier.processor()
    )
    for found, expected in zip(pipe(files), pcx.predict(trained, files, top=None), strict=True):
        assert [row["label"] for row in found] == expected.names
        assert [row["score"] for row in found] == pytest.approx(expected.probabilities, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_folder_holds_the_model_its_processor_and_a_card(trained, tmp_path):
    PcxForImageClassification(trained).save_pretrained(tmp_path / "ants")
    again = PcxForImageClassification.from_pretrained(tmp_path / "ants")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images).logits, trained(images))
        assert again(images, labels=torch.tensor([0, 2])).loss > 0
    assert again.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ants")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 70, 3), dtype=np.uint8))
    found = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, trained.transform()(image))
    pipe = transformers.pipeline("image-classification", model=str(tmp_path / "ants"))
    (expected,) = pcx.predict(trained, image, top=None)
    assert [row["label"] for row in pipe(image)] == expected.names
    card = (tmp_path / "ants" / "README.md").read_text()
    for said in ("vpt over pcx_scenes_vit", "| lr | 0.1 |", "ant, bee, cat", "library_name: pcx"):
        assert said in card
    with pytest.raises(FileNotFoundError, match="no file"):
        PcxForImageClassification.from_pretrained(tmp_path)


def test_two_classes_of_one_name_are_refused():
    model = pcx.VPT(of_timm(), 2)
    model.record.class_names = ["crane", "owl", "crane"]
    with pytest.raises(ValueError, match="classes 0 and 2 are both named 'crane'.*class_names"):
        PcxForImageClassification(model)
    model.record.class_names = ["crane, a bird", "owl", "crane, a machine"]
    config = PcxForImageClassification(model).config
    assert {config.label2id[name]: name for name in config.label2id} == config.id2label
