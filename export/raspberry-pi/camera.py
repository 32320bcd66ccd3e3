"""The smallest camera app for a Raspberry Pi: frame → array → label, until Ctrl-C.

python camera.py BUNDLE [FRAMES]
"""

import sys
import time

import cnnedge

SIZE = (640, 480)  # the network looks at far fewer pixels; a larger frame only costs time


def open_camera():
    """Return a running camera whose frames are uint8 [H, W, 3] RGB."""
    try:
        from picamera2 import Picamera2
    except ImportError as error:
        sys.exit(f"error: picamera2 cannot be imported ({error}); see README.md, Install")
    try:
        camera = Picamera2()
        # libcamera names a format by how it lies in a little-endian word: BGR888 is R, G, B in
        # memory. With RGB888 red and blue are exchanged, and the answers quietly worse.
        camera.configure(camera.create_video_configuration(main={"format": "BGR888", "size": SIZE}))
        camera.start()
    except IndexError:
        sys.exit("error: no camera was found; see what `rpicam-hello --list-cameras` says")
    except RuntimeError as error:  # another program's, above all
        sys.exit(f"error: the camera cannot be used: {error}; does another program use it?")
    return camera


def main(bundle, frames=None):
    """Say what the camera sees."""
    try:
        classify = cnnedge.load(bundle)
    except cnnedge.CnnEdgeError as error:
        sys.exit(f"error: {error}")
    print(f"{classify.variant}: {classify.choice.reason}", file=sys.stderr)
    camera = open_camera()
    try:
        done = 0
        while done != frames:
            frame = camera.capture_array("main")
            start = time.perf_counter()
            best = classify(frame, top=1)[0]
            taken = 1000 * (time.perf_counter() - start)
            print(f"{best.label} {best.probability:.1%} {taken:.1f} ms", flush=True)
            done += 1
    except KeyboardInterrupt:
        pass
    finally:
        camera.stop()


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not all(word.isdigit() for word in sys.argv[2:]):
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    main(sys.argv[1], *map(int, sys.argv[2:]))
