import subprocess
import sys

import numpy as np
import pytest

from cnnedge.errors import ModelError
from cnnedge.models import MODELS, build, model_info


def macs_of(model):
    """Multiply-accumulates, from the kernels and the sizes that Keras itself reports."""
    total = 0
    for layer in model._flatten_layers(include_self=False):
        kernel = getattr(layer, "kernel", None)
        if kernel is not None:
            positions = layer.output.shape[1:-1] if len(kernel.shape) == 4 else ()
            total += int(np.prod(kernel.shape)) * int(np.prod(positions))
    return total


@pytest.mark.tf
@pytest.mark.parametrize("name", MODELS)
def test_the_table_holds_what_the_built_model_has(name):
    info = MODELS[name]
    model = build(name)

    assert info.name == name == model.name
    assert info.input_size == (224, 224)
    assert model.count_params() == info.params
    assert macs_of(model) == info.macs
    assert model.compute_output_shape((5, 224, 224, 3)) == (5, info.classes)


@pytest.mark.system
def test_importing_the_table_loads_neither_keras_nor_tensorflow():
    code = (
        "import sys, cnnedge.models as m; assert m.MODELS['vgg16'].params == 72342312;"
        "assert not {'keras', 'tensorflow', 'h5py'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg61", "'vgg61'; did you mean vgg19 or vgg16"),
        ("AlexNet-v1", "did you mean alexnet_v1"),
        ("resnet50", "use alexnet, alexnet_v1, alexnet_v2, vgg11, vgg13, vgg16, vgg19"),
    ],
)
def test_an_unknown_name_is_answered_with_the_close_ones(name, message):
    with pytest.raises(ModelError, match=message):
        model_info(name)


@pytest.mark.tf
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 0}, "height of vgg11 is 0"),
        ({"width": 32.0}, "width of vgg11 is 32.0"),
        ({"channels": -1}, "channels of vgg11 is -1"),
        ({"classes": True}, "classes of vgg11 is True"),
        ({"lrn": True}, "vgg11 has no option lrn; its options are fc_units, pool, pool_range, cfg"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        build("vgg11", **options)


@pytest.mark.tf
def test_a_model_without_options_says_so():
    with pytest.raises(ModelError, match="alexnet_v1 has no option fc_units; it has no options"):
        build("alexnet_v1", fc_units=7)


@pytest.mark.tf
@pytest.mark.parametrize(
    ("name", "smallest"), [("alexnet_v1", 64), ("alexnet_v2", 64), ("vgg11", 32)]
)
def test_the_smallest_input_works_and_one_pixel_less_is_refused(name, smallest):
    small = {"height": smallest, "width": smallest, "classes": 2}
    assert build(name, **small).compute_output_shape((1, smallest, smallest, 3)) == (1, 2)

    for side in ("height", "width"):
        with pytest.raises(ModelError, match=f"too small for {name}.*{smallest}x{smallest}"):
            build(name, **small | {side: smallest - 1})


@pytest.mark.tf
@pytest.mark.parametrize("name", ["alexnet_v1", "alexnet_v2", "vgg11"])
def test_oblong_grey_images_and_few_classes(name):
    model = build(name, height=96, width=80, channels=1, classes=7)
    answers = model(np.random.default_rng(0).random((2, 96, 80, 1), np.float32)).numpy()

    assert answers.shape == (2, 7)
    assert answers.dtype == np.float32
    np.testing.assert_allclose(answers.sum(1), 1, rtol=1e-5)
    assert not np.array_equal(answers[0], answers[1])


@pytest.mark.tf
def test_the_seed_decides_the_weights():
    size = {"height": 64, "width": 64, "classes": 3}
    first, again, other = (
        build("alexnet_v2", seed=seed, **size).get_weights() for seed in (1, 1, 2)
    )

    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
