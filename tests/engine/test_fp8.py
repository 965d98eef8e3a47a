"""FP8 engines on a GPU: codes and scales follow the trainer's bf16 tensors in place, and are those of a server that loads the quantised
export. `make test-gpu`."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from slime.config import SlimeConfig
from slime.engine.client import Sampling
from slime.engine.control import Control
from slime.engine.fp8_model import fp8_model_dir
from slime.engine.host_copy import HostCopy
from slime.engine.served import Quantised
from slime.engine.server import Server
from slime.sync.channel import NotProven
from tests.engine import servers
from tests.engine.weights_double import Bits, Host, bf16_recipe, open_channel
from tests.tiny import make_tiny

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(os.environ.get("SLIME_TEST_DEVICE") != "cuda", reason="SGLang multiplies FP8 on a GPU")]
VERSIONS = 20
SIZES = {"hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 128, "intermediate": 512}
FAMILIES: dict[str, dict[str, Any]] = {"qwen3": {}, "qwen3_moe": {"moe_intermediate_size": 256}}
FAST = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "mem_fraction_static": 0.3,
    "cuda_graph_backend_prefill": "disabled",
    "cuda_graph_backend_decode": "disabled",
    "skip_server_warmup": True,
}


def recipe(model: Path, quantization: str = "fp8") -> SlimeConfig:
    cfg = bf16_recipe(model, **FAST)
    cfg.cluster.device, cfg.rollout.quantization = "cuda", quantization
    cfg.rollout.start_timeout_s = 240
    return cfg


@pytest.fixture(scope="module", autouse=True)
def no_warmup() -> Iterator[None]:
    """Triton's kernels alone: DeepGEMM's are compiled for minutes. Neither changes where weights lie."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_ENABLE_JIT_DEEPGEMM", "0")
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Host, Bits, Any]]:
    root = tmp_path_factory.mktemp("fp8")
    model = make_tiny(root / "model", request.param, dtype="bf16", **SIZES, **FAMILIES[request.param])
    with ExitStack() as stack:
        cfg = recipe(model)
        server = servers.start(cfg, root / "engine.log", 240)
        stack.callback(server.stop)
        host = stack.enter_context(Host(cfg, [server]))
        bits = Bits(model)
        yield root, host, bits, open_channel(cfg, bits, host)


def checksums(host: Host) -> dict[str, str]:
    """SGLang's own, of every parameter."""
    control = Control(host.live[0].endpoint, host._session)
    [rank] = host.run(control._call("POST", "/weights_checker", {"action": "checksum"}))["ranks"]
    return rank["checksums"]


def export(root: Path, bits: Bits) -> Path:
    """A directory of codes and scales, as quantising the trainer's export would make it."""
    model, made = root / "model", root / "quantised"
    bits.export(root / "bf16", model)
    copy = HostCopy.read(bits.spec(), root / "bf16", "export", "export")
    made.mkdir()
    for path in fp8_model_dir(model).iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    [tensors] = Quantised(copy, "export").buckets(1 << 40)
    save_file(dict(tensors), made / "model.safetensors", {"format": "pt"})
    return made


def greedy(server: Server, label: str) -> list[list[int]]:
    prompts = [[5 + i, 6, 7, 8 + i] for i in range(4)]
    greedily = Sampling(max_new_tokens=16, temperature=0.0)
    return [found.output_ids for found in servers.ask(server, [(ids, greedily) for ids in prompts], label, 240)]


def test_codes_and_scales_after_many_deltas_are_those_of_the_quantised_export(engine: Any) -> None:
    root, host, bits, channel = engine
    kinds = {live.dtype for live in host.live[0].maps[0].lives}
    assert {"float8_e4m3fn", "float32", "bfloat16"} <= kinds
    assert not host.weights.warnings
    before = checksums(host)
    for number in range(1, VERSIONS + 1):
        bits.step(number, 0.02 if number % 5 else 1.0)
        channel.publish(number)
    held, said = checksums(host), greedy(host.servers[0], f"run/0/{VERSIONS}")
    assert sum(held[name] != before[name] for name in held) > len(held) // 2
    cfg = recipe(root / "model", "none")
    cfg.model.path = str(export(root, bits))
    fresh = servers.start(cfg, root / "fresh.log", 240)
    try:
        with Host(cfg, [fresh]) as other:
            assert checksums(other) == held
        assert greedy(fresh, servers.LOADED) == said
    finally:
        fresh.stop()


def test_a_flipped_bit_of_a_code_or_a_scale_is_named(engine: Any) -> None:
    root, host, bits, channel = engine
    [[flipper]] = host.flippers(root)
    found = host.live[0].maps[0]
    spec = host.weights.served.engine.spec
    for number, name in enumerate(["model.layers.1.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight_scale_inv"]):
        [place] = [found.moves[i] for i in found.of_tensor[spec.index[name]]]
        live = found.lives[place.live]
        flipper.flip(live.name, place.target.offset * live.width, 0)
        bits.step(100 + number, 0.0)
        with pytest.raises(NotProven, match=name.replace(".", r"\.")):
            channel.publish(100 + number)
        flipper.flip(live.name, place.target.offset * live.width, 0)
        host.run(host.weights.take_in(host.live[0]))  # it was fenced


def test_a_server_that_is_not_quantised_is_refused(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", dtype="bf16", **SIZES)
    server = servers.start(recipe(model, "none"), tmp_path / "engine.log", 240)
    try:
        with (
            Host(recipe(model), [server]) as host,
            pytest.raises(ValueError, match=r"does not hold model\.layers\.0\..*_proj\.weight|holds 0 of"),
        ):
            open_channel(recipe(model), Bits(model), host)
    finally:
        server.stop()


def test_a_quantised_server_is_refused_where_none_is_wanted(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", dtype="bf16", **SIZES)
    bits = Bits(model)
    plain = recipe(model, "none")
    plain.model.path = str(export(tmp_path, bits))
    server = servers.start(plain, tmp_path / "engine.log", 240)
    try:
        plain.model.path = str(model)
        with Host(plain, [server]) as host, pytest.raises(ValueError, match=r"is quantised, .* set rollout\.quantization=fp8"):
            open_channel(plain, bits, host)
    finally:
        server.stop()
