"""A hub on a loopback socket: as much of the Hugging Face hub's HTTP interface as its real client needs to push and pull.

    with HubServer() as hub:
        ...  # HF_ENDPOINT=hub.url, HF_TOKEN=hub.token, HF_HUB_DISABLE_XET=1

Weights (`.safetensors`) go through LFS, everything else through the commit itself, as on the hub.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_token_of_the_test"
Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits of one repository, the newest last; a new one has an empty commit, as on the hub."""

    commits: dict[str, Files] = field(default_factory=lambda: {hashlib.sha1(b"new").hexdigest(): {}})

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def commit(self, revision: str) -> str | None:
        revision = self.head if revision == "main" else revision
        return revision if revision in self.commits else None

    def add(self, changes: Files) -> str:
        files = self.commits[self.head] | changes
        name = hashlib.sha1(json.dumps([self.head, {k: digest(v) for k, v in files.items()}]).encode()).hexdigest()
        self.commits[name] = files
        return name


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


class HubServer:
    """The server, in a thread from `with` to the end of the block."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large_files: Files = {}
        self.altered: Files = {}  # by path: what is served in place of the file, its digests as they were
        self.garbled: set[str] = set()  # paths that are stored with one byte changed
        self.meanwhile: Files = {}  # what somebody else commits while a push is under way
        self.token = TOKEN
        self.requests: list[str] = []

    def __enter__(self) -> "HubServer":
        hub = self

        class HubHandler(Handler):
            server_state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From here on connections are refused."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Refusal(Exception):
    """An HTTP error, with the hub's code for it."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.0: one connection a request, so that none outlives the server."""

    server_state: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        self.server_state.requests.append(f"{self.command} {unquote(url.path)}")
        try:
            answer, headers = self._route([unquote(part) for part in url.path.split("/")[1:]], body), {}
            if isinstance(answer, tuple):
                answer, headers = answer
            self._send(200, answer, headers)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self._send(refusal.status, {"error": refusal.message}, headers)

    def _send(self, status: int, answer: Any, headers: dict[str, str]) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _route(self, parts: list[str], body: bytes) -> Any:
        match parts:
            case ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case ["api", "validate-yaml"]:
                return {"warnings": [], "errors": []}
            case ["api", "models", owner, name]:
                return self._info(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision", revision]:
                return self._info(f"{owner}/{name}", revision)
            case ["api", "models", owner, name, "tree", revision, *_]:
                return [entry(path, content) for path, content in self._files(f"{owner}/{name}", revision)[1].items()]
            case ["api", "models", owner, name, "paths-info", revision]:
                files = self._files(f"{owner}/{name}", revision)[1]
                return [entry(path, files[path]) for path in parse_qs(body.decode())["paths"] if path in files]
            case ["api", "models", owner, name, "preupload", _]:
                self._require_token()
                if self.server_state.meanwhile:
                    self._repository(f"{owner}/{name}").add(self.server_state.meanwhile)
                files = json.loads(body)["files"]
                return {
                    "files": [{"path": file["path"], "shouldIgnore": False, "uploadMode": mode(file)} for file in files]
                }
            case ["api", "models", owner, name, "commit", _]:
                return self._commit(f"{owner}/{name}", body)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self._require_token()
                return {
                    "transfer": "basic",
                    "objects": [self._upload_action(one) for one in json.loads(body)["objects"]],
                }
            case ["upload", oid]:
                assert digest(body) == oid
                self.server_state.large_files[oid] = body
                return {}
            case [owner, name, "resolve", revision, *path]:
                return self._resolve(f"{owner}/{name}", revision, "/".join(path))
        raise Refusal(501, message=f"the test's hub does not know {self.command} {self.path}")

    def _require_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.server_state.token}":
            raise Refusal(401, message="Invalid credentials in Authorization header")

    def _repository(self, repo_id: str) -> Repository:
        if repo_id not in self.server_state.repositories:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return self.server_state.repositories[repo_id]

    def _files(self, repo_id: str, revision: str) -> tuple[str, Files]:
        repository = self._repository(repo_id)
        commit = repository.commit(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    def _create(self, request: dict[str, Any]) -> Any:
        self._require_token()
        repo_id = f"{request['organization']}/{request['name']}"
        if request["organization"] == "somebody-else":
            raise Refusal(403, message="You don't have the rights to create a model under this namespace")
        self.server_state.repositories.setdefault(repo_id, Repository())
        return {"url": f"{self.server_state.url}/{repo_id}"}

    def _info(self, repo_id: str, revision: str) -> Any:
        commit, files = self._files(repo_id, revision)
        return {"id": repo_id, "sha": commit, "siblings": [{"rfilename": path} for path in files]}

    def _upload_action(self, wanted: dict[str, Any]) -> Any:
        actions = {"upload": {"href": f"{self.server_state.url}/upload/{wanted['oid']}"}}
        return wanted | ({} if wanted["oid"] in self.server_state.large_files else {"actions": actions})

    def _commit(self, repo_id: str, body: bytes) -> Any:
        self._require_token()
        repository, changes = self._repository(repo_id), Files()
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", repository.head) != repository.head:
                raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                changes[value["path"]] = self.server_state.large_files[value["oid"]]
        for path in self.server_state.garbled & set(changes):
            changes[path] = changes[path][:-1] + b"\0"
        oid = repository.add(changes)
        return {"commitUrl": f"{self.server_state.url}/{repo_id}/commit/{oid}", "commitOid": oid}

    def _resolve(self, repo_id: str, revision: str, path: str) -> Any:
        commit, files = self._files(repo_id, revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        etag = digest(files[path]) if is_large(path) else blob(files[path])
        return self.server_state.altered.get(path, files[path]), {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}


def entry(path: str, content: bytes) -> dict[str, Any]:
    described = {"type": "file", "path": path, "size": len(content), "oid": blob(content)}
    if is_large(path):
        described["lfs"] = {"oid": digest(content), "size": len(content), "pointerSize": 134}
    return described


def mode(file: dict[str, Any]) -> str:
    return "lfs" if is_large(file["path"]) else "regular"
