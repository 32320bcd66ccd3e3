"""The command that signs a bundle, and what `verify` and it say of a signature."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cnnedge.cli.shell import command, main, say
from cnnedge.cli.show import print_json
from cnnedge.errors import GateError, SignatureError

if TYPE_CHECKING:
    from cnnedge.signature import Signature


@command(main, "sign", "cnnedge sign alexnet --key private.pem")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--key",
    required=True,
    metavar="PRIVATE.pem",
    type=click.Path(path_type=Path),
    help="An elliptic-curve key: P-256, P-384 or P-521.",
)
@click.option("--force", is_flag=True, help="Replace an older signature.")
def sign_command(bundle: Path, key: Path, force: bool, as_json: bool) -> None:
    """Sign a bundle, so that devices can refuse what you did not make.

    The signature, bundle.sig, covers every other file in the folder. Check it with `cnnedge verify
    --signature PUBLIC.pem`, or on the device with cnnedge.load(BUNDLE, public_key="PUBLIC.pem").
    docs/signing.md says how to make the keys.
    """
    from cnnedge.signature import sign_bundle

    signature = sign_bundle(bundle, key, overwrite=force)
    if as_json:
        print_json(signature.to_dict())
    else:
        show_signature("written", signature)


def show_signature(done: str, signature: Signature) -> None:
    """Say what a signature covers and whose it is."""
    key = signature.key_sha256
    say(f"{done}: {signature.file}: {signature.files} files, with the key {key}")


def require_signature(bundle: Path, public_key: Path) -> Signature:
    """Check a bundle's signature; one that does not hold is a gate that failed."""
    from cnnedge.signature import check_signature

    try:
        return check_signature(bundle, public_key)
    except SignatureError as error:
        raise GateError(error.what, fix=error.fix) from error
