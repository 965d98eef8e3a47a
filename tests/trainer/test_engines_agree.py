"""Every family that stock SGLang serves: its log-probs over the whole vocabulary are the trainer's, and it says which experts it chose."""

import base64
import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slime.engine.server import Server
from slime.models.registry import FAMILIES, load_map
from tests.engine import servers
from tests.tiny import make_tiny
from tests.trainer.ranks import make_cfg

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
VOCAB = 77
LENGTHS = (37, 5, 21)
SERVED = [name for name, family in FAMILIES.items() if not family.unserved]


def ask(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{server.spec.endpoint.url}/generate",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {server.spec.endpoint.key}"},
    )
    return json.load(urllib.request.urlopen(request, timeout=120))


def distributions(server: Server, prompt: list[int]) -> tuple[list[int], np.ndarray]:
    """A prompt with six tokens that the engine adds, and float64 [tokens - 1, VOCAB], the engine's log-probs of what follows each."""
    sampling = {"max_new_tokens": 6, "ignore_eos": True}
    wanted = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": VOCAB}
    answer = ask(server, {"input_ids": prompt, "sampling_params": sampling, **wanted})
    meta, ids = answer["meta_info"], prompt + answer["output_ids"]
    rows = [*meta["input_top_logprobs"][1:], *meta["output_top_logprobs"]]  # the first token follows nothing
    found = np.full((len(ids) - 1, VOCAB), np.nan)
    for at, row in enumerate(rows):
        for logprob, token, _ in row:
            found[at, token] = logprob
    assert len(rows) == len(found) and not np.isnan(found).any()
    return ids, found


def logprobs(place, cfg, sequences: list[list[int]]) -> list[np.ndarray]:
    from slime.trainer import proof

    model = place.trainer(cfg).model
    rows = [torch.tensor(ids) for ids in sequences]
    logits = proof.megatron_logits(model.stages[0].module, model.config, rows, VOCAB)
    return [x.double().log_softmax(-1).numpy()[:-1] for x in logits.split([len(row) for row in rows])]


@pytest.mark.parametrize("family", SERVED)
def test_log_probs_of_the_whole_vocabulary_are_the_engine_s(ranks, tmp_path: Path, family: str, record_property) -> None:
    path = make_tiny(tmp_path / "model", family, vocab=VOCAB, seed=1)
    cfg = servers.recipe(path)
    server = servers.start(cfg, tmp_path / "server.log")
    try:
        numbers = np.random.default_rng(0)
        answers = [distributions(server, numbers.integers(1, VOCAB, length).tolist()) for length in LENGTHS]
        routing = load_map(path).routing
        if routing is not None:
            answer = ask(server, {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 1}, "return_routed_experts": True})
            named = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), np.int32)
            assert len(named) == 3 * routing.layers * routing.chosen and 0 <= named.min() <= named.max() < routing.experts
    finally:
        server.stop()
    ours = ranks.run(logprobs, 1, make_cfg(path), [ids for ids, _ in answers])[0]
    difference = max(float(np.abs(found - expected).max()) for found, (_, expected) in zip(ours, answers, strict=True))
    record_property("max abs", difference)
    assert difference <= 1e-4
