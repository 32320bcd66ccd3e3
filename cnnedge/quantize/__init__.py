"""Step: an FP32 graph and real images become the INT8 graph of one family of runtimes.

::

    plan       which layers and tensors, for which family
    calibrate  how the tensors are distributed over real images     (histogram, threshold)
    build      the graph, with its pairs and integer weights         (qdq, check)
    guard      what is tried when the accuracy does not hold         (equalize, noise)

    weight_only  needs no images: the dense layers' weights alone, in 8 or 4 bits
"""

from cnnedge.quantize.build import QuantizedGraph, quantize
from cnnedge.quantize.calibrate import (
    BATCH_SIZE,
    Calibration,
    Convergence,
    Ranges,
    calibrate,
    choose_ranges,
    convergence,
    enough_images,
)
from cnnedge.quantize.check import contract_violations
from cnnedge.quantize.guard import Attempt, Guarded, hold_gate
from cnnedge.quantize.plan import (
    CPU,
    CPU_REDUCED,
    TRT,
    NoInt8Error,
    Plan,
    Target,
    brief,
    make_plan,
)
from cnnedge.quantize.threshold import METHODS
from cnnedge.quantize.weight_only import WeightOnlyGraph, quantize_dense_weights

__all__ = [
    "BATCH_SIZE",
    "CPU",
    "CPU_REDUCED",
    "METHODS",
    "TRT",
    "Attempt",
    "Calibration",
    "Convergence",
    "Guarded",
    "NoInt8Error",
    "Plan",
    "QuantizedGraph",
    "Ranges",
    "Target",
    "WeightOnlyGraph",
    "brief",
    "calibrate",
    "choose_ranges",
    "contract_violations",
    "convergence",
    "enough_images",
    "hold_gate",
    "make_plan",
    "quantize",
    "quantize_dense_weights",
]
