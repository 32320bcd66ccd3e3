// Probabilities → labelled answers; and what a session must be to be fed an image.

/**
 * @param {ArrayLike<number>} probabilities of one image
 * @param {string[]} labels in the same order
 * @param {number} [count] how many are wanted
 * @returns {{label: string, index: number, probability: number}[]} the likeliest first
 * @throws {Error} one of them is NaN or infinite
 */
export function rank(probabilities, labels, count = 5) {
  if (!Array.from(probabilities).every(Number.isFinite)) {
    throw new Error("the model answers with NaN or infinity: take another variant of it");
  }
  return Array.from(probabilities, (probability, index) => ({
    label: labels[index] ?? `class ${index}`,
    index,
    probability,
  }))
    .sort((a, b) => b.probability - a.probability || a.index - b.index)
    .slice(0, count);
}

/**
 * Refuse a graph that wants other pixels than this app gives.
 *
 * @param {{inputMetadata: readonly {name: string, type?: string}[]}} session of ONNX Runtime
 */
export function requireUint8(session) {
  const [input] = session.inputMetadata;
  if (input?.name !== "image" || input.type !== "uint8") {
    throw new Error(
      `its input is ${input?.type} "${input?.name}", not uint8 "image": export it with input = "uint8"`,
    );
  }
}
