"""Runs at the start of every process of a CPU engine: makes torchvision importable beside a CPU build of torch.

torchvision's PyPI wheel is built against CUDA torch; its C++ operators do not load here, and importing it fails where it attaches meta
kernels to operators that do not exist. Declaring the two operators is enough, as nothing that serves text calls them. It happens when
torchvision is first imported, so that processes without torch stay without it, and only if its operators do not load.
"""

import importlib.abc
import importlib.machinery
import pathlib
import sys

kept: list = []


class _DeclareMissingOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            spec = importlib.machinery.PathFinder.find_spec(fullname)
            if spec is not None and spec.origin is not None:
                self.declare(pathlib.Path(spec.origin).parent / "_C.so")
        return None

    def declare(self, extension):
        import torch

        try:
            torch.ops.load_library(str(extension))
        except OSError:
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            kept.append(library)  # operators live as long as their library


sys.meta_path.insert(0, _DeclareMissingOperators())
