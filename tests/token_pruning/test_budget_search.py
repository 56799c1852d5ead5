"""The search of pruning settings: what it draws, what it costs, and what it leaves alone."""

import copy
import subprocess
import sys

import optuna
import pytest
import timm
import torch
from families import build, randomise
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pcx
from pcx.backbones.inputs import input_size
from pcx.models.block_forward import found_on
from pcx.token_pruning.budget_space import LEAST_KEEP

QUIET = {"progress": False}
DEPTH = 6


@pytest.fixture(autouse=True)
def no_word_of_new_studies():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def model_and_dataset():
    """A random ViT of 6 blocks and 16 patches, in training mode, and images that it is right on."""
    small = {"img_size": 64, "depth": DEPTH, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
    model = timm.create_model("vit_tiny_patch16_224", **small)
    randomise(model)
    images = torch.randn(40, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model.eval()(images)
        model.head.bias -= logits.mean(0)  # or all would be of one class
        labels = model(images).argmax(1)
    return model.train(), TensorDataset(images, labels)


@pytest.fixture(scope="module")
def model(model_and_dataset):
    return model_and_dataset[0]


@pytest.fixture(scope="module")
def dataset(model_and_dataset):
    return model_and_dataset[1]


@pytest.fixture(scope="module")
def loader(dataset):
    return DataLoader(dataset, batch_size=16)


@pytest.fixture(scope="module")
def found(model, loader):
    return pcx.token_pruning.search(model, loader, budget=0.6, trials=12, seed=5, **QUIET)


def settings(result):
    return [trial.user_attrs["setting"] for trial in result.study.trials]


def test_every_setting_meets_the_budget_and_the_paper_s_ranges(model, found):
    whole = pcx.multiply_adds(model)
    for trial in found.study.trials:
        setting = trial.user_attrs["setting"]
        layers = setting["layers"]
        assert len(layers) >= 3
        assert layers == sorted(set(layers))
        assert layers[0] >= 1
        assert layers[-1] < DEPTH
        assert all(LEAST_KEEP <= keep <= 1 for keep in setting["keep"])
        assert all(similar <= 1 for similar in setting["similar"])  # a tenth of 16
        for layer, iters in zip(layers, setting["iters"], strict=True):
            assert 30 <= iters <= 50 if layer <= 3 else iters == 1
        pruning = pcx.zero_tprune(model, **setting)
        counted = pcx.multiply_adds(model)
        pruning.remove()
        assert trial.user_attrs["multiply_adds"] == counted
        assert 0.5 * whole < counted <= 0.6 * whole
    assert len({str(setting) for setting in settings(found)}) == 12


@pytest.mark.parametrize("family", ["vit-map", "dinov2-reg", "vpt", "vpt-read-only"])
def test_costs_are_the_counter_s_where_heads_and_prompts_have_their_own(family):
    vpt = family.startswith("vpt")
    model = build("vit" if vpt else family, dtype=torch.float32)
    if vpt:
        model = pcx.VPT(model, 5, read_only=family == "vpt-read-only")
    size = input_size(model)
    loader = [(torch.zeros(1, *size), torch.zeros(1, dtype=torch.int64))]
    found = pcx.token_pruning.search(model, loader, budget=0.85, trials=3, images=1, **QUIET)
    for trial in found.study.trials:
        pruning = pcx.zero_tprune(model, **trial.user_attrs["setting"])
        assert trial.user_attrs["multiply_adds"] == pcx.multiply_adds(model)
        pruning.remove()


def test_the_best_is_what_evaluating_it_by_hand_gives(model, loader, found):
    accuracies = [trial.value for trial in found.study.trials]
    assert found.unpruned == 100
    assert found.images == 40
    assert min(accuracies) < found.accuracy < 100
    assert found.accuracy == max(accuracies)
    best = found.study.trials[accuracies.index(max(accuracies))]
    assert found.best == {k: tuple(v) for k, v in best.user_attrs["setting"].items()}
    pruning = pcx.zero_tprune(model, **found.best)
    assert pcx.evaluate(model, loader)["accuracy"] == pytest.approx(found.accuracy)
    assert pcx.multiply_adds(model) == found.multiply_adds
    pruning.remove()


def test_the_seed_decides(model, dataset, found):
    shuffled = DataLoader(dataset, batch_size=9, shuffle=True, drop_last=True)
    again = pcx.token_pruning.search(model, shuffled, budget=0.6, trials=12, seed=5, **QUIET)
    assert settings(again) == settings(found)
    assert [t.value for t in again.study.trials] == [t.value for t in found.study.trials]
    other = pcx.token_pruning.search(model, shuffled, budget=0.6, trials=2, seed=6, **QUIET)
    assert settings(other) != settings(found)[:2]


def test_a_search_goes_on_where_it_stopped(model, loader, found, tmp_path):
    storage = f"sqlite:///{tmp_path}/search.db"
    arguments = {"seed": 5, "storage": storage, **QUIET}
    for trials in (2, 4):
        result = pcx.token_pruning.search(model, loader, budget=0.6, trials=trials, **arguments)
        assert settings(result) == settings(found)[:trials]
    with pytest.raises(ValueError, match="storage: its study 'zero_tprune' is of {'budget'"):
        pcx.token_pruning.search(model, loader, budget=0.5, **arguments)


def test_a_sampler_of_one_s_own(model, loader):
    def with_sampler(seed):
        sampler = optuna.samplers.TPESampler(n_startup_trials=2, seed=1)
        arguments = {"trials": 4, "seed": seed, "sampler": sampler, **QUIET}
        return settings(pcx.token_pruning.search(model, loader, budget=0.6, **arguments))

    assert with_sampler(0) == with_sampler(1)


def test_similar_patches_alone_where_they_are_enough(model, loader):
    found = pcx.token_pruning.search(model, loader, budget=0.97, trials=6, images=16, **QUIET)
    alone = [s for s in settings(found) if set(s["keep"]) == {1.0}]
    assert alone
    assert all(sum(s["similar"]) for s in alone)
    found = pcx.token_pruning.search(model, loader, budget=1.0, trials=1, images=16, **QUIET)
    assert found.accuracy == 100
    assert found.multiply_adds == pcx.multiply_adds(model)


def test_more_layers_join_where_the_drawn_ones_cannot_reach(model, loader):
    whole = pcx.multiply_adds(model)
    found = pcx.token_pruning.search(model, loader, budget=0.45 * whole, trials=8, **QUIET)
    assert all(trial.user_attrs["multiply_adds"] <= 0.45 * whole for trial in found.study.trials)
    assert all(setting["layers"][0] == 1 for setting in settings(found))


def test_images_are_drawn_from_all_or_the_first_that_come(model, dataset):
    class Counted(TensorDataset):
        read: list = []  # noqa: RUF012, one data set

        def __getitem__(self, index):
            self.read.append(index)
            return super().__getitem__(index)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(*dataset.tensors, strict=True))

    drawn = DataLoader(Counted(*dataset.tensors), batch_size=3)
    arguments = {"budget": 0.6, "trials": 1, "images": 10, **QUIET}
    assert pcx.token_pruning.search(model, drawn, **arguments).images == 10
    assert len(Counted.read) == len(set(Counted.read)) == 10
    assert max(Counted.read) >= 10
    first = pcx.token_pruning.search(model, DataLoader(Stream(), batch_size=3), **arguments)
    tensors = TensorDataset(*(tensor[:10] for tensor in dataset.tensors))
    same = pcx.token_pruning.search(model, DataLoader(tensors, batch_size=4), **arguments)
    assert first.images == 10
    assert first.accuracy == same.accuracy


def test_random_rankings_repeat_and_leave_the_generator_alone(model, dataset):
    loader = [dataset.tensors]  # a DataLoader's own iterator draws from the generator
    state = torch.get_rng_state()
    arguments = {"budget": 0.6, "trials": 3, "fixed": {"ranking": "random"}, **QUIET}
    found = [pcx.token_pruning.search(model, loader, **arguments) for _ in range(2)]
    assert found[0].best["ranking"] == "random"
    assert [t.value for t in found[0].study.trials] == [t.value for t in found[1].study.trials]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:model. mean and std")  # no checkpoint says them
def test_hugging_face_s_vit_in_half_precision(dataset):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3}
    config = transformers.ViTConfig(**sizes, intermediate_size=96, image_size=64, num_labels=7)
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    found = pcx.token_pruning.search(
        model, DataLoader(dataset, batch_size=16), budget=0.7, trials=2, amp="bf16", **QUIET
    )
    images, labels = dataset.tensors
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = (model.eval()(images).logits.argmax(1) == labels).double().mean()
    assert found.unpruned == pytest.approx(100 * float(expected))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(model, loader, fails):
    model = copy.deepcopy(model)
    model.blocks[1].eval()
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    x = torch.randn(2, 3, 64, 64)
    whole = model(x)
    sampler = optuna.samplers.RandomSampler(seed=0)
    arguments = {"budget": 0.6, "trials": 2, "sampler": sampler, **QUIET}
    if fails:

        def fail(_, inputs):
            if inputs[0].device.type != "meta" and found_on(model):
                raise RuntimeError("out of luck")

        hook = model.head.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            pcx.token_pruning.search(model, loader, **arguments)
        hook.remove()
    else:
        pcx.token_pruning.search(model, loader, **arguments)
    assert not found_on(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert torch.equal(model(x), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0.1}, r"budget: 0.1 cannot be reached: 0.3 of the patches kept after each of "
         r"layers 1 to 5 leave \d+ multiply-adds; give 0.422 of"),
        ({"budget": 0}, r"budget: 0, expected a share .* in \(0, 1\], or a number of them"),
        ({"budget": float("nan")}, "budget: nan, expected a share"),
        ({"budget": "half"}, "budget: 'half', expected a share"),
        ({"budget": 1e12}, "budget: 1000000000000.0, but the unpruned model takes"),
        ({"trials": 0}, "trials: 0, expected a whole number, 1 or more"),
        ({"images": 1.5}, "images: 1.5, expected a whole number, 1 or more"),
        ({"seed": -1}, "seed: -1, expected a whole number, 0 or more"),
        ({"fixed": {"keep": 0.5}}, r"fixed: got \['keep'\], expected some of \['cls_boost'"),
        ({"fixed": {"ranking": "best"}}, "ranking: got 'best'"),
        ({"amp": "int8"}, "amp: got 'int8'"),
        ({"execution": "compile"}, "execution: 'compile' would compile every setting anew"),
        ({"execution": "cuda-graph"}, "execution: 'cuda-graph' needs CUDA"),
        ({"execution": "fast"}, "execution: got 'fast', expected one of"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(model, tmp_path, changes, message):
    arguments = {"budget": 0.6, "storage": f"sqlite:///{tmp_path}/study.db", **changes}
    with pytest.raises(ValueError, match=message):
        pcx.token_pruning.search(model, None, **arguments)  # nothing is read
    assert not found_on(model)
    assert not (tmp_path / "study.db").exists()


def test_bad_models_and_loaders_are_named(model, dataset):
    def searched(model, loader):
        return pcx.token_pruning.search(model, loader, budget=0.9, trials=1, **QUIET)

    model = copy.deepcopy(model)
    with pytest.raises(ValueError, match="loader: it yielded no sample"):
        searched(model, [])
    with pytest.raises(ValueError, match="loader: it yields single samples"):
        searched(model, DataLoader(dataset, batch_size=None))
    images, labels = dataset.tensors
    with pytest.raises(ValueError, match=r"loader: labels 50..50 for a head of 7 classes"):
        searched(model, [(images[:2], torch.full_like(labels[:2], 50))])
    pruning = pcx.zero_tprune(model, layers=(1,), keep=0.5, iters=1)
    with pytest.raises(ValueError, match=r"model: it is pruned; call remove\(\)"):
        searched(model, [])
    assert found_on(model)
    pruning.remove()
    one = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, embed_dim=48, num_heads=3)
    with pytest.raises(ValueError, match="model: 1 blocks and 16 patches, expected 2 or more"):
        searched(one, [])


def test_optuna_is_not_imported_with_pcx():
    code = "import sys, pcx; assert 'optuna' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
