"""The check that the weights of a model folder have the shapes that its config.json gives them.

The weights are not read. Their shapes are compared with those of a model that is built on torch's meta device, which
needs no memory for weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from poise.errors import UserError

if TYPE_CHECKING:
    from poise.models.examine import FolderFacts

__all__ = ["check_shapes"]

_CANNOT_BUILD = (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
_WIDTH = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head")


def check_shapes(facts: FolderFacts) -> None:
    """Compare the shapes of stored weights with those that config.json gives them.

    The model is built only where the shapes of the usual layers do not follow from the sizes in config.json, since
    importing transformers takes seconds.

    Raises:
        UserError: a weight has another shape; the message names the first.
    """
    if all(_usual_layers_agree(facts)):
        return
    expected = _expected_shapes(facts)
    wrong = [name for name, shape in facts.shapes.items() if expected.get(name, shape) != shape]
    if wrong:
        first = wrong[0]
        raise UserError(
            f"{facts.path}: {len(wrong)} weights are not of the shape that config.json gives them, first {first}: "
            f"{list(facts.shapes[first])} instead of {list(expected[first])}"
        )


def _usual_layers_agree(facts: FolderFacts) -> Iterator[bool]:
    """For each embedding, attention and feed-forward weight, whether its shape follows from config.json.

    A number that config.json does not have agrees with every shape.
    """
    width = _number(facts, *_WIDTH)
    heads = _number(facts, *_HEADS)
    intermediate = _number(facts, "intermediate_size")
    groups = _number(facts, "num_key_value_heads") or heads
    head_width = _number(facts, "head_dim") or (width // heads if width and heads else None)
    for name, shape in facts.shapes.items():
        if not name.endswith(".weight") or len(shape) != 2:
            continue
        layer = name.split(".")[-2]
        if layer in ("embed_tokens", "wte"):
            yield width in (None, shape[1])
        elif layer == "q_proj":
            rows_agree = heads is None or head_width is None or shape[0] == heads * head_width
            yield rows_agree and width in (None, shape[1])
        elif layer in ("k_proj", "v_proj"):
            yield groups is None or head_width is None or shape[0] == groups * head_width
        elif layer in ("gate_proj", "up_proj"):
            yield intermediate in (None, shape[0])


def _number(facts: FolderFacts, *names: str) -> int | None:
    """The first of these numbers in the config, or in its section `text_config`; None where there is none."""
    nested = facts.config.get("text_config")
    for config in (facts.config, nested if isinstance(nested, dict) else {}):
        for name in names:
            if isinstance(value := config.get(name), int):
                return value
    return None


def _expected_shapes(facts: FolderFacts) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of the architecture, by name with and without the prefix of the base model.

    {} where the architecture cannot be built.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from poise.models.language import open_config

    config = open_config(facts.path)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except _CANNOT_BUILD:  # the run opens the model with its weights, and its error names the reason
        return {}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."  # missing from the names of a model that was saved without its head
    return {name.removeprefix(prefix): shape for name, shape in shapes.items()} | shapes
