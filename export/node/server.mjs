// node server.mjs MODEL.onnx [PORT]: POST an image file, get JSON.
//   curl --data-binary @photo.jpg localhost:8080
// `createHandler` is what to take into a server of your own.

import { realpathSync } from "node:fs";
import { createServer } from "node:http";
import { pathToFileURL } from "node:url";

import { ClassifierError, openClassifier } from "./classifier.mjs";

const LARGEST = 20 << 20; // bytes of an image file

/**
 * @param {{classify: Function}} classifier of `openClassifier`
 * @param {{largest?: number, top?: number}} [options] bytes of a body; how many answers
 * @returns a handler for `http.createServer`: 200 {answers}, 400 no image, 405, 413 too large
 */
export function createHandler(classifier, { largest = LARGEST, top = 5 } = {}) {
  return async (request, response) => {
    if (request.method !== "POST") {
      return send(response, 405, { error: "POST an image file" }, { Allow: "POST" });
    }
    try {
      const body = await receive(request, largest);
      if (body === null) {
        const error = `an image file may have ${largest} bytes`;
        return send(response, 413, { error }, { Connection: "close" });
      }
      return send(response, 200, { answers: await classifier.classify(body, top) });
    } catch (error) {
      if (request.destroyed && !request.complete) return undefined; // the client went away
      if (error instanceof ClassifierError) return send(response, 400, { error: error.message });
      console.error(error);
      return send(response, 500, { error: "the image could not be classified" });
    }
  };
}

/** Return a request's body, or null once it is larger than it may be. */
async function receive(request, largest) {
  if (Number(request.headers["content-length"]) > largest) return null;
  const parts = [];
  let size = 0;
  for await (const part of request.iterator({ destroyOnReturn: false })) {
    size += part.length;
    if (size > largest) return null;
    parts.push(part);
  }
  return Buffer.concat(parts);
}

function send(response, status, document, headers = {}) {
  response.writeHead(status, { "Content-Type": "application/json", ...headers });
  response.end(`${JSON.stringify(document)}\n`);
}

async function main([model, port = "8080"]) {
  if (!model || !/^\d+$/.test(port) || Number(port) > 65535) {
    console.error("usage: node server.mjs MODEL.onnx [PORT]");
    return void (process.exitCode = 2);
  }
  const server = createServer(createHandler(await openClassifier(model)));
  server.on("error", (error) => {
    console.error(`error: cannot listen on port ${port} (${error.code}); name another`);
    process.exitCode = 1;
  });
  return server.listen(Number(port), "127.0.0.1", () =>
    console.log(`http://127.0.0.1:${server.address().port}/`),
  );
}

const started = process.argv[1] && pathToFileURL(realpathSync(process.argv[1])).href;
if (import.meta.url === started) {
  try {
    await main(process.argv.slice(2));
  } catch (error) {
    if (!(error instanceof ClassifierError)) throw error;
    console.error(`error: ${error.message}`);
    process.exitCode = 1;
  }
}
