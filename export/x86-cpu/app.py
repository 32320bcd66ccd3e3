"""The smallest app: classify the images named on the command line.

python app.py BUNDLE IMAGE…
"""

import sys

import cnnedge

classify = cnnedge.load(sys.argv[1])
for path in sys.argv[2:]:
    best = classify(path)[0]
    print(f"{path}: {best.label} ({best.probability:.1%})")
