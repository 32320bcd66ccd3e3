"""The documentation site: built in strict mode, complete, without a broken link or a network."""

from __future__ import annotations

import importlib
import importlib.util
import posixpath
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints
from urllib.parse import unquote, urlsplit

import click
import pytest

import cnnedge
from cnnedge.cli import main

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[1]
NEEDED = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
needs_mkdocs = pytest.mark.skipif(
    bool(MISSING), reason=f'{", ".join(MISSING)} not installed: pip install "cnnedge[docs]"'
)
_LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """What of a page matters to links: its anchors, where it leads, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if tag == "a" and attributes.get("href") is not None:
            self.links.append(attributes["href"])
        loaded = attributes.get(_LOADED.get(tag, ""))
        # a canonical address and the like are not fetched
        if loaded is not None and attributes.get("rel") not in {"canonical", "prev", "next"}:
            self.loads.append(loaded)


def broken_links(site):
    """Return every internal link, anchor, image, script or style of a site that is not there."""
    pages = {
        path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8"))
        for path in site.rglob("*.html")
    }
    broken = []
    for name, page in pages.items():
        if name == "404.html":  # its links are absolute: a server shows it in any folder
            continue
        for link in (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            path = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path)))
            path = name if not parts.path else path
            if (site / path).is_dir():
                path = posixpath.normpath(f"{path}/index.html")
            if path.startswith("..") or not (site / path).is_file():
                broken.append(f"{name}: {link} is not there")
            elif path in pages and unquote(parts.fragment) not in pages[path].anchors | {""}:
                broken.append(f"{name}: {link} has no such anchor")
    return broken


def _returned(function):
    """Return the annotation of what a function returns, or None where it has none."""
    if not callable(function) or getattr(function, "__name__", "_").startswith("_"):
        return None
    module = vars(sys.modules[function.__module__])
    unknown = {"keras": SimpleNamespace(Model=object)}
    return get_type_hints(function, unknown | module).get("return")


def _types(hint):
    """Yield every class in an annotation, as in tuple[Bundle, list[str]]."""
    if isinstance(hint, type) and not get_args(hint):
        yield hint
    for inner in get_args(hint):
        yield from _types(inner)


def build(root, out):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", out],
        cwd=root,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def copied(tmp_path):
    """What the site is made of, to be damaged."""
    root = tmp_path / "repository"
    for name in ("docs", "export", "benchmarks", "cnnedge"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [ROOT / "mkdocs.yml", *ROOT.glob("*.md")]:
        shutil.copy(path, root)
    return root


def test_the_checker_finds_what_is_broken(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top"><a href="b.html#there"><a href="#top"><a href="https://elsewhere/x">'
        '<a href="none.html"><a href="b.html#gone"><a href="#gone"><img src="no.png">'
    )
    (tmp_path / "b.html").write_text('<h2 id="there"><link rel="stylesheet" href="no.css">')
    assert sorted(broken_links(tmp_path)) == [
        "a.html: #gone has no such anchor",
        "a.html: b.html#gone has no such anchor",
        "a.html: no.png is not there",
        "a.html: none.html is not there",
        "b.html: no.css is not there",
    ]


@needs_mkdocs
def test_no_link_is_broken(site):
    assert len(list(site.rglob("*.html"))) > 20
    assert broken_links(site) == []


@needs_mkdocs
def test_its_pages_need_no_network(site):
    for path in site.rglob("*.html"):
        elsewhere = [x for x in Page(path.read_text("utf-8")).loads if urlsplit(x).netloc]
        assert not elsewhere, f"{path.name} loads {elsewhere}"
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text("utf-8"))


@needs_mkdocs
def test_every_target_and_decision_has_its_page(site):
    index = (site / "index.html").read_text("utf-8")
    targets = [path.parent.name for path in ROOT.glob("export/*/README.md")]
    assert {"x86-cpu", "raspberry-pi", "jetson-orin", "rtx"} <= set(targets)
    for target in targets:
        assert (site / "export" / target / "index.html").is_file()
        assert f'href="export/{target}/index.html"' in index, "not in the navigation"
    for decision in ROOT.glob("docs/decisions/[!R]*.md"):
        assert f'href="decisions/{decision.stem}.html"' in index
    app = (site / "export" / "x86-cpu" / "index.html").read_text("utf-8")
    assert ">bare.py</summary>" in app
    assert "Classify images with onnxruntime" in app


@needs_mkdocs
def test_every_command_is_there_with_every_option(site):
    text = (site / "commands.html").read_text("utf-8")
    for name, command in main.commands.items():
        assert f'id="cnnedge-{name}"' in text
        section = text[text.index(f'id="cnnedge-{name}"') :].split("<h2")[0]
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.opts[-1] in section, f"{name} {option.opts[-1]}"
    assert "the commands --" not in text
    assert "[1&lt;=x&lt;=100]" in text, "escaped so that it shows"


@needs_mkdocs
def test_the_api_page_has_every_public_name_and_what_it_returns(site):
    text = (site / "api.html").read_text("utf-8")
    anchors = Page(text).anchors
    for name in cnnedge.__all__:
        if name == "__version__":
            continue
        assert any(a.startswith("cnnedge.") and a.endswith(f".{name}") for a in anchors), name
        # where a module has the name too, `cnnedge.name` may be either
        shadowed = (ROOT / "cnnedge" / name).exists()
        heading = f"cnnedge.{name}.{name}" if shadowed else f"cnnedge.{name}"
        assert re.search(rf">\s*{re.escape(heading)}\s*<", text), heading
    returned = set()
    for name, module in cnnedge._HOME.items():
        value = getattr(importlib.import_module(module), name)
        # of a class: of what its public methods return
        functions = vars(value).values() if isinstance(value, type) else [value]
        for function in functions:
            returned |= set(_types(_returned(function)))
    ours = {t for t in returned if t.__module__.startswith("cnnedge.")}
    assert {t.__name__ for t in ours} >= {"Bundle", "Classifier", "Verification", "TrainResult"}
    for kind in ours:
        assert f"{kind.__module__}.{kind.__qualname__}" in anchors


@needs_mkdocs
@pytest.mark.slow
def test_a_new_target_appears_by_itself(copied, tmp_path):
    folder = copied / "export" / "toaster"
    folder.mkdir()
    (folder / "README.md").write_text(
        "# Toaster\n\nSee [the manifest](../../docs/manifest.md#fields), [the app](app.py) and\n"
        "`[no](link.md)`.\n\n```sh\n[no](link.md)\n```\n"
    )
    (folder / "app.py").write_text('print("toast")\n')
    done = build(copied, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "export" / "toaster" / "index.html").read_text("utf-8")
    assert 'href="../../manifest.html#fields"' in page
    assert "toast" in page
    assert (tmp_path / "site" / "export" / "toaster" / "app.py").read_text() == 'print("toast")\n'
    assert broken_links(tmp_path / "site") == []


@needs_mkdocs
@pytest.mark.slow
def test_a_broken_link_stops_the_build(copied, tmp_path):
    broken = {
        "export/rtx/README.md": "../../docs/no_such.md",
        "docs/compress.md": "../export/no_target/README.md",
        "docs/tensorrt.md": "manifest.md#no-such-anchor",
    }
    for page, link in broken.items():
        with open(copied / page, "a", encoding="utf-8") as file:
            file.write(f"\n[x]({link})\n")
    done = build(copied, tmp_path / "site")
    assert done.returncode == 1
    for link in broken.values():
        assert link in done.stderr
