"""Real ranks for tests: processes that stay, and a trainer of any layout in them.

On the CPU, over gloo; with SLIME_TEST_DEVICE=cuda on a GPU each, over NCCL, as in `make test-gpu`.
"""

import gc
import multiprocessing
import os
import sys
import traceback
import uuid
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from slime.config import SlimeConfig
from slime.config.parallel import ParallelSizes, parallel_sizes
from slime.models.map import Routing
from slime.types import NOT_RECORDED, Batch

ANSWER_S = 120
KIND = os.environ.get("SLIME_TEST_DEVICE", "cpu")


class Ranks:
    """`run(fn, ...)` calls fn(place, ...) in `world` processes, within the device's scope, and returns their results. A process is started
    when it is first needed. Each has `answer_s` to answer."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def run(self, fn: Callable, world: int, *args: Any, answer_s: float = ANSWER_S) -> list[Any]:
        while len(self.pipes) < world:
            self._start()
        store = str(self.scratch / uuid.uuid4().hex)
        pipes = self.pipes[:world]
        for rank, pipe in enumerate(pipes):
            pipe.send((fn, rank, world, store, args))
        answers = []
        for pipe in pipes:
            assert pipe.poll(answer_s), f"a rank did not answer within {answer_s:g} s"
            answers.append(pipe.recv())
        failed = [text for ok, text in answers if not ok]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def _start(self) -> None:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs,), daemon=True)
        if KIND == "cuda":
            os.environ["CUDA_VISIBLE_DEVICES"] = str(len(self.processes))  # a rank sees its own GPU only
        process.start()
        self.pipes.append(ours)
        self.processes.append(process)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe: Connection) -> None:
    from slime.trainer import device, distributed

    dev = device.set_up(KIND, 1)
    imported = 0
    while True:
        fn, rank, world, store, args = pipe.recv()
        try:
            with dev.scope():
                pipe.send((True, fn(Place(dev, rank, world, store), *args)))
        except Exception:  # noqa: BLE001 - raised again by the test that asked
            pipe.send((False, traceback.format_exc()))
        distributed.leave_groups()
        _let_go()
        if len(sys.modules) > imported:  # what was imported stays: looking through it takes longer than most tests
            imported = len(sys.modules)
            gc.freeze()


def _let_go() -> None:
    """Free what a test built: a group that a model holds has threads, which would pile up. A layer with experts keeps the graph of its last
    pass, which refers to the model through hooks of gradients, where Python's collector does not look."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    for found in gc.get_objects():
        if issubclass(type(found), MoELayer):  # isinstance would look through weak references to what is gone
            found.token_dispatcher = None
    gc.collect()


class Place:
    """Where a test function runs."""

    def __init__(self, device: Any, rank: int, world: int, store: str) -> None:
        self.device, self.rank, self.world, self.store = device, rank, world, store
        self.joined = 0

    def join(self, sizes: ParallelSizes, seed: int = 0) -> Any:
        """Process groups; a second call leaves the first ones."""
        from slime.trainer import distributed

        distributed.leave_groups()
        self.joined += 1
        store = dist.FileStore(f"{self.store}-{self.joined}", self.world)
        return distributed.join_groups(self.device, store, self.rank, self.world, sizes, seed, 60.0)

    def trainer(self, cfg: SlimeConfig, beside: Any = None) -> Any:
        """A trainer built as a rank builds it: alone, or on the ranks of another of the same layout."""
        from slime.observe.trace import Tracer
        from slime.trainer.build import build_trainer

        parallel = self.join(parallel_sizes(cfg.trainer), cfg.run.seed) if beside is None else beside.parallel
        return build_trainer(cfg, self.device, parallel, Tracer(f"rank {self.rank}"))

    def critic(self, cfg: SlimeConfig, beside: Any = None) -> Any:
        """A critic built as a rank builds it: alone, or on the ranks of a trainer."""
        from slime.observe.trace import Tracer
        from slime.trainer.critic import build_critic

        parallel = self.join(parallel_sizes(cfg.trainer), cfg.run.seed) if beside is None else beside.parallel
        return build_critic(cfg, self.device, parallel, Tracer(f"critic {self.rank}"))


def make_cfg(path: Path, dtype: str = "fp32", **trainer: Any) -> SlimeConfig:
    """A recipe for a tiny model."""
    cfg = SlimeConfig()
    cfg.model.path, cfg.model.dtype, cfg.cluster.device = str(path), dtype, KIND
    cfg.rollout.max_response_tokens = 40
    for name, value in {"lr": 1e-3, **trainer}.items():
        assert hasattr(cfg.trainer, name)
        setattr(cfg.trainer, name, value)
    return cfg


def make_batch(samples: int = 12, vocab: int = 80, seed: int = 0, shortest: int = 3, longest: int = 40) -> Batch:
    """Random sequences drawn from version 0, four samples a group; the last two thirds of each are trained, with holes. Id 0 is not among
    the tokens: transformers takes it for padding, which has no gradient there."""
    g = np.random.default_rng(seed)
    lengths = g.integers(shortest, longest, samples)
    cu = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    mask = g.random(cu[-1]) < 0.8
    for start, length in zip(cu[:-1], lengths, strict=True):
        mask[start : start + 1 + length // 3] = False
    rollout = np.where(mask, g.normal(-3, 1, cu[-1]), 0).astype(np.float32)
    return Batch(
        tokens=g.integers(1, vocab, cu[-1]).astype(np.int32),
        cu_seqlens=cu,
        loss_mask=mask,
        rollout_logprobs=rollout,
        rewards=g.normal(size=samples),
        group=np.arange(samples) // 4 + 7,
        version=np.zeros(samples, np.int64),
    )


def with_experts(batch: Batch, routing: Routing, seed: int = 0) -> Batch:
    """The batch with random experts, as engines would name them: none of each sequence's last token, nor of one sequence in four."""
    g = np.random.default_rng(seed)
    tokens = len(batch.tokens)
    scores = g.random((tokens, routing.layers, routing.experts))
    experts = np.argsort(scores, -1)[..., : routing.chosen].astype(np.int16)
    experts[batch.cu_seqlens[1:] - 1] = NOT_RECORDED
    experts[batch.sample_of_token % 4 == 3] = NOT_RECORDED
    return replace(batch, experts=experts)


def weights(trained: Any) -> dict[str, torch.Tensor]:
    """The HF tensors of a trainer or a critic, on the leader; nothing elsewhere."""
    from slime.trainer.export import gather_all, make_atlas

    atlas = make_atlas(trained.model, trained.parallel)
    return dict(tensor for bucket in gather_all(trained.model, atlas, 1 << 16) for tensor in bucket)


def save(trainer: Any, directory: Path) -> None:
    """A checkpoint's shards, written before anything else goes on."""
    from slime.trainer import shards
    from slime.trainer.host_buffers import HostBuffers

    shards.snapshot(trainer, directory, HostBuffers(pinned=KIND == "cuda")).write()


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    """The accumulated gradients as HF tensors, on the leader; nothing elsewhere."""
    from slime.trainer.export import gather_hf, make_atlas

    for stage in trainer.model.stages:
        for buffers, group in ((stage.buffers, trainer.parallel.dp_cp), (stage.expert_parallel_buffers, trainer.parallel.expert_dp)):
            for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
                part = bucket.grad_data.chunk(group.size())[group.rank()].clone()  # reduce-scattered: each rank has the sum of its part
                dist.all_gather_into_tensor(bucket.grad_data, part, group=group)
    model = trainer.model
    found = {name: parameter.main_grad for name, parameter in model.parameters()}
    names = [name for name in model.map.parameters() if not model.map.is_router_bias(name)]
    return dict(gather_hf(model.map, make_atlas(model, trainer.parallel), found, names, model.device, lambda name: torch.float32))
