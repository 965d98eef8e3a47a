"""`slime convert`: both ways to the bit, refusals, and what becomes of a conversion that is wrong."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from rich.console import Console as RichConsole
from safetensors.torch import load_file, save_file

from slime.checkpoint import manifest
from slime.checkpoint.origin import Origin
from slime.checkpoint.state import DriverState, write_state
from slime.cli import convert
from slime.config.exits import ConfigError
from slime.observe.console import Console
from slime.types import WeightVersion
from tests.tiny import make_tiny
from tests.trainer.ranks import Ranks, make_batch, make_cfg, save, weights

MTP = {
    "model.layers.2.eh_proj.weight": (64, 128),
    "model.layers.2.enorm.weight": (5,),
    "model.layers.2.mlp.experts.0.up_proj.weight": (24, 64),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(tmp_path_factory.mktemp("stores"))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {
        "llama fp32": make_tiny(root / "llama", "llama", vocab=77),
        "qwen3 bf16": make_tiny(root / "qwen3", "qwen3", vocab=77, tied=True, dtype="bf16", max_shard_size="50KB"),
        "glm4_moe bf16": make_tiny(root / "glm4_moe", "glm4_moe", vocab=77, dtype="bf16", num_nextn_predict_layers=1),
        "glm4_moe fp32": make_tiny(root / "glm4_moe_fp32", "glm4_moe", vocab=77, num_nextn_predict_layers=1),
    }
    for name in ("glm4_moe bf16", "glm4_moe fp32"):
        add_passengers(found[name])
    return found


def add_passengers(path: Path) -> None:
    """A head that predicts a further token, and what real checkpoints do beside it: the routers' bias is fp32 whatever the rest is."""
    tensors = load_file(path / "model.safetensors")
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.randn(tensors[name].shape)
    dtype = tensors["lm_head.weight"].dtype
    tensors |= {name: torch.randn(shape).to(torch.float32 if "enorm" in name else dtype) for name, shape in MTP.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def contents(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    kinds = {2: torch.int16, 4: torch.int32}
    equal = (a[n].dtype == b[n].dtype and torch.equal(a[n].view(kinds[a[n].itemsize]), b[n].view(kinds[b[n].itemsize])) for n in a)
    return a.keys() == b.keys() and all(equal)


def quiet() -> Console:
    return Console(steps=0, out=RichConsole(stderr=True))


@dataclass
class Outcome:
    """What a conversion in another process found."""

    text: str
    equal: int
    logits: float | None
    left_out: tuple[str, ...]


def converted(place: Any, source: Path, out: Path, logits: bool = True) -> Outcome:
    found = convert.convert(source, out, quiet(), logits=logits)
    return Outcome(convert.account(out, found), found.bits.equal, found.logits, found.left_out)


def there_and_back(place: Any, source: Path, folder: Path) -> list[Outcome]:
    return [converted(place, source, folder / "megatron"), converted(place, folder / "megatron", folder / "hf")]


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["llama fp32", "qwen3 bf16", "glm4_moe bf16", "glm4_moe fp32"])
def test_there_and_back(ranks: Ranks, models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    source = models[kind]
    expected = contents(source)
    forth, back = ranks.run(there_and_back, 1, source, tmp_path)[0]
    assert forth.equal == back.equal == len(expected) and not forth.left_out
    assert max(forth.logits, back.logits) < 2e-5
    assert same(contents(tmp_path / "hf"), expected)
    assert {p.name for p in tmp_path.iterdir()} == {"megatron", "hf"}, "nothing hidden is left"
    assert json.loads((tmp_path / "hf/config.json").read_text()) == json.loads((source / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()
    says = f"read back    {len(expected)} tensors, all equal to the bit"
    assert all(says in outcome.text and "largest difference from transformers" in outcome.text for outcome in (forth, back))
    if "moe" in kind:
        assert "carried      3 of them untrained: model.layers.2.eh_proj.weight" in forth.text
        assert expected["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


@pytest.mark.e2e
def test_a_duplicate_of_tied_weights_is_named_and_left_out(ranks: Ranks, models: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = contents(models["qwen3 bf16"])
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, source / "model.safetensors")
    (source / "config.json").write_text((models["qwen3 bf16"] / "config.json").read_text())
    outcome = ranks.run(converted, 1, source, tmp_path / "out", False)[0]
    assert outcome.equal == len(tensors) and outcome.left_out == ("lm_head.weight",)
    assert "left out     1 that follow from the others: lm_head.weight" in outcome.text and "logits       not compared" in outcome.text


def trained(place: Any, cfg: Any, trainer: Path) -> dict[str, torch.Tensor]:
    from slime.trainer import step

    made = place.trainer(cfg)
    step.train_batch(made, make_batch(vocab=77))
    save(made, trainer)
    return weights(made)


@pytest.mark.e2e
@pytest.mark.parametrize("layout", [{"tensor_parallel": 2, "expert_parallel": 2}, {"pipeline_parallel": 2}], ids=str)
def test_a_run_s_checkpoint_of_any_layout(ranks: Ranks, models: dict[str, Path], tmp_path: Path, layout: dict[str, int]) -> None:
    source, iteration = models["glm4_moe bf16"], tmp_path / "iter_0000001"
    cfg = make_cfg(source, "bf16", **layout)
    if "expert_parallel" in layout:
        cfg.trainer.megatron["expert_tensor_parallel_size"] = 1
    held = ranks.run(trained, 2, cfg, iteration / "trainer")[0]
    config = {"model": {"path": str(source), "family": "auto"}}
    write_state(iteration, DriverState(1, WeightVersion(0, 1), {}, {}, config, 0.0, Origin()))
    manifest.write(iteration, manifest.describe(iteration, 1))
    outcome = ranks.run(converted, 1, iteration, tmp_path / "hf")[0]
    expected = held | {name: tensor for name, tensor in contents(source).items() if name in MTP}
    assert same(contents(tmp_path / "hf"), expected) and outcome.equal == len(expected) and outcome.logits < 2e-5
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(expected[name], contents(source)[name]), "it was trained"


def flip(file: Path, tensor: torch.Tensor) -> None:
    """Change one bit of a tensor where it lies in a file."""
    data, bits = bytearray(file.read_bytes()), tensor.contiguous().view(torch.uint8).numpy().tobytes()
    data[data.index(bits) + 3] ^= 1
    file.write_bytes(data)


def tampered_forth(place: Any, source: Path, out: Path, tensor: torch.Tensor) -> str:
    """What is said when the checkpoint changes on disk before it is read back."""
    from slime.trainer import shards

    read = shards.load_weights

    def meddle(gpt: Any, parallel: Any, directory: Path) -> None:
        flip(next(directory.glob("*.distcp")), tensor)
        read(gpt, parallel, directory)

    with mock.patch.object(shards, "load_weights", meddle), pytest.raises(RuntimeError) as raised:
        convert.convert(source, out, quiet())
    return str(raised.value)


def tampered_back(place: Any, source: Path, out: Path, tensor: torch.Tensor) -> str:
    """The same of a Hugging Face directory."""
    from slime.trainer import proof

    compare = proof.compare

    def meddle(tensors: Any, reader: Any, *rest: Any) -> Any:
        flip(reader.path / "model.safetensors", tensor)
        return compare(tensors, reader, *rest)

    convert.convert(source, out, quiet(), logits=False)
    with mock.patch.object(proof, "compare", meddle), pytest.raises(RuntimeError) as raised:
        convert.convert(out, out.with_name("back"), quiet())
    return str(raised.value)


@pytest.mark.e2e
def test_one_changed_bit_is_found_and_nothing_is_left(ranks: Ranks, models: dict[str, Path], tmp_path: Path) -> None:
    source = models["llama fp32"]
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = contents(source)[name]
    says = (
        f"of {len(contents(source))} tensors that were read back 1 differ from SOURCE and 0 are on one side only: {name}. OUT was not made"
    )
    assert says in ranks.run(tampered_forth, 1, source, tmp_path / "out", tensor)[0] and not list(tmp_path.iterdir())
    assert says in ranks.run(tampered_back, 1, source, tmp_path / "made", tensor)[0]
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def other_logits(place: Any, source: Path, out: Path) -> str:
    from slime.trainer import proof

    with mock.patch.object(proof, "sequences", lambda vocab, longest: [torch.tensor([1, 2, 3])]):
        real = proof.transformers_logits
        with (
            mock.patch.object(proof, "transformers_logits", lambda path, rows: real(path, [rows[0].flip(0)])),
            pytest.raises(RuntimeError) as raised,
        ):
            convert.convert(source, out, quiet())
    return str(raised.value)


@pytest.mark.e2e
def test_another_model_s_logits_are_refused(ranks: Ranks, models: dict[str, Path], tmp_path: Path) -> None:
    said = ranks.run(other_logits, 1, models["llama fp32"], tmp_path / "out")[0]
    assert "every tensor is equal to the bit, but the logits of megatron-core and transformers differ by" in said
    assert "OUT was not made; --no-logits makes it all the same" in said and not list(tmp_path.iterdir())


def refusals(place: Any, model: Path, folder: Path) -> list[str]:
    """What is said of each SOURCE that cannot be converted."""
    said = []
    for source, named in ((folder / "empty", None), (folder / "iter_0000001", None), (model, model)):
        with pytest.raises(ValueError) as raised:
            convert.convert(source, folder / "out", quiet(), named)
        said.append(str(raised.value))
    return said


@pytest.mark.e2e
def test_sources_that_cannot_be_converted(ranks: Ranks, models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    trainer = tmp_path / "iter_0000001/trainer"
    trainer.mkdir(parents=True)
    (trainer / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    config = {"model": {"path": str(tmp_path / "gone"), "family": "auto"}}
    write_state(tmp_path / "iter_0000001", DriverState(1, WeightVersion(0, 1), {}, {}, config, 0.0, Origin()))
    manifest.write(tmp_path / "iter_0000001", manifest.describe(tmp_path / "iter_0000001", 1))
    nothing, lost, superfluous = ranks.run(refusals, 1, models["llama fp32"], tmp_path)[0]
    assert "neither a Hugging Face directory (config.json) nor a megatron-core checkpoint (metadata.json); give one of these" in nothing
    assert "where no config.json is; name that model's directory by --model" in lost
    assert "leave --model out" in superfluous
    assert not (tmp_path / "out").exists()


def test_places_that_nothing_is_written_to(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").touch()
    for out in (tmp_path / "full", tmp_path / "full/a"):
        with pytest.raises(ConfigError, match=r"OUT=.* exists and is not an empty directory; name another"):
            convert.convert(models["llama fp32"], out, quiet())
    with pytest.raises(ConfigError, match=r"OUT=.*: no directory .*nowhere; make it first"):
        convert.convert(models["llama fp32"], tmp_path / "nowhere/out", quiet())


def test_memory_is_asked_about_first(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slime.models.registry import load_map

    model_map = load_map(models["llama fp32"])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: mock.Mock(available=1000))
    with pytest.raises(RuntimeError, match=r"1\.0 GiB of memory are needed, 0\.0 GiB are free; use a larger machine"):
        convert._check_memory(model_map, 2, True)
    monkeypatch.setattr(convert, "ITSELF", 0)
    need = int(1.7 * 2 * sum(torch.Size(shape).numel() for shape in model_map.hf_shapes.values()))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: mock.Mock(available=need))
    convert._check_memory(model_map, 2, False)
    with pytest.raises(RuntimeError, match=r"comparing logits in fp32 needs .*; --no-logits leaves it out"):
        convert._check_memory(model_map, 2, True)


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), convert._unfinished(tmp_path / "out") as folder:
        (folder / "config.json").touch()
        assert folder.name.startswith(".") and not (tmp_path / "out").exists()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished/of_a_killed_one").touch()
    (tmp_path / "out").mkdir()
    with convert._unfinished(tmp_path / "out") as folder:
        (folder / "config.json").touch()
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["out", "out/config.json"]


@pytest.mark.e2e
@pytest.mark.slow
def test_the_command_itself(models: dict[str, Path], tmp_path: Path) -> None:
    def slime(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "slime.cli.main", *arguments], capture_output=True, text=True, timeout=120)

    done = slime("convert", str(models["llama fp32"]), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'out'}: llama, held in float32\n  read back    21 tensors, all equal to the bit\n" in done.stdout
    assert "Warning" not in done.stderr
    again = slime("convert", str(models["llama fp32"]), str(tmp_path / "out"))
    assert again.returncode == 2 and again.stderr.endswith("out exists and is not an empty directory; name another\n")
    told = slime("convert", "--help").stdout
    assert "SOURCE" in told and "--no-logits" in told and "--model" in told


MEMORY = """
import json, sys
from pathlib import Path
import torch
from slime.models.hf_files import HFWriter
from slime.models.registry import load_map
from slime.trainer.alone import alone
from slime.trainer.export import make_atlas, write_hf
from slime.trainer.model import Model, build_stages, load_hf
from slime.trainer.options import sort_options

def memory(field):
    return 1024 * int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

class Stage(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

source, out = map(Path, sys.argv[1:])
model_map = load_map(source)
with alone() as parallel:
    before = memory("VmRSS")
    config, stages = build_stages(model_map, torch.bfloat16, parallel, sort_options({}))
    load_hf(stages, model_map, source, parallel)
    load = memory("VmHWM") - before
    model = Model(model_map, config, [Stage(stages[0])], None, {})
    with HFWriter(out, source, model_map.hf_shapes) as writer:
        write_hf(model, make_atlas(model, parallel), writer, 16 << 20)
    print(json.dumps([load, memory("VmHWM") - before]))
"""


@pytest.mark.e2e
@pytest.mark.slow
def test_memory_of_loading_and_exporting(tmp_path: Path) -> None:
    """Peak host memory stays below 1.2 times the rank's shard and its largest tensor, above that of the libraries."""
    sizes = {"hidden": 1024, "intermediate": 3072, "layers": 10, "vocab": 1 << 15, "heads": 16, "kv_heads": 8, "head_dim": 64}
    source = make_tiny(tmp_path / "source", "qwen3", dtype="bf16", **sizes)
    nbytes = [tensor.nbytes for tensor in contents(source).values()]
    done = subprocess.run([sys.executable, "-c", MEMORY, source, tmp_path / "out"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    load, export = json.loads(done.stdout.splitlines()[-1])
    bar = 1.2 * sum(nbytes) + max(nbytes)
    assert sum(nbytes) < load < bar and export < bar, (load, export, bar)
    assert same(contents(tmp_path / "out"), contents(source))
