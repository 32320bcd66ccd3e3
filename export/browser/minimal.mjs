// The smallest page: load a model, read labels and contract out of it, classify chosen images.

import * as ort from "onnxruntime-web/wasm";

import { rank, requireUint8 } from "./lib/answers.mjs";
import { decode } from "./lib/decode.mjs";
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

try {
  const classify = await load(new URLSearchParams(location.search).get("model") ?? "model.onnx");
  out.textContent = "Choose an image.";
  document.getElementById("file").onchange = async ({ target }) => {
    if (!target.files.length) return; // the choice was cancelled
    try {
      const answers = await classify(target.files[0]);
      out.textContent = answers
        .map(({ label, probability }) => `${(100 * probability).toFixed(1)} %  ${label}`)
        .join("\n");
    } catch (error) {
      out.textContent = String(error);
    }
  };
} catch (error) {
  out.textContent = String(error);
}
