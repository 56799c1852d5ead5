"""What prompts cost, and whether condensing them is worth it."""

from __future__ import annotations

from pcx.analysis.cost import WHOLE, operations_of
from pcx.backbones.inputs import input_size
from pcx.backbones.probing import hollow
from pcx.models.block_forward import found_on
from pcx.models.vpt.model import VPT


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

    Raises:
        ValueError: image tokens are dropped or merged on the way.
    """

    if found_on(model):
        raise ValueError(
            "model: its image tokens, which prompts are compared with, are dropped or merged on "
            "the way; remove that first, or count with pcx.multiply_adds"
        )
    size = input_size(model)
    tokens = _tokens(model, size)
    mean = sum(model.counts) / len(model.counts)
    if model.kind == "shallow":
        mean = model.counts[0]
    relative = 100 * mean / tokens
    plain = _flops(model.keep([[]] * len(model.prompts)), size, model.path)
    costs: dict[str, float | None] = {}
    for path in ("concat", "folded"):
        try:
            costs[f"{path}_flops"] = 100 * (_flops(model, size, path) / plain - 1)
        except ValueError:
            costs[f"{path}_flops"] = None
    return {"relative_tokens": relative, "worth_condensing": relative >= threshold, **costs}


def _flops(model: VPT, size: tuple[int, int, int], path: str) -> int:
    shapes = hollow(model)
    shapes.path = path
    for layer in shapes.layers:  # every token, on both paths and without prompts
        layer.read_tokens = None
    return operations_of(shapes, size)[WHOLE]


def _tokens(model: VPT, size: tuple[int, int, int]) -> int:
    pixels = 3 * size[1] * size[2]
    return pixels // (model.spec.patch_elements or pixels) + model.spec.prefix_tokens
