"""A small Hub on 127.0.0.1 that speaks what `huggingface_hub` asks of the real one, for models over the LFS protocol.

It stores what it receives: commits are immutable snapshots, branches point to them, large files are addressed by their
checksum, which is computed from the bytes that arrived. Clients must run with `HF_ENDPOINT` set to `HubServer.endpoint`
and `HF_HUB_DISABLE_XET=1` before `huggingface_hub` is imported, so they run in processes of their own.
"""

import base64
import hashlib
import json
import re
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN = "hf_test"
USER = "someone"
LFS_SUFFIXES = (".safetensors", ".bin", ".png")
DATE = "2026-01-01T00:00:00.000Z"

# What can go wrong with a push; `HubServer.faults` gives one per push, in order.
DROP_UPLOAD = "the connection breaks in the middle of a large file"
CORRUPT_UPLOAD = "the bytes of a large file change on the way"
REFUSE_COMMIT = "the server fails when the commit arrives"
OVERTAKE_COMMIT = "somebody else commits first"


class HubError(Exception):
    """An answer other than success."""

    def __init__(self, status, message, code=None, headers=None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **(headers or {})}
        if code is not None:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self):
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return text.encode()

    @property
    def git_oid(self):
        content = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """An immutable snapshot: path -> blob."""

    parent: str | None
    message: str
    tree: dict[str, Blob]

    @property
    def oid(self):
        files = {path: blob.git_oid for path, blob in sorted(self.tree.items())}
        return hashlib.sha1(json.dumps([self.parent, self.message, files]).encode()).hexdigest()


@dataclass
class Repo:
    """Commits by id, and branches that point to them. `main` starts with a commit of its own, as on the Hub."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        attributes = b"".join(b"*%s filter=lfs diff=lfs merge=lfs -text\n" % s.encode() for s in LFS_SUFFIXES)
        self.add(Commit(None, "initial commit", {".gitattributes": Blob(attributes, is_lfs=False)}), "main")

    def add(self, commit, branch):
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid

    def find(self, revision):
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def log(self, branch="main"):
        """Commits of a branch, newest first."""
        commit = self.find(branch)
        commits = [commit]
        while commit.parent is not None:
            commit = self.commits[commit.parent]
            commits.append(commit)
        return commits


class HubServer:
    """The server; use it as a context manager.

    Attributes: `repos` by id; `lfs`, the large files by the checksum of what arrived; `uploads`, one
    `(announced oid, checksum of what arrived)` per finished upload of a large file; `requests`, one
    `(method, path, status)` per answer; `faults`, what goes wrong with the next pushes (`None` = nothing).
    """

    def __init__(self):
        self.repos = {}
        self.lfs = {}
        self.uploads = []
        self.requests = []
        self.faults = deque()
        self.fault = None
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads = True
        self._http.hub = self
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc_info):
        self._http.shutdown()
        self._http.server_close()

    def client_environment(self, cache_dir):
        """Variables for a client process, with caches of its own under `cache_dir`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(cache_dir),
            "HF_MODULES_CACHE": str(cache_dir / "modules"),
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/models/(?P<repo>.+)/branch/(?P<revision>[^/]+)", "create_branch"),
        ("POST", r"/api/models/(?P<repo>.+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>.+)/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", r"/api/models/(?P<repo>.+)/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
        ("GET", r"/api/models/(?P<repo>.+)/revision/(?P<revision>[^/]+)", "model_info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "model_info"),
        ("POST", r"/(?P<repo>.+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
        ("HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    @property
    def hub(self):
        return self.server.hub

    def _dispatch(self):
        path = urlsplit(self.path).path
        self.body = self._read_body()
        if self.body is None:
            return
        try:
            for method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, path)
                if method == self.command and match:
                    arguments = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    with self.hub.lock:
                        status, content, headers = getattr(self, f"_{name}")(**arguments)
                    break
            else:
                raise HubError(404, f"the test server knows no {self.command} {path}")
        except HubError as error:
            status, content = error.status, {"error": str(error)}
            headers = error.headers
        self.hub.requests.append((self.command, path, status))
        self._answer(status, content, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def log_message(self, *args):
        pass

    def _answer(self, status, content, headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _read_body(self):
        """The body, or `None` after a connection that is to break in the middle of it."""
        if self.command == "PUT" and self.hub.fault == DROP_UPLOAD:
            self.rfile.read(256)
            self.hub.requests.append((self.command, urlsplit(self.path).path, None))
            self.close_connection = True
            self.connection.shutdown(2)
            return None
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _json(self):
        return json.loads(self.body)

    def _check_token(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "Invalid credentials in Authorization header")

    def _repo(self, repo, write=False):
        if write:
            self._check_token()
        known = repo in self.hub.repos
        if not known or (self.hub.repos[repo].private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.hub.repos[repo]

    # Accounts and repositories

    def _whoami(self):
        self._check_token()
        return 200, {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}}, {}

    def _validate_yaml(self):
        return 200, {"warnings": [], "errors": []}, {}

    def _create_repo(self):
        self._check_token()
        self.hub.fault = self.hub.faults.popleft() if self.hub.faults else None
        request = self._json()
        name = f"{request.get('organization') or USER}/{request['name']}"
        answer = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repos:
            return 409, {**answer, "error": "You already created this model repo"}, {}
        self.hub.repos[name] = Repo(private=request.get("visibility") == "private")
        return 200, answer, {}

    def _create_branch(self, repo, revision):
        repo = self._repo(repo, write=True)
        if revision in repo.branches:
            raise HubError(409, f"Reference already exists: {revision}")
        repo.branches[revision] = repo.find(self._json().get("startingPoint", "main")).oid
        return 200, {}, {}

    def _model_info(self, repo, revision="main"):
        name, repo = repo, self._repo(repo)
        commit = repo.find(revision)
        info = {
            "_id": "0",
            "id": name,
            "modelId": name,
            "sha": commit.oid,
            "private": repo.private,
            "lastModified": DATE,
            "createdAt": DATE,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": path} for path in sorted(commit.tree)],
        }
        return 200, info, {}

    def _tree(self, repo, revision, folder):
        tree = self._repo(repo).find(revision).tree
        prefix = f"{folder}/" if folder else ""
        paths = [path for path in sorted(tree) if path.startswith(prefix)]
        if folder and not paths:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        return 200, [_tree_entry(path, tree[path]) for path in paths], {}

    # Push

    def _preupload(self, repo, revision):
        tree = self._repo(repo, write=True).find(revision).tree
        files = []
        for file in self._json()["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            known = {"oid": tree[path].etag} if path in tree else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return 200, {"files": files}, {}

    def _lfs_batch(self, repo):
        self._repo(repo, write=True)
        objects = []
        for entry in self._json()["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.lfs:
                href = f"{self.hub.endpoint}/lfs/{entry['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def _lfs_upload(self, oid):
        body = bytes(reversed(self.body)) if self.hub.fault == CORRUPT_UPLOAD else self.body
        checksum = hashlib.sha256(body).hexdigest()
        self.hub.uploads.append((oid, checksum))
        if checksum != oid:
            raise HubError(400, f"announced sha256 {oid}, received {checksum}")
        self.hub.lfs[oid] = body
        return 200, b"", {}

    def _lfs_verify(self, oid):
        self._check_token()
        request = self._json()
        if request["oid"] != oid or len(self.hub.lfs.get(oid, b"")) != request["size"]:
            raise HubError(404, f"object {oid} was not received")
        return 200, {}, {}

    def _commit(self, repo, revision):
        name, repo = repo, self._repo(repo, write=True)
        if self.hub.fault == REFUSE_COMMIT:
            raise HubError(500, "Internal Error")
        if revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if self.hub.fault == OVERTAKE_COMMIT:
            repo.add(Commit(repo.find(revision).oid, OVERTAKE_COMMIT, repo.find(revision).tree), revision)
        head = repo.find(revision)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        expected = header["value"].get("parentCommit")
        if expected is not None and not head.oid.startswith(expected):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(head.tree)
        for operation in operations:
            self._apply(tree, operation["key"], operation["value"])
        commit = Commit(head.oid, header["value"]["summary"], tree)
        repo.add(commit, revision)
        url = f"{self.hub.endpoint}/{name}/commit/{commit.oid}"
        return 200, {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""}, {}

    def _apply(self, tree, key, value):
        path = value["path"]
        if key == "file":
            tree[path] = Blob(base64.b64decode(value["content"], validate=True), is_lfs=False)
        elif key == "lfsFile":
            content = self.hub.lfs.get(value["oid"])
            if content is None or len(content) != value["size"]:
                raise HubError(400, f"{path} points to {value['oid']}, which was not uploaded")
            tree[path] = Blob(content, is_lfs=True)
        elif key == "deletedFile":
            if path not in tree:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            del tree[path]
        else:
            raise HubError(400, f"the test server knows no operation {key!r}")

    # Download

    def _resolve(self, repo, revision, path):
        commit = self._repo(repo).find(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.tree:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        blob = commit.tree[path]
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.is_lfs:
            headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not match:
            return 200, blob.content, headers
        start, stop = int(match[1]), min(int(match[2] or len(blob.content)) + 1, len(blob.content))
        if start >= stop:
            raise HubError(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{len(blob.content)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(blob.content)}"
        return 206, blob.content[start:stop], headers


def _tree_entry(path, blob):
    entry = {"type": "file", "path": path, "oid": blob.git_oid, "size": len(blob.content)}
    if blob.is_lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
    return entry
