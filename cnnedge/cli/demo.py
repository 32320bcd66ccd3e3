"""The command that shows a bundle in a browser."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import click

from cnnedge.cli.shell import command, main, say
from cnnedge.cli.show import print_json


@command(
    main,
    "demo",
    "cnnedge demo alexnet\ncnnedge demo alexnet --variant int8 --out site",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: for others too.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the site there, serve nothing.")
@click.option("--force", is_flag=True, help="Replace the site that is there.")
@click.option("--variant", help="The page offers this one alone. Default: all verified for CPUs.")
@click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path),
    help="An unpacked onnxruntime-web. Default: npm fetches it once.",
)
@click.option("--open/--no-open", "show", default=False, help="Open the browser.  [no]")
def demo_command(
    bundle: Path,
    port: int,
    host: str,
    out: Path | None,
    force: bool,
    variant: str | None,
    runtime_dir: Path | None,
    show: bool,
    as_json: bool,
) -> None:
    """Show the model at work in a browser: an image, a sample or the camera in, five answers out.

    The model runs in the browser; no image leaves it, and nothing is loaded from elsewhere. --out
    writes the same page as a folder for any file server.
    """
    from cnnedge.bundle import open_bundle
    from cnnedge.demo import check_site_place, find_runtime, lay_site, open_server, page_variants
    from cnnedge.files import scratch_folder

    opened = open_bundle(bundle)
    names = [v.name for v in page_variants(opened, variant)]
    if out is not None:
        check_site_place(out, overwrite=force)
    runtime = find_runtime(runtime_dir, tell=lambda line: say(line, err=True))
    if not runtime.known:
        say(f"warning: {runtime.folder} is another version than was tested", err=True)
    if out is not None:
        lay_site(opened, out, runtime, variant=variant, overwrite=force)
        if as_json:
            print_json({"folder": str(out), "variants": names})
        else:
            say(f"{out}: put it on any file server, or: python -m http.server -d {out}")
        return
    with scratch_folder() as temporary:
        site = lay_site(opened, temporary / "site", runtime, variant=variant, place=os.symlink)
        with open_server(site, host, port) as server:
            if as_json:
                print_json({"url": server.url, "folder": str(site), "variants": names})
            else:
                say(f"{server.url}  (Ctrl-C ends it)")
            if show:  # in a thread: some browsers are waited for
                threading.Thread(target=click.launch, args=(server.url,), daemon=True).start()
            with contextlib.suppress(KeyboardInterrupt):  # that is how it is meant to end
                server.serve_forever(poll_interval=0.2)
