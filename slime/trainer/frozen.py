"""Models that are read and never trained: the reference policy, and teachers on the student's ranks. In the student's parallel layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from slime.config import SlimeConfig
from slime.models.map import ModelMap
from slime.models.registry import load_map
from slime.trainer import names
from slime.trainer.distributed import Parallel
from slime.trainer.model import DTYPES, Model, build_stages, load_hf
from slime.trainer.options import sort_options


@dataclass
class Frozen:
    """This rank's shard, without gradients and without an optimizer."""

    map: ModelMap
    config: TransformerConfig
    stages: list[GPTModel]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What the map places on this rank."""
        for stage in self.stages:
            yield from names.tensors(stage)

    @torch.no_grad()
    def become(self, model: Model) -> None:
        """Take the weights of a model of the same map and layout."""
        for (name, own), (other, theirs) in zip(self.tensors(), model.tensors(), strict=True):
            assert name == other, f"{name} is not {other}"
            own.copy_(theirs)


def build_frozen(path: str, family: str, cfg: SlimeConfig, parallel: Parallel) -> Frozen:
    """A model from a Hugging Face directory. All ranks call it together. Raises ValueError for one that cannot be used."""
    model_map = load_map(path, family, parallel.tp.size())
    options = sort_options(cfg.trainer.megatron)
    config, stages = build_stages(model_map, DTYPES[cfg.model.dtype], parallel, options, cfg.rollout.fp32_head)
    load_hf(stages, model_map, Path(path), parallel)
    for stage in stages:
        stage.eval().requires_grad_(False)
    return Frozen(model_map, config, stages)
