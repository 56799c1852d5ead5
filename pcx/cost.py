"""What prompts cost, and whether condensing them is worth it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pcx.data import data_config
from pcx.vpt import VPT

BATCH = 64


def token_cost(model: VPT, *, threshold: float = 20.0) -> dict:
    """The paper's rule of when to condense, beside the real cost (Prompt Condensation, Sec. 6.3).

    The rule compares prompts with the image's own tokens, 100 m / N percent (100 prompts on 197
    tokens: 50.8%), and condenses from `threshold` percent. In the folded form prompts cost far
    less than that; the operations counted here (torch's counter, per image of a batch of 64,
    which shares the prompts' keys and values) say how much.

    Args:
        model: a VPT.
        threshold: the rule's K, percent.

    Returns:
        {"relative_tokens": percent, mean over layers; "worth_condensing": bool;
        "concat_flops", "folded_flops": percent over the backbone without prompts}. A path that the
        kind does not have is None.
    """
    config = data_config(model)
    tokens = _tokens(model, config["input_size"])
    mean = sum(model.counts) / len(model.counts)
    if model.kind == "shallow":
        mean = model.counts[0]
    relative = 100 * mean / tokens
    plain = _flops(model.keep([[]] * len(model.prompts)), config, model.path)
    costs: dict[str, float | None] = {}
    for path in ("concat", "folded"):
        try:
            costs[f"{path}_flops"] = 100 * (_flops(model, config, path) / plain - 1)
        except ValueError:
            costs[f"{path}_flops"] = None
    return {"relative_tokens": relative, "worth_condensing": relative >= threshold, **costs}


@torch.no_grad()
def _flops(model: VPT, config: dict, path: str) -> int:
    """Operations of one forward, counted on shapes alone."""
    shapes = {id(t): _on_meta(t) for t in [*model.parameters(), *model.buffers()]}
    hollow = copy.deepcopy(model, shapes).eval()  # the weights themselves are not copied
    hollow.path = path
    for layer in hollow.layers:  # every token, on both paths and without prompts
        layer.read_tokens = None
    size, dtype = config["input_size"], model.prompts[0].dtype
    with FlopCounterMode(display=False) as counter:
        hollow(torch.empty(BATCH, *size, device="meta", dtype=dtype))
    return counter.get_total_flops()


def _on_meta(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().to("meta"), requires_grad=False)
    return tensor.to("meta")


def _tokens(model: VPT, input_size: tuple[int, int, int]) -> int:
    pixels = 3 * input_size[1] * input_size[2]
    return pixels // model.anatomy.patch_elements + model.anatomy.prefix_tokens
