"""TensorRT and TensorRT-RTX behind one adapter: build plans, read them back, run them.

``library`` is the only file that knows how the two libraries and their releases differ, ``layers``
reads what a built engine consists of, ``build`` makes plans, ``session`` runs them. None of them
imports either library before it is asked for by name: neither needs to be installed.
"""

from cnnedge.backends.tensorrt.build import BuiltPlan, build_plan
from cnnedge.backends.tensorrt.layers import EngineLayer, EngineTensor
from cnnedge.backends.tensorrt.library import Library, open_library
from cnnedge.backends.tensorrt.session import PlanSession, open_plan

__all__ = [
    "BuiltPlan",
    "EngineLayer",
    "EngineTensor",
    "Library",
    "PlanSession",
    "build_plan",
    "open_library",
    "open_plan",
]
