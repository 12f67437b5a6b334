"""A stand-in for the Hugging Face Hub on the loopback interface: repositories in memory, the routes that clients use.

Enough for `create_repo`, `upload_folder`, `push_to_hub`, `from_pretrained`, `snapshot_download`, `list_repo_files` and
`load_dataset` of huggingface_hub 2.x, large files by git-LFS and not by Xet. The fixture `hub` starts one; clients are
separate processes (`hub.run`), because huggingface_hub reads its environment when it is imported.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import pytest


USER = "tester"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet", ".png")
BLOCK_HF_VQ = """
import sys
from importlib.abc import MetaPathFinder

class NoHfVq(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "hf_vq" or name.startswith("hf_vq."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoHfVq())
"""


@dataclass
class File:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """The name git gives the content, or git-LFS."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Commit:
    sha: str
    files: dict[str, File]


@dataclass
class Repository:
    """`commits` are those of all branches; `heads` the newest of each, of "main" and of pull requests
    ("refs/pr/1").
    """

    commits: list[Commit]
    heads: dict[str, Commit] = field(default_factory=dict)
    private: bool = False

    def at(self, revision: str | None) -> Commit | None:
        head = self.heads.get(revision or "main")
        return head or next((commit for commit in self.commits if commit.sha == revision), None)

    def commit(self, files: dict[str, File], branch: str = "main") -> Commit:
        content = repr((len(self.commits), sorted((path, file.oid) for path, file in files.items())))
        self.commits.append(Commit(hashlib.sha1(content.encode()).hexdigest(), files))
        self.heads[branch] = self.commits[-1]
        return self.commits[-1]


@dataclass
class Store:
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    broken_uploads: int = 0  # so many uploads of large files from now on fail
    lock: threading.Lock = field(default_factory=threading.Lock)


class Failure(Exception):
    """An answer that the client turns into an exception named after the code."""

    def __init__(self, status: int, code: str):
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *arguments):
        pass

    def answer(self, status, content=b"", headers=None):
        headers = dict(headers or {})
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        headers.setdefault("Content-Length", str(len(content)))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_request(self):
        self.url = urlparse(self.path)
        self.path_only = unquote(self.url.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.base = f"http://{self.headers['Host']}"
        self.store.requests.append(f"{self.command} {self.path_only}")
        try:
            for pattern, method in ROUTES:
                if match := re.fullmatch(pattern, self.path_only):
                    with self.store.lock:
                        return method(self, *match.groups())
            raise Failure(404, "EntryNotFound")
        except Failure as failure:
            self.answer(failure.status, {"error": failure.code}, {"X-Error-Code": failure.code})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def repository(self, kind, name, missing=404) -> Repository:
        found = self.store.repositories.get((kind, name))
        if found is None:
            raise Failure(missing, "RepoNotFound")
        return found

    def commit_at(self, kind, name, revision, missing=404) -> Commit:
        found = self.repository(kind, name, missing).at(revision)
        if found is None:
            raise Failure(404, "RevisionNotFound")
        return found

    def whoami(self):
        token = {"displayName": "token", "role": "write"}
        user = {"type": "user", "name": USER, "fullname": USER, "orgs": []}
        self.answer(200, {**user, "auth": {"type": "access_token", "accessToken": token}})

    def validate_yaml(self):
        self.answer(200, {"errors": [], "warnings": []})

    def create(self):
        wanted = json.loads(self.body)
        kind, name = wanted.get("type") or "model", f"{wanted.get('organization') or USER}/{wanted['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        about = {"url": f"{self.base}/{prefix}{name}", "id": name, "name": name}
        if (kind, name) in self.store.repositories:  # the client's `exist_ok` relies on this answer
            return self.answer(409, {**about, "error": "exists"})
        repository = self.store.repositories[kind, name] = Repository(
            [], private=wanted.get("visibility") == "private"
        )
        repository.commit({})
        self.answer(200, about)

    def lfs_batch(self, kind, name):
        self.repository(kind or "model", name)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.store.large_files:
                item["actions"] = {"upload": {"href": f"{self.base}/lfs/{item['oid']}", "header": {}}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Failure(400, "BadHash")
        if self.store.broken_uploads > 0:
            self.store.broken_uploads -= 1
            raise Failure(400, "Broken")
        self.store.large_files[oid] = self.body
        self.answer(200, {})

    def preupload(self, kind, name, revision):
        now = self.commit_at(kind, name, revision).files
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": now[file["path"]].oid if file["path"] in now else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer(200, {"files": files})

    def make_commit(self, kind, name, revision):
        repository = self.repository(kind, name)
        files = dict(self.commit_at(kind, name, revision).files)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.store.large_files:
                    raise Failure(400, "LfsObjectMissing")
                files[value["path"]] = File(self.store.large_files[value["oid"]], lfs=True)
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif line["key"] == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
        answer, branch = {}, revision
        if parse_qs(self.url.query).get("create_pr") == ["1"]:
            number = 1 + sum(head.startswith("refs/pr/") for head in repository.heads)
            answer, branch = {"pullRequestUrl": f"{self.base}/{name}/discussions/{number}"}, f"refs/pr/{number}"
        commit = repository.commit(files, branch)
        self.answer(200, {**answer, "commitUrl": f"{self.base}/{name}/commit/{commit.sha}", "commitOid": commit.sha})

    def create_branch(self, kind, name, branch):
        repository = self.repository(kind, name)
        if branch in repository.heads:  # the client's `exist_ok` relies on this answer
            return self.answer(409, {"error": "exists"})
        start = (json.loads(self.body) if self.body else {}).get("startingPoint")
        repository.heads[branch] = self.commit_at(kind, name, start)
        self.answer(200, {})

    def describe(self, kind, name, revision=None):
        commit = self.commit_at(kind, name, revision)
        constants = {"private": False, "disabled": False, "gated": False, "downloads": 0, "likes": 0, "tags": []}
        dates = {"lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z"}
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        about = {"id": name, "modelId": name, "sha": commit.sha, "siblings": siblings, "spaces": []}
        self.answer(200, {**about, **constants, **dates})

    def refs(self, kind, name):
        heads = {head: commit.sha for head, commit in self.repository(kind, name).heads.items()}
        branches = [
            {"name": head, "ref": f"refs/heads/{head}", "targetCommit": sha}
            for head, sha in heads.items()
            if not head.startswith("refs/pr/")
        ]
        self.answer(200, {"branches": branches, "converts": [], "tags": []})

    def tree(self, kind, name, revision, folder):
        files = self.commit_at(kind, name, revision).files
        prefix = f"{folder}/" if folder else ""
        files = {path: file for path, file in files.items() if path.startswith(prefix)}
        if folder and not files:
            raise Failure(404, "EntryNotFound")
        parents = {path[: path.index("/", start)] for path in files for start in slashes(path, len(prefix))}
        if parse_qs(self.url.query).get("recursive", ["false"])[0].lower() not in ("true", "1"):
            files = {path: file for path, file in files.items() if "/" not in path[len(prefix) :]}
            parents = {path for path in parents if "/" not in path[len(prefix) :]}
        folders = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(parents)]
        self.answer(200, folders + entries(files))

    def paths_info(self, kind, name, revision):
        files = self.commit_at(kind, name, revision).files
        self.answer(200, entries({path: files[path] for path in json.loads(self.body)["paths"] if path in files}))

    def download(self, kind, name, revision, path):
        commit = self.commit_at(kind or "model", name, revision, missing=401)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            return self.answer(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        file = commit.files[path]
        headers |= {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if asked := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(asked[1]), int(asked[2]) + 1 if asked[2] else len(file.data)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(file.data)}"
            return self.answer(206, file.data[start:stop], headers)
        self.answer(200, file.data, headers)


def slashes(path: str, start: int) -> list[int]:
    """Where to look for each "/" of `path` from `start` on."""
    return [position for position in range(start, len(path)) if path[position] == "/"]


def entries(files: dict[str, File]) -> list[dict]:
    listed = []
    for path, file in sorted(files.items()):
        entry = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
        if file.lfs:
            entry["lfs"] = {"oid": file.oid, "size": len(file.data), "pointerSize": 134}
        listed.append(entry)
    return listed


REPO = r"/api/(model|dataset|space)s/([^/]+/[^/]+)"
REVISION = r"((?:refs/pr/)?[^/]+)"
ROUTES = [
    (r"/api/whoami-v2", Handler.whoami),
    (r"/api/validate-yaml", Handler.validate_yaml),
    (r"/api/repos/create", Handler.create),
    (r"/(?:(dataset|space)s/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"/lfs/([0-9a-f]{64})", Handler.lfs_upload),
    (REPO, Handler.describe),
    (REPO + rf"/revision/{REVISION}", Handler.describe),
    (REPO + rf"/preupload/{REVISION}", Handler.preupload),
    (REPO + rf"/commit/{REVISION}", Handler.make_commit),
    (REPO + r"/branch/([^/]+)", Handler.create_branch),
    (REPO + r"/refs", Handler.refs),
    (REPO + rf"/tree/{REVISION}(?:/(.+))?", Handler.tree),
    (REPO + rf"/paths-info/{REVISION}", Handler.paths_info),
    (rf"/(?:(dataset|space)s/)?([^/]+/[^/]+)/(?:resolve|raw)/{REVISION}/(.+)", Handler.download),
]


@dataclass
class Hub:
    """A running stand-in: its address, what it holds, and `run` for its clients."""

    url: str
    store: Store
    home: str

    def files(self, name: str, kind: str = "model") -> dict[str, bytes]:
        """The files on a repository's main branch."""
        return {path: file.data for path, file in self.store.repositories[kind, name].at("main").files.items()}

    def run(self, code: str, installed: bool = True, timeout: int = 900) -> str:
        """Runs Python code in a new process that knows this Hub only, from the folder "/"; returns what it printed.

        With `installed=False` the process has no hf_vq: importing it raises `ModuleNotFoundError`.
        """
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "SYSTEMROOT") if name in os.environ}
        environment = {
            **kept,
            "HOME": self.home,
            "HF_HOME": self.home,
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_stand_in",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        if installed:  # that of this checkout, which need not be the one that is installed
            environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        code = code if installed else BLOCK_HF_VQ + code
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=timeout)
        if done.returncode != 0:
            raise AssertionError(f"the client failed:\n{done.stdout}\n{done.stderr}")
        return done.stdout


@pytest.fixture
def hub(tmp_path):
    """A fresh, empty stand-in for the Hub."""
    store = Store()
    handler = type("BoundHandler", (Handler,), {"store": store})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Hub(f"http://127.0.0.1:{server.server_port}", store, str(tmp_path / "hf_home"))
    server.shutdown()
    server.server_close()
    thread.join()
