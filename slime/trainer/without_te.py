"""What megatron-core 0.14 - 0.16 gets wrong where Transformer Engine is not installed, on any device."""

import functools
from importlib.util import find_spec
from typing import Any

import torch

from slime.trainer.kernels import fuses_adam


@functools.cache
def repair() -> None:
    """Patch megatron-core in this process, once, if Transformer Engine is missing."""
    if find_spec("transformer_engine") is not None:
        return
    _name_router_gemm()
    _tell_mla()
    _load_torch_adam()


def _name_router_gemm() -> None:
    """The MoE router reads a name that is imported with Transformer Engine only (NameError)."""
    import megatron.core.transformer.moe.moe_utils as moe_utils

    moe_utils.te_general_gemm = None


def _tell_mla() -> None:
    """Multi-latent attention asks isinstance(x, <a mock>) (TypeError)."""
    import megatron.core.transformer.multi_latent_attention as mla

    mla.HAVE_TE = False


def _load_torch_adam() -> None:
    """DistributedOptimizer over torch.optim.AdamW: loading a checkpoint.

    It looks for "step" among the tensors (KeyError), and hands one `step` tensor to all parameters, which then counts each of
    them in every optimizer step.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load_state_dict = DistributedOptimizer.load_state_dict

    @torch.no_grad()
    def set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, index = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][index]
        targets = {"param": main, **self.optimizer.state[main]}
        for name in tensors.keys() & targets.keys() - {"step"}:
            targets[name].copy_(tensors[name])

    def load(self: Any, state_dict: dict[str, Any]) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    DistributedOptimizer.load_state_dict = load


def allocate_adam_state(optimizer: Any) -> None:
    """Make the state that torch's Adam makes in its first step: a checkpoint may be written or loaded before one. Where kernels are fused,
    so is Adam."""
    for part in optimizer.chained_optimizers:
        if not isinstance(part.optimizer, torch.optim.Adam):
            continue
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                group["fused"] = fuses_adam(main.device)
                fresh = {
                    "step": torch.zeros((), device=main.device),
                    "exp_avg": torch.zeros_like(main),
                    "exp_avg_sq": torch.zeros_like(main),
                }
                part.optimizer.state[main].update(fresh)
