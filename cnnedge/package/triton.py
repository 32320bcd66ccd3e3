"""A Triton model repository: one model for each variant and each TensorRT plan of a bundle.

::

    <bundle>_<variant>/config.pbtxt   Triton's ModelConfig, in protobuf's text format
    <bundle>_<variant>/labels.txt
    <bundle>_<variant>/1/model.onnx   or model.plan
    inferenceservice.yaml             KServe's, for the whole repository

https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnedge.bundle import LABELS, Bundle, Engine, Variant, file_hashes, write_labels
from cnnedge.errors import BundleError
from cnnedge.files import atomic_folder
from cnnedge.metadata import META_IMAGE, META_LABELS, META_NORMALIZATION
from cnnedge.package.place import CONFIG, SERVICE, check_repository
from cnnedge.package.single import check_variant, copy_checked
from cnnedge.runtime import read_note

if TYPE_CHECKING:
    from cnnedge.backends.onnxruntime import ModelFacts
    from cnnedge.metadata import TensorFacts

MAX_BATCH = 8
QUEUE_DELAY_US = 1000  # about one answer of an AlexNet on a CPU
_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}
# ONNX Runtime's optimizers would break the TensorRT graph's biases, and Triton can switch them off
# only all together; TensorRT optimizes by itself. See docs/decisions/ort-bias-quantization.md.
_NO_OPTIMIZERS = 2
_MAPS = {"inputs", "parameters"}  # the map fields of what is written here
_REPLICAS = 4
_MIB = 2**20
_SERVER_MIB = 1024  # Triton itself with ONNX Runtime


class Word(str):
    """A name of protobuf's text format, an enum's, which stands without quotes."""


@dataclass(frozen=True)
class TritonModel:
    """One model of a repository.

    Attributes:
        name: Its folder's name, by which clients ask for it.
        variant: The variant that it is, or that its plan was built of.
        backend: "onnxruntime" or "tensorrt".
        kind: Triton's word for where it runs: "KIND_CPU", "KIND_GPU", or "KIND_AUTO": on the GPU
            where there is one.
        config: Its ModelConfig, as data.
        source: The bundle's file.
    """

    name: str
    variant: str
    backend: str
    kind: str
    config: dict[str, Any]
    source: str


@dataclass(frozen=True)
class TritonRepository:
    """What was written.

    Attributes:
        folder: The repository.
        models: Its models.
        left_out: What of the bundle is not in it, and why.
        service: KServe's file in it.
    """

    folder: str
    models: tuple[TritonModel, ...]
    left_out: tuple[tuple[str, str], ...]
    service: str = SERVICE

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return asdict(self)


def write_triton(
    bundle: Bundle,
    out: Path | str,
    *,
    variant: str | None = None,
    max_batch: int = MAX_BATCH,
    force: bool = False,
) -> TritonRepository:
    """Write a Triton model repository, and KServe's InferenceService for it.

    Args:
        bundle: The bundle.
        out: The repository's folder, which appears once it is complete.
        variant: Which variant, with its plans; None: every one whose gate did not fail.
        max_batch: The largest batch that is made of several requests to an ONNX file. A plan has
            its own.
        force: Whether a repository that exists is replaced.

    Raises:
        BundleError: there is no such variant, or no verified one; or a file of the bundle changed
            while it was read.
        MissingExtraError: ONNX Runtime, which reads the graphs' signatures, is not installed.
        CnnEdgeError: the folder exists, or cannot be written.
    """
    out = Path(out)
    check_repository(bundle, out, force=force)
    manifest = bundle.manifest
    chosen = manifest.variants if variant is None else (manifest.variant(variant),)
    models: list[TritonModel] = []
    left_out: list[tuple[str, str]] = []
    for one in chosen:
        if variant is None and not one.verified:
            left_out.append((one.name, "its gate failed; name it with --variant"))
            continue
        facts = check_variant(bundle, one)
        models.append(_onnx_model(bundle, one, facts, max_batch))
        for engine in manifest.engines:
            if engine.variant == one.name:
                why = _why_not(bundle, engine, one)
                if why is None:
                    models.append(_plan_model(bundle, one, engine, facts))
                else:
                    left_out.append((engine.file, why))
    if not models:
        raise BundleError(
            f"no variant of {bundle.origin} was verified", fix="name one with --variant"
        )
    hashes = file_hashes(manifest)
    with atomic_folder(out, overwrite=force) as folder:
        for model in models:
            place = folder / model.name
            (place / "1").mkdir(parents=True)
            (place / CONFIG).write_text(to_text(model.config), encoding="utf-8")
            write_labels(place, manifest.labels)
            suffix = Path(model.source).suffix
            with open(place / "1" / f"model{suffix}", "wb") as target:
                copy_checked(bundle.path(model.source), target, hashes[model.source])
        service = inference_service(bundle, models)
        (folder / SERVICE).write_text(service, encoding="utf-8")
    return TritonRepository(str(out), tuple(models), tuple(left_out))


def to_text(fields: dict[str, Any], indent: str = "") -> str:
    """Return a message as protobuf's text format.

    Args:
        fields: Its fields by name; a message is a dict, an enum's value a `Word`.
        indent: What stands before each line.
    """
    lines = []
    for name, value in fields.items():
        if name in _MAPS:
            entries: list[Any] = [{"key": key, "value": one} for key, one in value.items()]
        else:
            entries = value if isinstance(value, list) else [value]
        if entries and not isinstance(entries[0], dict):
            texts = [_scalar(entry) for entry in entries]
            shown = f"[{', '.join(texts)}]" if isinstance(value, list) else texts[0]
            lines.append(f"{indent}{name}: {shown}\n")
            continue
        inner = indent + "  "
        lines += [f"{indent}{name} {{\n{to_text(e, inner)}{indent}}}\n" for e in entries]
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    # JSON's escapes of quotes, backslashes and control characters are the text format's, too.
    return json.dumps(value, ensure_ascii=False)


def _onnx_model(bundle: Bundle, variant: Variant, facts: ModelFacts, max_batch: int) -> TritonModel:
    kind = {"cpu": "KIND_CPU", "trt": "KIND_GPU"}.get(variant.target, "KIND_AUTO")
    name = _name(bundle.manifest.name, variant.name)
    if facts.input.shape[0] is not None:
        max_batch = 0  # a graph of one batch size: Triton's word for no batching
    more: dict[str, Any] = {"instance_group": [{"count": 1, "kind": Word(kind)}]}
    if variant.target == "trt":
        accelerator = {"name": "tensorrt", "parameters": {"precision_mode": "INT8"}}
        more["optimization"] = {
            "graph": {"level": _NO_OPTIMIZERS},
            "execution_accelerators": {"gpu_execution_accelerator": [accelerator]},
        }
    config = _config(bundle, name, "onnxruntime", facts, max_batch) | more
    return TritonModel(name, variant.name, "onnxruntime", kind, config, variant.file)


def _plan_model(bundle: Bundle, variant: Variant, engine: Engine, facts: ModelFacts) -> TritonModel:
    profiles = read_note(bundle, engine).options.profiles
    name = _name(bundle.manifest.name, Path(engine.file).stem)
    # The last profile takes every batch size; Triton uses the first unless told otherwise.
    group = {"count": 1, "kind": Word("KIND_GPU"), "profile": [str(len(profiles) - 1)]}
    config = _config(bundle, name, "tensorrt", facts, profiles[-1].largest)
    config |= {"instance_group": [group]}
    return TritonModel(name, variant.name, "tensorrt", "KIND_GPU", config, engine.file)


def _why_not(bundle: Bundle, engine: Engine, variant: Variant) -> str | None:
    if engine.runtime != "tensorrt":
        return "Triton has no backend for TensorRT-RTX"
    note = read_note(bundle, engine)
    if note.options.strip_weights:
        return "its weights are in the ONNX file, which Triton does not put back"
    if note.onnx_sha256 != variant.sha256:
        return f"it was built from another {variant.name}"
    return None


def _config(
    bundle: Bundle, name: str, backend: str, facts: ModelFacts, max_batch: int
) -> dict[str, Any]:
    manifest = bundle.manifest
    image, answers = (_tensor(one, max_batch) for one in (facts.input, facts.output))
    batches = sorted({max(1, max_batch // 2), max_batch}) if max_batch > 1 else []
    config: dict[str, Any] = {
        "name": name,
        "backend": backend,
        "max_batch_size": max_batch,
        "input": [image],
        "output": [answers | {"label_filename": LABELS}],
        "version_policy": {"latest": {"num_versions": 1}},
    }
    if batches:
        config["dynamic_batching"] = {
            "preferred_batch_size": batches,
            "max_queue_delay_microseconds": QUEUE_DELAY_US,
        }
    zeros = {key: image[key] for key in ("data_type", "dims")} | {"zero_data": True}
    config["model_warmup"] = [
        {"name": f"zeros_{size}", "batch_size": size, "inputs": {facts.input.name: zeros}}
        for size in sorted({1, *batches})
    ]
    # A client asks for the model's configuration, and knows what to send and what came back.
    texts = {
        META_LABELS: json.dumps(list(manifest.labels), ensure_ascii=False),
        META_IMAGE: json.dumps(manifest.image.to_dict()),
        META_NORMALIZATION: manifest.normalization,
    }
    config["parameters"] = {key: {"string_value": text} for key, text in texts.items()}
    return config


def _tensor(facts: TensorFacts, max_batch: int) -> dict[str, Any]:
    """Return a tensor as Triton names it: without the batch, where Triton makes batches."""
    dims = facts.shape[1:] if max_batch else facts.shape
    return {
        "name": facts.name,
        "data_type": Word(_TYPES[facts.dtype]),
        "dims": [-1 if size is None else size for size in dims],
    }


def _name(*parts: str) -> str:
    """Return a model's name, which is a folder's and part of an address."""
    return "_".join(re.sub(r"[^A-Za-z0-9_-]+", "_", part).strip("_") or "model" for part in parts)


def inference_service(bundle: Bundle, models: list[TritonModel]) -> str:
    """Return KServe's InferenceService (v1beta1) for a repository, its place left to be named."""
    name = re.sub(r"[^a-z0-9]+", "-", bundle.manifest.name.lower()).strip("-")
    name = name if name[:1].isalpha() else f"model-{name}".rstrip("-")
    sizes = [bundle.path(model.source).stat().st_size for model in models]
    # A graph is held with its optimized copy and the intermediates of a batch.
    memory = _SERVER_MIB + 4 * sum(-(-size // _MIB) for size in sizes)
    gpu = [f'{" " * 10}nvidia.com/gpu: "1"\n'] if any(m.kind == "KIND_GPU" for m in models) else []
    return f"""\
# KServe: kubectl apply -f {SERVICE}, once this repository lies at storageUri.
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: "{name[:63].rstrip("-")}"
spec:
  predictor:
    minReplicas: 1
    maxReplicas: {_REPLICAS}
    model:
      modelFormat:
        name: triton
      runtime: kserve-tritonserver
      protocolVersion: v2
      env:  # ONNX Runtime sends telemetry otherwise
        - name: ORT_DISABLE_TELEMETRY
          value: "1"
      # Where you have put this folder: s3://…, gs://…, pvc://…
      storageUri: s3://REPLACE-ME/{name}
      resources:
        requests:
          cpu: "1"
          memory: {memory}Mi
        limits:
          cpu: "2"
          memory: {2 * memory}Mi
{"".join(gpu)}"""
