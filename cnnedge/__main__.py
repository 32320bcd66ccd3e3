"""``python -m cnnedge``, where the script is not on the path."""

from cnnedge.cli import main

main(prog_name="cnnedge")
