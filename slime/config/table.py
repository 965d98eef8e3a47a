"""docs/knobs.md: the table of all knobs, written by `python -m slime.config.table`."""

from pathlib import Path

from slime.config.tree import Knob, knobs

HEADER = """# Knobs

Every knob with its default, in the order of `slime/config/`. Override one with `slime train --config-name RECIPE key=value`.
`rollout.sglang.<field>` takes the arguments of SGLang's server and `trainer.megatron.<field>` the performance options of
megatron-core's config dataclasses, each by its own name; what slime decides or what would do nothing is refused with the reason.
This file is written by `python -m slime.config.table`.
"""


def as_text(value: object) -> str:
    """A default as it is written in a recipe."""
    return (
        {None: "null", True: "true", False: "false", "???": "(required)"}.get(value, str(value))
        if isinstance(value, str | bool | None)
        else str(value)
    )


def table() -> str:
    """The whole file."""
    groups: dict[str, list[Knob]] = {}
    for knob in knobs():
        groups.setdefault(knob.path.partition(".")[0], []).append(knob)
    parts = [HEADER]
    for group, members in groups.items():
        rows = [f"| `{k.path}` | `{as_text(k.default)}` | {k.values.replace('|', '/')} | {k.doc.replace('|', '/')} |" for k in members]
        parts.append("\n".join([f"## {group}", "", "| knob | default | values | |", "|---|---|---|---|", *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(__file__).parents[2] / "docs" / "knobs.md").write_text(table())
