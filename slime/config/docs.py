"""The documentation of knobs: the string below a field, which Python itself does not keep."""

import ast
import inspect
import textwrap
from functools import cache


@cache
def documentation(group: type) -> dict[str, str]:
    """The string below each field of a dataclass, as one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(group))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            assert isinstance(below.value, ast.Constant)
            docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs
