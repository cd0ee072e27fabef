"""Keys for tests of signatures."""

from __future__ import annotations

from pathlib import Path


def key_pair(
    folder: Path, name: str = "signer", curve: str = "SECP256R1", password: bytes | None = None
) -> tuple[Path, Path]:
    """Write a new private and public key in PEM form and return both paths."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(getattr(ec, curve)())
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    pem = serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, how))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public
