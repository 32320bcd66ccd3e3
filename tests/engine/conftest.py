"""Plans without a GPU: the toy bundle's graphs on stand-ins for the libraries."""

from __future__ import annotations

import pytest
from fakes import NAMES, fake_gpu, fake_module

from cnnedge.backends.tensorrt.library import open_library


@pytest.fixture(params=NAMES)
def surface(request):
    return request.param


@pytest.fixture
def stand_in():
    """Return a maker of ``(library, gpu, cuda, module)`` with a recorded surface."""

    def make(surface, *, cuda_options=None, **behaviour):
        gpu, cuda = fake_gpu(**(cuda_options or {}))
        module = fake_module(surface, cuda, **behaviour)
        runtime = "rtx" if surface.startswith("rtx") else "tensorrt"
        return open_library(runtime, lambda name: module), gpu, cuda, module

    return make
