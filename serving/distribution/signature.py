"""Sign a bundle and check a signature, in the format of OpenSSF Model Signing, by its own library and a local key.

The signature is a Sigstore bundle over the SHA-256 of every file, manifest.json too. Nothing is sent anywhere.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from serving.bundle import Bundle
from serving.bundle.plain_files import read_plain
from serving.bundle.strict_json import MAX_BYTES
from serving.distribution.destination import file_hashes, signed_hashes
from serving.errors import BundleError, GPT2BundleError, InputError, RuntimeMissingError

PASSWORD = "GPT2_BUNDLE_KEY_PASSWORD"
_CURVES = "an elliptic-curve key (P-256, P-384 or P-521) in PEM form"


class SignatureError(GPT2BundleError):
    """A signature does not belong to the bundle and the key."""


def sign_bundle(bundle: Bundle, key: Path, signature: Path) -> Path:
    """Sign every file of the opened `bundle` with the private key in `key` and write `signature` in one rename.

    An encrypted key takes its password from the environment variable PASSWORD. Raises InputError for a key that is
    none, and BundleError if the bundle changes while it is signed.
    """
    signing = _library().signing
    password = os.environ.get(PASSWORD)
    try:
        config = signing.Config().use_elliptic_key_signer(
            private_key=key, password=password.encode() if password is not None else None
        )
    except (ValueError, TypeError, AttributeError) as error:
        advice = f"is encrypted; set {PASSWORD}" if "encrypted" in str(error) else f"is not {_CURVES}"
        if password is not None:
            advice = f"is not {_CURVES}, or {PASSWORD} does not open it"
        raise InputError(f"{key}: the private key {advice}") from None
    unfinished = signature.with_name(f".{signature.name}.{secrets.token_hex(4)}")
    try:
        config.sign(bundle.folder, unfinished)
        if signed_hashes(json.loads(unfinished.read_bytes())) != file_hashes(bundle):
            raise BundleError(
                f"{bundle.folder}: a file changed while it was signed, or has a name that a signature leaves out, "
                "such as .gitignore; sign the bundle again"
            )
        unfinished.replace(signature)
    finally:
        unfinished.unlink(missing_ok=True)
    return signature


def verify_signature(bundle: Bundle, key: Path, signature: Path) -> None:
    """Check that `signature` was made with the private half of `key` over every file of `bundle` as it is now.

    Raises InputError for a public key that is none, and SignatureError for every signature that does not hold.
    """
    verifying = _library().verifying
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (ValueError, TypeError, AttributeError):
        raise InputError(f"{key}: the public key is not {_CURVES}") from None
    try:
        content: Any = json.loads(read_plain(signature, MAX_BYTES))
    except FileNotFoundError:
        raise InputError(f"{signature}: there is no such file; make it with 'gpt2-bundle sign'") from None
    except (ValueError, RecursionError):
        content = None
    signed = signed_hashes(content)
    if signed is None:
        raise SignatureError(f"{signature}: is not a model signature over a bundle, or was changed")
    if signed != file_hashes(bundle):
        raise SignatureError(
            f"{signature}: the signature is of other files than those of {bundle.folder}; get both again"
        )
    try:
        config.verify(bundle.folder, signature)
    except Exception:  # What a malformed signature raises in the library has no common base.
        raise SignatureError(
            f"{signature}: the signature was not made with this key, or was changed; get it and the key again"
        ) from None


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise RuntimeMissingError(
            f"signatures need {error.name}, which is not installed; run: pip install 'gpt2-bundle[sign]'"
        ) from None
    return model_signing
