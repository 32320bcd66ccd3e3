"""An ONNX file that is no classifier of cnnedge's, or no whole one, is refused in one line."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

import cnnedge
from cnnedge.bundle import open_bundle
from cnnedge.cli import main
from cnnedge.errors import CnnEdgeError
from cnnedge.package.single import write_single

IMAGE = np.zeros((16, 16, 3), np.uint8)


@pytest.fixture
def single(recorded, tmp_path) -> Path:
    write_single(open_bundle(recorded), tmp_path / "single.onnx", variant="fp32")
    return tmp_path / "single.onnx"


def without_source(model) -> None:
    """Take out the hash of the file: a change on purpose would be told from that alone."""
    kept = [p for p in model.metadata_props if "source" not in p.key]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)


def say(model, key, value) -> None:
    (entry,) = [p for p in model.metadata_props if p.key == key]
    entry.value = value


def image(model, **changes) -> None:
    fields = {"height": 16, "width": 16, "channels": 3, "resize": "stretch", **changes}
    say(model, "cnnedge.image", json.dumps(fields))


def ending(model, op, dtype=TensorProto.FLOAT, shape=("N", 3), more=(), **attributes) -> None:
    """Put a node behind the answers, which gives the output from then on."""
    names = [model.graph.output[0].name, *more]
    model.graph.node.append(helper.make_node(op, names, ["end"], **attributes))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("end", dtype, shape))


def sequence(model) -> None:
    ending(model, "SequenceConstruct")
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, None))
    model.graph.output[0].CopyFrom(helper.make_value_info("end", kind))


def no_rows(model) -> None:
    for name, value in (("from", 0), ("to", 0)):
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
    ending(model, "Slice", shape=("M", "K"), more=("from", "to"))


def more_answers(model) -> None:
    ending(model, "Concat", shape=("N", "K"), more=(model.graph.output[0].name,), axis=1)


def elsewhere(location):
    def change(model) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("length", "8")):
            tensor.external_data.add(key=key, value=value)

    return change


def dims(*sizes):
    def change(model) -> None:
        del model.graph.initializer[0].dims[:]
        model.graph.initializer[0].dims.extend(sizes)

    return change


def cycle(model) -> None:
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def recursive_function(model) -> None:
    node = helper.make_node("F", ["a"], ["b"], domain="x.y")
    opset = [helper.make_opsetid("x.y", 1)]
    model.functions.append(helper.make_function("x.y", "F", ["a"], ["b"], [node], opset))
    model.opset_import.extend(opset)
    model.graph.node[0].domain, model.graph.node[0].op_type = "x.y", "F"


ODD = {
    "no outputs": lambda m: m.graph.ClearField("output"),
    "no inputs": lambda m: m.graph.ClearField("input"),
    "no graph": lambda m: m.ClearField("graph"),
    "two inputs": lambda m: m.graph.input.append(helper.make_tensor_value_info("more", 1, [1])),
    "two outputs": lambda m: m.graph.output.append(
        helper.make_tensor_value_info(m.graph.node[0].output[0], TensorProto.FLOAT, None)
    ),
    "a sequence": sequence,
    "texts": lambda m: ending(m, "Cast", TensorProto.STRING, to=TensorProto.STRING),
    "classes": lambda m: ending(m, "ArgMax", TensorProto.INT64, axis=1),
    "float16": lambda m: ending(m, "Cast", TensorProto.FLOAT16, to=TensorProto.FLOAT16),
    "no rows": no_rows,
    "more answers than labels": more_answers,
    "NaN": lambda m: ending(m, "Acosh"),
    "opset of the future": lambda m: setattr(m.opset_import[0], "version", 9999),
    "format of the future": lambda m: setattr(m, "ir_version", 9999),
    "another's operators": lambda m: setattr(m.graph.node[0], "domain", "x.y"),
    "an operator with a very long name": lambda m: setattr(m.graph.node[0], "op_type", "x" * 10**5),
    "a cycle": cycle,
    "a function of itself": recursive_function,
    "weights of terabytes": dims(10**6, 10**6),
    "weights of negative size": dims(-1, 3),
    "weights of no size": dims(0),
    "weights elsewhere": elsewhere("../secret"),
    "weights at an address": elsewhere("/etc/passwd"),
    "weights in itself": elsewhere("odd.onnx"),
    "too few labels": lambda m: say(m, "cnnedge.labels", '["a"]'),
    "too many labels": lambda m: say(m, "cnnedge.labels", '["a", "b", "c", "d"]'),
    "labels that are numbers": lambda m: say(m, "cnnedge.labels", "[1, 2, 3]"),
    "labels nested deep": lambda m: say(m, "cnnedge.labels", "[" * 10**5),
    "half a character": lambda m: say(m, "cnnedge.labels", '["a", "b", "\\ud800"]'),
    "an image of terabytes": lambda m: image(m, height=10**6, width=10**6),
    "another image": lambda m: image(m, height=32),
    "half a pixel": lambda m: image(m, height=16.5),
    "an unknown resize": lambda m: image(m, resize="tile"),
    "a variant that is a path": lambda m: say(m, "cnnedge.variant", "../../x"),
}


def check_refused(path: Path) -> str:
    with pytest.raises(CnnEdgeError) as raised:
        cnnedge.load(path)(IMAGE)
    text = str(raised.value)
    assert len(text.splitlines()) == 1
    assert len(text) <= 500
    return text


@pytest.mark.parametrize("name", ODD)
def test_it_is_refused_in_one_line(single, tmp_path, capfd, name):
    model = onnx.load(single)
    without_source(model)
    ODD[name](model)
    odd = tmp_path / "odd.onnx"
    odd.write_bytes(model.SerializeToString())
    assert "odd.onnx" in check_refused(odd) or name in {
        "no rows",
        "more answers than labels",
        "NaN",
    }
    assert capfd.readouterr().out == ""  # of ONNX Runtime, which tells of its fall-back there
    found = CliRunner().invoke(main, ["inspect", str(odd)])
    assert found.exit_code in (0, 1)
    assert found.exception is None or isinstance(found.exception, SystemExit)


def test_damage_is_refused_or_harmless(single, tmp_path):
    """Bytes cut off, changed and taken out at 100 seeded places: never any other exception."""
    model = onnx.load(single)
    without_source(model)
    whole, rng, refused = model.SerializeToString(), random.Random(5), 0
    for turn in range(100):
        found = bytearray(whole)
        place = rng.randrange(len(found))
        if turn % 3 == 0:
            del found[place:]
        elif turn % 3 == 1:
            found[place] = rng.randrange(256)
        else:
            del found[place : place + rng.randrange(1, 50)]
        odd = tmp_path / "odd.onnx"
        odd.write_bytes(found)
        try:
            cnnedge.load(odd)(IMAGE)
        except CnnEdgeError:
            refused += 1
    assert refused > 50


def test_what_is_whole_answers_as_before(single, recorded):
    classify, bundle = cnnedge.load(single), cnnedge.load(recorded, variant="fp32")
    assert classify(IMAGE) == bundle(IMAGE)
