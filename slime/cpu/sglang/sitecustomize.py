"""Runs at the start of every process of a CPU engine: makes torchvision importable beside a CPU build of torch.

torchvision's PyPI wheel is built against CUDA torch; its C++ operators do not load here, and importing it fails where it attaches meta
kernels to operators that do not exist. Declaring the two operators first is enough, as nothing that serves text calls them. They are
declared when torchvision is first imported, so that processes without torch stay without it.
"""

import importlib.abc
import sys


class _DeclareOperatorsFirst(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules["sitecustomize"].torchvision_operators = self.library  # a library's operators live as long as it does
        return None


sys.meta_path.insert(0, _DeclareOperatorsFirst())
