"""The map against the real thing: the GPTModel that megatron-core builds has the parameters, shapes and rotary frequencies that it states.

Runs in a process of its own, since megatron-core's parallel state is global; the ranks that do not run are stood in for by a process
group that never communicates.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import LLAMA3, make_tiny

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
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import TransformerConfig
    from slime.models.registry import load_map
    from tests.tiny import load_hf_model

    for tp in (1, 2, 4):
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, create_gloo_process_groups=False)
        for path in sys.argv[1:]:
            model_map = load_map(path, tp_size=tp)
            values = model_map.transformer | {"activation_func": torch.nn.functional.silu}
            config = TransformerConfig(**values, tensor_model_parallel_size=tp, perform_initialization=False)
            spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
            gpt = GPTModel(config, spec, **model_map.gpt)
            built = {name: tuple(p.shape) for name, p in gpt.named_parameters()}
            stated = {name: model_map.local_shape(name, tp) for name in model_map.parameters()}
            assert built == stated, (path, tp, set(built.items()) ^ set(stated.items()))
            ours, theirs = gpt.rotary_pos_emb.inv_freq, load_hf_model(path).model.rotary_emb.inv_freq
            assert torch.equal(ours, theirs), (path, ours, theirs)
            print("agrees", path, tp, len(built))
        parallel_state.destroy_model_parallel()
"""


@pytest.mark.e2e
def test_megatron_core_builds_what_the_maps_state(tmp_path: Path) -> None:
    sizes = {"vocab": 77, "hidden": 48, "heads": 8, "kv_heads": 4, "head_dim": 128}
    paths = [
        make_tiny(tmp_path / "qwen3", "qwen3", **sizes),
        make_tiny(tmp_path / "qwen3_tied", "qwen3", tied=True, **sizes),
        make_tiny(tmp_path / "llama", "llama", **sizes),
        make_tiny(tmp_path / "llama_tied_llama3", "llama", tied=True, **sizes, rope_parameters=LLAMA3),
    ]
    command = [sys.executable, "-c", BUILD, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("agrees") == 12
