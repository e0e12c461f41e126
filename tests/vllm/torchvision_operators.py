"""Make torchvision importable without its compiled operators: a CUDA build beside a CPU torch.

Its Python files fail then, at the operators that they describe. This declares them first, without a body.
`torchvision_operators.pth` imports this file whenever a process of the environment starts, so it imports
nothing large, and does nothing if the operators are loaded.
"""

import sys
from importlib.abc import MetaPathFinder

DESCRIBES = "torchvision._meta_registrations"
SCHEMAS = (  # it describes these even if they were not loaded
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
LIBRARIES = []  # declared operators live as long as these


class DeclareOperators(MetaPathFinder):
    """Declares the operators when the file that describes them is looked for; finds nothing itself."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != DESCRIBES:
            return None
        sys.meta_path.remove(self)
        if not sys.modules["torchvision.extension"]._has_ops():
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in SCHEMAS:
                library.define(schema)
            LIBRARIES.append(library)
        return None


sys.meta_path.insert(0, DeclareOperators())
