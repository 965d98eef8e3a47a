"""Which cell of a density map a tensor belongs to, by its Hugging Face name alone. Experts of a layer fall into one cell.

model.layers.7.self_attn.q_proj.weight           layer 7     attention, q
model.layers.7.mlp.experts.31.up_proj.weight     layer 7     experts, up
model.layers.7.mlp.gate.weight                   layer 7     router
model.embed_tokens.weight                        embedding   (no kind: a row of its own)
"""

import re
from dataclasses import dataclass

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)")
GROUPS = ("attention", "mlp", "router", "experts", "shared experts", "norms", "other")
ORDER = ("q", "k", "v", "qkv", "q a", "q b", "kv a", "kv b", "o", "w1", "w3", "w2", "gate up", "gate", "up", "down", "router", "input")
OUTSIDE = {"embed_tokens": "embedding", "norm": "final norm", "lm_head": "lm_head"}
SUFFIXES = ("_with_mqa", "_proj", "_layernorm", "_norm")


@dataclass(frozen=True, slots=True)
class Cell:
    """A row and a column of the map."""

    layer: int  # -1 outside of the layers
    row: str  # "layer 7", "embedding"
    group: str = ""  # of GROUPS; "" outside of the layers
    kind: str = ""  # "q", "up"

    @property
    def row_order(self) -> tuple[int, int, str]:
        """Embedding, layers, final norm, lm_head, the rest."""
        if self.layer >= 0:
            return 1, self.layer, ""
        place = list(OUTSIDE.values()).index(self.row) if self.row in OUTSIDE.values() else len(OUTSIDE)
        return (0 if place == 0 else 2), place, self.row

    @property
    def column_order(self) -> tuple[int, int, str]:
        """By group, then as a layer computes them."""
        return GROUPS.index(self.group), ORDER.index(self.kind) if self.kind in ORDER else len(ORDER), self.kind


def cell_of(name: str) -> Cell:
    """The cell of a tensor."""
    found = LAYER.search(name)
    if not found:
        parts = name.removeprefix("model.").removesuffix(".weight").split(".")
        return Cell(-1, OUTSIDE.get(parts[-1], parts[0]))
    parts = [part for part in found[2].removesuffix(".weight").split(".") if not part.isdigit()]
    group = _group(parts)
    return Cell(int(found[1]), f"layer {found[1]}", group, _kind(parts[-1] if parts else "", group))


def _group(parts: list[str]) -> str:
    block, leaf = (parts[0], parts[-1]) if parts else ("", "")
    if any("shared_expert" in part for part in parts):
        return "shared experts"
    if "experts" in parts:
        return "experts"
    if "norm" in leaf or (leaf == "bias" and "norm" in parts[-2:][0]):
        return "norms"
    if "router" in parts or parts[1:2] == ["gate"]:
        return "router"
    return "attention" if "attn" in block or "attention" in block else "mlp" if block in ("mlp", "block_sparse_moe") else "other"


def _kind(leaf: str, group: str) -> str:
    """The last part of a name in a few letters. Biases of a group are one kind."""
    if leaf.endswith("bias"):
        return "router bias" if group == "router" else "bias"
    if group == "router" or leaf == "shared_expert_gate":
        return "router"
    for suffix in SUFFIXES:
        leaf = leaf.removesuffix(suffix)
    return leaf.replace("attention", "attn").replace("_", " ")
