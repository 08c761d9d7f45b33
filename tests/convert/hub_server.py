# SPDX-License-Identifier: Apache-2.0
"""A server on this machine that answers as the HuggingFace hub does, for reading and for writing.

It takes the requests that huggingface_hub makes: those of downloads, and of `repo_info`,
`create_repo`, `create_branch` and `create_commit` with regular and LFS files (Xet is off in tests).
"""

import base64
import contextlib
import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

LARGE = 4096  # bytes from which a file goes by LFS


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for repositories {id: {revision: (commit, directory)}} as huggingface.co does.

    `private` names the repositories that are; `fails` maps a part of a path to the (status,
    headers, body) of the answer to it; `token` is the one that may write, None for any.
    """

    root: Path
    repositories: dict = {}
    private: set = set()
    objects: dict = {}  # LFS files by sha256
    asked: list = []  # of downloads: (method, revision, name)
    commits: list = []  # (repository, revision, lines) of commits
    fails: dict = {}
    token: str | None = None

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def log_message(self, *_):
        pass

    @property
    def parts(self) -> list[str]:
        return [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]

    @property
    def host(self) -> str:
        return f"http://{self.headers['Host']}"

    def failed(self, body: bool = True) -> bool:
        """Whether the request was answered by one of `fails`."""
        for part, (status, headers, text) in self.fails.items():
            if part in self.path:
                self.send(status, text.encode(), headers, body)
                return True
        return False

    def answer(self, body):
        parts = self.parts
        if self.failed(body):
            return None
        if parts[:2] == ["api", "models"]:
            return self.about("/".join(parts[2:4]), parts[4:])
        if parts[2:3] != ["resolve"]:
            return self.send(404, b"", {}, body)
        repository, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        self.asked.append((self.command, revision, name))
        held = self.repositories.get(repository)
        if held is None:
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        found = {**held, **{commit: (commit, at) for commit, at in held.values()}}.get(revision)
        if found is None:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        commit, directory = found
        headers = {"X-Repo-Commit": commit}
        if not (directory / name).is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", **headers}, body)
        content = (directory / name).read_bytes()
        etag = f'"{len(content)}-{commit[:8]}-{name.replace("/", "-")}"'
        return self.send(200, content, {"ETag": etag, **headers}, body)

    def about(self, repository, rest):
        """What `repo_info` and the listing of files ask."""
        held = self.repositories.get(repository)
        if held is None:
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, True)
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in held:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, True)
        commit, directory = held[revision]
        names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
        if rest[:1] == ["tree"]:
            listing = [{"type": "file", "path": n, "oid": "0", "size": 1} for n in names]
            return self.say(listing)
        about = {"id": repository, "sha": commit, "private": repository in self.private}
        return self.say(about | {"tags": [], "siblings": [{"rfilename": n} for n in names]})

    def do_PUT(self):
        """The content of an LFS file."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.failed():
            assert hashlib.sha256(content).hexdigest() == self.parts[-1]
            self.objects[self.parts[-1]] = content
            self.send(200, b"", {}, True)

    def do_POST(self):
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.failed():
            return None
        parts = self.parts
        if parts == ["api", "validate-yaml"]:
            return self.say({"errors": [], "warnings": []})
        if self.token is not None and self.headers.get("Authorization") != f"Bearer {self.token}":
            return self.send(401, b'{"error": "Invalid username or password."}', {}, True)
        if parts == ["api", "repos", "create"]:
            return self.create(json.loads(text))
        if parts[-1] == "batch":
            return self.lfs(json.loads(text)["objects"])
        repository, revision = "/".join(parts[2:4]), parts[5]
        held = self.repositories.get(repository)
        if held is None:
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, True)
        if parts[4] == "branch":
            if revision in held:
                return self.send(409, b'{"error": "it exists"}', {}, True)
            self.add(repository, revision, held["main"][1])
            return self.say({})
        if revision not in held:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, True)
        if parts[4] == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(text)["files"]
            ]
            return self.say({"files": modes})
        assert parts[4] == "commit", self.path
        return self.commit(repository, revision, [json.loads(x) for x in text.splitlines()])

    def create(self, asked):
        repository = f"{asked['organization']}/{asked['name']}"
        if repository in self.repositories:
            return self.send(409, b'{"error": "You already created this model repo"}', {}, True)
        if asked.get("private") or asked.get("visibility") == "private":
            self.private.add(repository)
        empty = self.root / "empty"
        empty.mkdir(exist_ok=True)
        (empty / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        self.repositories[repository] = {}
        self.add(repository, "main", empty)
        return self.say({"url": f"{self.host}/{repository}", "name": repository})

    def add(self, repository, revision, source) -> Path:
        """Make a commit with the files of `source`; returns their new directory."""
        number = sum(1 for _ in self.root.iterdir())
        place = self.root / f"commit{number}"
        shutil.copytree(source, place)
        commit = hashlib.sha1(str(place).encode()).hexdigest()
        self.repositories[repository][revision] = (commit, place)
        return place

    def lfs(self, objects):
        answers = []
        for each in objects:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.objects:
                answer["actions"] = {"upload": {"href": f"{self.host}/lfs/{each['oid']}"}}
            answers.append(answer)
        return self.say({"transfer": "basic", "objects": answers})

    def commit(self, repository, revision, lines):
        self.commits.append((repository, revision, lines))
        place = self.add(repository, revision, self.repositories[repository][revision][1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                (place / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                (place / value["path"]).write_bytes(self.objects[value["oid"]])
            elif line["key"] == "deletedFile":
                (place / value["path"]).unlink()
            else:
                assert line["key"] == "header", line
        commit = self.repositories[repository][revision][0]
        return self.say(
            {"commitUrl": f"{self.host}/{repository}/commit/{commit}", "commitOid": commit}
        )

    def say(self, value):
        return self.send(
            200, json.dumps(value).encode(), {"Content-Type": "application/json"}, True
        )

    def send(self, status, content, headers, body):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


class Serving:
    """A running server: its `handler` class, its `address`, and `stop`."""

    def __init__(self, root: Path, **state):
        fresh = dict(repositories={}, private=set(), objects={}, asked=[], commits=[], fails={})
        self.handler = type("Handler", (Hub,), {"root": root, **fresh, **state})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def serving(root: Path, **state) -> Iterator[Serving]:
    server = Serving(root, **state)
    try:
        yield server
    finally:
        server.stop()
