"""Forward passes over a batch, and what is gathered from them."""

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from slime.models.map import ModelMap
from slime.trainer.forward import OnOutput, run_micro_batches
from slime.trainer.frozen import Frozen
from slime.trainer.logprobs import token_logprobs
from slime.trainer.packing import MicroBatch
from slime.trainer.state import Trained, Trainer
from slime.types import Batch


def log_probs(
    trainer: Trainer,
    batch: Batch,
    frozen: Frozen | None = None,
    temperature: float | None = None,
    apart: np.ndarray | None = None,
) -> np.ndarray:
    """Log-probs of the trained tokens at `temperature`, by default the trainer's, under the current weights or those of a frozen model,
    which chooses its own experts: float32 [T], 0 outside loss_mask. `apart` as for `Trained.micro_batches`.

    Every rank computes its share and gets all of it.
    """
    model_map = trainer.model.map if frozen is None else frozen.map

    def keep(micro_batch: MicroBatch, logits: Tensor) -> tuple[Tensor, tuple[np.ndarray, Tensor]]:
        logprobs, _ = of_labels(trainer, micro_batch, logits, model_map, temperature)
        return logprobs.sum(), (micro_batch.trained, logprobs)

    return gather(trainer, look(trainer, batch, keep, frozen, apart=apart), len(batch.tokens))


def look(
    trained: Trained,
    batch: Batch,
    on_output: OnOutput,
    frozen: Frozen | None = None,
    span: str = "logprobs",
    apart: np.ndarray | None = None,
) -> list:
    """What `on_output` collects of this rank's share of a batch, without gradients. `apart` as for `Trained.micro_batches`."""
    trained.model.train(False)
    with trained.tracer.span(span):
        micro_batches = trained.micro_batches(batch if frozen is None else replace(batch, experts=None), apart)
        kept = run(trained, micro_batches, on_output, forward_only=True, model=frozen)
    trained.model.train(True)
    return kept


def run(
    trained: Trained, micro_batches: list[MicroBatch], on_output: OnOutput, forward_only: bool = False, model: Frozen | None = None
) -> list:
    """See `run_micro_batches`."""
    return run_micro_batches(
        model or trained.model,
        micro_batches,
        on_output,
        device=trained.device.torch,
        tp=trained.parallel.tp,
        cp_size=trained.parallel.cp.size(),
        forward_only=forward_only,
    )


def of_labels(
    trainer: Trainer, micro_batch: MicroBatch, logits: Tensor, model_map: ModelMap, temperature: float | None = None
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy) of the trained tokens, fp32 [t] each; at the trainer's temperature where none is given."""
    at = trainer.temperature if temperature is None else temperature
    rows, labels = (torch.from_numpy(x).to(logits.device) for x in (micro_batch.rows, micro_batch.labels))
    return token_logprobs(logits, rows, labels, at, model_map.vocab_size, trainer.parallel.tp)


def gather(
    trained: Trained, kept: list[tuple[np.ndarray, Tensor]], tokens: int, like: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
) -> np.ndarray:
    """Put every rank's (positions, values [t, *like]) into one [tokens, *like], on all ranks; 0 where there are none."""
    whole = torch.zeros(tokens, *like, dtype=dtype, device=trained.device.torch)
    for at, values in kept:
        whole[torch.from_numpy(at).to(whole.device)] = values
    dist.all_reduce(whole, group=trained.parallel.dp_cp)
    dist.all_reduce(whole, group=trained.parallel.pp)  # only the last stage has any
    return whole.cpu().numpy()


def tokens_of(batch: Batch, samples: np.ndarray) -> np.ndarray:
    """bool [T], the tokens of these samples (ascending)."""
    return np.isin(batch.sample_of_token, samples)
