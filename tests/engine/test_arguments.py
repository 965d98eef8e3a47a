"""rollout.sglang against SGLang's own list of server arguments, read from the real one once."""

import sys
from pathlib import Path
from typing import Any

import pytest

from slime.config import SlimeConfig
from slime.engine import arguments, settings
from slime.engine.arguments import Argument, Known, check, command_line, known_arguments

KNOWN = Known(
    "0.5.23",
    {
        a.name: a
        for a in (
            Argument("max_total_tokens", "--max-total-tokens", "value", "int", None, None),
            Argument("mem_fraction_static", "--mem-fraction-static", "value", "float", None, None),
            Argument("attention_backend", "--attention-backend", "value", "str", ["triton", "torch_native"], None),
            Argument("disable_radix_cache", "--disable-radix-cache", "flag", "str", None, False),
            Argument("enable_tf32_matmul", "--enable-tf32-matmul", "switch", "str", None, None),
            Argument("gc_threshold", "--gc-threshold", "values", "int", None, None),
            Argument("json_model_override_args", "--json-model-override-args", "value", "any", None, "{}"),
        )
    },
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"max_totl_tokens": 1},
            "rollout.sglang.max_totl_tokens: SGLang 0.5.23 has no such .*; did you mean rollout.sglang.max_total_tokens",
        ),
        ({"zzz": 1}, "rollout.sglang.zzz: SGLang 0.5.23 has no such server argument$"),
        ({"max_total_tokens": "many"}, "rollout.sglang.max_total_tokens=many: takes a whole number, not str"),
        ({"max_total_tokens": True}, "takes a whole number, not bool"),
        ({"mem_fraction_static": "half"}, "takes a number, not str"),
        ({"attention_backend": "torch_natve"}, "not a choice of SGLang; did you mean torch_native"),
        ({"disable_radix_cache": 1}, "rollout.sglang.disable_radix_cache=1: takes true or false"),
        ({"gc_threshold": 3}, r"rollout.sglang.gc_threshold=3: takes a list, such as \[3\]"),
        ({"gc_threshold": ["x"]}, "takes a whole number, not str"),
        ({"port": 1}, "rollout.sglang.port is set by slime: ports are chosen"),
        ({"model_path": "x"}, "rollout.sglang.model_path is set by slime: set model.path"),
        ({"api_key": "x"}, "rollout.sglang.api_key is set by slime: keys are made for each run"),
        ({"tp_size": 2}, "set rollout.tensor_parallel"),
    ],
)
def test_bad_overrides(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(overrides, KNOWN)


def test_good_overrides_as_command_line_words() -> None:
    values = {
        "max_total_tokens": 4096,
        "mem_fraction_static": 1,
        "attention_backend": "triton",
        "disable_radix_cache": True,
        "enable_tf32_matmul": False,
        "gc_threshold": [700, 10],
        "json_model_override_args": {"a": 1},
    }
    check(values, KNOWN)
    assert command_line(values, KNOWN) == [
        *("--max-total-tokens=4096", "--mem-fraction-static=1", "--attention-backend=triton", "--disable-radix-cache"),
        *("--no-enable-tf32-matmul", "--gc-threshold", "700", "10", '--json-model-override-args={"a": 1}'),
    ]
    assert command_line({"disable_radix_cache": False, "max_total_tokens": None}, KNOWN) == []


@pytest.mark.parametrize("python", ["/no/such/python", "/bin/false"])
def test_an_interpreter_that_cannot_serve(python: str) -> None:
    with pytest.raises(ValueError, match=rf"rollout.engine_python={python}: "):
        known_arguments(python)


def test_an_interpreter_without_sglang(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(ValueError, match=r"SGLang cannot be used there .*sglang"):
        known_arguments(str(bare))


@pytest.mark.e2e
def test_the_real_list_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = known_arguments()
    assert len(known.arguments) > 400
    assert set(arguments.OWNED) <= set(known.arguments) | {"config"}
    cfg = SlimeConfig()
    cfg.run.deterministic = True
    chosen = settings.server_arguments(cfg, "cpu")
    check({k: v for k, v in chosen.items() if k not in arguments.OWNED}, known)
    command_line(chosen, known)
    monkeypatch.setattr(arguments, "LIST_S", 0.001)  # a second reading would be too late
    assert known_arguments() == known
