"""Bad inputs of the API, one line each: every one is an error that names its argument.

A line is a Python expression, and what its message begins with or holds.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import pcx
from pcx import token_pruning as tp
from pcx.backbones.building import build_backbone
from pcx.backbones.inputs import data_config
from pcx.tasks import load_task
from pcx.training.callbacks import EarlyStopping

INF, NAN = float("inf"), float("nan")

MODELS = """
pcx.VPT("vit_base_patch16_224", 2)                      | backbone: got 'vit_base_patch16_224'
pcx.VPT(None, 2)                                        | backbone: got a NoneType
pcx.VPT(torch.nn.Linear(2, 2), 2)                       | backbone: Linear is not supported
pcx.VPT(torch.nn.Sequential(vit()), 2)                  | backbone: Sequential is not supported
pcx.VPT(vpt(), 2)                                       | backbone: already a VPT
pcx.VPT(vpt().backbone, 2)                              | backbone: it holds a PromptedBlock
pcx.VPT(torch.compile(vit()), 2)                        | backbone: OptimizedModule wraps
pcx.VPT(torch.nn.DataParallel(vit()), 2)                | backbone: DataParallel wraps
pcx.VPT(vit().to("meta"), 2)                            | backbone: cls_token is on the device meta
torch.inference_mode()(lambda: pcx.VPT(vit(), 2))()     | backbone: cls_token was made within
pcx.fit(torch.compile(vpt()), None, epochs=1, lr=1)     | model: OptimizedModule wraps the model
pcx.fit(torch.nn.DataParallel(vpt()), None, epochs=1, lr=1) | model: DataParallel wraps the model
torch.no_grad()(pcx.fit)(vpt(), None, epochs=1, lr=1)   | model: gradients are turned off here
pcx.score(torch.compile(vpt()), loader)                 | model: OptimizedModule wraps the model
pcx.save(torch.compile(vpt()), "new")                   | model: OptimizedModule wraps the model
pcx.save(timm.utils.ModelEmaV3(vpt()), "new")           | model: ModelEmaV3 wraps the model
pcx.save(torch.optim.swa_utils.AveragedModel(vpt()), "new") | model: AveragedModel wraps the model
pcx.freeze(torch.nn.DataParallel(vpt()))                | model: a DataParallel.*wraps
pcx.VPT(timm.create_model("resnet18"), 2)               | backbone: ResNet is not supported
pcx.VPT(vit(), -1)                                      | num_prompts: -1
pcx.VPT(vit(), 2.0)                                     | num_prompts: 2.0
pcx.VPT(vit(), "2")                                     | num_prompts: '2'
pcx.VPT(vit(), True)                                    | num_prompts: True
pcx.VPT(vit(), None)                                    | num_prompts: None
pcx.VPT(vit(), [2])                                     | num_prompts: 1 counts for a backbone of 2
pcx.VPT(vit(), [2, 2, 2])                               | num_prompts: 3 counts
pcx.VPT(vit(), [2, -2])                                 | num_prompts: -2
pcx.VPT(vit(), [2, 0.5])                                | num_prompts: 0.5
pcx.VPT(vit(), [])                                      | num_prompts: 0 counts
pcx.VPT(vit(), 10**12)                                  | num_prompts: 1000000000000
pcx.VPT(vit(), [2, 2], kind="shallow")                  | num_prompts: [2, 2]; kind='shallow'
pcx.VPT(vit(), 2, kind="Deep")                          | kind: got 'Deep'
pcx.VPT(vit(), 2, kind=None)                            | kind: got None
pcx.VPT(vit(), 2, dropout=1.0)                          | dropout: 1.0
pcx.VPT(vit(), 2, dropout=-0.1)                         | dropout: -0.1
pcx.VPT(vit(), 2, dropout=NAN)                          | dropout: nan
pcx.VPT(vit(), 2, dropout="0.1")                        | dropout: '0.1'
pcx.VPT(vit(), 2, dropout_groups=0)                     | dropout_groups: 0
pcx.VPT(vit(), 2, dropout_groups=1.5)                   | dropout_groups: 1.5
pcx.VPT(vit(), 2, path="fold")                          | path: got 'fold'
pcx.VPT(vit(), 2, kind="shallow", path="folded")        | path: 'folded' is not possible
pcx.VPT(vit(), 2, kind="prefix", path="concat")         | path: kind='prefix' has no tokens
pcx.VPT(vit(), 2, num_classes=-1)                       | num_classes: -1
pcx.VPT(vit(), 2, num_classes=2.5)                      | num_classes: 2.5
pcx.VPT(vit(), 2, num_classes="3")                      | num_classes: '3'
pcx.VPT(vit(), 2, head_init="zeros")                    | head_init: got 'zeros'
pcx.Linear("vit")                                       | backbone: got 'vit'
pcx.Linear(vit(), num_classes=-3)                       | num_classes: -3
pcx.Linear(vpt())                                       | backbone: already a VPT
pcx.Full(3)                                             | backbone: got a int
pcx.Full(vit(), head_init="kept")                       | head_init: got 'kept'
pcx.PeftModel(vit())                                    | model: a VisionTransformer
pcx.METHODS["vtp"]                                      | 'vtp'
vpt().keep([[0]])                                       | kept: 1 layers, expected 2
vpt().keep([[0], [9]])                                  | kept: layer 1: 9
vpt().keep([[0], [-1]])                                 | kept: layer 1: -1
vpt().keep([[0], [0.5]])                                | kept: layer 1: 0.5
vpt().keep([[0], [1, 0]])                               | kept: layer 1: [1, 0]
vpt().keep([[0], [1, 1]])                               | kept: layer 1: [1, 1]
vpt().keep([torch.tensor([False, True])] * 2)           | kept: layer 0: False
vpt().set_dropout(2)                                    | dropout: 2
vpt().own("blocks.9")                                   | part: the backbone has no tensor
vpt().features(X, layers=9)                             | layers: 9
pcx.freeze("m")                                         | model: got 'm'
pcx.freeze(torch.nn.Linear(2, 2))                       | model: a Linear
pcx.freeze(pcx.freeze(vpt()))                           | model: it is frozen already
pcx.freeze(vpt(), amp="half")                           | amp: got 'half'
pcx.freeze(vpt(), execution="fast")                     | execution: got 'fast'
pcx.export("m", "new.ts")                               | model: got 'm'
pcx.export(torch.nn.Linear(2, 2), "new.ts")             | model: a Linear
pcx.export(torch.compile(vpt()), "new.ts")              | model: a OptimizedModule.*wraps
pcx.export(vit().to("meta"), "new.ts")                  | model: cls_token is on the device meta
pcx.export(vpt(), None)                                 | path: None, expected the path of a file
pcx.export(vpt(), "")                                   | path: '', expected the path of a file
pcx.export(vpt(), "new")                                | path: new ends in '', which names no format
pcx.export(vpt(), "new.pt")                             | path: new.pt ends in '.pt', which names no
pcx.export(vpt(), "new.ts", format="ts")                | format: got 'ts', expected one of ('onnx',
pcx.export(vpt(), "new.ts", format="aoti")              | path: new.ts ends in '.ts'; format 'aoti'
pcx.ensemble([])                                        | models: none given
pcx.ensemble([vit()])                                   | models[0]: a VisionTransformer
pcx.ensemble([vpt(), pcx.VPT(vit(1), 2)])               | models[1]: its backbone's weights
pcx.ensemble([vpt(), pcx.VPT(vit(), 2, num_classes=9)]) | models[1]: heads of
pcx.ensemble([vpt(), pcx.VPT(vit(), 2, kind="shallow")])| models[1]: the prompts of kind
pcx.ensemble([vpt(), pruned()])                         | models[1]: its tokens are reduced
"""

TRAINING = """
pcx.predict(vpt(), "no/such.jpg")                       | images: no/such.jpg: no such file
pcx.predict(vpt(), "no/*.jpg")                          | images: no/*.jpg: no such file
pcx.predict(vpt(), "/dev/null")                         | images: none of 1 is an image
pcx.predict(vpt(), [])                                  | images: none given
pcx.predict(vpt(), 3)                                   | images: a int
pcx.predict(vpt(), [3])                                 | images[0]: a int
pcx.predict(vpt(), b"jpeg")                             | images: a bytes
pcx.predict(vpt(), torch.zeros(2, 2))                   | images: a tensor [2, 2]
pcx.predict(vpt(), torch.zeros(3, 32, 32).byte())       | images: a tensor [3, 32, 32] of torch.uint8
pcx.predict(vpt(), [torch.zeros(3, 32, 32), torch.zeros(3, 32, 48)]) | images: tensors of shapes
pcx.predict(vit(), torch.zeros(1, 3, 32, 32))           | model: a VisionTransformer
pcx.predict("vit", torch.zeros(1, 3, 32, 32))           | model: got 'vit'
pcx.predict(vpt(), torch.zeros(1, 3, 32, 32), top=0)    | top: 0
pcx.predict(vpt(), torch.zeros(1, 3, 32, 32), top=1.5)  | top: 1.5
pcx.predict(vpt(), torch.zeros(1, 3, 32, 32), batch_size=0) | batch_size: 0
pcx.predict(vpt(), torch.zeros(1, 3, 32, 32), num_workers=-1) | num_workers: -1
pcx.predict(vpt(), torch.zeros(1, 3, 32, 32), amp="int8") | amp: got 'int8'
pcx.predict(vpt(), torch.zeros(1, 3, 32, 32), execution="fast") | execution: got 'fast'
pcx.fit(vpt(), loader, epochs=1, lr=0.1, ema=1.0)       | ema: 1.0
pcx.fit(vpt(), loader, epochs=1, lr=0.1, ema=0)         | ema: 0
pcx.fit(vpt(), loader, epochs=1, lr=0.1, ema="0.9")     | ema: '0.9'
pcx.fit(vpt(), loader, epochs=1, lr=0.1, accumulate=0)  | accumulate: 0
pcx.fit(vpt(), loader, epochs=1, lr=0.1, accumulate=1.5) | accumulate: 1.5
pcx.fit(vpt(), loader, epochs=1, lr=0.1, best="val_loss") | best: 'val_loss' needs a val_loader
pcx.fit(vpt(), loader, epochs=1, lr=0.1, best=True)     | best: True
pcx.fit(vpt(), loader, epochs=1, lr=0.1, best="f1")     | best: 'f1' is none of the history's
pcx.fit(vpt(), loader, epochs=1, lr=0.1, callbacks=EarlyStopping) | callbacks[0]: a type
pcx.fit(vpt(), loader, epochs=1, lr=0.1, callbacks=[3]) | callbacks[0]: a int
pcx.fit(vpt(), loader, epochs=1, lr=0.1, callbacks=3)   | callbacks[0]: a int
pcx.fit(vpt(), loader, epochs=1, lr=0.1, callbacks=EarlyStopping("f1")) | metric: 'f1' is none
EarlyStopping(patience=0)                               | patience: 0
pcx.fit("vit", loader, epochs=1, lr=0.1)                | model: got 'vit'
pcx.fit(None, loader, epochs=1, lr=0.1)                 | model: got a NoneType
pcx.fit(vpt(), loader.dataset, epochs=1, lr=0.1)        | loader: a TensorDataset
pcx.fit(vpt(), None, epochs=1, lr=0.1)                  | loader: a NoneType
pcx.fit(vpt(), "photos", epochs=1, lr=0.1)              | loader: a str
pcx.fit(vpt(), (X, Y), epochs=1, lr=0.1)                | loader: a single batch
pcx.fit(vpt(), iter([(X, Y)]), epochs=1, lr=0.1)        | loader: it has no length
fit(val_loader=X)                                       | val_loader: a Tensor
fit(epochs=0)                                           | epochs: 0
fit(epochs=-1)                                          | epochs: -1
fit(epochs=1.5)                                         | epochs: 1.5
fit(epochs=INF)                                         | epochs: inf
fit(epochs="3")                                         | epochs: '3'
fit(epochs=None)                                        | epochs: None
fit(lr=None)                                            | lr: give lr or base_lr
fit(base_lr=0.1)                                        | lr: give lr or base_lr, one of them
fit(lr=0)                                               | lr: 0
fit(lr=-0.1)                                            | lr: -0.1
fit(lr=NAN)                                             | lr: nan
fit(lr=INF)                                             | lr: inf
fit(lr="0.1")                                           | lr: '0.1'
fit(lr=None, base_lr=-1.0)                              | base_lr: -1.0
pcx.fit(vpt(), [(X, Y)], epochs=1, base_lr=0.1)         | base_lr: the loader has no batch_size
fit(weight_decay=-1e-4)                                 | weight_decay: -0.0001
fit(weight_decay=NAN)                                   | weight_decay: nan
fit(weight_decay="0")                                   | weight_decay: '0'
fit(momentum=-1.0)                                      | momentum: -1.0
fit(momentum=1.0)                                       | momentum: 1.0
fit(opt="sgdd")                                         | opt: 'sgdd'
fit(opt="")                                             | opt: ''
fit(warmup_epochs=5)                                    | warmup_epochs: 5
fit(warmup_epochs=-1)                                   | warmup_epochs: -1
fit(warmup_epochs=NAN)                                  | warmup_epochs: nan
fit(clip_grad=0)                                        | clip_grad: 0
fit(clip_grad=-1)                                       | clip_grad: -1
fit(clip_grad=NAN)                                      | clip_grad: nan
fit(criterion=lambda a, b: a.mean())                    | criterion: gave shape ()
fit(criterion=lambda a, b: a)                           | criterion: gave shape (6, 3)
fit(objective="single")                                 | objective: got 'single'
fit(objective="regression")                             | loader: labels of shape (6,)
fit(objective="multi-label")                            | loader: labels 0..2, expected 0 or 1
fit(objective="soft")                                   | loader: labels of shape (6,)
fit(objective="segmentation")                           | loader: labels of shape (6,)
fit(amp="fp8")                                          | amp: got 'fp8'
fit(amp="fp16")                                         | amp: 'fp16' needs a GPU
fit(execution="graph")                                  | execution: got 'graph'
fit(execution="cuda-graph")                             | execution: 'cuda-graph'
fit(cache="images")                                     | cache: got 'images'
fit(seed=-1)                                            | seed: -1
fit(seed=0.5)                                           | seed: 0.5
fit(seed="1")                                           | seed: '1'
fit(resume=True)                                        | resume: needs checkpoint_dir
fit(checkpoint_dir=a_file)                              | checkpoint_dir: .* is a file
fit(checkpoint_dir=trained)                             | checkpoint_dir: .* holds 1 finished epochs
fit(checkpoint_dir=trained, resume=True, lr=0.2)        | resume: .* lr 0.1 (now 0.2)
fit(checkpoint_dir=trained, resume=True, epochs=3)      | resume: .* epochs 1 (now 3)
fit(checkpoint_dir=damaged, resume=True)                | checkpoint_dir: .* is damaged
fit(checkpoint_dir=damaged)                             | checkpoint_dir: .* cannot be read
pcx.fit(headless(), loader, epochs=1, lr=0.1)           | model: it has no head
pcx.fit(vit().requires_grad_(False), loader, epochs=1, lr=0.1) | model: no parameter requires
on([(X[:, :1], Y)])                                     | loader: the model cannot take its images
on([(X[..., :9], Y)])                                   | loader: the model cannot take its images
on([(X.half(), Y)])                                     | loader: the model cannot take its images
on([((X * 9).to(torch.uint8), Y)])                      | loader: the model cannot take its images
on([((X * 9).long(), Y)])                               | loader: the model cannot take its images
on([(X.numpy(), Y)])                                    | loader: its images are of type
on([(["a.jpg"] * 6, Y)])                                | loader: its images are of type str
on([(None, Y)])                                         | loader: its images are of type NoneType
on([(X, Y.tolist())])                                   | loader: its labels are a list
on([(X, Y.numpy())])                                    | loader: its labels are a ndarray
on([(X, None)])                                         | loader: its labels are a NoneType
on([(X[0], 1)])                                         | loader: it yields single samples
on([(X, ["cat"] * 6)])                                  | loader: its labels are text
on([(X, Y[:5])])                                        | loader: a batch of 6 images has labels
on([(X, Y[:, None])])                                   | loader: labels of shape (6, 1)
on([(X, Y + 1)])                                        | loader: labels 1..3 for a head of 3
on([(X, Y - 1)])                                        | loader: labels -1..1
on([(X, Y.float())])                                    | loader: labels of shape (6,) and torch.float32
on([(X, Y, Y)])                                         | loader: it yields tuple of 3
on([X])                                                 | loader: it yields Tensor
on([{"image": X, "label": Y}])                          | loader: it yields a dict of
on([{"pixel_values": X}])                               | loader: it yields a dict of
on([])                                                  | loader: it yielded no sample
on([(X[:0], Y[:0])])                                    | loader: it yielded no sample
on([(X * NAN, Y)])                                      | loader: image 0 of the batch
on([(X * INF, Y)])                                      | loader: image 0 of the batch
pcx.evaluate("vit", loader)                             | model: got 'vit'
pcx.evaluate(vpt(), loader.dataset)                     | loader: a TensorDataset
pcx.evaluate(vpt(), loader, objective="acc")            | objective: got 'acc'
pcx.evaluate(vpt(), loader, amp="bf8")                  | amp: got 'bf8'
pcx.evaluate(vpt(), loader, execution="eagerly")        | execution: got 'eagerly'
pcx.evaluate(vpt(), [])                                 | loader: it yielded no sample
pcx.evaluate(vpt(), [(X, Y + 5)])                       | loader: labels 5..7
pcx.evaluate(vpt(), [(X * NAN, Y)])                     | loader: image 0 of the batch
pcx.evaluate(headless(), loader)                        | model: it has no head
pcx.evaluate(named(), other_names)                      | loader: its classes are 'cat', 'owl', 'dog'
"""

CONDENSATION = """
pcx.score(vit(), loader)                                | model: a VisionTransformer
pcx.score("m", loader)                                  | model: a str
pcx.score(pcx.VPT(vit(), 0), loader)                    | model: it has no prompts
score(method="tailor")                                  | method: got 'tailor'
score(method=[])                                        | method:
score(method=None)                                      | method:
score(criterion=lambda a, b: a.mean())                  | criterion: gave shape
score(objective="x")                                    | objective: got 'x'
score(amp="tf32")                                       | amp: got 'tf32'
score(execution="x")                                    | execution: got 'x'
score(seed=-1, method="random")                         | seed: -1
score(resume=True, method="exact")                      | resume: needs checkpoint_dir
pcx.score(vpt(), [])                                    | loader: it yielded no sample
pcx.score(vpt(), loader.dataset)                        | loader: a TensorDataset
pcx.score(vpt(), [(X, Y + 3)])                          | loader: labels 3..5
pcx.score(vpt(), [(X * NAN, Y)])                        | loader: the image of sample 0
pcx.score(pcx.VPT(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=3, global_pool="avg", class_token=False), 2), loader, method="cls-attention", progress=False) | method:
pcx.select([], 0.5)                                     | scores: got list of 0
pcx.select(None, 0.5)                                   | scores: got None
pcx.select(torch.ones(4), 0.5)                          | scores: got a tensor
pcx.select([[1.0, 2.0]], 0.5)                           | scores: layer 0 is list of 2
pcx.select([torch.ones(2, 2)], 0.5)                     | scores: layer 0 is a tensor of shape (2, 2)
pcx.select([torch.tensor([1.0, NAN])], 0.5)             | scores: layer 0 has scores that are NaN
pcx.select([torch.ones(4)], 0.0)                        | keep: 0.0
pcx.select([torch.ones(4)], 1.5)                        | keep: 1.5
pcx.select([torch.ones(4)], -1)                         | keep: -1
pcx.select([torch.ones(4)], 5)                          | keep: 5
pcx.select([torch.ones(4)], 0)                          | keep: 0
pcx.select([torch.ones(4)], NAN)                        | keep: nan
pcx.select([torch.ones(4)], True)                       | keep: True
pcx.select([torch.ones(4)], "half")                     | keep: 'half'
pcx.select([torch.ones(4)], None)                       | keep: None
pcx.select([torch.ones(4)], 0.01)                       | keep: 0.01 of 4 prompts keeps none
pcx.select([torch.ones(4)], 0.5, scope="layer")         | scope: got 'layer'
pcx.condense(vit(), loader)                             | model: a VisionTransformer
pcx.condense(None, loader)                              | model: a NoneType
pcx.condense(vpt(), loader.dataset, lr=0.1)             | loader: a TensorDataset
pcx.condense(pcx.VPT(vit(), 0), loader, lr=0.1)         | keep: 0.3 of 0 prompts keeps none
pcx.condense(vpt(), loader)                             | lr: the model records no learning rate
condense(keep=0)                                        | keep: 0
condense(keep=2.0)                                      | keep: 2.0
condense(keep="some")                                   | keep: 'some'
condense(keep="auto")                                   | val_loader: keep='auto' needs
condense(keep=None)                                     | keep: None
condense(epochs=-1)                                     | epochs: -1
condense(epochs=1.5)                                    | epochs: 1.5
condense(lr=-1)                                         | lr: -1
condense(lr=NAN)                                        | lr: nan
condense(scope="all")                                   | scope: got 'all'
condense(method="x")                                    | method: got 'x'
condense(scores=[torch.ones(1)])                        | scores: [1] per layer, expected
condense(scores=[torch.ones(2), torch.tensor([1.0, NAN])]) | scores: layer 1 has scores
condense(scores="x")                                    | scores: got
condense(max_drop=NAN)                                  | max_drop: nan
vpt().keep([1, 0])                                      | kept: layer 0: 1
vpt().keep(3)                                           | kept: 0 layers
condense(opt="x")                                       | opt: 'x'
condense(amp="x")                                       | amp: got 'x'
condense(seed=-2)                                       | seed: -2
condense(resume=True)                                   | resume: needs checkpoint_dir
condense(checkpoint_dir=a_file)                         | checkpoint_dir: .* is a file
condense(checkpoint_dir=trained)                        | checkpoint_dir: .* holds 1 finished epochs
"""

FILES = """
pcx.save(vit(), here / "a")                             | model: a VisionTransformer
pcx.save("m", here / "a")                               | model: a str
pcx.save(vpt(), here)                                   | is a folder
pcx.export(vpt(), here, format="torchscript")           | is a folder, expected a file, such as
pcx.export(vpt(), a_file / "m.ts")                      | a_file
pcx.save(vpt(), a_file / "m")                           | a_file
pcx.save(vpt(), None)                                   | path: None
pcx.load(here / "none", vit())                          | path: no file
pcx.load(here, vit())                                   | path: no file
pcx.load(None, vit())                                   | path: None
pcx.load(a_file, vit())                                 | path: .* is not a whole safetensors file
pcx.load(saved, "vit")                                  | backbone: got 'vit'
pcx.load(saved, vit(1))                                 | backbone: .* give the same pretrained weights
pcx.load(saved, vpt())                                  | backbone:
pcx.load(saved, timm.create_model("resnet18"))          | backbone:
pcx.load(saved, vit().double())                         | backbone: .* in the dtype they were trained in
pcx.load(flipped, vit())                                | path: .* is damaged
pcx.load(cut, vit())                                    | path: .* is not a whole safetensors file
build_backbone("vit_x")                                 | backbone: neither timm nor pcx knows 'vit_x'
build_backbone("vit_tiny_patch16_224", weights=here / "none")   | weights: no file
build_backbone("vit_tiny_patch16_224", weights=a_file)          | weights: .* is not what torch.save
build_backbone("vit_tiny_patch16_224", weights=saved)           | weights: .* is not what torch.save
build_backbone("pcx_scenes_vit", weights=a_file)                | weights: pcx_scenes_vit has its own
load_task("letters", config)                            | name: 'letters'
load_task("sprites:x", config)                          | name: 'sprites:x'
load_task("vtab:x", config)                             | name: 'vtab:x'
load_task("vtab:dtd", config, root=here)                | not found
load_task("fgvc:cub", config, root=here)                | not found
load_task("folder", config, root=here)                  | none of its 1 files is an image
load_task("fgvc:mixed", config, root=data)              | its classes are of types
load_task("fgvc:null", config, root=data)               | its classes are of types
load_task("fgvc:latin", config, root=data)              | not UTF-8
load_task("fgvc:out", config, root=data)                | leads out of
load_task("fgvc:empty", config, root=data)              | expected a JSON object
load_task("digits", config).loader("dev")               | split: got 'dev'
load_task("digits", config, cache=a_file)               | cache:
"""

PRUNING = """
pcx.zero_tprune(vit(), layers=(), keep=0.5, iters=1)    | layers: none
pcx.zero_tprune(vit(), layers=1, keep=0.5, iters=1)     | layers: 1
pcx.zero_tprune(vit(), layers="1", keep=0.5, iters=1)   | layers: '1'
pcx.zero_tprune(vit(), layers=(0,), keep=0.5, iters=1)  | layers: 0
pcx.zero_tprune(vit(), layers=(9,), keep=0.5, iters=1)  | layers: [9]
pcx.zero_tprune(vit(), layers=(1.5,), keep=0.5, iters=1)| layers: 1.5
pcx.zero_tprune(vit(), layers=(1,), keep=0, iters=1)    | keep: 0
pcx.zero_tprune(vit(), layers=(1,), keep=NAN, iters=1)  | keep: nan
pcx.zero_tprune(vit(), layers=(1,), keep="x", iters=1)  | keep: 'x'
pcx.zero_tprune(vit(), layers=(1,), keep=(0.5, 0.5), iters=1) | keep: 2 values for 1 layers
pcx.zero_tprune(vit(), layers=(1,), keep=0.5, iters=0)  | iters: 0
pcx.zero_tprune(vit(), layers=(1,), keep=0.5, iters=1.5)| iters: 1.5
pcx.zero_tprune(vit(), layers=(1,), keep=0.5, iters=1, similar=-1) | similar: -1
pcx.zero_tprune(vit(), layers=(1,), keep=0.5, iters=1, similar=99) | similar: 99
pcx.zero_tprune(vit(), layers=(1,), keep=0.5, iters=1, ranking="x") | ranking: got 'x'
pcx.zero_tprune(vit(), layers=(1,), keep=0.5, iters=1, partition="x") | partition: got 'x'
pcx.zero_tprune(vit(), layers=(1,), keep=0.5, iters=1, measure="x") | measure:
pcx.zero_tprune("vit", layers=(1,), keep=0.5, iters=1)  | model: got 'vit'
pcx.zero_tprune(timm.create_model("resnet18"), layers=(1,), keep=0.5, iters=1) | ResNet
pcx.zero_tprune(pcx.VPT(vit(), 2, path="concat"), layers=(1,), keep=0.5, iters=1) | model: its path is 'concat'
tp.tome(vit(), r=-1)                                    | r: -1
tp.tome(vit(), r=1.5)                                   | r: 1.5
tp.tome(vit(), r="2")                                   | r: '2'
tp.tome(vit(), r=(1, 1, 1))                             | r: 3 values for 2 layers
tp.ats(vit(), layers=(1,), tokens=0)                    | tokens: 0
tp.ats(vit(), layers=(1,), tokens=99)                   | tokens: 99
tp.ats(vit(), layers=(2,), tokens=2)                    | layers: 2
tp.ats(vit(), layers="1", tokens=2)                     | layers: '1'
tp.search(vit(), loader, budget=0)                      | budget: 0
tp.search(vit(), loader, budget=NAN)                    | budget: nan
tp.search(vit(), loader, budget="x")                    | budget: 'x'
tp.search(vit(), loader, budget=0.8, trials=0)          | trials: 0
tp.search(vit(), loader, budget=0.8, images=0)          | images: 0
tp.search(vit(), loader, budget=0.8, seed=-1)           | seed: -1
tp.search(vit(), loader, budget=0.8, fixed={"x": 1})    | fixed: got ['x']
tp.search(vit(), loader, budget=0.8, amp="x")           | amp: got 'x'
tp.search(pruned(), loader, budget=0.8)                 | model: it is pruned
pcx.multiply_adds("vit")                                | model: got 'vit'
"""

OPS = """
attend(q=None)                                          | q: expected a tensor
attend(k=k.numpy())                                     | k: expected a tensor
attend(q=q[0])                                          | q: shape (2, 5, 8)
attend(k=k[:, :1])                                      | k: shape (3, 1, 5, 8)
attend(v=v[:2])                                         | v: shape (2, 2, 5, 8)
attend(k=k.double())                                    | k: dtype torch.float64
attend(q=q.long(), k=k.long(), v=v.long(), prefix_k=p.long(), prefix_v=p.long()) | q: dtype torch.int64
attend(prefix_k=p[0])                                   | prefix_k: shape (4, 8)
attend(prefix_k=p[:, :3])                               | prefix_v: shape (2, 4, 8)
attend(prefix_k=p.expand(2, 2, 4, 8), prefix_v=p.expand(2, 2, 4, 8)) | prefix_index: needed
attend(prefix_index=torch.zeros(3, dtype=torch.int64))  | prefix_index: given, but prefix_k has no set
attend(bias=torch.zeros(4, 4))                          | bias: shape (4, 4)
attend(bias=torch.zeros(5, 5, dtype=torch.int64))       | bias: dtype torch.int64
attend(bias=[0.0])                                      | bias: expected a tensor
attend(scale="1")                                       | scale: '1'
attend(scale=NAN)                                       | scale: nan
attend(scale=torch.ones(7))                             | scale: shape (7,)
attend(backend="gpu")                                   | backend: got 'gpu'
attend(backend="triton")                                | backend: 'triton' cannot run
sets(torch.tensor([0, 1, 2]))                           | prefix_index: values 0..2, expected 0..1
sets(torch.tensor([0, -1, 1]))                          | prefix_index: values -1..1
sets(torch.tensor([0.0, 1.0, 1.0]))                     | prefix_index: torch.float32
sets(torch.tensor([0, 1]))                              | prefix_index: torch.int64 of shape (2,)
sets(torch.tensor([0, 1, 1]), torch.tensor([9, 1]))     | prefix_lengths: values 1..9
sets(torch.tensor([0, 1, 1]), torch.tensor([-1, 1]))    | prefix_lengths: values -1..1
sets(torch.tensor([0, 1, 1]), torch.tensor([1]))        | prefix_lengths: torch.int64 of shape (1,)
pcx.weighted_pagerank(q, k, iters=-1)                   | iters: -1
pcx.weighted_pagerank(q, k, iters=1.0)                  | iters: 1.0
pcx.weighted_pagerank(q, k[:1], iters=1)                | k: shape (1, 2, 5, 8)
pcx.weighted_pagerank(q[0], k[0], iters=1)              | q: shape (2, 5, 8)
pcx.weighted_pagerank(q.long(), k.long(), iters=1)      | q, k: torch.int64
pcx.weighted_pagerank(q, k, iters=1, init=-torch.ones(5)) | init: expected no negative score
pcx.weighted_pagerank(q, k, iters=1, init=torch.zeros(5)) | init: expected no negative score
pcx.weighted_pagerank(q, k, iters=1, init=torch.ones(4))  | init: shape (4,)
pcx.weighted_pagerank(q, k, iters=1, bias=torch.ones(4, 4)) | bias: shape (4, 4)
pcx.weighted_pagerank(q, k, iters=1, prefix_k=p[:1])    | prefix_k: shape (1, 4, 8)
pcx.weighted_pagerank(q, k, iters=1, scale="x")         | scale: 'x'
pcx.weighted_pagerank(q, k, iters=1, backend="x")       | backend: got 'x'
"""

TABLES = {
    "models": MODELS,
    "training": TRAINING,
    "condensation": CONDENSATION,
    "files": FILES,
    "pruning": PRUNING,
    "ops": OPS,
}
LINES = [
    pytest.param(*(part.strip() for part in line.rsplit("|", 1)), id=f"{name}-{number}")
    for name, table in TABLES.items()
    for number, line in enumerate(table.strip().splitlines())
]
X, Y = torch.randn(6, 3, 32, 32), torch.arange(6) % 3


def vit(seed=0):
    torch.manual_seed(seed)
    small = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **small).eval()


class Named(TensorDataset):
    classes = ("cat", "owl", "dog")


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the expressions may name."""
    here: Path = tmp_path_factory.mktemp("bad")
    loader = DataLoader(TensorDataset(X, Y), batch_size=6)

    def vpt():
        return pcx.VPT(vit(), 2)

    def pruned():
        model = vpt()
        pcx.zero_tprune(model, layers=(1,), keep=0.5, iters=1)
        return model

    def named():
        model = vpt()
        model.record.class_names = ["cat", "dog", "owl"]
        return model

    def fit(**more):
        given = {"epochs": 1, "lr": 0.1, "progress": False, "warmup_epochs": 0, **more}
        pcx.fit(vpt(), loader, **given)

    def on(batches):
        pcx.fit(vpt(), batches, epochs=1, lr=0.1, progress=False)

    def condense(**more):
        pcx.condense(vpt(), loader, **{"lr": 0.1, "epochs": 1, "progress": False, **more})

    (here / "a_file").write_text("hello")
    pcx.save(vpt(), here / "saved")
    whole = (here / "saved").read_bytes()
    (here / "cut").write_bytes(whole[:-9])
    (here / "flipped").write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
    fit(checkpoint_dir=here / "trained")
    (here / "damaged").mkdir()
    (here / "damaged" / "last.pt").write_bytes((here / "trained" / "last.pt").read_bytes()[:-50])
    tables = {
        "mixed": '{"0.jpg": 1, "1.jpg": "b"}',
        "null": '{"0.jpg": null}',
        "out": '{"../../0.jpg": 1}',
        "empty": "{}",
        "latin": '{"\xfc.jpg": 1}'.encode("latin-1"),
    }
    for name, table in tables.items():
        folder = here / "data" / name
        folder.mkdir(parents=True)
        for split in ("train", "val", "test"):
            content = table if isinstance(table, bytes) else table.encode()
            (folder / f"{split}.json").write_bytes(content)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 5, 8, generator=generator) for _ in range(3))
    p = torch.randn(2, 4, 8, generator=generator)

    def attend(**more):
        given = {"q": q, "k": k, "v": v, "prefix_k": p, "prefix_v": p, **more}
        first = [given.pop(name) for name in ("q", "k", "v", "prefix_k", "prefix_v")]
        pcx.prefix_attention(*first, **given)

    def sets(index, lengths=None):
        pair = p.expand(2, 2, 4, 8)
        attend(prefix_k=pair, prefix_v=pair, prefix_index=index, prefix_lengths=lengths)

    return {
        **{name: here / name for name in ("a_file", "saved", "cut", "flipped", "damaged")},
        **{name: here / name for name in ("trained", "data")},
        **{"pcx": pcx, "torch": torch, "np": np, "timm": timm, "tp": tp, "INF": INF, "NAN": NAN},
        **{"X": X, "Y": Y, "vit": vit, "vpt": vpt, "pruned": pruned, "named": named, "fit": fit},
        **{"on": on, "condense": condense, "here": here, "loader": loader},
        **{"q": q, "k": k, "v": v, "p": p, "attend": attend, "sets": sets},
        "headless": lambda: pcx.VPT(vit(), 2, num_classes=0),
        "score": lambda **more: pcx.score(vpt(), loader, progress=False, **more),
        "other_names": DataLoader(Named(X, Y), batch_size=6),
        "config": data_config(vit()),
        "build_backbone": build_backbone,
        "load_task": load_task,
        "EarlyStopping": EarlyStopping,
        "SimpleNamespace": SimpleNamespace,
    }


def test_there_are_as_many_as_there_should_be():
    assert len(LINES) >= 216


@pytest.mark.filterwarnings("ignore:.*decompression bomb")
@pytest.mark.parametrize(("expression", "message"), LINES)
def test_bad_input_is_named(names, expression, message):
    errors = (ValueError, TypeError, OSError, FloatingPointError, KeyError)
    with pytest.raises(errors) as found:
        eval(expression, names)  # of the tables above
    said = str(found.value)
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    assert re.search(pattern, said, re.DOTALL), f"{type(found.value).__name__}: {said}"
    assert not isinstance(found.value, KeyError) or "'vtp'" in said
