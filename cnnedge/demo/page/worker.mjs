// The model, off the page's own thread: the page stays smooth while an image is read and answered.
//
// The page sends {id, open: {file, precision, backend}}, once, and later {id, classify: Blob | ImageBitmap};
// it gets {id, result} or {id, error}, and while a model is on its way {progress: {done, total}}.

import { rank, requireUint8 } from "./lib/answers.mjs";
import { decode } from "./lib/decode.mjs";
import { toTensor } from "./lib/image.mjs";
import { readMetadata } from "./lib/metadata.mjs";

const RUNTIME = new URL("./ort/", import.meta.url).href;
// Asked for in turn: that the whole graph runs on the GPU, then that it may share with the CPU.
const WHOLE = { session: { disable_cpu_ep_fallback: "1" } };

let ort, session, about;
let threads = 1; // that WebAssembly runs on

/** Open a model on the backend that is asked for; "auto": the one that suits its precision. */
async function open({ file, precision, backend }) {
  const bytes = await download(file);
  about = readMetadata(bytes);
  return { ...about, ...(await openOn(bytes, precision, backend)) };
}

/** Open a session and run it once: that allocates and, on a GPU, compiles, which may fail. */
async function start(bytes, options) {
  const opened = await ort.InferenceSession.create(bytes, options);
  try {
    requireUint8(opened);
    const { height, width, channels } = about.image;
    await run(opened, new Uint8Array(height * width * channels));
  } catch (error) {
    await opened.release(); // another backend needs the memory
    throw error;
  }
  session = opened;
}

async function openOn(bytes, precision, backend) {
  // WebAssembly has INT8 convolutions; of WebGPU none are known.
  const wantsGpu = backend === "webgpu" || (backend === "auto" && !precision.startsWith("int"));
  let why = "";
  if (wantsGpu) {
    try {
      return await openOnGpu(bytes);
    } catch (error) {
      why = error.message.split("\n")[0];
    }
  }
  await loadRuntime("ort.wasm.min.mjs");
  await start(bytes, { executionProviders: ["wasm"] });
  const how = threads > 1 ? `${threads} threads` : "1 thread";
  let note = `WebAssembly SIMD, ${how}`;
  if (backend === "webgpu") note += ` (WebGPU was asked for: ${why})`;
  return { backend: "wasm", note };
}

async function openOnGpu(bytes) {
  const adapter = await navigator.gpu?.requestAdapter();
  if (!adapter) throw new Error("this browser offers no WebGPU here");
  await loadRuntime("ort.webgpu.min.mjs");
  const { vendor = "", architecture = "", description = "" } = adapter.info ?? {};
  const gpu = description || [vendor, architecture].filter(Boolean).join(" ") || "GPU";
  const executionProviders = ["webgpu"];
  try {
    await start(bytes, { executionProviders, extra: WHOLE });
    return { backend: "webgpu", note: `WebGPU, ${gpu}, the whole graph` };
  } catch {
    await start(bytes, { executionProviders });
    return { backend: "webgpu", note: `WebGPU, ${gpu}, some layers on the CPU` };
  }
}

/** Load ONNX Runtime, once: the build for WebGPU has the CPU's code too, should the GPU fail. */
async function loadRuntime(build) {
  if (ort) return;
  ort = await import(RUNTIME + build);
  // Threads share memory, which browsers give only to pages whose server isolates them.
  const cores = navigator.hardwareConcurrency || 1;
  if (self.crossOriginIsolated) threads = Math.min(4, Math.ceil(cores / 2));
  ort.env.wasm.wasmPaths = RUNTIME;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
}

async function download(file) {
  const response = await fetch(new URL(file, import.meta.url));
  if (!response.ok) throw new Error(`the model ${file} cannot be loaded (${response.status})`);
  const total = Number(response.headers.get("Content-Length")) || 0;
  const parts = [];
  let done = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done: ended, value } = await reader.read();
    if (ended) break;
    parts.push(value);
    done += value.length;
    postMessage({ progress: { done, total } });
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function classify(source) {
  if (!session) throw new Error("no model is open");
  const start = performance.now();
  const picture = await decode(source);
  const decoded = performance.now();
  const tensor = toTensor(picture, about.image);
  const prepared = performance.now();
  const probabilities = await run(session, tensor);
  const answered = performance.now();
  return {
    answers: rank(probabilities, about.labels),
    probabilities,
    size: [picture.width, picture.height],
    milliseconds: {
      decode: decoded - start,
      resize: prepared - decoded,
      network: answered - prepared,
    },
  };
}

async function run(session, tensor) {
  const { height, width, channels } = about.image;
  const image = new ort.Tensor("uint8", tensor, [1, height, width, channels]);
  const { probabilities } = await session.run({ image }, ["probabilities"]);
  return Float32Array.from(await probabilities.getData());
}

// One after another: a session and the canvas are not for two at a time.
let queue = Promise.resolve();
onmessage = ({ data }) => {
  queue = queue.then(async () => {
    try {
      const result = data.open ? await open(data.open) : await classify(data.classify);
      postMessage({ id: data.id, result });
    } catch (error) {
      postMessage({ id: data.id, error: String(error?.message ?? error) });
    }
  });
};
