"""A real SGLang server on the CPU: answers, weights, keys, deterministic mode, and how it ends."""

import asyncio
import os
import pickle
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest
import torch

from slime.engine.client import EngineClient, Generation, Sampling
from slime.engine.control import Control
from slime.engine.endpoint import Endpoint
from slime.engine.errors import EngineError, NotStarted, StaleWeights
from slime.engine.health import Kind
from slime.engine.live import LiveEngine
from slime.engine.routing import State
from slime.engine.server import Server
from slime.models.hf_files import HFReader
from slime.sync import buckets
from tests.engine import servers
from tests.tiny import load_hf_model

pytestmark = pytest.mark.e2e
PROMPTS = [[7, 8, 9], list(range(5, 45)), [30] * 7]


def tensors(model: Path) -> list[tuple[str, torch.Tensor]]:
    reader = HFReader(model)
    return [(name, torch.as_tensor(reader.read(name))) for name in reader.names]


def hf_logprobs(model: Path, generation: Generation, prompt: list[int], temperature: float = 1.0) -> torch.Tensor:
    """transformers' log-probs of the response tokens [R]."""
    ids = torch.tensor([prompt + generation.output_ids])
    with torch.no_grad():
        logits = load_hf_model(model)(ids).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def distance(model: Path, generation: Generation, prompt: list[int], temperature: float = 1.0) -> float:
    return float((hf_logprobs(model, generation, prompt, temperature) - torch.tensor(generation.logprobs).double()).abs().max())


def test_log_probs_are_those_of_transformers(server: Server, models: tuple[Path, Path]) -> None:
    servers.update(server, tensors(models[0]), "run/0/0")
    for temperature in (1.0, 0.7):
        sampling = servers.Endless(max_new_tokens=20, temperature=temperature, seed=3)
        answers = servers.ask(server, [(p, sampling) for p in PROMPTS], "run/0/0")
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert len(answer.output_ids) == len(answer.logprobs) == 20 and answer.finish_reason == "length"
            assert distance(models[0], answer, prompt, temperature) < 1e-5
            assert answer.prompt_tokens == len(prompt) and answer.started_s < answer.finished_s and answer.e2e_s > 0
    greedy = servers.ask(server, [(PROMPTS[0], servers.Endless(max_new_tokens=5, temperature=0.0))], "run/0/0")[0]
    assert distance(models[0], greedy, PROMPTS[0]) < 1e-5


def test_log_probs_of_a_nucleus_are_of_the_whole_distribution(server: Server, models: tuple[Path, Path]) -> None:
    """Of its likeliest token alone, which is drawn with probability 1."""
    servers.update(server, tensors(models[0]), "run/0/0")
    for seed in (3, None):
        sampling = servers.Endless(max_new_tokens=20, temperature=0.7, top_p=1e-6, seed=seed)
        for prompt, answer in zip(PROMPTS, servers.ask(server, [(p, sampling) for p in PROMPTS], "run/0/0"), strict=True):
            assert distance(models[0], answer, prompt, 0.7) < 1e-5 and max(answer.logprobs) < -0.01


def test_it_says_how_many_requests_it_runs_at_once(server: Server) -> None:
    async def ask() -> int | None:
        async with aiohttp.ClientSession() as session:
            return await Control(server.spec.endpoint, session).runs()

    [told] = [word.partition("=")[2] for word in server.spec.words if word.startswith("--max-running-requests")]
    assert asyncio.run(ask()) == int(told)


def test_stop_strings_end_an_answer(server: Server, models: tuple[Path, Path]) -> None:
    servers.update(server, tensors(models[0]), "run/0/0")
    free = servers.ask(server, [(PROMPTS[1], servers.Endless(max_new_tokens=20, seed=5))], "run/0/0")[0]
    word = free.text[3]
    stopped = servers.ask(server, [(PROMPTS[1], servers.Endless(max_new_tokens=20, seed=5, stop=(word,)))], "run/0/0")[0]
    assert stopped.finish_reason == "stop" and free.text.startswith(stopped.text) and word not in stopped.text
    assert stopped.output_ids == free.output_ids[: len(stopped.output_ids)]


def test_an_update_brings_the_new_weights_and_their_label(server: Server, models: tuple[Path, Path]) -> None:
    requests = [(p, servers.Endless(max_new_tokens=20, seed=3)) for p in PROMPTS]
    servers.update(server, tensors(models[0]), "run/0/0")
    before = servers.ask(server, requests, "run/0/0")
    servers.update(server, tensors(models[1]), "run/0/1")
    after = servers.ask(server, requests, "run/0/1")
    for prompt, old, new in zip(PROMPTS, before, after, strict=True):
        assert distance(models[1], new, prompt) < 1e-5 < distance(models[1], old, prompt)
        assert [(s.version, s.start, s.end) for s in new.versions] == [("run/0/1", 0, 20)]
    servers.update(server, tensors(models[0]), "run/0/0")
    assert [g.logprobs for g in servers.ask(server, requests, "run/0/0")] == [g.logprobs for g in before], "bits did not come back"


def test_wrong_labels_are_refused_and_fenced(server: Server, models: tuple[Path, Path]) -> None:
    servers.update(server, tensors(models[0]), "run/0/0")
    with pytest.raises(StaleWeights, match="engine 0 holds weights run/0/0; expected run/0/7"):
        servers.ask(server, [(PROMPTS[0], Sampling(max_new_tokens=1))], "run/0/7")


def test_a_session_that_a_dead_driver_left_open_is_closed_first(server: Server, models: tuple[Path, Path]) -> None:
    """An engine of the user's outlives its driver, which died amid an update; another driver's first publication mends it."""
    servers.update(server, tensors(models[0]), "run/0/0")

    async def dies_amid_an_update(engine: LiveEngine, session: aiohttp.ClientSession) -> None:
        await engine._control.pause("retract")
        await engine._control.begin()
        payload = buckets.serialise(tensors(models[1])[:4])
        await engine._control.update([payload], None, flush=False, timeout_s=60)

    async def stock_sglang_refuses(engine: LiveEngine, session: aiohttp.ClientSession) -> None:
        with pytest.raises(EngineError, match=r"refused /begin_weight_update: 400 .*a weight-update session is already open"):
            await engine._control.begin()

    servers.with_engine(server, dies_amid_an_update)
    servers.with_engine(server, stock_sglang_refuses)
    servers.update(server, tensors(models[0]), "run/1/0")
    [answer] = servers.ask(server, [(PROMPTS[1], servers.Endless(max_new_tokens=8))], "run/1/0")
    assert distance(models[0], answer, PROMPTS[1]) < 1e-5


def test_a_session_that_cannot_be_opened_is_refused_as_it_was(server: Server, models: tuple[Path, Path]) -> None:
    """Nothing is hidden where no session was open."""

    class Refusing(Control):
        async def begin(self) -> None:
            raise EngineError("engine 0 refused /begin_weight_update: not today")

    async def begin(engine: LiveEngine, session: aiohttp.ClientSession) -> None:
        engine._control = Refusing(server.spec.endpoint, session)
        with pytest.raises(EngineError, match="not today"):
            await engine.load_whole([tensors(models[0])], "run/0/0", 60)

    servers.with_engine(server, begin)


def test_weights_that_give_no_number_are_an_error(server: Server, models: tuple[Path, Path]) -> None:
    """SGLang writes the NaN of a log-prob as null, which would pass for a number in a batch."""
    good = tensors(models[0])
    servers.update(server, [(name, t * torch.nan if "norm" in name else t) for name, t in good], "run/0/0")
    with pytest.raises(EngineError, match="engine 0 returned the log-prob NaN for token 0 of 4, which no probability has"):
        servers.ask(server, [(PROMPTS[0], servers.Endless(max_new_tokens=4, temperature=0.0))], "run/0/0")
    servers.update(server, good, "run/0/1")
    [answer] = servers.ask(server, [(PROMPTS[1], servers.Endless(max_new_tokens=8))], "run/0/1")
    assert distance(models[0], answer, PROMPTS[1]) < 1e-5


def test_what_a_server_refuses_to_load_is_an_error(server: Server, models: tuple[Path, Path]) -> None:
    async def wrong_order(engine: LiveEngine, session: aiohttp.ClientSession) -> None:
        with pytest.raises(EngineError, match=r"engine 0 refused /update_weights_from_tensor: 400.*begin_weight_update"):
            await engine._control.update([buckets.serialise(tensors(models[0])[:1])], None, flush=False, timeout_s=60)

    servers.with_engine(server, wrong_order)


def test_requests_without_the_key_are_refused(server: Server) -> None:
    async def statuses() -> list[int]:
        found = []
        async with aiohttp.ClientSession() as session:
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                for path, body in (("/generate", {"input_ids": [7]}), ("/pause_generation", {}), ("/server_info", None)):
                    call = session.post if body is not None else session.get
                    async with call(server.spec.endpoint.url + path, json=body, headers=headers) as response:
                        found.append(response.status)
        return found

    assert asyncio.run(statuses()) == [401] * 6


def test_keys_are_in_no_log_and_no_process_list(server: Server) -> None:
    key = server.spec.endpoint.key
    assert key not in repr(server.spec)
    log = server.spec.log.read_text()
    assert "'api_key': '***'" in log and key not in log
    cmdlines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline")]
    assert any(str(server.spec.address[1]).encode() in line for line in cmdlines) and not any(key.encode() in line for line in cmdlines)


def test_ids_outside_the_vocabulary_never_reach_the_server(server: Server, models: tuple[Path, Path]) -> None:
    servers.update(server, tensors(models[0]), "run/0/0")
    for prompt in ([servers.VOCAB], [3, -1], []):
        with pytest.raises(ValueError, match=r"outside the model's vocabulary|empty prompt"):
            servers.ask(server, [(prompt, Sampling(max_new_tokens=1))], "run/0/0")
    assert servers.ask(server, [([servers.VOCAB - 1], Sampling(max_new_tokens=1))], "run/0/0")[0].output_ids
    with pytest.raises(ValueError, match="32 hexadecimal digits"):
        asyncio.run(ask_with_a_short_rid(server))


async def ask_with_a_short_rid(server: Server) -> None:
    async with EngineClient([server.spec.endpoint], vocab_size=servers.VOCAB, timeout_s=5, max_in_flight=1) as client:
        await client.generate([7], Sampling(max_new_tokens=1), rid="7")


def mixed_requests(count: int) -> list[tuple[list[int], Sampling]]:
    """Requests of many lengths and samplings; those of one prompt share it."""
    found = []
    for i in range(count):
        draw = random.Random(i)
        prompt = [draw.randrange(5, 80) for _ in range(draw.choice([1, 3, 16, 17, 40, 150]))] if i % 3 else PROMPTS[1]
        top_p = 0.8 if i % 4 == 1 else 1.0
        temperature = 0.0 if i % 7 == 3 else 1.0
        found.append((prompt, servers.Endless(max_new_tokens=12 + i % 5, temperature=temperature, top_p=top_p, seed=1000 + i)))
    return found


def bits(answers: list[Generation]) -> list[tuple[list[int], bytes]]:
    return [(g.output_ids, torch.tensor(g.logprobs, dtype=torch.float64).numpy().tobytes()) for g in answers]


OTHER_SERVER = """
import sys, time, pathlib, pickle
from tests.engine import servers
from tests.engine.test_server import mixed_requests, bits
cfg = servers.recipe(pathlib.Path(sys.argv[1]))
cfg.run.deterministic = True
server = servers.start(cfg, pathlib.Path(sys.argv[2]) / "engine_0.log")
pathlib.Path(sys.argv[2], "bits").write_bytes(pickle.dumps(bits(servers.ask(server, mixed_requests(12)))))
print(server.spec.address[1], flush=True)
time.sleep(600)
"""


def test_deterministic_mode_gives_equal_bits_and_servers_die_with_their_parent(
    server: Server, models: tuple[Path, Path], tmp_path: Path
) -> None:
    """The same requests: one after the other, in one batch, in a larger batch, and on another server, whose parent is killed then."""
    root = Path(__file__).parents[2]
    other = subprocess.Popen([sys.executable, "-c", OTHER_SERVER, str(models[0]), str(tmp_path)], stdout=subprocess.PIPE, cwd=root)
    servers.update(server, tensors(models[0]), "run/0/0")
    requests = mixed_requests(48)
    alone = bits([servers.ask(server, [request], "run/0/0")[0] for request in requests[:12]])
    assert bits(servers.ask(server, requests[:12], "run/0/0")) == alone
    assert bits(servers.ask(server, requests[::-1], "run/0/0"))[::-1][:12] == alone
    assert other.stdout is not None
    port = int(other.stdout.readline())
    assert pickle.loads((tmp_path / "bits").read_bytes()) == alone

    [main] = servers.processes_of(f"--port\0{port}")
    group = [pid for pid in all_pids() if group_of(pid) == main]
    guard = int(Path(f"/proc/{main}/stat").read_text().split()[3])
    assert len(group) >= 3, "a server is several processes"
    other.kill()
    other.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(map(alive, [*group, guard])):
        time.sleep(0.1)
    assert not [pid for pid in [*group, guard] if alive(pid)]


def all_pids() -> list[int]:
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]


def group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has waited for is over."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_occupied_port_is_its_own_error(models: tuple[Path, Path], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((servers.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(NotStarted, match=f"engine 0: port {port} of 127.0.0.1 is taken by another process"):
            servers.start(servers.recipe(models[0]), tmp_path / "e.log", port=port)


def test_a_late_server_is_ended_and_shows_its_log(models: tuple[Path, Path], tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"engine 0 to start: not healthy after 1 s \(rollout.start_timeout_s\)"):
        servers.start(servers.recipe(models[0]), tmp_path / "late.log", timeout_s=1.0)
    assert time.monotonic() - begun < 5 and not servers.processes_of(str(models[0]) + "\0--port")


def test_what_a_broken_or_refused_connection_was_asked_is_asked_of_another_engine(models: tuple[Path, Path], server: Server) -> None:
    servers.update(server, tensors(models[0]), "run/0/0")

    async def ask() -> None:
        silent = await asyncio.start_server(lambda reader, writer: writer.close(), servers.HOST, 0)
        gone = Endpoint(f"http://{servers.HOST}:{silent.sockets[0].getsockname()[1]}", "", "engine 1", "0.5.23")
        async with EngineClient([gone, server.spec.endpoint], vocab_size=servers.VOCAB, timeout_s=20, max_in_flight=4) as client:
            for says in ("was lost while it generated", "does not accept connections"):
                client._expected = "run/0/0"
                client.router.ready(0)  # expected weights and all, and then it breaks
                client.router.ready(1)
                client._noted.clear()
                assert (await client.generate([7], Sampling(max_new_tokens=1))).engine == "engine 0"
                assert client.router.slots[0].state is State.DEAD and says in client.router.slots[0].reason
                [trouble] = client.troubles()
                assert (trouble.engine, trouble.kind) == ("engine 1", Kind.LOST) and says in trouble.reason
                silent.close()
                await silent.wait_closed()

    asyncio.run(ask())
