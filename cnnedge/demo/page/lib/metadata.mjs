// Labels and image contract out of the ONNX file itself: the one file is all an app needs.
//
// An ONNX file is a protobuf message. Of its fields only `metadata_props` (14), pairs of strings,
// is read; the graph, field 7 and nearly all of the file, is stepped over.

const METADATA = 14;
const VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5; // protobuf's wire types
const RESIZES = ["stretch", "crop", "letterbox"];
const NONE = "this is no model that cnnedge exported";

/**
 * @param {Uint8Array} bytes of an ONNX file
 * @returns {{labels: string[], image: {height: number, width: number, channels: number,
 *   resize: string}, name: string, version: string}}
 * @throws {Error} it is no ONNX file, or none that cnnedge exported
 */
export function readMetadata(bytes) {
  const about = {};
  const text = new TextDecoder("utf-8", { fatal: true });
  try {
    for (const [field, pair] of fieldsOf(bytes)) {
      if (field !== METADATA || !pair) continue;
      const entry = {};
      for (const [part, value] of fieldsOf(pair)) entry[part] = text.decode(value);
      about[entry[1]] = entry[2] ?? "";
    }
  } catch {
    throw new Error("this is no whole ONNX file");
  }
  let labels, image;
  try {
    labels = JSON.parse(about["cnnedge.labels"]);
    image = JSON.parse(about["cnnedge.image"]);
  } catch {
    throw new Error(`${NONE}: it does not hold its labels and its image contract`);
  }
  const { height, width, channels = 3, resize = "stretch" } = image ?? {};
  const sized = [height, width].every((n) => Number.isInteger(n) && n > 0);
  const known = [1, 3].includes(channels) && RESIZES.includes(resize);
  if (!Array.isArray(labels) || !sized || !known) {
    throw new Error(`${NONE}: its labels or its image contract cannot be read`);
  }
  return {
    labels,
    image: { height, width, channels, resize },
    name: about["cnnedge.model"] ?? "",
    version: about["cnnedge.version"] ?? "",
  };
}

/** Yield `[field number, bytes]` of a protobuf message; null for what is not a run of bytes. */
function* fieldsOf(bytes) {
  let at = 0;
  const varint = () => {
    // Not by shifts, which end at 32 bits: a graph may be larger than 2 GiB.
    for (let value = 0, place = 1; ; place *= 128) {
      if (at >= bytes.length || place > 2 ** 63) throw new Error("cut short");
      const byte = bytes[at++];
      value += (byte & 127) * place;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    if (tag < 8) throw new Error("field 0");
    const kind = tag % 8;
    let value = null;
    if (kind === VARINT) varint();
    else if (kind === FIXED64) at += 8;
    else if (kind === FIXED32) at += 4;
    else if (kind === BYTES) {
      const length = varint();
      value = bytes.subarray(at, at + length);
      at += length;
    } else throw new Error(`wire type ${kind}`);
    if (at > bytes.length) throw new Error("cut short");
    yield [Math.floor(tag / 8), value];
  }
}
