"""Makes torchvision importable where its compiled operators cannot be: a CUDA build beside a CPU torch.

Its Python files then fail at the operators that they describe. Here those are declared, without a body, right
before that. `torchvision_operators.pth` imports this file at the start of each process of the environment; so
it imports nothing that is large, and where the operators are loaded it does nothing.
"""

import sys
from importlib.abc import MetaPathFinder

DESCRIBES = "torchvision._meta_registrations"
SCHEMAS = (  # those that it describes whether or not they were loaded
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
