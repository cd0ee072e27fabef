"""`gpt2-bundle sign` and `verify-signature`: every changed byte is found, and OpenSSF's own command agrees."""

from __future__ import annotations

import base64
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serving.cli import run
from tests.closed_form import write_bundle
from tests.serving.distribution.keys import key_pair
from tests.tiny_build import Fails, contents


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    write_bundle(folder, extra={"README.md": b"# tiny\n"})
    return folder


@pytest.fixture
def signed(bundle: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A bundle, its signature and the public key."""
    private, public = key_pair(tmp_path)
    assert run(["sign", str(bundle), "--key", str(private)]) == 0
    return bundle, tmp_path / "tiny.sig", public


def verify(bundle: Path, public: Path) -> list[str]:
    return ["verify-signature", str(bundle), "--key", str(public)]


@pytest.mark.parametrize("curve", ["SECP256R1", "SECP384R1", "SECP521R1"])
def test_a_signature_holds_and_leaves_the_bundle_as_it_is(
    bundle: Path, tmp_path: Path, curve: str, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = key_pair(tmp_path, curve=curve)
    before = contents(bundle)
    assert run(["sign", str(bundle), "--key", str(private)]) == 0
    assert run(verify(bundle, public)) == 0
    assert f"{len(before)} files" in capsys.readouterr().out
    assert contents(bundle) == before
    assert not list(tmp_path.glob(".tiny.sig*"))


def test_a_copy_under_another_name_has_the_same_signature(signed: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bundle, signature, public = signed
    copy = shutil.copytree(bundle, tmp_path / "elsewhere" / "renamed")
    assert run([*verify(copy, public), "--signature", str(signature)]) == 0


def test_openssf_verifies_it(signed: tuple[Path, Path, Path]) -> None:
    bundle, signature, public = signed
    command = [sys.executable, "-m", "model_signing", "verify", "key", bundle]
    command += ["--signature", signature, "--public_key", public]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (bundle / "README.md").write_bytes(b"# Tiny\n")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0


def test_every_flipped_byte_of_the_bundle_is_found(signed: tuple[Path, Path, Path], fails: Fails) -> None:
    bundle, _, public = signed
    choose = random.Random(7)
    for path in sorted(each for each in bundle.rglob("*") if each.is_file()):
        data = path.read_bytes()
        flipped = bytearray(data or b"?")  # An empty file gets a byte.
        flipped[choose.randrange(len(flipped))] ^= 1 << choose.randrange(8)
        path.write_bytes(flipped)
        fails(verify(bundle, public), 1)
        path.write_bytes(data)
    assert run(verify(bundle, public)) == 0


def test_a_manifest_that_was_made_to_fit_is_found(signed: tuple[Path, Path, Path], fails: Fails) -> None:
    """What hashes alone cannot see: a changed file with a manifest that names its new hash."""
    bundle, _, public = signed
    shutil.rmtree(bundle)
    write_bundle(bundle, extra={"README.md": b"# Tiny\n"})
    assert run(["inspect", str(bundle), "--json"]) == 0
    fails(verify(bundle, public), 1, "the signature is of other files")


def test_a_changed_signature_is_found(signed: tuple[Path, Path, Path], fails: Fails) -> None:
    bundle, signature, public = signed
    whole = json.loads(signature.read_bytes())
    for part in ("payload", "signature"):
        changed = json.loads(signature.read_bytes())
        envelope = changed["dsseEnvelope"]
        holder, key = (envelope, "payload") if part == "payload" else (envelope["signatures"][0], "sig")
        data = bytearray(base64.b64decode(holder[key]))
        data[len(data) // 2] ^= 1
        holder[key] = base64.b64encode(data).decode()
        signature.write_text(json.dumps(changed))
        fails(verify(bundle, public), 1, str(signature))
    # A payload of another statement with the right hashes still has a wrong signature.
    changed = json.loads(json.dumps(whole))
    payload = base64.b64decode(changed["dsseEnvelope"]["payload"])
    changed["dsseEnvelope"]["payload"] = base64.b64encode(payload + b" ").decode()
    signature.write_text(json.dumps(changed))
    fails(verify(bundle, public), 1, "was not made with this key, or was changed")


def test_another_key_is_refused(signed: tuple[Path, Path, Path], tmp_path: Path, fails: Fails) -> None:
    bundle, signature, _ = signed
    _, other = key_pair(tmp_path, "other")
    fails(verify(bundle, other), 1, "was not made with this key")
    # Nor does a signature without the key's hint let it pass.
    content = json.loads(signature.read_bytes())
    content["verificationMaterial"]["publicKey"] = {}
    signature.write_text(json.dumps(content))
    fails(verify(bundle, other), 1, "was not made with this key")


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "7", "[" * 100_000, '{"dsseEnvelope": {"payload": "!"}}', '{"dsseEnvelope": 1}', "\udcff"]
)
def test_what_is_no_signature(signed: tuple[Path, Path, Path], fails: Fails, text: str) -> None:
    bundle, signature, public = signed
    signature.write_bytes(text.encode("utf-8", "surrogateescape"))
    fails(verify(bundle, public), 1, "is not a model signature")


def test_keys_that_are_none(bundle: Path, tmp_path: Path, fails: Fails) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

    private, public = key_pair(tmp_path)
    wrong = [tmp_path / name for name in ("text.pem", "rsa.pem", "ed25519.pem", "k1.pem")]
    wrong[0].write_text("no key")
    how = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    wrong[1].write_bytes(rsa.generate_private_key(65537, 2048).private_bytes(*how))
    wrong[2].write_bytes(ed25519.Ed25519PrivateKey.generate().private_bytes(*how))
    wrong[3].write_bytes(key_pair(tmp_path, "koblitz", "SECP256K1")[0].read_bytes())
    for key in (*wrong, public):
        fails(["sign", str(bundle), "--key", str(key)], 2, "the private key is not an elliptic-curve key")
    assert run(["sign", str(bundle), "--key", str(private)]) == 0
    for key in (*wrong, private):
        fails(verify(bundle, key), 2, "the public key is not an elliptic-curve key")
    fails(["sign", str(bundle), "--key", str(tmp_path / "missing")], 2, "missing")


def test_an_encrypted_key(bundle: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = key_pair(tmp_path, password=b"secret")
    sign = ["sign", str(bundle), "--key", str(private)]
    fails(sign, 2, "is encrypted; set GPT2_BUNDLE_KEY_PASSWORD")
    monkeypatch.setenv("GPT2_BUNDLE_KEY_PASSWORD", "wrong")
    line = fails(sign, 2, "GPT2_BUNDLE_KEY_PASSWORD does not open it")
    assert "wrong" not in line
    assert not (tmp_path / "tiny.sig").exists()
    monkeypatch.setenv("GPT2_BUNDLE_KEY_PASSWORD", "secret")
    assert run(sign) == 0 and run(verify(bundle, public)) == 0


def test_a_signature_stays_outside_the_bundle(bundle: Path, tmp_path: Path, fails: Fails) -> None:
    private, public = key_pair(tmp_path)
    before = contents(bundle)
    fails(["sign", str(bundle), "--key", str(private), "--signature", str(bundle / "a.sig")], 2, "lies inside")
    fails(verify(bundle, public), 2, "there is no such file", "'gpt2-bundle sign'")
    assert contents(bundle) == before


def test_a_file_that_a_signature_would_leave_out(tmp_path: Path, fails: Fails) -> None:
    private, _ = key_pair(tmp_path)
    write_bundle(tmp_path / "hidden", extra={".gitignore": b"x"})
    fails(["sign", str(tmp_path / "hidden"), "--key", str(private)], 1, "such as .gitignore")
    assert not (tmp_path / "hidden.sig").exists()


def test_without_the_package(bundle: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    private, _ = key_pair(tmp_path)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    fails(["sign", str(bundle), "--key", str(private)], 1, "pip install 'gpt2-bundle[sign]'")
