"""A server on loopback in place of W&B's: it keeps what its client sends, and answers that everything has worked."""

import gzip
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COLLECTION = {"__typename": "ArtifactSequence", "name": "artifact"}
PROJECT = {"id": "project", "name": "project", "entity": {"id": "entity", "name": "us"}}
ARTIFACT = {
    "__typename": "Artifact",
    "id": "artifact",
    "artifactSequence": {
        "__typename": "ArtifactSequence",
        "name": "artifact",
        "project": PROJECT | {"internalId": "1"},
    },
    "versionIndex": 0,
    "artifactType": {"name": "dataset"},
    "description": None,
    "metadata": "{}",
    "ttlDurationSeconds": -2,
    "ttlIsInherited": True,
    "tags": [],
    "historyStep": None,
    "state": "COMMITTED",
    "size": 0,
    "digest": "digest",
    "commitHash": "hash",
    "fileCount": 0,
    "createdAt": "2026-01-01T00:00:00",
    "updatedAt": None,
    "aliases": [],
}


class WandbServer(ThreadingHTTPServer):
    """Knows the runs that were started on it, so that they can be resumed.

    Attributes:
        calls: of its GraphQL API, as (operation, variables); answered by the method of that name, if there is one.
        runs: ID -> what the client has said of it, with its summary.
        rows: ID -> the rows of its history.
        refused, stuck: operations that are answered with an error, or not at all.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.calls = []
        self.runs = {}
        self.rows = {}
        self.refused = set()
        self.stuck = set()

    def handle_error(self, request, client_address):
        """Say nothing of connections that the client has closed."""

    def sent(self, operation):
        """The variables of all calls of an operation, in their order."""
        return [variables for name, variables in self.calls if name == operation]

    def artifacts(self, kind):
        """What was said of each artifact of a type that was logged."""
        inputs = [variables["input"] for variables in self.sent("CreateArtifact")]
        return [artifact for artifact in inputs if artifact["artifactTypeName"] == kind]

    def upload(self):
        return {"id": "file", "uploadUrl": f"{self.url}/upload", "uploadHeaders": []}

    def Viewer(self, variables):
        return {"viewer": {"id": "me", "entity": "us", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def ServerFeaturesQuery(self, variables):
        return {"serverInfo": {"features": []}}

    def RunResumeStatus(self, variables):
        run = self.runs.get(variables["name"])
        rows = self.rows.get(variables["name"], [])
        bucket = run and {
            "id": "run",
            "name": variables["name"],
            "config": run["config"],
            "summaryMetrics": run.get("summary", "{}"),
            "historyLineCount": len(rows),
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }
        return {"model": PROJECT | {"bucket": bucket}}

    def UpsertBucket(self, variables):
        inserted = variables["name"] not in self.runs
        run = self.runs.setdefault(variables["name"], {})
        run |= {key: value for key, value in variables.items() if value is not None}
        bucket = {"id": "run", "name": variables["name"], "displayName": run["displayName"], "project": PROJECT}
        return {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": inserted}}

    def CreateRunFiles(self, variables):
        files = [self.upload() | {"name": name} for name in variables["files"]]
        return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}

    def ArtifactType(self, variables):
        return {"project": None}

    def CreateArtifact(self, variables):
        return {"createArtifact": {"artifact": {"id": "artifact", "state": "PENDING", "artifactSequence": {"id": "s"}}}}

    def CreateArtifactManifest(self, variables):
        return {"createArtifactManifest": {"artifactManifest": {"id": "manifest", "file": self.upload()}}}

    def UpdateArtifactManifest(self, variables):
        return {"updateArtifactManifest": {"artifactManifest": {"id": "manifest", "file": self.upload()}}}

    def CreateArtifactFiles(self, variables):
        files = [self.upload() | {"name": file["name"]} for file in variables["input"]["artifactFiles"]]
        edges = [{"node": file | {"artifact": {"id": "artifact"}}} for file in files]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def CommitArtifact(self, variables):
        return {"commitArtifact": {"artifact": {"id": "artifact", "digest": "digest"}}}

    def ArtifactByID(self, variables):
        return {"artifact": ARTIFACT}

    def UpsertView2(self, variables):
        return {"upsertView": {"view": {"id": "view", "name": variables["name"]}, "inserted": True}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *values):
        """Print nothing."""

    def body(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def reply(self, answer):
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_PUT(self):
        self.body()
        self.reply({})

    def do_POST(self):
        content = self.body()
        if self.path.endswith("/graphql"):
            self.reply(self.answer(json.loads(content)))
            return
        if self.path.endswith("/file_stream"):
            files = json.loads(content).get("files") or {}
            run_id = self.path.split("/")[-2]
            rows = files.get("wandb-history.jsonl", {}).get("content", [])
            self.server.rows.setdefault(run_id, []).extend(map(json.loads, rows))
            for summary in files.get("wandb-summary.json", {}).get("content", []):
                self.server.runs[run_id]["summary"] = summary
        self.reply({})

    def answer(self, call):
        operation = re.search(r"(?:query|mutation)\s+(\w+)", call["query"])[1]
        variables = call.get("variables") or {}
        self.server.calls.append((operation, variables))
        if operation in self.server.stuck:
            threading.Event().wait()
        if operation in self.server.refused:
            return {"errors": [{"message": f"{operation} is refused"}]}
        answer = getattr(self.server, operation, None)
        return {"data": answer(variables) if answer else {}}


@contextmanager
def wandb_server():
    """Serve in threads of this process."""
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
