// The page: takes an image from a file, a drop, the clipboard, a sample or the camera, and shows
// what the worker answers.

import { startCamera } from "./camera.mjs";

const $ = (id) => document.getElementById(id);
const LIVE_PAUSE = 120; // milliseconds between two frames of the camera: some a second, not all
const SPEAK_PAUSE = 2500; // between two live announcements to a screen reader

let site, worker, calls, camera, imageUrl;
let ready = false;
let starting = false; // the camera is, which takes as long as its user takes to allow it
let turn = 0; // of what was asked for last, so that what is slow does not replace what is newer
let again = null; // classify the same image once more, when the model was changed

function startWorker() {
  if (worker) worker.onmessage = null; // what it sent already may still be on its way
  worker?.terminate();
  for (const call of calls?.values() ?? []) call.reject(new Error("stopped"));
  calls = new Map();
  worker = new Worker(new URL("./worker.mjs", import.meta.url), { type: "module" });
  worker.onmessage = ({ data }) => {
    if (data.progress) return showProgress(data.progress);
    const call = calls.get(data.id);
    calls.delete(data.id);
    if (data.error === undefined) call?.resolve(data.result);
    else call?.reject(new Error(data.error));
    return undefined;
  };
  worker.onerror = (event) => {
    event.preventDefault();
    for (const call of calls.values()) call.reject(new Error(event.message || "the worker stopped"));
    calls.clear();
  };
}

function ask(message, transfer = []) {
  return new Promise((resolve, reject) => {
    const id = crypto.getRandomValues(new Uint32Array(1))[0];
    calls.set(id, { resolve, reject });
    worker.postMessage({ id, ...message }, transfer);
  });
}

/** Open the chosen model on the chosen backend, in a worker of its own. */
async function openModel() {
  ready = false;
  const variant = site.variants[Number($("variant").value)];
  $("backend").dataset.state = "loading";
  $("backend-note").textContent = "Loading…";
  $("loading").hidden = false;
  $("loading").removeAttribute("value");
  for (const id of ["choose", "camera"]) $(id).disabled = !camera;
  if (!$("bars").children.length) say("Loading the model…");
  startWorker();
  const { file, precision } = variant;
  const mine = worker;
  try {
    const model = await ask({ open: { file, precision, backend: $("device").value } });
    ready = true;
    $("backend").dataset.state = "ready";
    $("backend").dataset.backend = model.backend;
    $("backend-note").textContent = model.note;
    showFacts(variant, model);
    problem("");
    if (!$("bars").children.length) invite();
    for (const id of ["choose", "camera"]) $(id).disabled = false;
    if (again && !camera) await again();
  } catch (error) {
    if (mine !== worker) return; // another choice was made meanwhile
    stopCamera();
    fail(`The model cannot be opened: ${error.message}`);
  } finally {
    if (mine === worker) $("loading").hidden = true;
  }
}

/** There is no model: nothing of a former one may stay, as if it were of this. */
function fail(text) {
  $("backend").dataset.state = "failed";
  $("backend-note").textContent = "Not running";
  $("loading").hidden = true;
  $("facts").textContent = "";
  for (const id of ["choose", "camera"]) $(id).disabled = true;
  clearResult();
  problem(text);
}

function showProgress({ done, total }) {
  if (total) $("loading").value = Math.min(done / total, 1);
}

function showFacts(variant, model) {
  const { height, width, channels, resize } = model.image;
  const megabytes = (variant.bytes / 1e6).toFixed(1);
  const how = { stretch: "stretched", crop: "cropped", letterbox: "letterboxed" }[resize] ?? resize;
  $("facts").textContent =
    `${model.labels.length} classes · ${width}×${height} ${channels === 3 ? "RGB" : "grey"}, ${how} · ` +
    `${variant.file.split("/").pop()}, ${megabytes} MB · made by cnnedge ${model.version}`;
}

/** Show an image file and what the model answers. */
async function show(blob, { sample = null, name = "The chosen image" } = {}) {
  stopCamera();
  again = () => show(blob, { sample, name });
  const mine = ++turn;
  $("spoken").textContent = ""; // the same answer to another image is said again
  URL.revokeObjectURL(imageUrl);
  imageUrl = URL.createObjectURL(blob);
  $("picture").src = imageUrl;
  $("picture").alt = name;
  stage("picture");
  for (const button of $("samples").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.sample === sample && sample !== null));
  }
  if (!ready) { // it is answered as soon as there is a model
    clearResult();
    if ($("backend").dataset.state === "loading") say("Loading the model…");
    return;
  }
  problem("");
  try {
    const result = await ask({ classify: blob });
    if (mine !== turn) return;
    $("picture").classList.toggle("tiny", Math.max(...result.size) < 200);
    showResult(result, name);
    speak(result.answers[0]);
    showReference(sample, result);
  } catch (error) {
    if (mine !== turn || error.message === "stopped") return;
    again = null;
    invite();
    problem(`${name}: ${error.message}`);
  }
}

async function showSample(sample, name) {
  const mine = ++turn;
  let blob;
  try {
    const response = await fetch(sample.file);
    if (!response.ok) throw new Error(response.status);
    blob = await response.blob();
  } catch (error) {
    if (mine === turn) problem(`${sample.file} cannot be loaded (${error.message})`);
    return;
  }
  if (mine === turn) await show(blob, { sample, name });
}

function showResult({ answers, milliseconds }, name) {
  const bars = $("bars");
  bars.dataset.of = name;
  $("best").textContent = answers[0].label;
  while (bars.children.length > answers.length) bars.lastChild.remove();
  while (bars.children.length < answers.length) {
    const item = document.createElement("li");
    item.innerHTML =
      '<span class="row"><span class="label"></span><span class="share"></span></span>' +
      '<span class="track" aria-hidden="true"><span class="bar"></span></span>';
    bars.append(item);
  }
  answers.forEach(({ label, index, probability }, place) => {
    const item = bars.children[place];
    item.dataset.index = index;
    item.dataset.probability = probability;
    item.querySelector(".label").textContent = label;
    item.querySelector(".share").textContent = percent(probability);
    item.querySelector(".bar").style.width = `${Math.max(100 * probability, 0.4)}%`;
  });
  $("times").hidden = false;
  for (const [step, value] of Object.entries(milliseconds)) {
    $(`time-${step}`).textContent = `${value.toFixed(value < 10 ? 1 : 0)} ms`;
  }
}

function showReference(sample, { answers }) {
  const line = $("reference");
  line.hidden = !sample?.reference;
  if (line.hidden) return;
  const { label, index, probability } = sample.reference;
  const same = index === answers[0].index;
  line.className = `reference ${same ? "same" : "other"}`;
  line.innerHTML = "<strong></strong> <span></span>";
  line.firstChild.textContent = same ? "✓ Same answer as the reference." : "✗ The reference answers otherwise.";
  line.lastChild.textContent = `Keras: ${label}, ${percent(probability)}`;
}

function clearResult() {
  $("bars").replaceChildren();
  $("times").hidden = true;
  $("reference").hidden = true;
  $("best").textContent = "";
  $("spoken").textContent = "";
}

function speak({ label }) {
  if ($("spoken").textContent !== label) $("spoken").textContent = label;
}

/** Show that nothing is shown, and what can be. */
function invite() {
  clearResult();
  say(site.samples.length ? "Choose an image, or try a sample." : "Choose an image.");
  stage("hint");
}

function say(text) {
  $("best").innerHTML = '<span class="quiet"></span>';
  $("best").firstChild.textContent = text;
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function stage(shown) {
  for (const id of ["picture", "video", "hint"]) $(id).hidden = id !== shown;
}

function percent(p) {
  return p > 0.9995 && p < 1 ? "> 99.9 %" : `${(100 * p).toFixed(1)} %`;
}

// The camera: the next frame is taken when the last one was answered.

async function toggleCamera() {
  if (camera) return stopCamera();
  if (starting) return undefined;
  problem("");
  starting = true; // and not a disabled button, which would lose the keyboard's focus
  const before = turn;
  let started;
  try {
    started = await startCamera($("video"));
  } catch (error) {
    if (before === turn) problem(error.message);
    return undefined;
  } finally {
    starting = false;
  }
  if (before !== turn || document.hidden || $("backend").dataset.state === "failed") return started.stop();
  camera = started;
  again = null;
  turn++;
  stage("video");
  $("camera").textContent = "Stop camera";
  $("camera").classList.add("stops");
  $("reference").hidden = true;
  $("rate-block").hidden = false;
  $("bars").classList.add("live");
  for (const button of $("samples").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", "false");
  }
  return live(camera);
}

async function live(mine) {
  let spoken = 0, last = 0, rate = 0;
  while (camera === mine) {
    try {
      if (ready) {
        const frame = await mine.frame();
        const result = await ask({ classify: frame }, [frame]);
        if (camera !== mine) return;
        const now = performance.now();
        if (last) rate = rate ? 0.8 * rate + 0.2 * (1000 / (now - last)) : 1000 / (now - last);
        last = now;
        $("rate").textContent = rate ? `${rate.toFixed(1)} / s` : "";
        showResult(result, "camera");
        if (now - spoken > SPEAK_PAUSE) {
          speak(result.answers[0]);
          spoken = now;
        }
      }
    } catch (error) {
      if (camera !== mine) return;
      if (error.message !== "stopped") {
        stopCamera();
        problem(error.message);
        return;
      }
    }
    await new Promise((resolve) => setTimeout(resolve, LIVE_PAUSE));
  }
}

function stopCamera() {
  if (!camera) return;
  camera.stop();
  camera = null;
  invite();
  $("camera").textContent = "Start camera";
  $("camera").classList.remove("stops");
  $("rate-block").hidden = true;
  $("bars").classList.remove("live");
}

// What the site holds.

function fillIn() {
  document.title = `${site.name} – image classifier`;
  $("name").textContent = site.name;
  site.variants.forEach(({ title, bytes }, place) => {
    $("variant").append(new Option(`${title} · ${(bytes / 1e6).toFixed(1)} MB`, place));
  });
  $("variant-field").hidden = site.variants.length < 2;
  if (!navigator.gpu) $("device").querySelector('[value="webgpu"]').disabled = true;
  site.samples.forEach((sample, place) => {
    const button = document.createElement("button");
    const image = new Image();
    image.src = sample.file;
    image.alt = `Sample ${place + 1}`;
    image.loading = "lazy";
    button.type = "button";
    button.sample = sample;
    button.setAttribute("aria-pressed", "false");
    button.append(image);
    button.onclick = () => showSample(sample, image.alt);
    const item = document.createElement("li");
    item.append(button);
    $("samples").append(item);
  });
  $("samples-block").hidden = !site.samples.length;
}

const imageIn = (list) => [...(list ?? [])].find((file) => file.type.startsWith("image/")) ?? list?.[0];
const showFile = (file) => file && show(file, { name: file.name || "The pasted image" });

$("choose").onclick = () => $("file").click();
$("file").onchange = ({ target }) => {
  showFile(target.files[0]);
  target.value = ""; // the same file may be chosen again
};
$("camera").onclick = toggleCamera;
$("variant").onchange = openModel;
$("device").onchange = openModel;
let depth = 0; // dragenter and dragleave come for every element on the way
addEventListener("dragenter", (event) => {
  if (!event.dataTransfer?.types.includes("Files")) return;
  depth++;
  document.body.classList.add("dropping");
});
addEventListener("dragleave", () => {
  depth = Math.max(0, depth - 1);
  if (!depth) document.body.classList.remove("dropping");
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("dropping");
  showFile(imageIn(event.dataTransfer?.files));
});
addEventListener("paste", (event) => {
  const file = imageIn(event.clipboardData?.files);
  if (file) showFile(file);
});
addEventListener("visibilitychange", () => document.hidden && stopCamera());

try {
  const response = await fetch("site.json");
  if (!response.ok) throw new Error(String(response.status));
  site = await response.json();
  fillIn();
  await openModel();
} catch (error) {
  fail(`The page is incomplete: site.json cannot be read (${error.message})`);
}
