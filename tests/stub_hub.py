"""A hub for tests: what huggingface_hub asks of one to make a repository and to commit to it, on a local port."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StubHub:
    """Repositories by name: their branches, each with the contents of its files by name.

    Attributes:
        url: Where it listens.
        repositories: What was made and committed.
        created: The bodies of the requests to make a repository.
        commits: The messages.
        refuses: The status of every request to write; None takes them.
    """

    def __init__(self):
        self.repositories, self.created, self.commits = {}, [], []
        self.stored, self.refuses, self.url = {}, None, ""

    def answer(self, method, path, body):
        """Status and JSON of a request; of a PUT, which stores a large file, and of a HEAD nothing but the status."""
        if method == "HEAD":
            if path == "/":
                return 200, {}
            name, _, rest = path.strip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            return (200 if file in self.repositories.get(name, {}).get(revision, {}) else 404), {}
        if method == "PUT":
            self.stored[path.rpartition("/")[2]] = body
            return 200, {}
        if self.refuses is not None:
            return self.refuses, {"error": "no <b>writing</b>\nhere"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        values = json.loads(body) if not path.count("/commit/") else None
        if path == "/api/repos/create":
            name = f"{values['organization']}/{values['name']}"
            self.created.append(values)
            is_new = self.repositories.setdefault(name, {"main": {}}) == {"main": {}}
            return (200 if is_new else 409), {"url": f"{self.url}/{name}", "name": name}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [{**o, "actions": {"upload": {"href": f"{self.url}/put/{o['oid']}"}}} for o in values["objects"]]
            return 200, {"transfer": "basic", "objects": objects}
        name, action, revision = self._parts(path)
        if action == "branch":
            self.repositories[name].setdefault(revision, dict(self.repositories[name]["main"]))
            return 200, {}
        if action == "preupload":
            mode = {True: "lfs", False: "regular"}
            files = [
                {"path": f["path"], "uploadMode": mode[f["path"].endswith("safetensors")], "shouldIgnore": False}
                for f in values["files"]
            ]
            return 200, {"files": files}
        for line in map(json.loads, body.decode().splitlines()):
            self._commit(self.repositories[name][revision], line["key"], line["value"])
        return 200, {"commitUrl": f"{self.url}/{name}/commit/abc", "commitOid": "a" * 40, "success": True}

    def _parts(self, path):
        owner, name, action, revision = path.removeprefix("/api/models/").split("/")
        return f"{owner}/{name}", action, revision

    def _commit(self, files, key, value):
        if key == "header":
            self.commits.append(value["summary"])
        elif key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        else:
            data = self.stored[value["oid"]]
            assert hashlib.sha256(data).hexdigest() == value["oid"]
            files[value["path"]] = data


@contextmanager
def stub_hub():
    """A hub that listens as long as the context lasts."""
    hub = StubHub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self._chunk, b""))
            status, value = hub.answer(self.command, self.path.partition("?")[0], body)
            data = b"" if self.command == "HEAD" else json.dumps(value).encode()
            self.send_response(status)
            for name, text in (("ETag", '"e"'), ("X-Repo-Commit", "a" * 40), ("Content-Type", "application/json")):
                self.send_header(name, text)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _chunk(self):
            chunk = self.rfile.read(int(self.rfile.readline(), 16))
            self.rfile.readline()
            return chunk

        def log_message(self, *args):
            pass

    for method in ("HEAD", "GET", "POST", "PUT"):
        setattr(Handler, f"do_{method}", Handler._answer)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
