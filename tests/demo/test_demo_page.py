"""The page of `cnnedge demo` in a browser: its answers, its manners, and rubbish fed to it."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from browsing import answers_shown, golden, served, served_plainly, visited, watch
from PIL import Image

from cnnedge.demo.runtime import FILES
from cnnedge.image import ImageContract, to_tensor
from cnnedge.selftest import TOLERANCE

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
PAGE, EXPORT = ROOT / "cnnedge" / "demo" / "page", ROOT / "export"


@pytest.fixture(scope="module")
def url(site):
    with served(site) as address:
        yield address


@pytest.fixture
def desk(browser, url):
    with visited(browser, url) as page:
        yield page


def answer_of_sample(page, place):
    """Choose a sample and wait for its answer."""
    page.evaluate("document.getElementById('bars').dataset.of = ''")
    page.locator("#samples button").nth(place).click()
    page.wait_for_selector(f"#bars[data-of='Sample {place + 1}']")
    return answers_shown(page)


@pytest.mark.parametrize("serve", [served, served_plainly], ids=["own server", "http.server"])
def test_golden_images_are_answered_as_by_the_reference(browser, site, toy_bundle, serve):
    _, reference = golden(toy_bundle, "reference")
    with serve(site) as address, visited(browser, address) as page:
        assert page.locator("#samples button").count() == len(reference)
        isolated = page.evaluate("crossOriginIsolated")
        assert isolated == (serve is served)
        for variant in ("int8", "fp32", "fp16"):
            _, expected = golden(toy_bundle, variant)
            title = {"int8": "INT8", "fp32": "FP32", "fp16": "FP16"}[variant]
            (label,) = [t for t in page.locator("#variant option").all_inner_texts() if title in t]
            page.select_option("#variant", label=label)
            page.wait_for_selector("#backend[data-state=ready]")
            for place in range(len(reference)):
                shown = answer_of_sample(page, place)
                assert len(shown) == 5
                assert next(iter(shown)) == reference[place].argmax()
                for index, probability in shown.items():
                    difference = abs(probability - expected[place][index])
                    assert difference <= TOLERANCE[variant], (variant, place, index)
                assert "Same answer" in page.inner_text("#reference")
        assert "WebAssembly" in page.inner_text("#backend-note")
        assert page.problems == []


def test_the_page_opens_with_int8_and_says_what_runs(desk, site):
    assert "INT8" in desk.locator("#variant option").first.inner_text()
    assert re.search(r"WebAssembly SIMD, \d threads?", desk.inner_text("#backend-note"))
    facts = desk.inner_text("#facts")
    assert "10 classes" in facts
    assert "model.int8.onnx" in facts
    assert desk.locator("h1").inner_text() == "toy"
    answer_of_sample(desk, 0)
    for step in ("decode", "resize", "network"):
        assert re.fullmatch(r"[\d.]+ ms", desk.inner_text(f"#time-{step}"))


def test_webgpu_that_is_not_there_is_said(desk):
    if desk.evaluate("navigator.gpu?.requestAdapter().then(a => !!a) ?? false"):
        pytest.skip("this browser has WebGPU")
    offered = desk.evaluate("!!navigator.gpu")
    assert desk.locator("#device option[value=webgpu]").is_disabled() is not offered
    if not offered:  # then it cannot be asked for
        return
    desk.select_option("#device", "webgpu")
    desk.wait_for_selector("#backend[data-state=ready]")
    assert "WebGPU was asked for" in desk.inner_text("#backend-note")
    assert answer_of_sample(desk, 0)


def altered(site, folder, prelude):
    """Return a copy of the site whose worker finds another machine."""
    shutil.copytree(site, folder)
    worker = folder / "worker.mjs"
    worker.write_text(prelude + worker.read_text())
    return folder


def test_threads_answer_alike(browser, site, toy_bundle, tmp_path):
    _, expected = golden(toy_bundle, "int8")
    cores = 'Object.defineProperty(navigator, "hardwareConcurrency", {value: 4});\n'
    with served(altered(site, tmp_path / "site", cores)) as address:
        with visited(browser, address) as page:
            assert page.inner_text("#backend-note") == "WebAssembly SIMD, 2 threads"
            for index, probability in answer_of_sample(page, 0).items():
                assert abs(probability - expected[0][index]) <= TOLERANCE["int8"]
            assert page.problems == []


PRETENDED_GPU = """
Object.defineProperty(navigator, "gpu", {value: {requestAdapter: async () => ({info: {}})}});
"""
# ONNX Runtime's build for WebGPU as it is, but for what it does when asked for the GPU.
PRETENDED_BUILD = """
import * as real from "./ort.wasm.min.mjs";
export const {env, Tensor} = real;
export const InferenceSession = {create: async (bytes, options) => {
    const onGpu = options.executionProviders[0] === "webgpu";
    if (onGpu && options.extra && !WHOLE) throw new Error("a node is not supported");
    const opened = await real.InferenceSession.create(bytes, {executionProviders: ["wasm"]});
    if (onGpu && !RUNS) opened.run = async () => { throw new Error("a shader is not valid"); };
    return opened;
}};
"""


@pytest.mark.parametrize(
    ("whole", "runs", "note"),
    [
        (True, True, "WebGPU, GPU, the whole graph"),
        (False, True, "WebGPU, GPU, some layers on the CPU"),
        (True, False, "WebAssembly SIMD, 1 thread (WebGPU was asked for: a shader is not valid)"),
    ],
)
def test_what_the_gpu_cannot_do_the_cpu_does(browser, site, tmp_path, whole, runs, note):
    folder = altered(site, tmp_path / "site", PRETENDED_GPU)
    flags = f"const WHOLE = {str(whole).lower()}, RUNS = {str(runs).lower()};\n"
    (folder / "ort" / "ort.webgpu.min.mjs").write_text(flags + PRETENDED_BUILD)
    with served_plainly(folder) as address, visited(browser, address) as page:
        # The page itself offers it where it sees a GPU.
        page.evaluate("document.querySelector('#device [value=webgpu]').disabled = false")
        page.select_option("#device", "webgpu")
        page.wait_for_selector("#backend[data-state=ready]")
        assert page.inner_text("#backend-note") == note
        assert len(answer_of_sample(page, 0)) == 5
        assert page.problems == []


def test_a_broken_file_is_told_and_the_next_one_answered(desk, toy_bundle):
    files, _ = golden(toy_bundle, "reference")
    desk.set_input_files("#file", {"name": "no.png", "mimeType": "image/png", "buffer": b"no"})
    desk.wait_for_selector("#problem:not([hidden])")
    assert desk.inner_text("#problem").startswith("no.png: this is no image")
    assert desk.locator("#bars li").count() == 0
    assert desk.inner_text("#best") == "Choose an image, or try a sample."
    desk.set_input_files("#file", str(toy_bundle.path(files[0])))
    desk.wait_for_selector("#bars li")
    assert desk.locator("#problem").is_hidden()
    assert desk.locator("#reference").is_hidden()  # known of samples alone


def test_a_model_that_is_missing_is_told(browser, url):
    context = browser.new_context()
    page = context.new_page()
    page.route("**/models/*", lambda route: route.fulfill(status=404, body="none"))
    page.goto(url)
    page.wait_for_selector("#problem:not([hidden])")
    assert "model.int8.onnx cannot be loaded (404)" in page.inner_text("#problem")
    assert page.get_attribute("#backend", "data-state") == "failed"
    context.close()


def test_a_model_that_fails_leaves_no_answer_of_the_one_before(desk, toy_bundle):
    files, reference = golden(toy_bundle, "reference")
    answer_of_sample(desk, 0)
    desk.route("**/model.fp32.onnx", lambda route: route.abort())
    desk.select_option("#variant", label=desk.locator("#variant option").last.inner_text())
    desk.wait_for_selector("#backend[data-state=failed]")
    for shown in ("#bars li", "#reference:visible", "#times:visible", "#loading:visible"):
        assert desk.locator(shown).count() == 0, shown
    assert desk.inner_text("#facts") == ""
    desk.set_input_files("#file", str(toy_bundle.path(files[1])))
    assert desk.inner_text("#problem").startswith("The model cannot be opened")
    desk.select_option("#variant", "0")  # the image waits for a model that works
    desk.wait_for_selector("#bars li")
    assert next(iter(answers_shown(desk))) == reference[1].argmax()
    assert desk.locator("#problem").is_hidden()


def test_a_page_without_its_list_does_not_load_for_ever(browser, url):
    context = browser.new_context()
    page = context.new_page()
    page.route("**/site.json", lambda route: route.fulfill(status=404, body="none"))
    page.goto(url)
    page.wait_for_selector("#backend[data-state=failed]")
    assert page.inner_text("#problem") == "The page is incomplete: site.json cannot be read (404)"
    assert page.locator("#loading").is_hidden()
    assert page.inner_text("#best") == ""
    context.close()


def test_the_sample_chosen_last_is_shown_whichever_comes_first(desk):
    held = []
    desk.route("**/golden-00.*", lambda route: held.append(route))
    desk.locator("#samples button").nth(0).click()
    while not held:
        desk.wait_for_timeout(20)
    answer_of_sample(desk, 1)
    held[0].continue_()
    desk.wait_for_timeout(500)
    assert desk.get_attribute("#picture", "alt") == "Sample 2"
    assert desk.get_attribute("#bars", "data-of") == "Sample 2"


def test_a_sample_that_cannot_be_loaded_is_told(desk):
    desk.route("**/golden-00.*", lambda route: route.abort())
    desk.locator("#samples button").nth(0).click()
    desk.wait_for_selector("#problem:not([hidden])")
    assert re.match(r"samples/golden-00\.\w+ cannot be loaded", desk.inner_text("#problem"))


def test_opened_by_a_double_click_it_says_what_to_do(browser, site):
    context = browser.new_context()
    page = context.new_page()
    page.goto((site / "index.html").as_uri())
    page.wait_for_selector("#problem:not([hidden])")
    assert "python -m http.server" in page.inner_text("#problem")
    context.close()


def test_a_dropped_file_is_answered(desk, toy_bundle):
    files, reference = golden(toy_bundle, "reference")
    content = list(toy_bundle.path(files[0]).read_bytes())
    desk.evaluate(
        """content => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(content)], "drop.png", {type: "image/png"}));
            document.body.dispatchEvent(
                new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        content,
    )
    desk.wait_for_selector("#bars li")
    assert next(iter(answers_shown(desk))) == reference[0].argmax()


def test_the_camera_is_answered_until_it_is_stopped(desk):
    desk.click("#camera")
    desk.wait_for_selector("#rate:has-text('/ s')")
    assert desk.inner_text("#camera") == "Stop camera"
    assert len(answers_shown(desk)) == 5
    assert desk.evaluate("best.textContent === document.querySelector('.label').textContent")
    desk.evaluate("window.track = document.getElementById('video').srcObject.getTracks()[0]")
    desk.click("#camera")
    assert desk.evaluate("track.readyState") == "ended"
    assert desk.locator("#video").is_hidden()
    assert desk.locator("#bars li").count() == 0
    assert desk.problems == []


def test_an_image_given_while_the_camera_starts_stays(desk, toy_bundle):
    files, reference = golden(toy_bundle, "reference")
    desk.evaluate(
        """() => {
            const media = navigator.mediaDevices, real = media.getUserMedia.bind(media);
            media.getUserMedia = async (wanted) => {
                await new Promise((resolve) => { window.allow = resolve; });
                const stream = await real(wanted);
                window.track = stream.getTracks()[0];
                return stream;
            };
        }"""
    )
    desk.focus("#camera")
    desk.keyboard.press("Enter")
    assert desk.evaluate("document.activeElement.id") == "camera"
    desk.set_input_files("#file", str(toy_bundle.path(files[0])))
    desk.wait_for_selector("#bars li")
    state = desk.evaluate(
        """async () => {
            allow();
            for (let k = 0; k < 100 && window.track?.readyState !== "ended"; k++) {
                await new Promise((resolve) => setTimeout(resolve, 50));
            }
            return window.track?.readyState;
        }"""
    )
    assert state == "ended"
    assert desk.locator("#picture").is_visible()
    assert desk.inner_text("#camera") == "Start camera"
    assert next(iter(answers_shown(desk))) == reference[0].argmax()


def test_a_camera_that_goes_away_is_told(desk):
    desk.click("#camera")
    desk.wait_for_selector("#rate:has-text('/ s')")
    desk.evaluate("document.getElementById('video').srcObject.getTracks()[0].stop()")
    desk.wait_for_selector("#problem:not([hidden])")
    assert desk.inner_text("#problem") == "The camera stopped."
    assert desk.inner_text("#camera") == "Start camera"


def test_without_a_camera_that_is_said(browser, url):
    with visited(browser, url) as page:
        page.evaluate(
            """() => { navigator.mediaDevices.getUserMedia = async () => {
                throw new DOMException("Requested device not found", "NotFoundError"); } }"""
        )
        page.click("#camera")
        page.wait_for_selector("#problem:not([hidden])")
        assert "no camera" in page.inner_text("#problem")
        assert page.inner_text("#camera") == "Start camera"


def test_it_is_used_by_keyboard_alone_and_speaks(desk):
    reached = []
    for _ in range(30):
        desk.keyboard.press("Tab")
        reached.append(desk.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if desk.evaluate("!!document.activeElement.sample"):
            break
    assert reached[:2] == ["choose", "camera"]
    desk.keyboard.press("Enter")
    desk.wait_for_selector("#bars li")
    best = desk.locator("#bars .label").first.inner_text()
    assert desk.inner_text("#best") == best
    assert desk.locator("[aria-live=polite]").text_content() == best
    assert desk.locator("#samples button[aria-pressed=true]").count() == 1


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_does_not_scroll_sideways(browser, url, width):
    with visited(browser, url, width=width) as page:
        answer_of_sample(page, 0)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for button in page.locator("button:visible").all():
            box = button.bounding_box()
            assert min(box["width"], box["height"]) >= 40, button.inner_text()


def luminance(colour):
    levels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in levels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(scheme):
    """WCAG 2.2, 1.4.3: 4.5 to 1 for text, 1.4.11: 3 to 1 for the bars."""
    blocks = re.findall(r":root \{(.*?)\}", (PAGE / "style.css").read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", blocks[scheme == "dark"]))
    colours = {
        k: v if len(v) == 7 else "#" + "".join(2 * c for c in v[1:]) for k, v in colours.items()
    }
    pairs = [("ink", "paper"), ("ink", "page"), ("soft", "paper"), ("soft", "page")]
    pairs += [("soft", "stage"), ("accent-ink", "accent"), ("ok", "paper"), ("bad", "paper")]
    pairs += [("bad", "bad-paper"), ("accent", "paper")]
    for text, ground in pairs:
        high, low = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
    high, low = sorted((luminance(colours["bar"]), luminance(colours["track"])), reverse=True)
    assert (high + 0.05) / (low + 0.05) >= 3


def png(pixels, **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", **options)
    return stream.getvalue()


def test_a_file_becomes_the_very_tensor_that_python_makes(desk):
    """Through the browser's own decoder and canvas: a PNG, a turned one, one of greys."""
    random = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    files = [
        png(random.integers(0, 256, (301, 407, 3), np.uint8)),
        png(random.integers(0, 256, (90, 41, 3), np.uint8), exif=turned),
        png(random.integers(0, 256, (64, 64), np.uint8)),
        png(
            np.dstack(
                [random.integers(0, 256, (50, 70, 3), np.uint8), np.zeros((50, 70), np.uint8)]
            )
        ),
    ]
    for k, content in enumerate(files):
        for resize, channels in (("stretch", 3), ("crop", 3), ("letterbox", 1)):
            contract = ImageContract(48, 56, channels, resize)
            found = desk.evaluate(
                """async ([content, contract]) => {
                    const {decode} = await import("./lib/decode.mjs");
                    const {toTensor} = await import("./lib/image.mjs");
                    const picture = await decode(new Blob([new Uint8Array(content)]));
                    return [...toTensor(picture, contract)];
                }""",
                [list(content), contract.to_dict()],
            )
            expected = to_tensor(content, contract)
            difference = np.abs(np.array(found).reshape(expected.shape) - expected.astype(int))
            assert difference.max() == 0, (k, resize, channels)


def test_the_smallest_page_answers(browser, runtime, toy_bundle, tmp_path):
    """export/browser as its README says; npm's part is played by the files that the demo has."""
    page_folder = tmp_path / "page"
    shutil.copytree(EXPORT / "browser", page_folder, symlinks=False)
    modules = page_folder / "node_modules" / "onnxruntime-web" / "dist"
    modules.mkdir(parents=True)
    for name in FILES:
        (modules / name).symlink_to(runtime.folder / name)
    (page_folder / "model.onnx").symlink_to(toy_bundle.path("model.int8.onnx"))
    files, reference = golden(toy_bundle, "reference")
    with served_plainly(page_folder) as address:
        page = watch(browser.new_page(), address)
        page.goto(f"{address}minimal.html")
        page.wait_for_function("document.getElementById('answers').textContent[0] === 'C'")
        for name, answers in zip(files, reference, strict=True):
            page.evaluate("document.getElementById('answers').textContent = ''")
            page.set_input_files("#file", str(toy_bundle.path(name)))
            page.wait_for_function("document.getElementById('answers').textContent")
            best = page.inner_text("#answers").splitlines()[0]
            label = toy_bundle.manifest.labels[answers.argmax()]
            assert re.fullmatch(rf"[\d.]+ %  {label}", best)
        page.set_input_files("#file", {"name": "no.png", "mimeType": "image/png", "buffer": b"no"})
        page.wait_for_function("document.getElementById('answers').textContent[0] === 'E'")
        assert "this is no image" in page.inner_text("#answers")
        assert page.problems == []
        page.close()
