"""The command line: parse, call the library once, print. The only place that knows exit codes.

0 done · 1 failed, one line ``error: what; what to do`` · 2 usage · 3 a gate failed.

``make`` has the commands that build something, ``compress`` the one that makes a model smaller,
``package`` the one that gives a bundle another form, ``sign`` the one that signs it, ``use`` those
that look at a bundle and run it, ``demo`` the one that shows it in a browser, ``shell`` what they
share, ``show`` what they print.
"""

from cnnedge.cli import compress, demo, make, package, sign, use
from cnnedge.cli.shell import main

__all__ = ["compress", "demo", "main", "make", "package", "sign", "use"]
