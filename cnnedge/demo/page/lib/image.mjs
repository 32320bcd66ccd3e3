// Decoded pixels → what the network takes, by the model's image contract: the same as cnnedge's
// Python does (cnnedge/image.py), to the bit where the decoded pixels are the same.

import { resize } from "./resize.mjs";

/** More pixels than this are refused, as in Python. */
export const MOST_PIXELS = 89_478_485;

/**
 * @param {{data: Uint8Array | Uint8ClampedArray, width: number, height: number,
 *   channels?: number}} picture upright, opaque; 1, 3 or 4 channels (4 where not said, as in a
 *   browser's ImageData; the fourth is not looked at)
 * @param {{height: number, width: number, channels: number, resize: string}} contract as
 *   `readMetadata` returns it
 * @returns {Uint8Array} `[height, width, channels]`
 */
export function toTensor(picture, contract) {
  const { width, height, channels } = contract;
  let { data: pixels, channels: stride = 4 } = picture;
  if (channels === 1 && stride !== 1) {
    pixels = toGrey(pixels, stride);
    stride = 1;
  } else if (channels === 3 && stride < 3) {
    pixels = fromGrey(pixels, stride);
    stride = 3;
  }
  const whole = { left: 0, top: 0, width: picture.width, height: picture.height };
  const fit = (box, w, h) => resize(pixels, picture.width, stride, channels, box, w, h);
  if (contract.resize === "stretch") return fit(whole, width, height);
  if (contract.resize === "crop") return fit(centre(whole, width / height), width, height);

  const scale = Math.min(width / whole.width, height / whole.height);
  const inner = {
    width: Math.max(1, roundHalfEven(whole.width * scale)),
    height: Math.max(1, roundHalfEven(whole.height * scale)),
  };
  const small = fit(whole, inner.width, inner.height);
  const left = Math.floor((width - inner.width) / 2);
  const top = Math.floor((height - inner.height) / 2);
  const canvas = new Uint8Array(height * width * channels);
  const row = inner.width * channels;
  for (let y = 0; y < inner.height; y++) {
    canvas.set(small.subarray(y * row, (y + 1) * row), ((top + y) * width + left) * channels);
  }
  return canvas;
}

/** The largest centred box of a shape, in whole pixels. */
function centre(whole, aspect) {
  const width = Math.max(1, roundHalfEven(Math.min(whole.width, whole.height * aspect)));
  const height = Math.max(1, roundHalfEven(Math.min(whole.height, whole.width / aspect)));
  const left = Math.floor((whole.width - width) / 2);
  const top = Math.floor((whole.height - height) / 2);
  return { left, top, width, height };
}

/** ITU-R 601-2 luma, in Pillow's fixed point. */
function toGrey(pixels, stride) {
  const grey = new Uint8Array(pixels.length / stride);
  if (stride < 3) return grey.map((_, i) => pixels[i * stride]);
  for (let i = 0, p = 0; i < grey.length; i++, p += stride) {
    grey[i] = (pixels[p] * 19595 + pixels[p + 1] * 38470 + pixels[p + 2] * 7471 + 0x8000) >> 16;
  }
  return grey;
}

function fromGrey(pixels, stride) {
  const count = pixels.length / stride;
  const rgb = new Uint8Array(count * 3);
  for (let i = 0; i < count; i++) rgb.fill(pixels[i * stride], i * 3, i * 3 + 3);
  return rgb;
}

/** Python's round: a half goes to the even neighbour. */
function roundHalfEven(x) {
  const rounded = Math.round(x);
  return rounded - x === 0.5 && rounded % 2 !== 0 ? rounded - 1 : rounded;
}
