"""The smallest app: classify the images named on the command line.

python app.py BUNDLE IMAGE…
"""

import sys

import cnnedge

if len(sys.argv) < 3:
    sys.exit(__doc__)
try:
    classify = cnnedge.load(sys.argv[1])
    for path in sys.argv[2:]:
        best = classify(path)[0]
        print(f"{path}: {best.label} ({best.probability:.1%})")
except cnnedge.CnnEdgeError as error:
    sys.exit(f"error: {error}")
