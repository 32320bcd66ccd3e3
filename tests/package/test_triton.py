"""A Triton repository, held against Triton's protocol definitions, KServe's and the graph."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image
from test_bundle import edit_manifest
from test_single import error_of, golden, run

from cnnedge.backends.onnxruntime import open_session
from cnnedge.bundle import open_bundle
from cnnedge.change import put_engine
from cnnedge.cli import main
from cnnedge.errors import BundleError, CnnEdgeError
from cnnedge.files import sha256
from cnnedge.image import RESIZES, ImageContract, to_tensor
from cnnedge.package.triton import inference_service, to_text, write_triton
from cnnedge.plan import PlanNote, PlanOptions
from cnnedge.selftest import TOLERANCE

CLIENT = Path(__file__).parents[2] / "export" / "triton" / "client.py"
SURFACE = Path(__file__).with_name("surfaces") / "kserve-0.21.json"


@pytest.fixture(scope="module")
def repository(toy_bundle, tmp_path_factory):
    return write_triton(toy_bundle, tmp_path_factory.mktemp("triton") / "models")


@pytest.fixture(scope="module")
def protocol():
    """Triton's model_config.proto as its client package ships it.

    The module is loaded by its file: the package's own import wants gRPC.
    """
    package = importlib.util.find_spec("tritonclient")
    if package is None:
        pytest.skip("tritonclient, which has Triton's protocol definitions, is not installed")
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    (place,) = package.submodule_search_locations
    spec = importlib.util.spec_from_file_location(
        "model_config_pb2", Path(place) / "grpc" / "model_config_pb2.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(protocol, folder, name):
    from google.protobuf import text_format

    text = (Path(folder) / name / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, protocol.ModelConfig())


def signature(path):
    """Return the graph's input and output as onnx itself reads them: name, NumPy type, dims."""
    graph = onnx.load(path).graph
    return [
        (
            value.name,
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim],
        )
        for value in (graph.input[0], graph.output[0])
    ]


def test_the_layout(repository, toy_bundle):
    names = [f"{toy_bundle.manifest.name}_{v.name}" for v in toy_bundle.manifest.variants]
    folder = Path(repository.folder)
    assert [model.name for model in repository.models] == names
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    files = ("config.pbtxt", "labels.txt", "1/model.onnx")
    assert there == {f"{n}/{f}" for n in names for f in files} | {"inferenceservice.yaml"}
    for variant, name in zip(toy_bundle.manifest.variants, names, strict=True):
        assert sha256(folder / name / "1" / "model.onnx") == variant.sha256
        labels = (folder / name / "labels.txt").read_text(encoding="utf-8").splitlines()
        assert tuple(labels) == toy_bundle.manifest.labels


def test_each_configuration_is_the_graphs(protocol, repository, toy_bundle):
    types = {"uint8": protocol.TYPE_UINT8, "float32": protocol.TYPE_FP32}
    for model, variant in zip(repository.models, toy_bundle.manifest.variants, strict=True):
        config = parsed(protocol, repository.folder, model.name)
        assert (config.name, config.backend) == (model.name, "onnxruntime")
        for listed, (name, dtype, dims) in zip(
            (config.input, config.output), signature(toy_bundle.path(variant.file)), strict=True
        ):
            (tensor,) = listed
            assert (tensor.name, tensor.data_type) == (name, types[dtype])
            assert dims[0] == "N"  # Triton's batch dimension, which it does not list
            assert list(tensor.dims) == dims[1:]
        assert config.output[0].label_filename == "labels.txt"
        assert config.max_batch_size == 8
        assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
        assert 0 < config.dynamic_batching.max_queue_delay_microseconds <= 10_000
        assert config.version_policy.latest.num_versions == 1
        (group,) = config.instance_group
        expected = {"cpu": group.KIND_CPU, "trt": group.KIND_GPU, "any": group.KIND_AUTO}
        assert group.kind == expected[variant.target]
        assert [w.batch_size for w in config.model_warmup] == [1, 4, 8]
        for warmup in config.model_warmup:
            (zeros,) = warmup.inputs.values()
            assert list(warmup.inputs) == [config.input[0].name]
            assert zeros.zero_data
            assert (zeros.data_type, zeros.dims) == (
                config.input[0].data_type,
                config.input[0].dims,
            )
        told = {key: entry.string_value for key, entry in config.parameters.items()}
        assert json.loads(told["cnnedge.labels"]) == list(toy_bundle.manifest.labels)
        assert json.loads(told["cnnedge.image"]) == toy_bundle.manifest.image.to_dict()
        accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
        if variant.target == "trt":
            assert [a.name for a in accelerators] == ["tensorrt"]
            assert dict(accelerators[0].parameters) == {"precision_mode": "INT8"}
            assert config.optimization.graph.level == 2
        else:
            assert not config.HasField("optimization")


def test_the_text_is_what_was_meant(protocol, repository):
    """The same message by way of protobuf's JSON form, in which Triton answers /config."""
    from google.protobuf import json_format

    for model in repository.models:
        meant = json_format.ParseDict(model.config, protocol.ModelConfig())
        assert parsed(protocol, repository.folder, model.name) == meant


def test_labels_of_any_kind_survive_the_text(protocol):
    from google.protobuf import text_format

    labels = json.dumps(["schön", "日本", 'a "quoted" \\ one', "tab\there", "\x01"])
    for text in (labels, json.dumps(json.loads(labels), ensure_ascii=False)):
        config = to_text({"name": "x", "parameters": {"l": {"string_value": text}}})
        found = text_format.Parse(config, protocol.ModelConfig())
        assert found.parameters["l"].string_value == text


@pytest.mark.parametrize(("most", "preferred"), [(1, []), (2, [1, 2]), (16, [8, 16])])
def test_the_largest_batch(protocol, toy_bundle, tmp_path, most, preferred):
    made = write_triton(toy_bundle, tmp_path / "models", variant="int8", max_batch=most)
    (model,) = made.models
    config = parsed(protocol, made.folder, model.name)
    assert config.max_batch_size == most
    assert config.HasField("dynamic_batching") == (most > 1)
    assert list(config.dynamic_batching.preferred_batch_size) == preferred
    assert [w.batch_size for w in config.model_warmup] == sorted({1, *preferred})


def with_plans(root, *plans):
    """Put plans into a bundle: (runtime, file's stem, options, hash of the ONNX file)."""
    bundle = open_bundle(root)
    for runtime, stem, options, onnx_sha256 in plans:
        content = f"plan {stem}".encode()
        file = f"engines/{stem}.plan"
        note = PlanNote(
            *("int8-trt", "int8", runtime, "10.3.0", file),
            sha256="",
            bytes=len(content),
            onnx_sha256=onnx_sha256 or bundle.manifest.variant("int8-trt").sha256,
            calibration_sha256=None,
            compute_capabilities=("8.7",),
            gpu=None,
            options=options,
        )
        import hashlib

        note = replace(note, sha256=hashlib.sha256(content).hexdigest())
        bundle = put_engine(bundle, note, content)
    return open_bundle(root)


def test_plans_are_models_too(protocol, bundle_copy, tmp_path):
    bundle = with_plans(
        bundle_copy,
        ("tensorrt", "int8-trt.tensorrt", PlanOptions(max_batch=16), None),
        ("tensorrt", "int8-trt.tensorrt-static", PlanOptions(max_batch=1), None),
        ("tensorrt", "int8-trt.tensorrt-thin", PlanOptions(strip_weights=True), None),
        ("tensorrt", "int8-trt.tensorrt-old", PlanOptions(), "0" * 64),
        ("rtx", "int8-trt.rtx", PlanOptions(), None),
    )
    made = write_triton(bundle, tmp_path / "models", variant="int8-trt")
    name = bundle.manifest.name
    assert [(m.name, m.backend) for m in made.models] == [
        (f"{name}_int8-trt", "onnxruntime"),
        (f"{name}_int8-trt_tensorrt", "tensorrt"),
        (f"{name}_int8-trt_tensorrt-static", "tensorrt"),
    ]
    why = dict(made.left_out)
    assert "no backend for TensorRT-RTX" in why["engines/int8-trt.rtx.plan"]
    assert "weights" in why["engines/int8-trt.tensorrt-thin.plan"]
    assert "another int8-trt" in why["engines/int8-trt.tensorrt-old.plan"]
    for model, most, profile in ((made.models[1], 16, "1"), (made.models[2], 1, "0")):
        config = parsed(protocol, made.folder, model.name)
        (group,) = config.instance_group
        assert (config.backend, config.max_batch_size) == ("tensorrt", most)
        assert (group.kind, list(group.profile)) == (group.KIND_GPU, [profile])
        assert list(config.input[0].dims) == [32, 32, 3]
        plan = Path(made.folder) / model.name / "1" / "model.plan"
        assert plan.read_bytes() == bundle.path(model.source).read_bytes()


def test_a_failed_variant_is_served_by_name_alone(bundle_copy, tmp_path):
    def fail(fields):
        for variant in fields["variants"]:
            if variant["name"] == "int8":
                variant["verdict"] = {"status": "failed", "reason": "made to"}

    edit_manifest(bundle_copy, fail)
    done = run("package", bundle_copy, "--triton", tmp_path / "models")
    assert done.exit_code == 0, done.output
    assert "left out: int8: its gate failed" in done.output
    assert not (tmp_path / "models" / "toy_int8").exists()
    words = ["--triton", tmp_path / "one", "--variant", "int8", "--json"]
    (model,) = json.loads(run("package", bundle_copy, *words).output)["triton"]["models"]
    assert model["variant"] == "int8"
    edit_manifest(bundle_copy, lambda f: [v.update(verdict=None) for v in f["variants"]])
    assert "was verified" in error_of(run("package", bundle_copy, "--triton", tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_it_is_not_written_where_it_should_not_be(bundle_copy, tmp_path, monkeypatch):
    out = tmp_path / "models"
    assert run("package", bundle_copy, "--triton", out).exit_code == 0
    assert "exists already" in error_of(run("package", bundle_copy, "--triton", out))
    again = run("package", bundle_copy, "--triton", out, "--variant", "int8", "--force")
    assert again.exit_code == 0, again.output
    assert sorted(p.name for p in out.iterdir()) == ["inferenceservice.yaml", "toy_int8"]
    (out / "notes.txt").write_text("mine")
    line = error_of(run("package", bundle_copy, "--triton", out, "--force"))
    assert "holds notes.txt, and is no model repository" in line
    assert (out / "notes.txt").read_text() == "mine"
    assert "inside the bundle" in error_of(
        run("package", bundle_copy, "--triton", bundle_copy / "m")
    )
    assert "holds the bundle" in error_of(
        run("package", bundle_copy, "--triton", tmp_path, "--force")
    )
    assert "is a file" in error_of(
        run("package", bundle_copy, "--triton", out / "notes.txt", "--force")
    )
    assert "cannot write" in error_of(
        run("package", bundle_copy, "--triton", out / "notes.txt" / "x")
    )

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cnnedge.package.triton.copy_checked", full)
    assert "No space left" in error_of(run("package", bundle_copy, "--triton", tmp_path / "new"))
    assert {p.name for p in tmp_path.iterdir()} == {"toy", "models"}
    open_bundle(bundle_copy)


def test_a_bundle_that_changes_meanwhile_gives_no_repository(bundle_copy, tmp_path):
    plan = ("tensorrt", "int8-trt.tensorrt", PlanOptions(), None)
    bundle = with_plans(bundle_copy, plan)
    bundle.path("engines/int8-trt.tensorrt.plan").write_bytes(b"another plan")
    with pytest.raises(BundleError, match=r"tensorrt\.plan changed while it was read"):
        write_triton(bundle, tmp_path / "models", variant="int8-trt")
    assert {p.name for p in tmp_path.iterdir()} == {"toy"}


def service_of(folder):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    return yaml.safe_load((Path(folder) / "inferenceservice.yaml").read_text())


PLAIN = {"str": str, "int": int, "bool": bool}


def hold_to(classes, name, fields):
    """Hold data against a class that KServe publishes: known fields, types, and what must be."""
    known = classes[name]
    assert set(known["required"]) <= set(fields), name
    for key, value in fields.items():
        kind = known["fields"][key]  # KeyError: KServe knows no such field
        if kind in PLAIN:
            assert type(value) is PLAIN[kind], key
        elif kind in classes:
            hold_to(classes, kind, value)
        elif kind.startswith("list["):
            assert isinstance(value, list), key
        else:
            assert isinstance(value, dict), key


def test_the_inference_service_is_kserves(repository, toy_bundle, tmp_path):
    service = service_of(repository.folder)
    classes = json.loads(SURFACE.read_text())["classes"]
    hold_to(classes, "V1beta1InferenceService", service)
    assert (service["apiVersion"], service["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", service["metadata"]["name"])
    predictor = service["spec"]["predictor"]
    model = predictor["model"]
    assert model["modelFormat"] == {"name": "triton"}
    assert (model["runtime"], model["protocolVersion"]) == ("kserve-tritonserver", "v2")
    assert model["env"] == [{"name": "ORT_DISABLE_TELEMETRY", "value": "1"}]
    assert model["storageUri"].startswith("s3://REPLACE-ME/")
    assert 1 <= predictor["minReplicas"] < predictor["maxReplicas"]
    requests, limits = model["resources"]["requests"], model["resources"]["limits"]
    for amounts in (requests, limits):
        assert re.fullmatch(r"\d+Mi", amounts["memory"])
        assert isinstance(amounts["cpu"], str)
    size = sum(variant.bytes for variant in toy_bundle.manifest.variants)
    assert int(requests["memory"][:-2]) * 2**20 > size
    assert limits["nvidia.com/gpu"] == "1"  # int8-trt is among them
    on_cpu = write_triton(toy_bundle, tmp_path / "models", variant="int8")
    assert (
        "nvidia.com/gpu"
        not in service_of(on_cpu.folder)["spec"]["predictor"]["model"]["resources"]["limits"]
    )


@pytest.mark.parametrize("name", ["VGG 16", "16_fach", "schön", "x" * 90, "日本", "a-_-", "on"])
def test_any_name_makes_names(toy_bundle, repository, tmp_path, name):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    named = replace(toy_bundle, manifest=replace(toy_bundle.manifest, name=name))
    service = yaml.safe_load(inference_service(named, list(repository.models)))["metadata"]["name"]
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", service)
    assert len(service) <= 63
    (model,) = write_triton(named, tmp_path / "models", variant="fp32").models
    assert re.fullmatch("[A-Za-z0-9_-]+", model.name)


class Server(BaseHTTPRequestHandler):
    """Speaks the KServe v2 protocol as Triton does, and answers with ONNX Runtime."""

    repository, as_json = None, False

    def do_GET(self):
        model = self.find(r"/v2/models/([^/]+)/config")
        if model is not None:
            self.reply(json.dumps(model.config).encode())

    def do_POST(self):
        model = self.find(r"/v2/models/([^/]+)/infer")
        if model is None:
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        length = int(self.headers["Inference-Header-Content-Length"])
        request, binary = json.loads(body[:length]), body[length:]
        (given,), (wanted,) = request["inputs"], request["outputs"]
        (declared,), (output,) = model.config["input"], model.config["output"]
        if (
            given["name"] != declared["name"]
            or f"TYPE_{given['datatype']}" != declared["data_type"]
            or given["shape"][1:] != declared["dims"]
            or not 1 <= given["shape"][0] <= model.config["max_batch_size"]
            or given["parameters"]["binary_data_size"] != len(binary)
            or wanted["name"] != output["name"]
        ):
            self.reply(json.dumps({"error": f"unexpected request {request}"}).encode(), 400)
            return
        batch = np.frombuffer(binary, np.uint8).reshape(given["shape"])
        session = open_session(Path(self.repository.folder) / model.name / "1" / "model.onnx")
        answers = session(batch)
        told = {"name": output["name"], "datatype": "FP32", "shape": list(answers.shape)}
        if self.as_json or not wanted["parameters"].get("binary_data"):
            told["data"] = answers.reshape(-1).tolist()
            self.reply(json.dumps({"model_name": model.name, "outputs": [told]}).encode())
            return
        told["parameters"] = {"binary_data_size": answers.nbytes}
        head = json.dumps({"model_name": model.name, "outputs": [told]}).encode()
        self.reply(head + answers.tobytes(), header=len(head))

    def find(self, pattern):
        asked = re.fullmatch(pattern, self.path)
        for model in self.repository.models if asked else ():
            if model.name == asked[1]:
                return model
        self.reply(b'{"error": "unknown model"}', 404)
        return None

    def reply(self, body, code=200, header=None):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        if header is not None:
            self.send_header("Inference-Header-Content-Length", str(header))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(params=["binary", "json"])
def server(repository, request):
    handler = type(
        "Handler", (Server,), {"repository": repository, "as_json": request.param == "json"}
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def client():
    spec = importlib.util.spec_from_file_location("triton_client", CLIENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_the_client_gets_the_references_answers(client, server, toy_bundle, variant):
    model = client.Model(server + "/", f"{toy_bundle.manifest.name}_{variant}")
    paths, answers = golden(toy_bundle)
    batch = np.stack([model.tensor(str(path)) for path in paths])
    for path, tensor in zip(paths, batch, strict=True):
        np.testing.assert_array_equal(tensor, to_tensor(path, toy_bundle.manifest.image))
    given = model.probabilities(batch)
    assert np.abs(given - np.array(answers[variant])).max() <= TOLERANCE[variant]
    reference = np.array(answers["reference"])
    assert np.abs(given - reference).max() <= (1e-5 if variant == "fp32" else 5e-2)
    assert (given.argmax(1) == reference.argmax(1)).all()


@pytest.mark.system
def test_the_client_as_it_is_called(server, toy_bundle):
    paths, answers = golden(toy_bundle)
    words = [server, f"{toy_bundle.manifest.name}_int8", *map(str, paths)]
    done = subprocess.run([sys.executable, CLIENT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    labels = [line.split(": ")[1].split(" (")[0] for line in done.stdout.splitlines()]
    best = np.array(answers["reference"]).argmax(1)
    assert labels == [toy_bundle.manifest.labels[i] for i in best]


def test_what_goes_wrong_is_one_line(client, server, toy_bundle, tmp_path, monkeypatch):
    name = f"{toy_bundle.manifest.name}_int8"
    broken = tmp_path / "broken.png"
    broken.write_bytes(toy_bundle.path("selftest/golden-00.png").read_bytes()[:200])
    for words, says in (
        ((server, name, str(broken)), r"^error: .*broken\.png: .+"),
        ((server, name, str(tmp_path / "none.png")), r"^error: .*none\.png: .*No such file"),
        (("nowhere", name, str(broken)), "^error: nowhere: unknown url type"),
    ):
        with pytest.raises(SystemExit, match=says) as caught:
            client.main(*words)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(SystemExit, match="answers 404: .*unknown model"):
        client.Model(server, "none")
    with pytest.raises(SystemExit, match="cannot be reached"):
        client.Model("http://127.0.0.1:9", "none")
    monkeypatch.setattr(client, "call", lambda *arguments: ({}, b"<html>"))
    with pytest.raises(SystemExit, match=f"^error: {server}: "):
        client.main(server, name, str(broken))


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("size", [(31, 57), (57, 31), (200, 133), (24, 40)])
def test_the_client_resizes_as_the_contract_says(client, tmp_path, resize, channels, size):
    contract = ImageContract(24, 40, channels, resize)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    model = object.__new__(client.Model)
    model.image = contract.to_dict()
    np.testing.assert_array_equal(
        model.tensor(str(tmp_path / "photo.png")), to_tensor(tmp_path / "photo.png", contract)
    )


def test_the_client_imports_numpy_and_pillow_alone():
    imported = re.findall(r"^(?:import|from) (\w+)", CLIENT.read_text(), re.M)
    assert set(imported) <= {"numpy", "PIL"} | set(sys.stdlib_module_names)


def test_help_names_every_form():
    shown = CliRunner().invoke(main, ["package", "--help"]).output
    assert all(word in shown for word in ("--onnx FILE", "--zip FILE", "--triton DIR"))


def test_a_missing_bundle_is_one_line(tmp_path):
    with pytest.raises((BundleError, CnnEdgeError), match="does not exist"):
        open_bundle(tmp_path / "none")
    line = error_of(run("package", tmp_path / "none", "--triton", tmp_path / "models"))
    assert "does not exist" in line
