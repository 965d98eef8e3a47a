"""A model of values from the map of a language model: the same trunk, with one output a token."""

from dataclasses import replace

from slime.layout import HFTensor, Whole
from slime.models.map import ModelMap

OUTPUT = "output_layer.weight"
HEAD = "score.weight"  # as transformers names it in models for classification


def value_map(model: ModelMap) -> ModelMap:
    """`model` with a head [1, hidden] in place of its output layer, tied or not. The head is in no checkpoint: it begins as 0."""
    layouts = {name: layout for name, layout in model.layouts.items() if name != OUTPUT}
    head = Whole(HFTensor(HEAD, (1, model.transformer["hidden_size"])))
    shared = {name: owner for name, owner in model.shared.items() if name != OUTPUT}
    gpt = {**model.gpt, "share_embeddings_and_output_weights": False}
    return replace(model, gpt=gpt, layouts={**layouts, OUTPUT: head}, shared=shared, fresh=(OUTPUT,))
