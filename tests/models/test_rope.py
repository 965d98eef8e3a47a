"""Rotary embeddings: every spelling of config.json that is understood, and what is refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from slime.models.config_json import ConfigJson
from slime.models.parts.attention import DEEPSEEK, WHOLE_HEAD, GroupedQuery, Latent
from slime.models.registry import FAMILIES
from slime.models.rope import Linear, Llama3, Rope, RopeForm, Yarn, mscale, read_rope
from tests.tiny import LLAMA3

HALF = RopeForm(partial=0.5)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
KINDS = r"\(default, linear, llama3 and yarn are\)"


class Read:
    """Reads the rotary embedding of a config.json with these fields."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def config(self, **fields: Any) -> ConfigJson:
        (self.folder / "config.json").write_text(json.dumps({"max_position_embeddings": 512, **fields}))
        return ConfigJson(self.folder)

    def __call__(self, form: RopeForm = WHOLE_HEAD, head_dim: int = 16, **fields: Any) -> Rope:
        return read_rope(self.config(**fields), head_dim, form)

    def refused(self, text: str, form: RopeForm = WHOLE_HEAD, **fields: Any) -> None:
        with pytest.raises(ValueError, match=rf"config.json: {text}"):
            self(form, **fields)


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return Read(tmp_path)


def test_no_scaling(read: Read) -> None:
    assert read() == read(rope_scaling=None) == read(rope_parameters={}) == Rope(16, 10000.0, False, None, 1.0, 0.0)
    for fields in (
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "default", "type": "default", "rope_theta": 5e5}},
    ):
        assert read(**fields) == Rope(16, 5e5, False, None, 1.0, 0.0)
    assert read(RopeForm(interleaved=True, theta=1e6)) == Rope(16, 1e6, True, None, 1.0, 0.0)


def test_the_base_of_a_family_that_has_its_own() -> None:
    """MixtralConfig alone does not fall back to 10000."""
    bases = {name: family.attention.rope.theta for name, family in FAMILIES.items()}
    assert bases == {name: 1e6 if name == "mixtral" else 1e4 for name in FAMILIES}


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_scalings_in_either_spelling(read: Read, spelling: str, kind: str) -> None:
    assert read(**{spelling: {kind: "linear", "factor": 2}}).scaling == Linear(2)
    llama3 = {kind: "llama3"} | {name: value for name, value in LLAMA3.items() if name != "rope_type"}
    assert read(**{spelling: llama3}) == Rope(16, 500000.0, False, Llama3(8.0, 1.0, 4.0, 8192), 1.0, 0.0)
    yarn = read(**{spelling: {**YARN, kind: "yarn"}})
    assert yarn.scaling == Yarn(4.0, 128, 32.0, 1.0, True) and yarn.attention_factor == 0.1 * math.log(4) + 1


def test_the_original_length(read: Read) -> None:
    llama3 = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}
    assert read(rope_scaling=llama3).scaling == Llama3(8.0, 1.0, 4.0, 512)  # max_position_embeddings
    assert read(rope_scaling=LLAMA3, original_max_position_embeddings=64).scaling == Llama3(8.0, 1.0, 4.0, 64)  # outside comes first
    assert read(rope_scaling=YARN | {"factor": None}).scaling == Yarn(4.0, 128, 32.0, 1.0, True)  # 512 / 128
    read.refused("rope_scaling=.*original_max_position_embeddings='x': a positive number", rope_scaling={**LLAMA3, **_original("x")})
    read.refused("rope_scaling=.*embeddings=2.5: a positive whole number", rope_scaling={**LLAMA3, **_original(2.5)})
    read.refused("original_max_position_embeddings=-1: a positive whole", rope_scaling=LLAMA3, original_max_position_embeddings=-1)


def _original(length: Any) -> dict[str, Any]:
    return {"original_max_position_embeddings": length}


def test_the_temperature_of_yarn(read: Read) -> None:
    deepseek = {**YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert read(DEEPSEEK, rope_scaling=deepseek).attention_factor == 1.0
    assert read(DEEPSEEK, rope_scaling=deepseek).mscale_all_dim == 1.0 and read(rope_scaling=deepseek).mscale_all_dim == 0.0
    assert read(rope_scaling=YARN | {"attention_factor": 1.5}).attention_factor == 1.5
    uneven = read(rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}).attention_factor
    assert uneven == mscale(4.0, 1.0) / mscale(4.0, 0.5)
    for absent in ({"mscale": 0.7}, {"mscale_all_dim": 0.7}, {"mscale": 0, "mscale_all_dim": 0.7}, {"mscale": None}):
        assert read(rope_scaling=YARN | absent).attention_factor == mscale(4.0)
    assert mscale(0.5) == mscale(1.0) == 1.0
    ramp = read(rope_scaling=YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False}).scaling
    assert ramp == Yarn(4.0, 128, 16, 2, False)


def test_a_part_of_the_head(read: Read) -> None:
    assert read(HALF).dim == 8 and read(HALF, partial_rotary_factor=0.25).dim == 4
    assert read(HALF, rope_parameters={"partial_rotary_factor": 1.0}).dim == 16
    assert read(partial_rotary_factor=1.0).dim == 16
    read.refused("rope_scaling=.*partial_rotary_factor=0.5: heads of this family rotate whole", partial_rotary_factor=0.5)
    read.refused("rope_scaling=.*partial_rotary_factor=1.5 of head size 16: an even number", HALF, partial_rotary_factor=1.5)
    read.refused("rope_scaling=.*partial_rotary_factor=0.2 of head size 16: an even number", HALF, partial_rotary_factor=0.2)
    text = "partial_rotary_factor=0.25: contradicts rope_parameters; keep one of them"
    read.refused(text, HALF, partial_rotary_factor=0.25, rope_parameters={"partial_rotary_factor": 0.5})


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "proportional", "su", "mrope", 7, None, ["yarn"]])
def test_scalings_that_are_not_mapped(read: Read, kind: Any) -> None:
    scaling = {"rope_type": kind, "factor": 2.0}
    read.refused(rf"rope_scaling=.*: rotary scaling of type {_literal(kind)} is not mapped {KINDS}", rope_scaling=scaling)


def _literal(kind: Any) -> str:
    return repr(kind).replace("[", r"\[").replace("]", r"\]")


PARAMETERS = [
    ({**LLAMA3, "mscale": 1}, r"unknown rotary parameter\(s\) mscale for type 'llama3'"),
    ({"rope_type": "linear", "factor": 2.0, "zeta": 1, "beta_fast": 2}, r"unknown rotary parameter\(s\) beta_fast, zeta for type 'linear'"),
    ({"factor": 2.0}, r"unknown rotary parameter\(s\) factor for type 'default'"),
    ({**YARN, "short_factor": [1.0]}, r"unknown rotary parameter\(s\) short_factor for type 'yarn'"),
    ({"rope_type": "default", "mrope_section": [1]}, r"unknown rotary parameter\(s\) mrope_section for type 'default'"),
    ({"type": "linear"}, "factor=None: a positive number is needed"),
    ({name: value for name, value in LLAMA3.items() if name != "low_freq_factor"}, "low_freq_factor=None: a positive number is needed"),
    ({**LLAMA3, "factor": "big"}, "factor='big': a positive number is needed"),
    ({**YARN, "mscale": "big"}, "mscale='big': a positive number is needed"),
    ({**YARN, "mscale_all_dim": -1}, "mscale_all_dim=-1: a positive number is needed"),
    ({**YARN, "attention_factor": "1"}, "attention_factor='1': a positive number is needed"),
    ({**YARN, "truncate": "no"}, "truncate='no': true or false is needed"),
    ({**YARN, "beta_fast": True}, "beta_fast=True: a positive number is needed"),
]


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("scaling", "text"), PARAMETERS, ids=[text for _, text in PARAMETERS])
def test_parameters_that_are_not_understood(read: Read, spelling: str, scaling: dict[str, Any], text: str) -> None:
    read.refused(f"{spelling}=.*: {text}", **{spelling: scaling})


def test_spellings_that_contradict(read: Read) -> None:
    text = "rope_scaling=.*: contradicts rope_parameters; keep one of them"
    read.refused(text, rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "default"})
    read.refused("rope_theta=5.0: contradicts rope_parameters", rope_theta=5.0, rope_parameters={"rope_theta": 6.0})
    read.refused("rope_theta=5.0: contradicts rope_scaling", rope_theta=5.0, rope_scaling={"rope_theta": 6.0})
    read.refused("rope_parameters=5: an object of rotary parameters is needed", rope_parameters=5)
    read.refused("rope_scaling=.*: rope_theta='big': a positive number is needed", rope_theta="big")
    assert read(rope_theta=5, rope_scaling={**YARN, "rope_theta": 5}, rope_parameters={**YARN, "rope_theta": 5}).theta == 5


def test_an_attention_factor_goes_into_the_scale_of_the_softmax(read: Read) -> None:
    heads = {"hidden_size": 64, "num_attention_heads": 4}
    values, _ = GroupedQuery().read(read.config(**heads, rope_scaling=YARN))
    assert values["softmax_scale"] == mscale(4.0) ** 2 / 4
    assert "softmax_scale" not in GroupedQuery().read(read.config(**heads, rope_scaling=YARN | {"attention_factor": 1}))[0]
    for spelling in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ValueError, match=rf"{spelling}=\{{.*an attention factor on part of a head is not mapped; set"):
            GroupedQuery(rope=HALF).read(read.config(**heads, **{spelling: YARN}))


def test_the_temperature_of_latent_attention(read: Read) -> None:
    sizes = {"num_attention_heads": 4, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "kv_lora_rank": 12}
    values, rope = Latent().read(read.config(**sizes, rope_scaling={**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}))
    assert (values["rotary_scaling_factor"], values["mscale_all_dim"], rope.dim) == (4.0, 0.7, 8)
    values, _ = Latent().read(read.config(**sizes, rope_scaling={**YARN, "attention_factor": 1.0}))
    assert values["rotary_scaling_factor"] == 1.0  # the softmax scale is left as it is
    with pytest.raises(ValueError, match=r"rope_scaling=\{.*mscale and mscale_all_dim must agree"):
        Latent().read(read.config(**sizes, rope_scaling={**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}))
