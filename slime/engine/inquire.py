"""Run as a program in the engine's interpreter: prints SGLang's server arguments as JSON. Imports SGLang and the standard library only.

What its own command line takes is the list, read from the parser: so it does not matter whether ServerArgs is a dataclass (before 0.5.20)
or assembled from structs.
"""

import argparse
import json
import sys

FORMS = {
    "_StoreAction": "value",
    "_StoreTrueAction": "flag",  # --name
    "BooleanOptionalAction": "switch",  # --name or --no-name
    "LoRAPathAction": "value",
}
TYPES = {"str": "str", "int": "int", "float": "float", "human_readable_int": "int"}


def describe(action: argparse.Action) -> dict | None:
    """One argument in JSON values; None for actions that are no arguments, and for deprecated ones."""
    form = FORMS.get(type(action).__name__)
    if form is None or not action.option_strings:
        return None
    several = action.nargs in ("+", "*")
    type_name = "str" if action.type is None else getattr(action.type, "__name__", "")
    return {
        "name": action.dest,
        "option": next(o for o in action.option_strings if o.startswith("--")),
        "form": "values" if several and form == "value" else form,
        "type": TYPES.get(type_name, "any"),
        "choices": None if action.choices is None else list(action.choices),
        "default": plain(action.default),
    }


def plain(value):
    """`value` if JSON can hold it, else its text."""
    return value if isinstance(value, bool | int | float | str | list | dict | None) else str(value)


def main() -> None:
    from sglang.srt.server_args import ServerArgs
    from sglang.version import __version__

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    found = [d for d in map(describe, parser._actions) if d is not None]
    json.dump({"version": __version__, "arguments": found}, sys.stdout, default=str)


if __name__ == "__main__":
    main()
