"""What the prompts of a VPT cost, and whether condensing them is worth it."""

from __future__ import annotations

from pcx.analysis.cost import WHOLE, operations_of
from pcx.backbones.inputs import input_size
from pcx.backbones.probing import hollow
from pcx.models.block_forward import found_on
from pcx.models.vpt.model import VPT


def token_cost(model: VPT, *, threshold: float = 20.0) -> dict:
    """The paper's rule of when to condense, beside the real cost (Prompt Condensation, Sec. 6.3).

    The rule compares m prompts with the image's N tokens: 100 m / N percent. It condenses from
    `threshold` percent on. 100 prompts on 197 tokens are 50.8%.

    In the folded form prompts cost far less than that. The second and third result therefore count
    operations, with torch's counter, per image of a batch of 64 that shares the prompts' keys and
    values.

    Args:
        model: a VPT without token pruning.
        threshold: the rule's K, percent.

    Returns:
        {"relative_tokens": percent, mean over layers; "worth_condensing": bool;
        "concat_flops", "folded_flops": percent more than the backbone without prompts}. A path
        that the model's kind does not have is None.

    Raises:
        ValueError: image tokens are dropped or merged on the way.
    """

    if found_on(model):
        raise ValueError(
            "model: its image tokens, which prompts are compared with, are dropped or merged on "
            "the way; remove that first, or count with pcx.multiply_adds"
        )
    size = input_size(model)
    tokens = _image_tokens(model, size)
    prompts = sum(model.counts) / len(model.counts)
    if model.kind == "shallow":
        prompts = model.counts[0]
    relative = 100 * prompts / tokens
    plain = _operations(model.keep([[]] * len(model.prompts)), size, model.path)
    costs: dict[str, float | None] = {}
    for path in ("concat", "folded"):
        try:
            costs[f"{path}_flops"] = 100 * (_operations(model, size, path) / plain - 1)
        except ValueError:
            costs[f"{path}_flops"] = None
    return {"relative_tokens": relative, "worth_condensing": relative >= threshold, **costs}


def _operations(model: VPT, size: tuple[int, int, int], path: str) -> int:
    """Operations of one batch on a path, with every token computed in the last layer too."""
    shapes = hollow(model)
    shapes.path = path
    for layer in shapes.layers:
        layer.read_tokens = None
    return operations_of(shapes, size)[WHOLE]


def _image_tokens(model: VPT, size: tuple[int, int, int]) -> int:
    """How many tokens an image gives, [CLS] and registers included."""
    pixels = 3 * size[1] * size[2]
    return pixels // (model.spec.patch_elements or pixels) + model.spec.prefix_tokens
