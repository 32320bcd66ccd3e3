// node classify.mjs MODEL.onnx IMAGE… [--top 5] [--json]
// Exit codes: 0 done, 1 a file is missing or broken (one line says which), 2 usage.

import { parseArgs } from "node:util";

import { ClassifierError, openClassifier, read } from "./classifier.mjs";

const USAGE = "usage: node classify.mjs MODEL.onnx IMAGE… [--top 5] [--json]";

async function main() {
  let model, images, top, json;
  try {
    const { values, positionals } = parseArgs({
      allowPositionals: true,
      options: { top: { type: "string", default: "5" }, json: { type: "boolean", default: false } },
    });
    [model, ...images] = positionals;
    ({ json } = values);
    top = Number(values.top);
    if (!images.length || !Number.isInteger(top) || top < 1) throw new Error("nothing to do");
  } catch {
    console.error(USAGE);
    return 2;
  }
  const { classify } = await openClassifier(model);
  let failed = 0;
  for (const path of images) {
    try {
      const file = await read(path, "image");
      const answers = await classify(file, top).catch((error) => {
        error.message = `${path}: ${error.message}`;
        throw error;
      });
      const likely = answers.map((a) => `${a.label} ${(100 * a.probability).toFixed(1)}%`);
      console.log(json ? JSON.stringify({ image: path, answers }) : `${path}: ${likely.join(", ")}`);
    } catch (error) {
      if (!(error instanceof ClassifierError)) throw error;
      console.error(`error: ${error.message}`);
      failed = 1;
    }
  }
  return failed;
}

try {
  process.exitCode = await main();
} catch (error) {
  if (!(error instanceof ClassifierError)) throw error;
  console.error(`error: ${error.message}`);
  process.exitCode = 1;
}
