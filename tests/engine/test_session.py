"""A plan at work: its answers, its buffers, its graphs, its parts; on stand-ins for the GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cnnedge.backends.onnxruntime import open_session
from cnnedge.backends.tensorrt.library import Messages
from cnnedge.backends.tensorrt.session import open_plan
from cnnedge.errors import BackendError
from cnnedge.plan import PlanOptions


@pytest.fixture
def images(digits, digit_contract):
    return np.stack([digits.test.tensor(i, digit_contract) for i in range(24)])


def serialize(module, library, bundle, options, variant="fp32"):
    """Return a plan as the stand-in's builder makes it."""
    logger = library.logger(Messages())
    builder = module.Builder(logger)
    network = builder.create_network(library.network_flags())
    parser = module.OnnxParser(network, logger)
    assert parser.parse_from_file(str(bundle.path(f"model.{variant}.onnx")))
    config = builder.create_builder_config()
    library.configure(config, options, ())
    for profile in options.profiles:
        added = builder.create_optimization_profile()
        shapes = [(n, *network._size) for n in (profile.smallest, profile.typical, profile.largest)]
        added.set_shape("image", *shapes)
        config.add_optimization_profile(added)
    return builder.build_serialized_network(network, config)


@pytest.fixture
def opened(stand_in, surface, toy_bundle):
    """Return a maker of ``(session, cuda, module)`` of the toy's FP32 plan."""

    def make(*, options=None, cuda_options=None, behaviour=None, **session_options):
        options = options or PlanOptions()
        library, gpu, cuda, module = stand_in(
            surface, cuda_options=cuda_options, **(behaviour or {})
        )
        plan = serialize(module, library, toy_bundle, options)
        session = open_plan(library, gpu, plan, options.profiles, **session_options)
        return session, cuda, module

    return make


def executions(module):
    return [call for call in module.calls if call[0] == "execute"]


def test_it_answers_as_the_graph_does(opened, toy_bundle, images):
    session, _, _ = opened()
    expected = open_session(toy_bundle.path("model.fp32.onnx"))
    for n in (1, 3, 8, 1, 20):  # 20 is more than the plan takes: it runs in parts
        found = session(images[:n])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected(images[:n]), atol=1e-6)


def test_nothing_is_allocated_in_a_call(opened, images):
    session, cuda, _ = opened()
    for n in (1, 4):
        session(images[:n])
    before = cuda.allocations
    for n in (1, 4, 1, 4):
        session(images[:n])
    assert cuda.allocations == before


def test_answers_are_the_callers_own(opened, images):
    session, _, _ = opened()
    first = session(images[:1])
    kept = first.copy()
    session(images[1:2])
    np.testing.assert_array_equal(first, kept)


def test_graphs_are_replayed(opened, surface, images):
    session, cuda, module = opened()
    session(images[:1])
    enqueued = len(executions(module))
    for _ in range(3):
        session(images[:1])
    if surface.startswith("rtx"):  # it replays by itself, and is told to
        assert cuda.launches == 0
        assert len(executions(module)) == enqueued + 3
        assert executions(module)[-1][2].cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
    else:
        assert len(executions(module)) == enqueued
        assert cuda.launches == 4


def test_graphs_can_be_left_out(opened, surface, images):
    session, cuda, module = opened(graphs=False)
    for _ in range(3):
        session(images[:1])
    assert cuda.launches == 0
    if surface.startswith("rtx"):
        assert executions(module)[-1][2].cuda_graph_strategy.name == "DISABLED"


def test_a_plan_that_cannot_be_captured_runs_without(opened, surface, toy_bundle, images, caplog):
    session, cuda, _ = opened(cuda_options={"capture_fails": True})
    expected = open_session(toy_bundle.path("model.fp32.onnx"))(images[:2])
    for _ in range(2):
        np.testing.assert_allclose(session(images[:2]), expected, atol=1e-6)
    assert cuda.launches == 0
    if not surface.startswith("rtx"):
        assert session.graphs is False
        assert "no CUDA graph" in caplog.text


def test_a_batch_size_has_a_context_of_its_own_where_graphs_are_captured(
    opened, surface, toy_bundle, images
):
    session, cuda, _ = opened(options=PlanOptions(max_batch=16))
    expected = open_session(toy_bundle.path("model.fp32.onnx"))
    for n in (*range(1, 17), 1, 5, 16):
        np.testing.assert_allclose(session(images[:n]), expected(images[:n]), atol=1e-6)
    lanes = len(cuda.memory) // 4
    assert lanes == (2 if surface.startswith("rtx") else 8)  # not sixteen


def test_it_tells_what_a_call_costs_by_part(opened, images):
    session, _, _ = opened()
    times = session.timed(images[:1])
    assert (times.copy_in, times.compute, times.copy_out) == (0.002, 0.005, 0.001)
    assert times.latency == pytest.approx(0.008)
    assert times.enqueue > 0
    with pytest.raises(BackendError, match="batch of 24 cannot be timed"):
        session.timed(images)


def test_many_threads_share_it(opened, images):
    session, _, _ = opened()
    alone = [session(images[i : i + 1]) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            together = list(pool.map(lambda i: session(images[i : i + 1]), range(16)))
            for one, other in zip(alone, together, strict=True):
                np.testing.assert_array_equal(one, other)


def test_closing_gives_everything_back(opened, images):
    session, cuda, _ = opened()
    for n in (1, 3, 8):
        session(images[:n])
    session.close()
    session.close()
    assert not cuda.memory
    assert not cuda.graphs
    assert not cuda.events
    assert not cuda.pending
    with pytest.raises(BackendError, match="closed"):
        session(images[:1])


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((1, 5, 5, 3), np.uint8),
        np.zeros((1, 32, 32, 3), np.float32),
        np.zeros((0, 32, 32, 3), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
    ],
    ids=["size", "type", "empty", "rank"],
)
def test_a_wrong_batch_is_refused(opened, batch):
    session, _, _ = opened()
    with pytest.raises(BackendError, match=r"takes uint8 N × 32 × 32 × 3, not"):
        session(batch)


def test_a_full_gpu_is_named(opened, images):
    session, _, _ = opened(behaviour={"contexts": False})
    with pytest.raises(BackendError, match="memory may be full"):
        session(images[:1])


def test_a_stripped_plan_gets_its_weights_back(opened, toy_bundle, images):
    options = PlanOptions(strip_weights=True)
    onnx = toy_bundle.path("model.fp32.onnx").read_bytes()
    session, _, _ = opened(options=options, weights=onnx)
    expected = open_session(toy_bundle.path("model.fp32.onnx"))(images[:2])
    np.testing.assert_allclose(session(images[:2]), expected, atol=1e-6)
    other = toy_bundle.path("model.fp16.onnx").read_bytes()
    with pytest.raises(BackendError, match="does not take the weights .*: weights do not match"):
        opened(options=options, weights=other)


def test_host_code_runs_only_from_plans_that_say_so(opened):
    for trusted in (False, True):
        _, _, module = opened(trust_code=trusted)
        assert module.calls[-1] == ("deserialize", trusted)


def test_kernels_are_kept_for_the_next_start(opened, surface, tmp_path, images):
    path = tmp_path / "toy.kernels"
    session, _, _ = opened(kernel_cache=path)
    session(images[:1])
    if not surface.startswith("rtx"):
        assert not path.exists()  # TensorRT compiles nothing at load
        return
    assert path.read_bytes() == b"kernels"
    again, _, module = opened(kernel_cache=path)
    again(images[:1])
    assert ("kernels", b"kernels") in module.calls
    path.write_bytes(b"of another machine")
    opened(kernel_cache=path)[0](images[:1])
    assert path.read_bytes() == b"kernels"


def test_a_broken_plan_is_refused(stand_in, surface):
    library, gpu, _, _ = stand_in(surface)
    with pytest.raises(BackendError, match="cannot load the plan: Serialization assertion"):
        open_plan(library, gpu, b"\x00 nonsense", PlanOptions().profiles)


def test_rtx_says_beforehand_why_a_plan_is_invalid(stand_in):
    library, gpu, _, _ = stand_in("rtx-1.7", validity=("INVALID", 1 | 4))
    with pytest.raises(BackendError) as caught:
        open_plan(library, gpu, b"{}", PlanOptions().profiles)
    assert "it was built by another release; the CUDA driver is too old for it" in str(caught.value)
