"""HTTPS and gRPC over TLS with a certificate made for the test, and files that are none."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from serving.protobuf.tf_serving import MESSAGES, MODEL_SERVICE
from tests.serving.commands.test_serve import ROOT, process
from tests.tiny_build import Fails

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


@dataclass(frozen=True)
class Pair:
    """A self-signed certificate for 127.0.0.1 and its key."""

    certificate: Path
    key: Path


def make_pair(folder: Path, name: str) -> Pair:
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    curve, names = "ec_paramgen_curve:prime256v1", "subjectAltName=IP:127.0.0.1,DNS:localhost"
    command = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", curve, "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", names, "-keyout", str(pair.key), "-out", str(pair.certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return pair


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Pair]:
    folder = tmp_path_factory.mktemp("tls")
    return make_pair(folder, "one"), make_pair(folder, "two")


def test_http_and_grpc_are_encrypted(real_bundle: Path, pairs: tuple[Pair, Pair]) -> None:
    ours, other = pairs
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    options = ["--ssl-certfile", str(ours.certificate), "--ssl-keyfile", str(ours.key), "--grpc-port", str(port)]
    status = MESSAGES["GetModelStatusRequest"]()
    status.model_spec.name = "bytes"

    def ask(pair: Pair) -> int:
        """States of the model by gRPC, trusting the certificate of `pair` alone."""
        trusted = grpc.ssl_channel_credentials(pair.certificate.read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{port}", trusted) as channel:
            call = channel.unary_unary(
                f"/{MODEL_SERVICE}/GetModelStatus",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=MESSAGES["GetModelStatusResponse"].FromString,
            )
            return len(call(status, timeout=20).model_version_status)

    with process(real_bundle, *options) as (server, url):
        assert url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=ours.certificate)
        with urllib.request.urlopen(f"{url}/health/ready", context=trusting, timeout=20) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(f"{url}/health/ready", timeout=20)
        with pytest.raises(OSError):
            urllib.request.urlopen(url.replace("https", "http") + "/health/ready", timeout=20)
        assert ask(ours) == 1
        with pytest.raises(grpc.RpcError):
            ask(other)
        server.terminate()
        assert server.wait(60) == 0


@pytest.mark.parametrize("beside", [[], ["--grpc-port", "0"]])
def test_what_is_no_pair_is_one_line(
    bundle_folder: Path, pairs: tuple[Pair, Pair], fails: Fails, tmp_path: Path, beside: list[str]
) -> None:
    ours, other = pairs
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("-----BEGIN CERTIFICATE-----\nnot base64\n-----END CERTIFICATE-----\n")
    for certificate, key in (
        (ours.certificate, other.key),
        (ours.key, ours.certificate),
        (nonsense, ours.key),
        (ours.certificate, nonsense),
        (tmp_path / "none.pem", ours.key),
        (ours.certificate, tmp_path / "none.pem"),
        (tmp_path, ours.key),
        (ours.certificate, tmp_path),
    ):
        options = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), *beside]
        fails(["serve", str(bundle_folder), "--port", "0", *options], 2, "check --ssl-certfile and --ssl-keyfile")


def test_a_grpc_port_that_is_taken_is_one_line_before_the_model_loads(bundle_folder: Path) -> None:
    # The bundle's graph is no graph, so whatever came behind its loading would be another error.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "serving.cli", "serve", str(bundle_folder), "--port", "0", "--grpc-port", port]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    wanted = f"error: port {port} on 127.0.0.1 is taken; choose another with --grpc-port\n"
    assert (done.returncode, done.stderr, done.stdout) == (1, wanted, "")
