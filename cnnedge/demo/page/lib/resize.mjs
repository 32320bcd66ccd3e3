// Pillow's antialiased bilinear resize, to the bit. A browser's canvas resizes otherwise, and so
// does every other library: enough to flip answers of a network that was trained on this one.
//
// As in Pillow's src/libImaging/Resample.c for 8-bit images: a triangle filter as wide as a pixel
// of the result, a horizontal and a vertical pass, weights in fixed point, and each pass rounded
// to 8 bits.

const PRECISION_BITS = 32 - 8 - 2;
const ONE_HALF = 2 ** (PRECISION_BITS - 1);

/**
 * Resize one part of an image.
 *
 * @param {Uint8Array | Uint8ClampedArray} pixels rows of pixels of `stride` bytes each
 * @param {number} rowPixels how many pixels a row of `pixels` has
 * @param {number} stride bytes from one pixel to the next
 * @param {number} channels 3 or 1: how many bytes of a pixel are taken, the first ones
 * @param {{left: number, top: number, width: number, height: number}} box the part, whole pixels
 * @param {number} width of the result
 * @param {number} height of the result
 * @returns {Uint8Array} `[height, width, channels]`
 */
export function resize(pixels, rowPixels, stride, channels, box, width, height) {
  const source = { pixels, rowPixels, stride, channels, ...box };
  // Each pass rounds, so their order shows in the last bit. The contract's is the width first.
  return down(across(source, width), height).pixels;
}

/** The horizontal pass. */
function across({ pixels, rowPixels, stride, channels, left, top, width: from, height }, width) {
  const result = new Uint8Array(height * width * channels);
  const weighted = weights(from, width);
  for (let y = 0, target = 0; y < height; y++) {
    const row = ((top + y) * rowPixels + left) * stride;
    for (let x = 0; x < width; x++) {
      const { first, factors } = weighted[x];
      let source = row + first * stride;
      let [red, green, blue] = [ONE_HALF, ONE_HALF, ONE_HALF];
      if (channels === 3) {
        for (let k = 0; k < factors.length; k++, source += stride) {
          const factor = factors[k];
          red += pixels[source] * factor;
          green += pixels[source + 1] * factor;
          blue += pixels[source + 2] * factor;
        }
        result[target + 1] = green >> PRECISION_BITS;
        result[target + 2] = blue >> PRECISION_BITS;
      } else {
        for (let k = 0; k < factors.length; k++, source += stride) red += pixels[source] * factors[k];
      }
      result[target] = red >> PRECISION_BITS;
      target += channels;
    }
  }
  return packed(result, width, height, channels);
}

/** The vertical pass. */
function down({ pixels, rowPixels, stride, channels, left, top, width, height: from }, height) {
  const result = new Uint8Array(height * width * channels);
  const weighted = weights(from, height);
  for (let y = 0, target = 0; y < height; y++) {
    const { first, factors } = weighted[y];
    const row = ((top + first) * rowPixels + left) * stride;
    for (let x = 0; x < width; x++) {
      for (let c = 0; c < channels; c++) {
        let sum = ONE_HALF;
        let source = row + x * stride + c;
        for (let k = 0; k < factors.length; k++, source += rowPixels * stride) {
          sum += pixels[source] * factors[k];
        }
        result[target++] = sum >> PRECISION_BITS;
      }
    }
  }
  return packed(result, width, height, channels);
}

function packed(pixels, width, height, channels) {
  return { pixels, rowPixels: width, stride: channels, channels, left: 0, top: 0, width, height };
}

/**
 * For each pixel of the result, the first source pixel it sees and the weight of each from there.
 * The sum of products stays below 2^31: 255 · 2^22, and a rounding of each weight.
 */
function weights(from, to) {
  const scale = from / to;
  const support = Math.max(scale, 1);
  const found = [];
  for (let i = 0; i < to; i++) {
    const centre = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support + 0.5), 0);
    const end = Math.min(Math.trunc(centre + support + 0.5), from);
    const shares = [];
    let total = 0;
    for (let k = first; k < end; k++) {
      const share = Math.max(1 - Math.abs((k - centre + 0.5) * (1 / support)), 0);
      shares.push(share);
      total += share;
    }
    const factors = Int32Array.from(shares, (share) =>
      Math.trunc(0.5 + (share / total) * 2 ** PRECISION_BITS),
    );
    found.push({ first, factors });
  }
  return found;
}
