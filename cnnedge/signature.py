"""The maker's signature over a bundle: a device refuses what its maker did not sign.

The hashes in a manifest find a file that was damaged; whoever alters a file on purpose alters its
hash too. A signature tells the two apart. It is made and checked by the OpenSSF's model-signing
library, with an elliptic-curve key and no network, over every file in the folder but itself, and
lies in ``bundle.sig``: a Sigstore bundle (v0.3), a DSSE envelope around an in-toto statement that
lists each file's SHA-256. Any other tool that reads those can check it too.
"""

from __future__ import annotations

import base64
import importlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cnnedge.archive import is_archive
from cnnedge.bundle import MANIFEST, SIGNATURE, Bundle, open_bundle, require_folder
from cnnedge.change import changing, unfinished
from cnnedge.errors import (
    MALFORMED,
    BundleError,
    CnnEdgeError,
    MissingExtraError,
    SignatureError,
    first_line,
)
from cnnedge.files import atomic_path, cannot_write, refuse_special, scratch_folder

_MOST_BYTES = 16 << 20  # a signature of a hundred thousand files has as many
_GENERATE = "make a pair with: openssl ecparam -name prime256v1 -genkey -noout -out private.pem"


@dataclass(frozen=True)
class Signature:
    """What a signature says.

    Attributes:
        file: Where it lies.
        key_sha256: SHA-256 of the public key's PEM: which key it belongs to.
        files: How many files it covers.
    """

    file: str
    key_sha256: str
    files: int

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return asdict(self)


def sign_bundle(
    bundle: Path | str, private_key: Path | str, *, overwrite: bool = False
) -> Signature:
    """Sign a bundle: write ``bundle.sig`` into it, whole or not at all.

    Args:
        bundle: The bundle's folder. It is checked first: a damaged one is not signed, nor one with
            files that its manifest does not name.
        private_key: An elliptic-curve key (P-256, P-384 or P-521) in a PEM file, unencrypted.
        overwrite: Whether an older signature is replaced.

    Raises:
        BundleError: it is no whole bundle, holds a file that does not belong to it, or is signed
            already and ``overwrite`` is false.
        CnnEdgeError: the key cannot be used, or the bundle cannot be written.
        MissingExtraError: the library is not installed.
    """
    library = _library("signing")
    key, root = Path(private_key), Path(bundle).resolve()
    if not root.is_dir():
        require_folder(open_bundle(bundle), "signing")
    with changing(root):
        opened = open_bundle(bundle)
        if key.resolve().is_relative_to(root):
            raise BundleError(
                f"the private key {key} lies in the bundle, which you are about to hand over",
                fix="move it to where only you can read it",
            )
        if (root / SIGNATURE).exists() and not overwrite:
            raise BundleError(f"{bundle} is signed already", fix="pass --force to sign it anew")
        left = unfinished(root)
        _refuse_links(root, bundle, left)
        strangers = sorted(_files(root, left) - opened.files())
        if strangers:
            raise BundleError(
                f"{bundle} holds what its manifest does not name: {_some(strangers)}",
                fix="remove it: a signature covers the whole folder",
            )
        with _key_errors(key, private=True):
            config = library.Config().use_elliptic_key_signer(private_key=key)
        config.set_hashing_config(_hashing(left))
        _write_signature(config, root)
    return _read(root / SIGNATURE, Path(bundle))[0]


def _write_signature(config: Any, root: Path) -> None:
    """Sign elsewhere, since all that lies in the folder is signed, and then put it there."""
    with scratch_folder() as scratch:
        try:
            config.sign(root, scratch / SIGNATURE)
        except OSError as error:
            raise cannot_write(root / SIGNATURE, error) from error
        with atomic_path(root / SIGNATURE) as temporary:
            temporary.write_bytes((scratch / SIGNATURE).read_bytes())


def check_signature(bundle: Path | str | Bundle, public_key: Path | str) -> Signature:
    """Check that a bundle is, file by file, what the holder of a key signed.

    It tells of this moment; who goes on to read the files uses `open_signed`.

    Args:
        bundle: The bundle's folder, its zip file, or either as it was opened.
        public_key: The public half of the key it was signed with, a PEM file.

    Raises:
        SignatureError: it is not signed, or with another key, or a file was altered, added or
            removed since.
        BundleError: it is no bundle.
        CnnEdgeError: the key cannot be used, or a file cannot be read.
        MissingExtraError: the library is not installed.
    """
    return _checked(bundle, public_key)[0]


def _checked(
    bundle: Path | str | Bundle, public_key: Path | str
) -> tuple[Signature, dict[str, str]]:
    """Check it, and return the signature with the hash that was signed for each file."""
    library = _library("verifying")
    if not isinstance(bundle, Bundle) and is_archive(Path(bundle)):
        bundle = open_bundle(bundle)
    key = Path(public_key)
    if isinstance(bundle, Bundle):
        root, where = bundle.root.resolve(), bundle.origin
    else:
        root, where = Path(bundle).resolve(), Path(bundle)
        if not (root / MANIFEST).is_file():
            open_bundle(bundle)  # says what is wrong with it
    refuse_special(key)
    with _key_errors(key, private=False):
        config = library.Config().use_elliptic_key_verifier(public_key=key)
    if not (root / SIGNATURE).is_file():
        raise SignatureError(
            f"{where} is not signed: it has no {SIGNATURE}",
            fix="get it from its maker, signed: cnnedge sign BUNDLE --key PRIVATE.pem",
        )
    signature, signed, content = _read(root / SIGNATURE, where)
    left = unfinished(root)
    _refuse_links(root, where, left)
    config.set_hashing_config(_hashing(left))
    try:
        with scratch_folder() as scratch:  # the very bytes that were read
            (scratch / SIGNATURE).write_bytes(content)
            config.verify(root, scratch / SIGNATURE)
    except OSError as error:
        raise CnnEdgeError(
            f"a file of {where} cannot be read: {error.strerror or error}", fix="check its rights"
        ) from error
    # Whatever else goes wrong in there, the bundle is refused; these only find the words for it.
    except Exception as error:
        raise _refusal(error, root, where, signed, left) from error
    # The library goes by the signature's own list of what it need not cover.
    uncovered = sorted(_files(root, left) - signed.keys())
    if uncovered:
        raise SignatureError(
            f"the signature of {where} does not cover {_some(uncovered)}",
            fix="have it signed whole: cnnedge sign BUNDLE --key PRIVATE.pem",
        )
    return signature, signed


def open_signed(path: Path | str, public_key: Path | str) -> Bundle:
    """Open a bundle that the holder of a key signed.

    The manifest that is read is held against the hash that was signed, and every other file
    against the manifest: what is swapped between the check and the reading is refused.

    Raises:
        As `check_signature` and `open_bundle`.
    """
    if is_archive(Path(path)):  # unpacked once: what is checked is what is opened
        opened = open_bundle(path)
        check_signature(opened, public_key)
        return opened
    _, signed = _checked(path, public_key)
    return open_bundle(path, manifest_sha256=signed.get(MANIFEST, ""))


def _library(part: str) -> Any:
    try:
        return importlib.import_module(f"model_signing.{part}")
    except ImportError as error:
        needed = (error.name or "model-signing").partition(".")[0]
        raise MissingExtraError(needed, "sign", purpose="signing bundles") from error


def _hashing(left: Collection[str]) -> Any:
    """Return how files are hashed: all but the signature and what is unfinished, links refused."""
    ignored = [SIGNATURE, *sorted(left)]
    return _library("hashing").Config().set_ignored_paths(paths=ignored, ignore_git_paths=False)


def _refuse_links(root: Path, bundle: Path | str, left: Collection[str]) -> None:
    for path in sorted(root.rglob("*")):
        if not _within(path.relative_to(root), left) and (
            path.is_symlink() or not (path.is_file() or path.is_dir())
        ):
            raise SignatureError(
                f"{path.relative_to(root)} in {bundle} is a link or no ordinary file, which a "
                "signature cannot vouch for",
                fix="put the file itself in its place",
            )


def _files(root: Path, left: Collection[str]) -> set[str]:
    found = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    return {path.as_posix() for path in found if not _within(path, left)} - {SIGNATURE}


def _within(path: Path, left: Collection[str]) -> bool:
    """Whether a path, within the bundle, is one of those that are left out, or lies in one."""
    return any(place.as_posix() in left for place in (path, *path.parents))


def _read(path: Path, where: Path) -> tuple[Signature, dict[str, str], bytes]:
    """Return what a signature file says, the hash that it lists for each file, and its bytes."""
    name = where / SIGNATURE  # as its user knows it: an archive is unpacked elsewhere
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        read = path.read_bytes()
        content = json.loads(read.decode("utf-8"))
        # Before its release 1.0 the library named no key, and now prints a warning for that.
        key = content["verificationMaterial"]["publicKey"]["hint"]
        if not isinstance(key, str) or not key:
            raise ValueError("it names no key")
        statement = json.loads(base64.b64decode(content["dsseEnvelope"]["payload"], validate=True))
        resources = statement["predicate"]["resources"]
        signed = {str(entry["name"]): str(entry["digest"]) for entry in resources}
    except (OSError, *MALFORMED) as error:
        raise SignatureError(
            f"{name} is no signature of a bundle ({first_line(error)})",
            fix="get the bundle from its maker again",
        ) from error
    return Signature(str(name), key, len(signed)), signed, read


def _refusal(
    error: Exception, root: Path, bundle: Path | str, signed: dict[str, str], left: Collection[str]
) -> SignatureError:
    """Return why a signature does not hold, in our words."""
    again = "do not use it; get it from its maker again"
    reason = first_line(error)
    if type(error).__name__ == "InvalidSignature":
        return SignatureError(f"the signature of {bundle} is forged or was altered", fix=again)
    if reason.startswith("Key mismatch"):
        return SignatureError(
            f"{bundle} was signed with another key",
            fix="do not use it, or give the public key of the one who made it",
        )
    if reason.startswith("Signature mismatch"):  # so the list of hashes itself is authentic
        found = {
            entry.identifier: entry.digest.digest_hex
            for entry in _hashing(left).hash(root).resource_descriptors()
        }
        altered = sorted(n for n in found.keys() & signed.keys() if found[n] != signed[n])
        added, missing = sorted(found.keys() - signed.keys()), sorted(signed.keys() - found.keys())
        parts = (("altered", altered), ("added", added), ("missing", missing))
        what = "; ".join(f"{word}: {_some(names)}" for word, names in parts if names)
        if all(n == MANIFEST or n.startswith("engines/") for n in altered + added + missing):
            again = "if `cnnedge engine` was run on it since, it must be signed again"
        return SignatureError(f"{bundle} is not what its maker signed ({what})", fix=again)
    return SignatureError(f"the signature of {bundle} does not hold ({reason})", fix=again)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


@contextmanager
def _key_errors(path: Path, *, private: bool) -> Iterator[None]:
    """Say in one line why a key file cannot be used."""
    half = "private" if private else "public"
    try:
        yield
    except OSError as error:
        raise CnnEdgeError(
            f"cannot read the {half} key {path}: {error.strerror or error}", fix=_GENERATE
        ) from error
    except Exception as error:
        if private and isinstance(error, TypeError):  # `cryptography`'s, for want of a password
            raise CnnEdgeError(
                f"the private key {path} is encrypted",
                fix="decrypt it for the signing: openssl ec -in KEY.pem -out PLAIN.pem",
            ) from error
        text = _peek(path)
        if "PRIVATE KEY" in text and not private:
            raise CnnEdgeError(
                f"{path} is a private key, which belongs on no device",
                fix="give its public half: openssl ec -in PRIVATE.pem -pubout -out PUBLIC.pem",
            ) from error
        if "PUBLIC KEY" in text and private:
            what = f"{path} is a public key, and signing needs the private one"
            raise CnnEdgeError(what, fix=_GENERATE) from error
        if "KEY" in text and (isinstance(error, AttributeError) or "curve" in str(error)):
            raise CnnEdgeError(
                f"{path} is no elliptic-curve key of P-256, P-384 or P-521", fix=_GENERATE
            ) from error
        raise CnnEdgeError(f"{path} is no {half} key in PEM form", fix=_GENERATE) from error


def _peek(path: Path) -> str:
    """Return the PEM headings of a file, or nothing."""
    try:
        text = path.read_bytes()[:65536].decode("ascii", "replace")
    except OSError:
        return ""
    return "\n".join(line for line in text.splitlines() if line.startswith("-----BEGIN"))
