"""A rank's share of a checkpoint, first held in host memory, then written while training goes on.

    snapshot = hold(state, directory, ...)      all ranks together, between two updates: collectives over the ranks' own groups
    files = snapshot.write()                    on any thread of every rank: collectives over the group of saves alone

The files are megatron-core's (`torch_dist`): __<rank>_0.distcp of each rank that holds anything, and of rank 0 common.pt, .metadata and
metadata.json. megatron-core's own writers fork, which is not safe beside the threads of Ray and gloo.
"""

import dataclasses
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from slime.observe.files import fsync_directory
from slime.observe.hashed import File, HashedFile, write_hashed
from slime.trainer.host_buffers import HostBuffers

METADATA_FNAME = ".metadata"  # torch's index of what lies where
COPIED = 64 << 10  # bytes: what is smaller is put together before it is written
Held = list[tuple[WriteItem, torch.Tensor | io.BytesIO]]
Written = tuple[dict[str, File], list[WriteResult], str]  # of a rank: its files, what lies where in them, why it failed or ""


@dataclasses.dataclass
class Snapshot:
    """What one rank writes. Nothing of it is memory of the model."""

    directory: Path
    group: dist.ProcessGroup  # gloo; all ranks; of saves alone
    items: Held
    common: dict[str, Any]  # equal on all ranks; rank 0 writes it
    metadata: Metadata | None  # rank 0

    @property
    def host_bytes(self) -> int:
        """Host memory that it takes until `write` returns."""
        return sum(data.nbytes if isinstance(data, torch.Tensor) else data.getbuffer().nbytes for _, data in self.items)

    def write(self) -> dict[str, File]:
        """Write this rank's files and return them by name with the hashes of what was meant to be written. All ranks call it; it returns
        when the files of all are on disk. Tensors are written out of the memory where they lie.

        Raises OSError on every rank where the disk refuses on one.
        """
        rank, world = self.group.rank(), self.group.size()
        mine = self._write_items(rank)
        everything: list[Any] = [None] * world
        dist.all_gather_object(everything, mine, self.group)
        failures = [failure for _, _, failure in everything if failure]
        indices = [""]
        files = mine[0]
        if rank == 0 and not failures:
            try:
                files |= self._write_index([result for _, results, _ in everything for result in results])
            except OSError as error:
                indices = [f"rank 0: {error}"]
        dist.broadcast_object_list(indices, src=0, group=self.group)
        if failures := [*failures, *filter(None, indices)]:
            raise OSError(f"the trainer's shards could not be written to {self.directory}: {'; '.join(failures)}")
        return files

    def _write_items(self, rank: int) -> Written:
        name, results = f"__{rank}_0.distcp", []
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not self.items:
                return {}, [], ""
            torch.serialization.set_crc32_options(False)  # the manifest has a hash of every file
            with HashedFile(self.directory / name) as file:
                for item, data in self.items:
                    at = file.size
                    for piece in _serialised(data):
                        file.write(piece)
                    place = _StorageInfo(name, at, file.size - at)
                    results.append(WriteResult(index=item.index, size_in_bytes=place.length, storage_data=place))
            fsync_directory(self.directory)
        except OSError as error:
            return {}, [], f"rank {rank}: {error}"
        return {name: file.result}, results, ""

    def _write_index(self, results: list[WriteResult]) -> dict[str, File]:
        """metadata.json is last: without it the folder is no checkpoint to megatron-core."""
        assert self.metadata is not None, "rank 0 has gathered the plans"
        self.metadata.version, self.metadata.storage_meta = CURRENT_DCP_VERSION, StorageMeta(checkpoint_id=str(self.directory))
        self.metadata.storage_data = {result.index: result.storage_data for result in results}
        common = io.BytesIO()
        torch.save(self.common, common)
        contents = {
            COMMON_STATE_FNAME: common.getvalue(),
            METADATA_FNAME: pickle.dumps(self.metadata),
            CONFIG_FNAME: json.dumps(dataclasses.asdict(CheckpointingConfig("torch_dist", 1))).encode(),
        }
        files = {name: write_hashed(self.directory / name, content) for name, content in contents.items()}
        fsync_directory(self.directory)
        return files


def hold(state: dict[str, Any], directory: Path, group: dist.ProcessGroup, buffers: HostBuffers | None) -> Snapshot:
    """Plan with the other ranks who writes what, and take hold of this rank's share of a sharded state dict.

    Tensors that are not in `buffers` are copied there. Without buffers, the snapshot is the state's own memory, which must not change until
    it is written.
    """
    sharded, common = save_preprocess(state)
    sharded, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    holder = _Holder()
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    (_, metadata, _), *_ = save_state_dict_async_plan(mcore_to_pyt_state_dict(sharded, False), holder, planner=planner)

    def kept(item: WriteItem, data: Any) -> Any:
        if not isinstance(data, torch.Tensor) or buffers is None or buffers.holds(data):
            return data
        assert not data.is_meta, f"{item.index} is to be written by a rank that does not have it"
        return buffers.copy(item.index, data)  # on a CPU megatron-core's own staging would alias the model

    items = [(item, kept(item, data)) for item, data in holder.items]
    if buffers is not None:
        buffers.complete()
    return Snapshot(directory, group, items, common, metadata)


class _Holder:
    """Stands in megatron-core's planning for a writer: keeps the tensors of this rank's plan and touches no disk."""

    can_run_decentralized_global_plan = True

    def __init__(self) -> None:
        self.items: list[tuple[WriteItem, Any]] = []

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_decentralized_global_plan(self, plan: SavePlan) -> SavePlan:
        """As it is: a file is named after its rank."""
        return plan

    def prepare_write_data(self, plan: SavePlan, planner: MCoreSavePlanner) -> None:
        """Take what the plan says this rank writes."""
        self.items = [(item, planner.resolve_data(item)) for item in plan.items]


def _serialised(data: torch.Tensor | io.BytesIO) -> Iterator[bytearray | memoryview]:
    """As torch's reader wants it. The numbers of a large tensor are a view of its memory."""
    if isinstance(data, io.BytesIO):
        yield data.getbuffer()
        return
    pieces = _Pieces(_alone(data.cpu()))
    torch.save(pieces.tensor, cast(IO[bytes], pieces))
    yield from pieces.found


class _Pieces:
    """A file to torch.save, which hands over the tensor's own memory. Nothing is written before that has returned: a disk that refuses in
    between would end in C++."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.found: list[bytearray | memoryview] = []

    def write(self, piece: memoryview) -> int:
        view = np.frombuffer(piece, np.uint8)
        if view.nbytes == self.tensor.nbytes >= COPIED and view.ctypes.data == self.tensor.data_ptr():
            self.found.append(view.data)
        elif self.found and isinstance(self.found[-1], bytearray):
            self.found[-1] += piece
        else:
            self.found.append(bytearray(piece))
        return view.nbytes

    def flush(self) -> None:
        """Nothing is kept back."""


def _alone(data: torch.Tensor) -> torch.Tensor:
    """The same memory without what lies around it, all of which torch would save with a view."""
    if data.untyped_storage().nbytes() == data.nbytes or data.numel() == 0 or not data.is_contiguous():
        return data if data.untyped_storage().nbytes() == data.nbytes else data.clone(memory_format=torch.contiguous_format)
    return torch.frombuffer(data.view(-1).view(torch.uint8).numpy(), dtype=data.dtype).view(data.shape)
