"""Low-rank adapters (LoRA) of chosen linear layers, by peft."""

from __future__ import annotations

import warnings
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import nn

from poise.errors import UserError
from poise.models.sizes import count_parameters
from poise.models.tuning.base import Tuning
from poise.spec import ExactNumber
from poise.spec.problems import nearest

__all__ = ["Lora"]


class Lora(Tuning):
    """Low-rank updates of linear layers, with all other weights frozen; the export merges them into the weights."""

    name: Literal["lora"] = Field("lora", description="tune W + alpha / rank * B A, with B = 0 at the start")
    rank: int = Field(16, ge=1, le=4096, description="rank of the update of each layer")
    alpha: Annotated[ExactNumber, Field(gt=0, le=100_000)] = Field(
        ExactNumber(32), description="scale of the update, over rank"
    )
    dropout: Annotated[ExactNumber, Field(ge=0, lt=1)] = Field(
        ExactNumber(0), description="share of the inputs of an update that is dropped in training"
    )
    targets: list[str] | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="last parts of the names of layers that get an update, such as q_proj; default all but the head",
    )

    def prepare(self, model: nn.Module) -> list[str]:
        """Check the targets against the layers of the model, and untie its head where the head is a target.

        A head that shares its weight with the embedding is given a copy: the merged update of the head would otherwise
        change the embedding as well.

        Returns:
            Sentences for the user: which weights get no update, and whether the head was untied.

        Raises:
            UserError: a target that is no linear layer of the model, with those that are.
        """
        layers = _linear_layers(model)
        for target in self.targets or ():
            if not any(_matches(name, target) for name in layers):
                raise UserError(_no_such_layer(model, target, layers))
        notes = _notes_on_experts(model)
        if self._targets_head(model, layers) and _untie(model):
            notes.append(
                "the head shared its weight with the embedding; it was given a copy, and only the copy is tuned"
            )
        return notes

    def add_adapters(self, model: nn.Module, seed: int) -> nn.Module:
        """The model with frozen weights and adapters, initialised from `seed`.

        Raises:
            UserError: peft cannot merge such adapters into this model, which the end of the run needs.
        """
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.rank,
            lora_alpha=cast("int", float(self.alpha)),
            lora_dropout=float(self.dropout),
            target_modules=self.targets or "all-linear",
            task_type="CAUSAL_LM",
        )
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft sets it itself for a Conv1D
                torch.default_generator.manual_seed(seed)
                adapted: Any = get_peft_model(cast("Any", model), config)
            adapted.merge_adapter()  # B = 0 at the start: the weights stay what they are
            adapted.unmerge_adapter()
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"tuning: this model cannot be tuned by low-rank updates: {error}") from error
        return cast("nn.Module", adapted)

    def merge_adapters(self, model: nn.Module) -> nn.Module:
        """The model without adapters, their updates merged into its weights."""
        return cast("nn.Module", cast("Any", model).merge_and_unload())

    def describe(self) -> str:
        """The rank, such as "lora (rank 16)"."""
        return f"lora (rank {self.rank})"

    def _targets_head(self, model: nn.Module, layers: dict[str, nn.Module]) -> bool:
        """Whether the output head of the model is one of the targets."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        names = [name for name, module in layers.items() if module is head]
        return any(_matches(name, target) for name in names for target in self.targets or ())


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can have an update, by name: Linear, and the Conv1D of GPT-2, which is a Linear transposed."""
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _matches(name: str, target: str) -> bool:
    """Whether peft applies the target to a layer: the name of the layer is or ends with it."""
    return name == target or name.endswith(f".{target}")


def _no_such_layer(model: nn.Module, target: str, layers: dict[str, nn.Module]) -> str:
    """The message about a target that is no linear layer of the model."""
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    tensors = _expert_tensors(model)
    experts = f"; its experts are held in whole tensors ({next(iter(tensors))}), which get no update" if tensors else ""
    suggestion = nearest(target, leaves)
    valid = "" if suggestion.startswith("valid") else f" (valid: {', '.join(leaves)})"
    return f"tuning.targets: the model has no linear layer {target!r}; {suggestion}{valid}{experts}"


def _expert_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, the tensors that hold the weights of all experts of a layer: (experts, rows, columns)."""
    return {name: weight for name, weight in model.named_parameters() if ".experts" in f".{name}" and weight.ndim == 3}


def _notes_on_experts(model: nn.Module) -> list[str]:
    weights = sum(weight.numel() for weight in _expert_tensors(model).values())
    if not weights:
        return []
    share = weights / count_parameters(model)
    return [f"the experts of the model, {share:.0%} of its weights, get no update: they are not linear layers"]


def _untie(model: nn.Module) -> bool:
    """Give the head a copy of the weight that it shares with the embedding; False where they share none."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone())
    config = cast("Any", model.config)
    config.tie_word_embeddings = False
    config.get_text_config().tie_word_embeddings = False
    cast("Any", model).tie_weights()  # with nothing to tie, it forgets which names were tied
    return True
