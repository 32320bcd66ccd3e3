// The camera: its picture in a <video>, and single frames of it.

const REASONS = {
  NotAllowedError: "The camera was not allowed: allow it in the browser's settings of this page.",
  NotFoundError: "This device has no camera that the browser can see.",
  NotReadableError: "The camera is in use by another program.",
};

/**
 * @param {HTMLVideoElement} video where the picture is shown
 * @returns {Promise<{frame: () => Promise<ImageBitmap>, stop: () => void}>}
 * @throws {Error} there is none, or it may not be used; the message says so in a sentence
 */
export async function startCamera(video) {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new Error("Browsers give the camera only to pages from https or from localhost.");
  }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({
      audio: false,
      video: { facingMode: "environment", width: { ideal: 640 }, height: { ideal: 480 } },
    });
  } catch (error) {
    throw new Error(REASONS[error.name] ?? `The camera cannot be used: ${error.message}`);
  }
  const stop = () => {
    for (const track of stream.getTracks()) track.stop();
    video.srcObject = null;
  };
  try {
    video.srcObject = stream;
    await video.play();
  } catch (error) {
    stop();
    throw new Error(`The camera's picture cannot be shown: ${error.message}`);
  }
  const frame = async () => {
    // An unplugged camera's last picture stays in the video.
    if (!stream.active) throw new Error("The camera stopped.");
    return createImageBitmap(video);
  };
  return { frame, stop };
}
