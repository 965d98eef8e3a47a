"""A general plugin of SGLang (entry-point group sglang.srt.plugins): SGLang calls `register` in each of its processes.

What serving on a CPU needs beyond stock SGLang:

    processes              forked from the first one, which has imported everything; spawned ones import it all again, for 10 to 20 s
    host buffers           plain tensors, where SGLang would register them with CUDA
    latent attention       absorbed (queries meet the cached latents) for torch_native too, whose cache holds nothing else; and without
                           rotary scaling, where SGLang's CPU form takes DeepSeek's scaled one only
    torch.cuda.synchronize nothing to wait for
    decode attention       one call a batch instead of one a sequence, except in deterministic mode
    deterministic mode     torch_native counts as a deterministic backend, and SGLang's batch-invariant mode is ours
"""

import multiprocessing
import os

import torch

BATCH_INVARIANT = "SLIME_CPU_BATCH_INVARIANT"  # set by slime.cpu.serving


def register():
    torch.cuda.synchronize = lambda device=None: None
    _fork()
    _plain_host_buffers()
    _latent_attention()
    if os.environ.get(BATCH_INVARIANT) == "1":
        _deterministic()
    else:
        import slime_batched_decode

        slime_batched_decode.install()


def _fork():
    """SGLang asks for spawned processes, which CUDA needs. At the time it has neither a second thread nor used torch's."""
    set_start_method = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: set_start_method("fork", force=force)


def _plain_host_buffers():
    from sglang.srt.mem_cache.pool_host import common

    def allocate(dims, dtype, device, pin_memory, allocator):
        return torch.empty(dims, dtype=dtype, device=device)

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate


def _latent_attention():
    from sglang.srt.layers.rotary_embedding import factory
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers

    handlers.AttentionBackendRegistry.register("torch_native", lambda attention, batch: handlers.AttnForwardMethod.MLA)

    scaled = factory.get_rope_cpu

    def get_rope_cpu(head_size, rotary_dim, max_position, base, is_neox_style=True, rope_scaling=None, dtype=None, *rest):
        if rope_scaling is None:
            return factory.get_rope(head_size, rotary_dim, max_position, base, is_neox_style, None, dtype, *rest[:1])
        return scaled(head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling, dtype, *rest)

    factory.get_rope_cpu = get_rope_cpu


def _deterministic():
    import slime_batch_invariant
    import slime_seeded_sampling
    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups import choices
    from sglang.srt.batch_invariant_ops import batch_invariant_ops as triton_ops

    choices.add_deterministic_attention_backend_choices(["torch_native"])
    for module in (batch_invariant_ops, triton_ops):
        module.enable_batch_invariant_mode = slime_batch_invariant.enable
    slime_seeded_sampling.install()
