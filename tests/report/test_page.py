"""The page of `cnnedge bench --html`, opened in a browser that has no network."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
import sample

from cnnedge.errors import MissingExtraError
from cnnedge.report import style, table
from cnnedge.report.page import render_page

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# Of the model with all: nine, layers of all but Keras, a matrix of each; then the other's.
FIGURES = 9 + 4 + 5 + 2


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def visit(browser, tmp_path_factory):
    """Open a document's page, offline; all that went wrong is in its `problems`."""
    contexts = []

    def visit(document, width=1280, scheme="light"):
        file = tmp_path_factory.mktemp("page") / "bench.html"
        file.write_text(render_page(document), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        context.set_offline(True)
        page = context.new_page()
        page.problems = []
        page.on("console", lambda m: page.problems.append(f"console: {m.text}"))
        page.on("pageerror", lambda e: page.problems.append(f"error: {e}"))
        page.on("dialog", lambda d: (page.problems.append(f"dialog: {d.message}"), d.dismiss()))
        page.on(
            "request",
            lambda r: (
                None
                if r.url == file.as_uri() or r.url.startswith("data:image/png")
                else page.problems.append(f"request: {r.url[:200]}")
            ),
        )
        page.goto(file.as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def desk(visit):
    return visit(sample.document())


@pytest.fixture(scope="module")
def phone(visit):
    return visit(sample.document(), width=390)


def plots_shown(page):
    """Return of each plot in sight what it is and how much was drawn into it."""
    return page.evaluate(
        """() => [...document.querySelectorAll(".plot")].filter(p => p.checkVisibility()).map(p => {
            const area = p.querySelector(".cartesianlayer")?.getBoundingClientRect();
            return { id: p.id, svgs: p.querySelectorAll(".main-svg").length,
                     width: area?.width ?? 0, height: area?.height ?? 0,
                     marks: p.querySelectorAll(".cartesianlayer :is(.trace, .hm)").length };
        })"""
    )


@pytest.mark.system
def test_every_figure_is_drawn_without_network_or_complaint(desk):
    drawn = {}
    selects = desk.locator("section > select")
    most = max(selects.nth(i).locator("option").count() for i in range(selects.count()))
    for choice in range(most):
        for i in range(selects.count()):
            count = selects.nth(i).locator("option").count()
            selects.nth(i).select_option(index=min(choice, count - 1))
        desk.wait_for_timeout(200)
        drawn |= {plot["id"]: plot for plot in plots_shown(desk)}
    assert len(drawn) == desk.locator(".plot").count() == FIGURES
    for plot in drawn.values():
        assert plot["svgs"] >= 1, plot
        assert plot["marks"] >= 1, plot
        assert plot["width"] > 200, plot
        assert plot["height"] > 40, plot
    assert desk.problems == []


def test_plotly_comes_once():
    page = render_page(sample.document())
    assert page.count("* plotly.js v") == 1


def test_a_phone_shows_all_of_it_readably(phone):
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    sizes = phone.evaluate(
        """() => [...document.querySelectorAll(".plot svg text")]
            .map(t => [parseFloat(getComputedStyle(t).fontSize), t.textContent])"""
    )
    assert len(sizes) > 100
    assert [found for found in sizes if found[0] < 11] == []
    assert phone.problems == []


def test_no_label_of_a_plot_is_cut_off_on_a_phone(phone):
    cut = phone.evaluate(
        """() => [...document.querySelectorAll(".plot")].filter(p => p.checkVisibility())
            .flatMap(p => [...p.querySelectorAll("svg text")].filter(t => {
                const own = t.getBoundingClientRect(), all = p.getBoundingClientRect();
                return own.width && (own.left < all.left - 2 || own.right > all.right + 2);
            }).map(t => p.id + ": " + t.textContent))"""
    )
    assert cut == []


def test_legends_stand_clear_of_their_plots(phone):
    gaps = phone.evaluate(
        """() => [...document.querySelectorAll(".keys")].map(keys => {
            const plot = keys.parentElement.querySelector(".plot").getBoundingClientRect();
            return plot.top - keys.getBoundingClientRect().bottom;
        })"""
    )
    assert len(gaps) > 5
    assert min(gaps) >= 0


@pytest.mark.parametrize(
    "text",
    [
        "INT8 for CPUs, ONNX Runtime",
        "no NVIDIA GPU on this machine",
        "its top-1 drops by 1.58 points, the budget is 1",
        "unstable",
        "over budget",
    ],
)
def test_what_must_not_be_missed_is_in_sight(phone, text):
    assert phone.get_by_text(text).locator("visible=true").first.is_visible()


def test_the_pick_comes_first_and_says_how_to_run_it(desk):
    first = desk.locator("article section").first
    assert first.locator("h2").inner_text() == "INT8 for CPUs, ONNX Runtime"
    assert 'cnnedge.load("alexnet", variant="int8")' in first.inner_text()


def test_the_legend_hides_and_shows(desk):
    figure = desk.locator("figure", has=desk.locator("#m0-offline"))
    lines = figure.locator(".scatterlayer .trace")
    key = figure.get_by_role("button", name="INT8, LiteRT")
    before = lines.count()
    key.click()
    assert lines.count() == before - 1
    assert key.get_attribute("aria-pressed") == "false"
    key.click()
    assert lines.count() == before


def test_plots_follow_the_colour_scheme(visit):
    page = visit(bare())
    ink = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    light = page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(300)
    assert light == "rgb(28, 36, 48)"
    assert page.evaluate(ink) == "rgb(230, 235, 241)"


def test_a_flipped_image_says_who_was_right(desk):
    flips = desk.locator("details", has_text="INT8, LiteRT").last
    flips.locator("summary").click()
    lost = flips.locator(".flips > div").first
    assert lost.locator(".yes").inner_text() == "✓ four"
    assert lost.locator(".no").inner_text() == "✗ seven"
    image = lost.locator("img")
    assert image.evaluate("i => i.complete && i.naturalWidth") == 32


HOSTILE = (
    "<script>window.hacked=1;alert(1)</script>",
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "<!-- <script>",
    '"><b onmouseover=window.hacked=1>',
    '<a href="javascript:window.hacked=1">a</a>',
)


def hostile():
    """The sample with something nasty wherever a user's words go."""
    document = sample.document()
    document["models"] = document["models"][:1]
    model = document["models"][0]
    document["suite"]["name"] = model["name"] = HOSTILE[1]
    model["labels"] = [*HOSTILE, *map(str, range(len(HOSTILE), 10))]
    model["left_out"] = {HOSTILE[0]: HOSTILE[1]}
    model["data"]["source"] = model["pick"]["why"] = model["pick"]["how"] = HOSTILE[2]
    for place, c in enumerate(model["contestants"]):
        c["title"] = HOSTILE[place % len(HOSTILE)] + str(place)
        c["provider"] = HOSTILE[2]
        c["single_stream"]["notes"] = list(HOSTILE)
        c["waterfall"]["stages"][0]["name"] = HOSTILE[1]
        for layer, nasty in zip(c["layers"] or (), HOSTILE, strict=False):
            layer["name"] = layer["kind"] = nasty
        for flip in c["flips"] or ():
            flip["answer"] = HOSTILE[0]
    truth, thumbnails = model["examples"]["truth"], model["examples"]["thumbnails"]
    for place, image in enumerate(truth):
        truth[image] = HOSTILE[place % len(HOSTILE)]
        thumbnails[image] = ('" onerror="window.hacked=1', "https://example.org/x.png")[place % 2]
    return document


def test_hostile_words_stay_words(visit):
    page = visit(hostile())
    assert page.problems == []
    assert page.evaluate("window.hacked") is None
    assert page.locator(".left-out").inner_text() == f"Left out: {HOSTILE[0]} – {HOSTILE[1]}"
    assert len(plots_shown(page)) == 9 + 2
    labels = page.locator("#m0-confusion-0 .ytick text").all_text_contents()
    assert any(label.startswith("<script>") for label in labels), str(labels)
    hovered = page.locator("#m0-layers-0 .bars .point").first
    hovered.scroll_into_view_if_needed()
    hovered.hover(force=True)
    told = page.locator("#m0-layers-0 .hoverlayer .hovertext").first.text_content()
    assert HOSTILE[0] in told
    assert page.locator(".plot a").count() == 0
    assert page.evaluate("window.hacked") is None


def bare():
    """The least that a run leaves behind."""
    document = sample.document()
    document["models"] = document["models"][1:]
    return document


def test_sections_without_data_are_not_shown(visit):
    page = visit(bare())
    heads = page.locator("section h2").all_inner_texts()
    assert heads == [
        "INT8, ONNX Runtime",
        "All contestants",
        "Size and latency",
        "How latency is distributed",
    ]
    assert "Top-1" not in page.locator("table").inner_text()
    assert page.problems == []


def nothing_measured():
    document = bare()
    for c in document["models"][0]["contestants"]:
        c["single_stream"] = c["bytes"] = None
    document["models"][0]["pick"] = {"name": None, "title": None, "why": "Nothing ran."}
    return document


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"models": []},
        {"models": [{"name": "a"}]},
        {"models": [{"name": "a", "contestants": [{"name": "x@cpu"}], "left_out": None}]},
        nothing_measured(),
    ],
    ids=["empty", "no model", "no contestant", "bare contestant", "nothing measured"],
)
def test_whatever_is_absent_the_page_comes(document):
    assert render_page(document).count("</html>") == 1


SCENARIOS = {"single_stream", "offline", "multi_stream", "server", "cold_start", "sustained"}
SCENARIOS |= {"duty_cycle", "waterfall", "layers", "confusion"}


def fields(found, place=()):
    """Yield the way to every field, of lists only to the fields of the first entry."""
    for key, part in found.items() if isinstance(found, dict) else enumerate(found[:1]):
        if isinstance(part, (dict, list)):
            yield from fields(part, (*place, key))
        if isinstance(key, str):
            yield (*place, key)


@pytest.mark.system
def test_any_field_may_be_null():
    document = sample.document()
    model = document["models"][0]
    c = model["contestants"][2]
    c["single_stream"]["samples_ms"] = [[[1.0, 1.1, 1.2]], [[1.0]]]
    model["contestants"] = [c]  # a small page, as each field makes one of its own
    document["models"] = [model]
    kept = json.dumps(document)
    places = [p for p in fields(document) if p[-2:] != (0, "name")]  # a contestant has a name
    assert len(places) > 150
    failed = {}
    for place in places:
        changed = json.loads(kept)
        at = changed
        if place[0] != "models":  # then no figure has to do with it
            changed["models"] = []
        elif len(place) > 5:  # inside what one scenario found
            c = changed["models"][0]["contestants"][0]
            c |= dict.fromkeys(SCENARIOS - {place[4]})
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = None
        try:
            render_page(changed)
        except Exception as error:
            failed[".".join(map(str, place))] = repr(error)
    assert failed == {}


@pytest.mark.parametrize("package", ["jinja2", "plotly"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingExtraError, match=rf"the HTML page needs the package '{package}'"
    ) as e:
        render_page(sample.document())
    assert 'pip install "cnnedge[report]"' in str(e.value)


def test_a_contestant_has_one_colour_in_every_figure():
    page = render_page(sample.document())
    found = dict(re.findall(r'data-of="([^"]+)">(.*?)</script>', page))
    colours: dict[str, set[str]] = {}
    for spec in map(json.loads, found.values()):
        for trace in spec["data"]:
            group = trace.get("legendgroup")
            colour = trace.get("line", {}).get("color")
            if group in {row[0] for row in sample.CONTESTANTS} and colour:
                colours.setdefault(group, set()).add(colour)
    assert len(colours) == 5
    assert all(len(own) == 1 for own in colours.values()), colours
    assert len(set.union(*colours.values())) == 5


def test_looks_differ_beyond_the_palette():
    looks = style.looks(["keras", *(f"v{i}@cpu" for i in range(20))])
    assert len({(x.colour, x.symbol, x.dash) for x in looks.values()}) == 21


def test_the_table_judges_a_drop_by_its_interval():
    model = sample.document()["models"][0]
    looks = style.looks(c["name"] for c in model["contestants"])
    model["contestants"][1]["accuracy"]["drop_interval_points"] = [-0.2, 1.3]
    rows = {row["name"]: row for row in table.rows(model, looks)}
    assert rows["fp32@cpu"]["status"] == "unproven"
    assert rows["int8@cpu"]["status"] == ""
    assert rows["int8-litert"]["status"] == "over budget"
    assert rows["int8-litert"]["drop"] == "+1.56"
    assert rows["keras"]["top1"] == "99.17 %"
    assert rows["keras"]["ratio"] == "1×"


def test_notes_say_whom_they_are_of():
    model = sample.document()["models"][0]
    for c in model["contestants"][1:]:
        c["accuracy_note"] = "measured here"
    model["contestants"][2] |= {"notes": {"waterfall": "no file"}, "error": "it died"}
    notes = table.notes(model)
    assert [text.split(":")[0] for _, text in notes[:2]] == ["failed", "unstable"]
    assert ("All but Keras reference", "accuracy: measured here") in notes
    assert ("All", "this machine does not tell its temperature") in notes
    assert ("INT8 for CPUs, ONNX Runtime", "no waterfall: no file") in notes


def test_accuracy_of_random_weights_is_not_shown():
    document = sample.document()
    document["models"][0]["weights"] = "random"
    page = render_page(document)
    assert "over budget</span>" not in page
    assert "<th>Top-1</th>" not in page
    assert "<th>Top-1</th>" in render_page(sample.document())


@pytest.mark.parametrize(
    ("x", "text"), [(0.01234, "0.0123"), (1.049, "1.05"), (5015.2, "5,015"), (-2.5, "−2.50")]
)
def test_numbers_have_three_digits(x, text):
    assert style.number(x) == text


def test_layers_are_named_by_what_tells_them_apart():
    names = ["model/conv1/relu/Bias", "model/conv2/relu/Bias", "model/fc/Bias"]
    assert style.told_apart(names) == ["conv1/relu", "conv2/relu", "fc"]
    assert style.told_apart(["a/b", "a/b"]) == ["a/b", "a/b"]
    assert style.told_apart(["a", "a/b"]) == ["a", "a/b"]


def test_long_titles_take_two_lines():
    assert style.wrapped("INT8") == "INT8"
    assert style.wrapped("INT8 for CPUs, ONNX Runtime") == "INT8 for CPUs,<br>ONNX Runtime"
    two = style.wrapped("LiteRT's own DYNAMIC conversion of the network").split("<br>")
    assert len(two) == 2
    assert max(map(len, two)) <= 20


@pytest.mark.parametrize(("low", "high"), [(1, 1.3), (3.2, 5.9), (0.9, 6), (0.02, 400), (5, 5.001)])
def test_logarithmic_ticks_are_few_and_inside(low, high):
    axis = style.log_axis("ms", [low, high])
    assert 2 <= len(axis["tickvals"]) <= 9
    assert len(set(axis["ticktext"])) == len(axis["ticktext"])
    assert all(10 ** axis["range"][0] <= t <= 10 ** axis["range"][1] for t in axis["tickvals"])
