"""The README's commands, as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cnnedge.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md")]
PAGES += [*ROOT.glob("docs/**/*.md"), *ROOT.glob("export/*/README.md")]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = "\n".join(blocks("sh")).splitlines()
    lines += re.findall(r"`(cnnedge [^`]+)`", README)
    return sorted({line.split("  #")[0].strip() for line in lines if line.startswith("cnnedge ")})


@pytest.mark.parametrize("line", commands())
def test_every_command_in_the_readme_parses(line):
    name, *arguments = shlex.split(line)[1:]
    command = main.commands[name]
    arguments = [a for a in arguments if a not in {"MODEL", "BUNDLE", "IMAGE…"}] or arguments
    if {"MODEL", "BUNDLE", "IMAGE…"} & set(shlex.split(line)):
        arguments = shlex.split(line)[2:]
    with click.Context(main) as parent:
        command.make_context(name, list(arguments), parent=parent)


@pytest.mark.tf
def test_the_tour_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # How long is measured is not of interest either; see `short_turns` of test_bench_cli.
    monkeypatch.setattr("cnnedge.benchmark.rounds.TURN_SECONDS", 0.05)
    monkeypatch.setattr("cnnedge.benchmark.rounds.WARM_UP", 0.0)
    monkeypatch.setattr("cnnedge.benchmark.run.PEAK_SECONDS", 0.02)
    tour = next(block for block in blocks("sh") if "cnnedge train" in block)
    for line in tour.splitlines():
        line = re.sub(r"--epochs \d+", "--epochs 2", line)  # how long it learns is not of interest
        result = CliRunner().invoke(main, shlex.split(line)[1:])
        assert result.exit_code == 0, (line, result.output, result.exception)
    (snippet,) = blocks("python")
    printed = []
    exec(snippet, {"print": printed.append})
    assert printed[0] in "0123456789"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page}: {target}"
