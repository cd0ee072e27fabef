"""A local endpoint with the part of the Hugging Face hub's API that its client needs to create, commit and download.

It stands in for the hub in tests: huggingface_hub itself talks to it. Large files come by LFS, not by Xet.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 200
"""Bytes from which a file goes by LFS; the hub's own threshold is higher."""


@dataclass
class FakeHub:
    """Repositories by name, each a list of commits: path to bytes. `fail` maps a path's pattern to what it answers."""

    url: str = ""
    tokens: dict[str, str] = field(default_factory=lambda: {"hf_writer": "write", "hf_reader": "read"})
    repositories: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    fail: dict[str, int | str] = field(default_factory=dict)
    corrupt: str = ""

    def head(self, name: str) -> str:
        return self.oid(name, len(self.repositories[name]) - 1)

    def oid(self, name: str, number: int) -> str:
        return hashlib.sha1(f"{name} {number}".encode()).hexdigest()

    def files(self, name: str) -> dict[str, bytes]:
        """The files of the newest commit."""
        return self.repositories[name][-1]

    def at(self, name: str, revision: str) -> dict[str, bytes]:
        commits = self.repositories[name]
        return next((files for at, files in enumerate(commits) if self.oid(name, at) == revision), commits[-1])

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob}
        if len(data) >= LARGE:
            found["lfs"] = {"size": len(data), "oid": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
        return found


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"X_Error_Message": message, "X_Error_Code": code} if code else {"X_Error_Message": message}
        self.answer(status, {"error": message}, **headers)

    def do_any(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {path}")
        for pattern, what in hub.fail.items():
            if re.search(pattern, f"{self.command} {path}"):
                if what == "drop":
                    self.close_connection = True
                    self.connection.close()
                    return
                return self.refuse(int(what), "the fake hub was told to fail")
        right = hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body), right)
        if found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            hub.uploads.append(found[1])
            if hashlib.sha256(body).hexdigest() != found[1]:
                return self.refuse(400, "the object has another SHA-256")
            hub.blobs[found[1]] = body
            return self.answer(200, {})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            return self.model(found[1], (found[2] or "").strip("/").split("/"), body, right)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(found[1], json.loads(body), right)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            data = hub.at(found[1], found[2])[found[3]]
            tag = hashlib.sha256(data).hexdigest() if len(data) >= LARGE else hub.entry("", data)["oid"]
            return self.answer(200, data, ETag=f'"{tag}"', X_Repo_Commit=hub.head(found[1]))
        self.refuse(404, f"no such place: {path}")

    do_GET = do_POST = do_PUT = do_HEAD = do_any

    def create(self, asked: dict[str, Any], right: str | None) -> None:
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        if right is None:
            return self.refuse(401, "Invalid username or password.")
        if right != "write":
            return self.refuse(403, "You don't have the rights to create a model under this namespace")
        if name in self.hub.repositories:
            return self.answer(409, {**url, "error": "You already created this model repo"})
        self.hub.repositories[name] = [{".gitattributes": b"*.safetensors filter=lfs\n"}]
        if asked.get("visibility") == "private":
            self.hub.private.add(name)
        self.answer(200, url)

    def model(self, name: str, rest: list[str], body: bytes, right: str | None) -> None:
        hub = self.hub
        if name not in hub.repositories or (name in hub.private and right is None):
            return self.refuse(404, "Repository not found", "RepoNotFound")
        files, head = hub.files(name), hub.head(name)
        if rest[0] in ("", "revision"):
            siblings = [{"rfilename": path} for path in files]
            return self.answer(200, {"_id": "1", "id": name, "sha": head, "siblings": siblings, "private": False})
        if rest[0] == "tree":
            tree = [hub.entry(path, data) for path, data in hub.at(name, rest[1]).items()]
            return self.answer(200, tree)
        if right != "write":
            return self.refuse(403, "Your token has no write access")
        if rest[0] == "preupload":
            listed = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                    "oid": self.remote_oid(files.get(each["path"])),
                }
                for each in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": listed})
        assert rest[0] == "commit", rest
        return self.commit(name, [json.loads(line) for line in body.splitlines()])

    def remote_oid(self, data: bytes | None) -> str | None:
        if data is None:
            return None
        entry = self.hub.entry("", data)
        found: str = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        return found

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        hub, files = self.hub, dict(self.hub.files(name))
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, hub.head(name)):
                return self.refuse(412, "A commit has happened since. Please refresh and try again.")
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in hub.blobs:
                    return self.refuse(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        if hub.corrupt:
            files[hub.corrupt] = files[hub.corrupt][:-1] + b"?"
        hub.repositories[name].append(files)
        url = f"{hub.url}/{name}/commit/{hub.head(name)}"
        self.answer(200, {"success": True, "commitOid": hub.head(name), "commitUrl": url})

    def batch(self, name: str, asked: dict[str, Any], right: str | None) -> None:
        if right != "write":
            return self.refuse(403, "Your token has no write access")
        objects = []
        for each in asked["objects"]:
            item = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.blobs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            objects.append(item)
        self.answer(200, {"transfer": "basic", "objects": objects})


@contextlib.contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A hub on a loopback port while the block runs."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
