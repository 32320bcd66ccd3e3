// An image, by the browser → pixels: upright, as stored (no colour management), on white.

import { MOST_PIXELS } from "./image.mjs";

let canvas, context; // kept, for a camera's frames have one size

/**
 * @param {Blob | ImageBitmap} source an image file; or a frame, which is closed
 * @returns {Promise<ImageData>}
 * @throws {Error} it is no image, or has too many pixels
 */
export async function decode(source) {
  let bitmap = source;
  if (source instanceof Blob) {
    const as = { imageOrientation: "from-image", colorSpaceConversion: "none" };
    try {
      bitmap = await createImageBitmap(source, as);
    } catch {
      throw new Error("this is no image that the browser can read: give a JPEG, PNG or WebP");
    }
  }
  const { width, height } = bitmap;
  try {
    if (width * height > MOST_PIXELS) {
      throw new Error(`${width}×${height} pixels are too many: shrink the image`);
    }
    if (canvas?.width !== width || canvas.height !== height) {
      canvas = new OffscreenCanvas(width, height);
      context = canvas.getContext("2d", { willReadFrequently: true });
    }
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
    context.drawImage(bitmap, 0, 0); // at its own size: a canvas resizes otherwise than Pillow
    return context.getImageData(0, 0, width, height);
  } finally {
    bitmap.close();
  }
}
