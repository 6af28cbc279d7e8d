"""A hub for tests: the parts of the Hugging Face hub's HTTP API that huggingface_hub and datasets ask for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

import datasets
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

LARGE = (".safetensors", ".parquet", ".bin")  # files that the hub names by their SHA-256


def git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """A repository: the files of each commit, and commits by the names of branches and tags."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: int = 0  # status for those who may not read it
    titles: list[str] = field(default_factory=list)

    def commit(self, files, ref="main", title=""):
        sha = hashlib.sha1(json.dumps([ref, len(self.commits), sorted(files)]).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        self.titles.append(title)
        return sha

    def find(self, revision):
        sha = self.refs.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else (None, None)


@dataclass
class Fault:
    """What goes wrong for requests whose method and path match: a status, a cut, other bytes, or silence."""

    match: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": "as the test wants"}'
    cut: int | None = None
    change: bool = False
    stall_s: float = 0.0
    times: int = 10**9


class Hub:
    """The server, with what it holds and what it was asked."""

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.faults: list[Fault] = []
        self.writers: set[str] = set()  # tokens that may write
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # clients that gave up
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def repo(self, name, kind="models"):
        return self.repos.setdefault((kind, name), Repo())

    def fetched(self):
        """The names of the files whose bytes were asked for."""
        return sorted(
            {
                line.split("/resolve/")[1].split("/", 1)[1]
                for line in self.asked
                if line[:4] == "GET " and "/resolve/" in line
            }
        )

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def _send(self, status, body=b"", headers=None, cut=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        if cut is not None:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def _json(self, value, status=200, headers=None):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _fail(self, status, code):
        self._json({"error": code}, status, {"X-Error-Code": code} if code else {})

    def _serve(self):
        url = urlparse(self.path)
        path, line = url.path, f"{self.command} {unquote(url.path)}"
        self.hub.asked.append(line)
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        body = self._body()
        fault = next((each for each in self.hub.faults if each.times > 0 and re.search(each.match, line)), None)
        if fault is not None:
            fault.times -= 1
            if fault.stall_s:
                threading.Event().wait(fault.stall_s)
                self.close_connection = True
                return
            if fault.status:
                return self._send(fault.status, fault.body, fault.headers)
        self._answer(path, parse_qs(url.query), body, fault)

    do_GET = do_HEAD = do_POST = _serve

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, path, query, body, fault):
        if path.startswith("/api/repos/create"):
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        kinds = {"": "models", "datasets/": "datasets"}
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, file = kinds[found[1] or ""], found[2], unquote(found[3]), unquote(found[4])
            return self._with_repo(kind, name, revision, lambda repo, sha, files: self._file(sha, files, file, fault))
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/.*)?", path):
            kind, name, rest = found[1], found[2], found[3] or ""
            verb, _, more = rest.lstrip("/").partition("/")
            if verb in ("preupload", "commit"):
                return self._write(kind, name, verb, body)
            revision = unquote(more.split("/")[0]) or "main"
            answer = {"tree": self._tree, "paths-info": self._paths}.get(verb, self._info)
            return self._with_repo(kind, name, revision, lambda *its: answer(name, *its, query, body))
        self._fail(404, "")

    def _with_repo(self, kind, name, revision, answer):
        repo = self.hub.repos.get((kind, name))
        if repo is None:
            return self._fail(401, "RepoNotFound")
        if repo.gated:
            return self._fail(repo.gated, "GatedRepo")
        sha, files = repo.find(revision)
        if sha is None:
            return self._fail(404, "RevisionNotFound")
        return answer(repo, sha, files)

    def _info(self, name, repo, sha, files, query, body):
        siblings = [{"rfilename": file} for file in files]
        self._json({"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []})

    def _entry(self, file, data):
        entry = {"type": "file", "path": file, "size": len(data), "oid": git_oid(data)}
        if file.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def _tree(self, name, repo, sha, files, query, body):
        folders = sorted({file.rsplit("/", 1)[0] for file in files if "/" in file})
        entries = [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in folders]
        entries += [self._entry(file, data) for file, data in files.items()]
        self._json(entries)

    def _paths(self, name, repo, sha, files, query, body):
        text = body.decode()
        paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        self._json([self._entry(file, files[file]) for file in paths if file in files])

    def _file(self, sha, files, file, fault):
        if file not in files:
            return self._fail(404, "EntryNotFound")
        data = files[file]
        etag = hashlib.sha256(data).hexdigest() if file.endswith(LARGE) else git_oid(data)
        sent = bytes(255 - byte for byte in data) if fault is not None and fault.change else data
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Content-Length": str(len(data))}
        headers |= {"Accept-Ranges": "none"}
        self._send(200, sent, headers, None if fault is None else fault.cut)

    def _create(self, asked):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.writers:
            return self._fail(403 if token else 401, "")
        name = f"{asked['organization']}/{asked['name']}"
        if ("models", name) in self.hub.repos:
            return self._json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
        repo = self.hub.repo(name)
        repo.private = asked.get("private", False) or asked.get("visibility") == "private"
        repo.commit({".gitattributes": b""})
        self._json({"url": f"{self.hub.url}/{name}"})

    def _write(self, kind, name, verb, body):
        repo = self.hub.repos.get((kind, name))
        if self.headers.get("Authorization", "").removeprefix("Bearer ") not in self.hub.writers:
            return self._fail(403, "")
        if repo is None:
            return self._fail(404, "RepoNotFound")
        if verb == "preupload":
            asked = json.loads(body)["files"]
            return self._json(
                {"files": [{"path": x["path"], "uploadMode": "regular", "shouldIgnore": False} for x in asked]}
            )
        lines = [json.loads(line) for line in body.splitlines() if line]
        files = dict(repo.find("main")[1])
        files |= {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
        sha = repo.commit(files, title=lines[0]["value"]["summary"])
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None})


@contextmanager
def serving(tmp_path, monkeypatch):
    """Serves a hub, and directs the libraries of this process to it, with an empty cache."""
    hub = Hub()
    cache = tmp_path / "hub-cache"
    for holder in (constants, file_download):
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
        }.items():
            monkeypatch.setattr(holder, name, value, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    monkeypatch.setattr(_http.time, "sleep", _counting(hub, time.sleep))
    _http.close_session()
    try:
        yield hub
    finally:
        _http.close_session()
        hub.close()


def _counting(hub, sleep):
    """`time.sleep` that does not sleep long, but counts for how long it was asked to."""
    hub.slept_s = 0.0

    def nap(seconds):
        hub.slept_s += seconds
        sleep(min(seconds, 0.01))

    return nap
