"""The maps against the real thing: the GPTModel that megatron-core builds holds the tensors, of the shapes, that a family's map states.

Runs in a process of its own, since megatron-core's parallel state is global; the ranks that do not run are stood in for by a process
group that never communicates.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slime.models.registry import FAMILIES
from tests.tiny import make_tiny

BUILD = """
import sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from slime.cpu import megatron as cpu

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
cpu.install()
with cpu.scope():
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
    from slime.models.registry import load_map
    from slime.trainer import names, rotary, routing, without_te
    from slime.trainer.spec import decoder_spec

    without_te.repair()
    for tp, expert_tp in ((1, 1), (2, 1), (4, 4)):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp, expert_tensor_parallel_size=expert_tp, create_gloo_process_groups=False
        )
        for path in sys.argv[1:]:
            model_map = load_map(path, tp_size=tp)
            values = model_map.transformer | {
                "activation_func": torch.nn.functional.silu,
                "tensor_model_parallel_size": tp,
                "expert_tensor_parallel_size": expert_tp,
                "sequence_parallel": tp > 1 and model_map.has_experts,
                "moe_token_dispatcher_type": "alltoall",
                "perform_initialization": False,
            }
            kind = MLATransformerConfig if "multi_latent_attention" in values else TransformerConfig
            config = kind(**values)
            gpt = GPTModel(config, decoder_spec(config, model_map.sandwich, None), **model_map.gpt)
            built = {name: tuple(tensor.shape) for name, tensor in names.tensors(gpt)}
            sizes = {name: expert_tp if model_map.is_expert(name) else tp for name in model_map.parameters()}
            stated = {name: model_map.local_shape(name, size) for name, size in sizes.items()}
            assert built == stated, (path, tp, set(built.items()) ^ set(stated.items()))
            rotary.install(gpt, model_map.rope)  # asserts that as many channels rotate
            routing.install(gpt, model_map.groups)
            print("agrees", path, tp, len(built))
        parallel_state.destroy_model_parallel()
"""


@pytest.mark.e2e
def test_megatron_core_builds_what_the_maps_state(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Every family, every other one tied; and a model with fewer key heads than the largest number of ranks."""
    paths = [tiny(family, number % 2 == 1) for number, family in enumerate(FAMILIES)]
    paths.append(make_tiny(tmp_path, "qwen3", heads=8, kv_heads=2))
    command = [sys.executable, "-c", BUILD, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("agrees") == 3 * len(paths)
