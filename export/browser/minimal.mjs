// The smallest page: load a model, read labels and contract out of it, classify chosen images.

import * as ort from "onnxruntime-web/wasm";

import { rank, requireUint8 } from "./lib/answers.mjs";
import { toTensor } from "./lib/image.mjs";
import { readMetadata } from "./lib/metadata.mjs";

const out = document.getElementById("answers");

async function load(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status}`);
  const bytes = new Uint8Array(await response.arrayBuffer());
  const { labels, image } = readMetadata(bytes);
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  requireUint8(session);
  const shape = [1, image.height, image.width, image.channels];

  return async (file) => {
    const tensor = toTensor(await decode(file), image);
    const feeds = { image: new ort.Tensor("uint8", tensor, shape) };
    const { probabilities } = await session.run(feeds);
    return rank(probabilities.data, labels);
  };
}

// The file's own pixels, upright, on white: no colour management, and no resize by the canvas.
async function decode(file) {
  const as = { imageOrientation: "from-image", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(file, as);
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, width, height);
}

try {
  const classify = await load(new URLSearchParams(location.search).get("model") ?? "model.onnx");
  out.textContent = "Choose an image.";
  document.getElementById("file").onchange = async ({ target }) => {
    const answers = await classify(target.files[0]).catch((error) => [{ label: String(error) }]);
    out.textContent = answers
      .map(({ label, probability = 0 }) => `${(100 * probability).toFixed(1)} %  ${label}`)
      .join("\n");
  };
} catch (error) {
  out.textContent = String(error);
}
