"""Record which names a TensorRT binding has, for the fakes that stand in for it.

    python record_surface.py tensorrt_bindings > surfaces/tensorrt-10.3.json

The packages tensorrt-cu12-bindings hold the Python module alone; it imports once libnvinfer,
libnvinfer_plugin and libnvonnxparser are found. Recorded with empty stand-ins for those three,
which export the eleven functions that the module links to and do nothing: names and enumerations
are the module's own, nothing in it was run.
"""

import importlib
import inspect
import json
import sys

CLASSES = """
    Builder BuilderFlag ComputeCapability CudaGraphStrategy DataType DeviceType EngineInspector
    EngineInvalidityDiagnostics EngineStat EngineValidity HardwareCompatibilityLevel
    IBuilderConfig ICudaEngine IExecutionContext IHostMemory ILogger INetworkDefinition
    IOptimizationProfile IRuntimeCache IRuntimeConfig ITensor ITimingCache
    LayerInformationFormat MemoryPoolType NetworkDefinitionCreationFlag OnnxParser
    OnnxParserFlag OnnxParserRefitter ParserError ProfilingVerbosity Refitter Runtime
    TensorIOMode nptype
"""


def main() -> None:
    """Print the names of the module given, as JSON."""
    module = importlib.import_module(sys.argv[1])
    names = {}
    for name in CLASSES.split():
        found = getattr(module, name, None)
        if found is None:
            continue
        members = getattr(found, "__members__", None)
        if members is not None:
            names[name] = {key: int(value) for key, value in members.items()}
        elif inspect.isclass(found):
            names[name] = sorted(key for key in dir(found) if not key.startswith("_"))
        else:
            names[name] = []
    json.dump({"version": module.__version__, "names": names}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
