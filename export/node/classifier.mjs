// One ONNX file of a bundle → a function from an image to labelled answers.

import { readFile } from "node:fs/promises";

import "./quiet.mjs"; // before the next
import * as ort from "onnxruntime-node";
import sharp from "sharp";

import { rank, requireUint8 } from "./lib/answers.mjs";
import { MOST_PIXELS, toTensor } from "./lib/image.mjs";
import { readMetadata } from "./lib/metadata.mjs";

// As in Python, pictures made of pixels: what is posted is no drawing to be interpreted.
sharp.block({ operation: ["VipsForeignLoadSvg"] });

/** What went wrong, in one line that is meant for the user. */
export class ClassifierError extends Error {}

/**
 * @param {string} path of `model.*.onnx` of a bundle; labels and image contract are inside
 * @returns {Promise<{labels: string[], image: object, classify: Function}>} `classify(image, top)`
 *   takes the bytes of an image file and may be called many times at once
 * @throws {ClassifierError} the file is missing, or is no model that cnnedge exported
 */
export async function openClassifier(path) {
  const bytes = await read(path, "model");
  let about, session;
  try {
    about = readMetadata(bytes);
    session = await ort.InferenceSession.create(bytes);
    requireUint8(session);
  } catch (error) {
    throw new ClassifierError(`${path} cannot be opened: ${firstLine(error)}`);
  }
  const { labels, image } = about;
  const shape = [1, image.height, image.width, image.channels];

  async function classify(file, top = 5) {
    const tensor = toTensor(await decode(file), image);
    const feeds = { image: new ort.Tensor("uint8", tensor, shape) };
    const { probabilities } = await session.run(feeds);
    return rank(probabilities.data, labels, top);
  }
  return { labels, image, classify };
}

/** Read a file whole; a missing one is told in a line. */
export async function read(path, kind) {
  try {
    return await readFile(path);
  } catch (error) {
    const missing = error.code === "ENOENT";
    throw new ClassifierError(
      missing ? `there is no ${kind} ${path}` : `the ${kind} ${path} cannot be read (${error.code})`,
    );
  }
}

/** An image file → 8-bit pixels: upright, first frame, on white, without colour management. */
async function decode(file) {
  try {
    const { data, info } = await sharp(file, {
      autoOrient: true,
      failOn: "error",
      ignoreIcc: true,
      limitInputPixels: MOST_PIXELS,
    })
      .flatten({ background: "white" })
      .toColourspace("srgb")
      .raw({ depth: "uchar" })
      .toBuffer({ resolveWithObject: true });
    return { data, width: info.width, height: info.height, channels: info.channels };
  } catch (error) {
    throw new ClassifierError(`this is no image that can be read (${firstLine(error)})`);
  }
}

const firstLine = (error) => String(error.message ?? error).trim().split("\n")[0];
