"""Feed-forward layers: a gated MLP, or experts behind a router. Parameters are named as megatron-core names them, without the layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from slime.layout import GLU, Cols, GateUp, Layout, Whole
from slime.models.config_json import ConfigJson
from slime.models.parts.names import Names


@dataclass(frozen=True)
class Gated:
    """down(silu(gate(x)) * up(x)) in every layer (Shazeer 2020, arXiv:2002.05202)."""

    fused: bool = False  # gate and up are one HF tensor, gate_up_proj

    def read(self, config: ConfigJson) -> tuple[dict[str, Any], "Groups | None"]:
        """Values of TransformerConfig; no groups of experts."""
        return {"ffn_hidden_size": config.integer("intermediate_size")}, None

    def layouts(self, values: dict[str, Any], hf: Names, layer: int) -> dict[str, Layout]:
        """The parameters of one layer."""
        hidden, inner = values["hidden_size"], values["ffn_hidden_size"]
        fc1 = GateUp(hf("mlp.gate_up_proj.weight", 2 * inner, hidden)) if self.fused else _glu(hf, "mlp.", inner, hidden, DENSE)
        return {"mlp.linear_fc1.weight": fc1, "mlp.linear_fc2.weight": Cols(hf("mlp.down_proj.weight", hidden, inner))}


@dataclass(frozen=True)
class Groups:
    """Experts are chosen within the best `chosen` of `count` groups of neighbours."""

    count: int
    chosen: int
    score: Literal["max", "top2"]  # of a group: its best expert (DeepSeek-V2), or the sum of its two best (DeepSeek-V3)

    def allow(self, experts: int, topk: int) -> bool:
        """Whether so many of so many experts can be chosen this way."""
        size, rest = divmod(experts, self.count)
        return not rest and size >= (2 if self.score == "top2" else 1) and self.chosen <= self.count and topk <= size * self.chosen


@dataclass(frozen=True)
class Softmax:
    """softmax over all experts, then the best; `norm` names the field that asks for weights that sum to one, None where they always do."""

    norm: str | None = None
    scaled: bool = False  # weights are multiplied by routed_scaling_factor

    def read(self, config: ConfigJson) -> dict[str, Any]:
        norm = config.flag(self.norm, False) if self.norm else True
        values = {"moe_router_score_function": "softmax", "moe_router_pre_softmax": not norm, "moe_router_enable_expert_bias": False}
        if self.scaled:
            values["moe_router_topk_scaling_factor"] = config.number("routed_scaling_factor", 1.0)
        return values


@dataclass(frozen=True)
class Sigmoid:
    """sigmoid scores, chosen by score + bias and weighted by the score, normalised (DeepSeek-V3, arXiv:2412.19437, equations 12 - 16)."""

    def read(self, config: ConfigJson) -> dict[str, Any]:
        config.only("norm_topk_prob", (True,), "only normalised weights of sigmoid routers are mapped")
        config.only("scoring_func", ("sigmoid",), "only sigmoid scores are mapped for this family")
        config.only("topk_method", ("noaux_tc",), "only the choice by score and bias (noaux_tc) is mapped for this family")
        return {
            "moe_router_score_function": "sigmoid",
            "moe_router_pre_softmax": False,
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.0,  # the bias stays as it is unless the recipe says otherwise
            "moe_router_topk_scaling_factor": config.number("routed_scaling_factor"),  # families disagree on what it is where absent
        }


Split = tuple[str, str, str]
DENSE: Split = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Experts:
    """Routed experts, beside shared ones or not, in some layers; a gated MLP in the others."""

    router: Softmax | Sigmoid
    sparse_layers: Callable[[ConfigJson, int], list[int]]  # of a model with that many layers: 1 where it has experts
    count: tuple[str, ...] = ("n_routed_experts", "num_local_experts")  # spellings of the field
    width: str = "moe_intermediate_size"  # field
    shared: str | None = None  # field: shared experts, each as wide as a routed one
    groups: Callable[[ConfigJson], Groups | None] = lambda config: None
    mlp: str = "mlp"  # HF names
    projections: Split = DENSE

    def read(self, config: ConfigJson) -> tuple[dict[str, Any], Groups | None]:
        """Values of TransformerConfig, and the groups that the router chooses within."""
        width, topk = config.integer(self.width), config.integer("num_experts_per_tok")
        count = config.integer(config.spelled(*self.count))
        if topk > count:
            raise config.error("num_experts_per_tok", f"the model has {count} experts")
        router = self.router.read(config)
        if topk == 1 and not router["moe_router_pre_softmax"]:  # megatron-core refuses it after softmax and leaves a sigmoid as it is
            raise config.error("num_experts_per_tok", "the normalised weight of one expert is always 1, which is not mapped")
        values = {
            "num_moe_experts": count,
            "moe_router_topk": topk,
            "moe_ffn_hidden_size": width,
            "ffn_hidden_size": config.integer("intermediate_size", width),
            "moe_layer_freq": self.sparse_layers(config, config.integer("num_hidden_layers")),
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_router_dtype": "fp32",
            "moe_grouped_gemm": False,
            **router,
        }
        if self.shared:
            values["moe_shared_expert_intermediate_size"] = width * config.integer(self.shared)
        groups = self.groups(config)
        if groups and not groups.allow(count, topk):
            where = f"within {groups.chosen} of {groups.count} groups"
            raise config.error("n_group", f"{count} experts, {topk} a token, cannot be chosen {where}")
        return values, None if groups and groups.chosen == groups.count else groups

    def layouts(self, values: dict[str, Any], hf: Names, layer: int) -> dict[str, Layout]:
        """The parameters of one layer."""
        hidden, mlp = values["hidden_size"], f"{self.mlp}."
        if not values["moe_layer_freq"][layer]:
            return Gated().layouts(values, hf, layer)
        layouts: dict[str, Layout] = {"mlp.router.weight": Whole(hf(f"{mlp}gate.weight", values["num_moe_experts"], hidden))}
        if values["moe_router_enable_expert_bias"]:
            layouts["mlp.router.expert_bias"] = Whole(hf(f"{mlp}gate.e_score_correction_bias", values["num_moe_experts"]))
        for expert in range(values["num_moe_experts"]):
            ours, theirs = f"mlp.experts.local_experts.{expert}.", f"{mlp}experts.{expert}."
            layouts |= self._mlp(ours, theirs, hf, values["moe_ffn_hidden_size"], hidden, self.projections)
        if self.shared:
            width = values["moe_shared_expert_intermediate_size"]
            layouts |= self._mlp("mlp.shared_experts.", f"{mlp}shared_experts.", hf, width, hidden, DENSE)
        return layouts

    def _mlp(self, ours: str, theirs: str, hf: Names, inner: int, hidden: int, names: Split) -> dict[str, Layout]:
        return {
            f"{ours}linear_fc1.weight": _glu(hf, theirs, inner, hidden, names),
            f"{ours}linear_fc2.weight": Cols(hf(f"{theirs}{names[2]}.weight", hidden, inner)),
        }


def _glu(hf: Names, prefix: str, inner: int, hidden: int, names: Split) -> Layout:
    return GLU(hf(f"{prefix}{names[0]}.weight", inner, hidden), hf(f"{prefix}{names[1]}.weight", inner, hidden))
