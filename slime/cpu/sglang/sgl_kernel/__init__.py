"""Stands for the package `sgl_kernel`, whose PyPI wheels hold CUDA code only.

SGLang (0.5.16 and later) imports names from it on a CPU too and, for plain text, calls one operator: the hash of seeded sampling.
Every other name resolves to a function that raises when it is called.
"""

import sgl_kernel.murmur_hash  # noqa: F401

__version__ = "0.4.10"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU form: switch off the SGLang feature that calls it")

    missing.__name__ = name
    return missing
