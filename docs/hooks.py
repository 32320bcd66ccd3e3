"""What MkDocs does not do by itself: pages from outside docs/, their links, the command line.

The site has one copy of everything. A page of the repository keeps its path in the site, less a
leading `docs/`: `export/x86-cpu/README.md` is `export/x86-cpu/index.html`. So a link between two
Markdown files means the same on the forge and here, and whatever a page links to comes along.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
TARGETS = "export/README.md"
COMMANDS = "<!-- the commands -->"
# An inline link or image: its text, its target, an anchor, a title.
LINK = re.compile(r"(\]\()([^)\s#]*)(#[^)\s]*)?((?:\s+\"[^\"]*\")?\))")
# Code is left alone: fenced blocks, and spans of any number of backticks.
CODE = re.compile(
    r"^ *(?P<fence>`{3,}|~{3,}).*?^ *(?P=fence) *$|(?P<tick>`+)(?!`).+?(?P=tick)", re.M | re.S
)
SHOWN = {
    ".cc": "cpp",
    ".cpp": "cpp",
    ".h": "cpp",
    ".html": "html",
    ".js": "js",
    ".mjs": "js",
    ".py": "python",
    ".sh": "sh",
    ".toml": "toml",
    ".ts": "ts",
    ".yaml": "yaml",
    ".yml": "yaml",
}
MOST_SHOWN = 16_000  # bytes of a target's file; a longer one is no smallest app


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that there are in the place of patterns of the navigation."""
    config.nav = list(_expand(config.nav or []))
    # As forges make anchors: each space a hyphen, "Compressed + INT8" → "compressed--int8".
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, and every file that some page links to."""
    waiting = [DOCS + file.src_uri for file in files.documentation_pages()]
    waiting += [path for path in _pages(config.nav or []) if not (ROOT / DOCS / path).exists()]
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if files.get_file_from_path(_in_site(path)) is None:
            source = str(ROOT / path)
            files.append(File.generated(config, _in_site(path), abs_src_path=source))
        if path.endswith(".md"):
            waiting += _links(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links, write out the commands, and show a target's files."""
    path = _in_repository(page.file)
    here = posixpath.dirname(page.file.src_uri)

    def rewrite(link: re.Match[str]) -> str:
        target = _resolve(path, link[2])
        if target is None:
            return link[0]
        return (
            f"{link[1]}{posixpath.relpath(_in_site(target), here or '.')}{link[3] or ''}{link[4]}"
        )

    markdown = _outside_code(markdown, lambda text: LINK.sub(rewrite, text))
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, _commands())
    if re.fullmatch(r"export/[^/]+/README\.md", path):
        markdown += _files_of((ROOT / path).parent)
    return markdown


def _expand(nav: list[Any]) -> Iterator[Any]:
    """Yield a navigation with its patterns, such as `export/*/README.md`, replaced by pages."""
    for entry in nav:
        if isinstance(entry, dict):
            yield {
                title: list(_expand(inner)) if isinstance(inner, list) else inner
                for title, inner in entry.items()
            }
        elif isinstance(entry, str) and "*" in entry:
            base = ROOT if entry.startswith("export/") else ROOT / DOCS
            found = sorted(path.relative_to(base).as_posix() for path in base.glob(entry))
            if entry.startswith("export/"):
                found.sort(key=_place_in_list)
            yield from found
        else:
            yield entry


def _pages(nav: list[Any]) -> Iterator[str]:
    """Yield the pages of a navigation, on every level."""
    for entry in nav:
        if isinstance(entry, dict):
            for inner in entry.values():
                yield from _pages(inner if isinstance(inner, list) else [inner])
        else:
            yield entry


def _place_in_list(path: str) -> int:
    """Return where the list of targets names one; those it does not name come last."""
    place = (ROOT / TARGETS).read_text(encoding="utf-8").find(f"]({path.split('/')[1]}/")
    return place if place >= 0 else 1_000_000


def _in_site(path: str) -> str:
    """Return the place in the site of a file of the repository."""
    return "index.md" if path == "README.md" else path.removeprefix(DOCS)


def _in_repository(file: File) -> str:
    """Return the path in the repository of a file of the site."""
    return file.src_uri if file.generated_by else DOCS + file.src_uri


def _resolve(page: str, target: str) -> str | None:
    """Return the file of the repository that a page's link leads to, or None: none of ours."""
    if not target or re.match(r"[a-z]+:|/", target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    if (ROOT / path).is_dir():
        path = f"{path}/README.md"
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def _links(path: str) -> list[str]:
    """Return the files of the repository that a page links to."""
    found: list[str] = []

    def collect(text: str) -> str:
        targets = (_resolve(path, link[2]) for link in LINK.finditer(text))
        found.extend(target for target in targets if target is not None)
        return text

    _outside_code((ROOT / path).read_text(encoding="utf-8"), collect)
    return found


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Apply a change to what is not code."""
    parts, end = [], 0
    for code in CODE.finditer(markdown):
        parts += [change(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(markdown[end:])])


def _files_of(folder: Path) -> str:
    """Return a target's own files, each folded away under its name."""
    parts = []
    for path in sorted(folder.iterdir()):
        known = path.suffix in SHOWN and path.is_file() and path.name != "ruff.toml"
        if known and path.stat().st_size <= MOST_SHOWN:
            lines = [
                f"~~~~~~ {SHOWN[path.suffix]}",
                *path.read_text("utf-8").splitlines(),
                "~~~~~~",
            ]
            body = "\n".join(f"    {line}" if line else "" for line in lines)
            parts.append(f'??? example "{path.name}"\n\n{body}\n')
    return "\n\n## The files of this folder\n\n" + "\n".join(parts) if parts else ""


def _commands() -> str:
    """Return every command of the command line with its arguments, options and example."""
    from cnnedge.cli import main

    return "\n".join(_command(name, main.commands[name]) for name in sorted(main.commands))


def _command(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"cnnedge {name}")
    usage = " ".join([f"cnnedge {name}", *command.collect_usage_pieces(context)])
    parts = [f"## cnnedge {name}", _escape(_unfold(command.help or "")), f"```text\n{usage}\n```"]
    # Those that every command has come last; arguments stand in the usage.
    options = [option for option in command.params if isinstance(option, click.Option)]
    for option in sorted(options, key=lambda option: "--json" in option.opts):
        record = option.get_help_record(context)
        if record is not None:
            parts.append(f"`{record[0]}`\n:   {_escape(record[1]) or '–'}")
    if command.epilog:
        parts.append(f"```sh\n{command.epilog.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def _unfold(text: str) -> str:
    """Return a docstring with its paragraphs kept and its lines joined."""
    paragraphs = (" ".join(part.split()) for part in text.replace("\b", "").split("\n\n"))
    return "\n\n".join(paragraphs)


def _escape(text: str) -> str:
    """Return plain text as Markdown that shows it."""
    return re.sub(r"([*_\[\]`|])", r"\\\1", text).replace("<", "&lt;")
