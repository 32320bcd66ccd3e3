"""Serve a site and look at it: what the tests of the page share."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading

import numpy as np

from cnnedge.demo import open_server
from cnnedge.selftest import INDEX

# What npm says where there is no network. All else it says is a fault of ours: a version that does
# not exist, a file that is not what was pinned.
OFFLINE = re.compile("ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH")


@contextlib.contextmanager
def served(folder):
    """Serve a folder as `cnnedge demo` does; yield its address."""
    with open_server(folder, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server.url
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def served_plainly(folder):
    """Serve a folder by `python -m http.server`; yield its address."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    server = subprocess.Popen(
        [*command, "-d", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        port = re.search(r"port (\d+)", server.stdout.readline()).group(1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


def watch(page, url):
    """Note in the page's `problems` whatever goes wrong, and each request to elsewhere."""
    page.problems = []
    page.on("console", lambda m: page.problems.append(f"console: {m.text}"))
    page.on("pageerror", lambda e: page.problems.append(f"error: {e}"))
    page.on(
        "request",
        lambda r: (
            None
            if r.url.startswith((url, f"blob:{url}"))
            else page.problems.append(f"request: {r.url[:200]}")
        ),
    )
    return page


@contextlib.contextmanager
def visited(browser, url, width=1280, scheme="light", **options):
    """Open a site whose model is ready; yield the page."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, **options
    )
    try:
        page = watch(context.new_page(), url)
        page.goto(url)
        page.wait_for_selector("#backend[data-state=ready]", timeout=60_000)
        yield page
    finally:
        context.close()


def answers_shown(page):
    """Return the page's answers as ``{index: probability}``, the likeliest first."""
    return {
        int(bar["index"]): float(bar["probability"])
        for bar in page.evaluate(
            "[...document.querySelectorAll('#bars li')].map(e => ({...e.dataset}))"
        )
    }


def golden(bundle, variant):
    """Return the golden images' files and the answers of a variant to them."""
    index = json.loads(bundle.path(INDEX).read_text())
    return [entry["file"] for entry in index["images"]], np.array(index["answers"][variant])
