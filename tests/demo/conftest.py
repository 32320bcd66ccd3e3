"""The toy bundle as a site, and a browser to look at it."""

from __future__ import annotations

import shutil

import pytest
from browsing import OFFLINE

from cnnedge.demo import find_runtime, lay_site
from cnnedge.demo.runtime import FILES, Runtime
from cnnedge.errors import CnnEdgeError

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


@pytest.fixture(scope="session")
def runtime():
    """ONNX Runtime's real files, from the cache or from npm."""
    try:
        return find_runtime()
    except CnnEdgeError as error:
        if "no npm here" in str(error) or OFFLINE.search(str(error)):
            pytest.skip(f"ONNX Runtime's files for browsers are not to be had: {error.what}")
        raise


@pytest.fixture
def pretend_runtime(tmp_path):
    """Files of the right names, for what does not run them."""
    folder = tmp_path / "dist"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(f"// {name}")
    return Runtime(folder, known=False)


@pytest.fixture(scope="session")
def site(toy_bundle, runtime, tmp_path_factory):
    return lay_site(toy_bundle, tmp_path_factory.mktemp("demo") / "site", runtime)


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as p:
        arguments = ["--no-sandbox", "--disable-gpu", *CAMERA]
        opened = p.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()
