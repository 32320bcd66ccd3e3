"""The smallest app: classify the images named on the command line, on an RTX GPU.

python app.py BUNDLE IMAGE…
"""

import sys
from pathlib import Path

import cnnedge

# What the library compiles for this GPU at the first start is kept for the next one.
cache = Path.home() / ".cache" / "my-app"
classify = cnnedge.load(sys.argv[1], runtime="rtx", cache=cache)
for path in sys.argv[2:]:
    best = classify(path)[0]
    print(f"{path}: {best.label} ({best.probability:.1%})")
