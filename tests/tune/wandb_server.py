"""A stand-in for W&B's server on the loopback interface: what its client 0.31 asks, answered.

It proves the client's side alone: which runs there are, with which configuration, and what they
logged. A request that it does not know is answered with an error and kept in `unknown`, and the
test that sees one there fails.
"""

import base64
import gzip
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

ENTITY, PROJECT = "someone", "sweeps"
NAME = re.compile(r"\b(?:query|mutation)\s+(\w+)")
TERMINAL = ("finished", "failed", "crashed", "killed")


def _id(text):
    return base64.b64encode(str(text).encode()).decode()


class Backend:
    """The state: runs, sweeps, views, files; every method that begins with `on_` is a request."""

    def __init__(self, sampler):
        self.sampler = sampler  # (sweep's config, n) -> flat values of run n, or None
        self.url = ""
        self.lock = threading.RLock()
        self.unknown, self.asked = [], []
        self.runs, self.sweeps, self.views, self.files, self.agents = {}, {}, {}, {}, {}
        self.count = 0

    def fresh(self, prefix):
        self.count += 1
        return f"{prefix}{self.count}"

    @property
    def project(self):
        return {
            "id": _id("project"),
            "name": PROJECT,
            "entity": {"id": _id(ENTITY), "name": ENTITY},
        }

    def answer(self, name, variables):
        with self.lock:
            self.asked.append(name)
            handle = getattr(self, f"on_{name}", None)
            if handle is None:
                self.unknown.append(name)
                return {"data": None, "errors": [{"message": f"the stand-in has no {name}"}]}
            return {"data": handle(variables)}

    # ------------------------------------------------------------ who and what

    def on_Viewer(self, given):
        who = {
            "id": _id("user"),
            "name": ENTITY,
            "username": ENTITY,
            "email": "someone@localhost",
            "admin": False,
            "entity": ENTITY,
            "flags": "{}",
            "teams": {"edges": [{"node": {"id": _id("team"), "name": ENTITY}}]},
            "apiKeys": {"edges": []},
            "deletedAt": None,
            "capabilities": [],
        }
        return {"viewer": who}

    on_GetViewer = on_GetDefaultEntity = on_Viewer

    def on_ServerFeaturesQuery(self, given):
        feature = {"name": "SWEEPS_LOCAL_SCHEDULER", "isEnabled": True}
        return {"serverInfo": {"features": [feature]}}

    def on_OrganizationCoreWeaveOrganizationID(self, given):
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def on_ProjectInternalId(self, given):
        return {"project": {"internalId": _id("Project:1")}}

    # ------------------------------------------------------------ runs

    def run(self, name):
        return self.runs.setdefault(
            name,
            {
                "name": name,
                "config": {},
                "summary": {},
                "history": [],
                "state": "running",
                "sweep": None,
                "display": name,
                "opened": 0,
                "exitcode": None,
            },
        )

    def on_UpsertBucket(self, given):
        name = given.get("name") or base64.b64decode(given["id"]).decode()
        inserted = name not in self.runs
        run = self.run(name)
        if given.get("config"):
            run["config"] |= json.loads(given["config"])
        if given.get("summaryMetrics"):
            run["summary"] |= json.loads(given["summaryMetrics"])
        run["sweep"] = given.get("sweep") or run["sweep"]
        run["display"] = given.get("displayName") or run["display"]
        if run["state"] == "pending":
            run["state"] = "running"
        run["opened"] += 1
        bucket = {
            "id": _id(name),
            "name": name,
            "displayName": run["display"],
            "description": None,
            "config": json.dumps(run["config"]),
            "sweepName": run["sweep"],
            "project": self.project,
            "historyLineCount": len(run["history"]),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def stream(self, name, body):
        with self.lock:
            run = self.run(name)
            for file, part in (body.get("files") or {}).items():
                lines = part["content"]
                if file == "wandb-history.jsonl":
                    del run["history"][part.get("offset", 0) :]
                    run["history"] += [json.loads(line) for line in lines]
                elif file == "wandb-summary.json" and lines:
                    run["summary"] = json.loads(lines[-1])
            if body.get("complete"):
                run["exitcode"] = body.get("exitcode")
                run["state"] = "failed" if body.get("exitcode") else "finished"

    def on_CreateRunFiles(self, given):
        files = [
            {"name": name, "uploadUrl": f"{self.url}/storage/{given['run']}/{name}"}
            for name in given["files"]
        ]
        made = {"runID": _id(given["run"]), "uploadHeaders": [], "files": files}
        return {"createRunFiles": made}

    def on_RunResumeStatus(self, given):
        return {"model": {"id": _id("project"), "name": PROJECT, "bucket": None}}

    def on_RunStoppedStatus(self, given):
        return {"project": {"run": {"stopped": False}}}

    def on_NotifyScriptableRunAlert(self, given):
        return {"notifyScriptableRunAlert": {"success": True}}

    # ------------------------------------------------------------ artifacts

    def on_ArtifactType(self, given):
        return {"project": {"artifact": {"artifactType": {"name": "run_table"}}}}

    def on_CreateArtifact(self, given):
        sequence = {"id": self.fresh("sequence"), "latestArtifact": None}
        made = {"id": self.fresh("artifact"), "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": made}}

    def _manifest(self, given):
        name = self.fresh("manifest")
        file = {"id": name, "uploadUrl": f"{self.url}/storage/{name}", "uploadHeaders": []}
        return {"artifactManifest": {"id": name, "file": file}}

    def on_CreateArtifactManifest(self, given):
        return {"createArtifactManifest": self._manifest(given)}

    def on_UpdateArtifactManifest(self, given):
        return {"updateArtifactManifest": self._manifest(given)}

    def on_CreateArtifactFiles(self, given):
        edges = []
        for file in given["input"]["artifactFiles"]:
            path = f"{file['artifactID']}/{file['name']}"
            node = {
                "storagePath": path,
                "uploadUrl": f"{self.url}/storage/{path}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
            }
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def on_CommitArtifact(self, given):
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "0"}}}

    def on_FetchArtifactDigestAlgorithm(self, given):
        return {"project": None}

    def on_MarkRunFilesUploaded(self, given):
        return {"markRunFilesUploaded": {"success": True}}

    # ------------------------------------------------------------ sweeps

    def _sweep(self, name):
        """A sweep's name, from itself or from its id."""
        return name if name in self.sweeps else base64.b64decode(name).decode()

    def on_UpsertSweep(self, given):
        name = self._sweep(given["id"]) if given.get("id") else self.fresh("sweep")
        if name not in self.sweeps:
            self.sweeps[name] = {
                "config": given["config"],
                "state": given.get("state") or "RUNNING",
                "scheduler": given.get("scheduler"),
                "queue": [],
                "handed": 0,
            }
        sweep = self.sweeps[name]
        sweep["state"] = given.get("state") or sweep["state"]
        shown = {"name": name, "state": sweep["state"], "project": self.project}
        return {"upsertSweep": {"sweep": shown, "configValidationWarnings": []}}

    on_UpsertSweepState = on_UpsertSweep

    def _runs_of(self, name):
        edges = []
        for run in self.runs.values():
            if run["sweep"] != name:
                continue
            state = run["state"]
            node = {
                "id": _id(run["name"]),
                "name": run["name"],
                "displayName": run["display"],
                "state": state,
                "config": json.dumps(run["config"]),
                "exitcode": run["exitcode"],
                "heartbeatAt": "2026-01-01T00:00:00",
                "shouldStop": False,
                "failed": state == "failed",
                "stopped": False,
                "running": state == "running",
                "summaryMetrics": json.dumps(run["summary"]),
                "sampledHistory": [run["history"]],
                "createdAt": "2026-01-01T00:00:00",
                "historyKeys": None,
                "projectId": 1,
            }
            edges.append({"node": node, "cursor": run["name"]})
        page = {"hasNextPage": False, "endCursor": ""}
        return {"edges": edges, "pageInfo": page, "totalCount": len(edges)}

    def _shown(self, name):
        sweep = self.sweeps.get(name)
        if sweep is None:
            return None
        return {
            "id": _id(name),
            "name": name,
            "displayName": name,
            "config": sweep["config"],
            "state": sweep["state"],
            "method": yaml.safe_load(sweep["config"])["method"],
            "description": None,
            "createdAt": "2026-01-01T00:00:00",
            "heartbeatAt": "2026-01-01T00:00:00",
            "updatedAt": "2026-01-01T00:00:00",
            "earlyStopJobRunning": False,
            "bestLoss": None,
            "controller": None,
            "controllerRunName": f"{name}-controller",
            "scheduler": sweep["scheduler"],
            "runs": self._runs_of(name),
        }

    def on_SweepWithRuns(self, given):
        return {"project": {"sweep": self._shown(given["sweep"])}}

    on_SweepConfig = on_SweepRunsWithHistory = on_GetSweepState = on_SweepWithRuns

    def on_SweepWatchedRuns(self, given):
        return {"project": {"sweep": self._shown(given["sweep"])} | {
            "runs": self._runs_of(given["sweep"])
        }}  # fmt: skip

    def on_EnqueueSweepRun(self, given):
        name = self._sweep(given["id"])
        run = self.run(self.fresh("run"))
        run.update(state="pending", sweep=name, config=json.loads(given["config"]))
        self.sweeps[name]["queue"].append(run["name"])
        return {"enqueueSweepRun": {"id": run["name"], "runQueueItemId": run["name"]}}

    def on_CreateAgent(self, given):
        agent = self.fresh("agent")
        self.agents[agent] = given["sweep"]
        return {"createAgent": {"agent": {"id": agent}}}

    def on_Heartbeat(self, given):
        commands = self._commands(given["id"], json.loads(given.get("runState") or "{}"))
        beat = {"agent": {"id": given["id"]}, "commands": json.dumps(commands)}
        return {"agentHeartbeat": beat}

    def _commands(self, agent, busy):
        if any(busy.values()):
            return []
        name = self.agents[agent]
        sweep = self.sweeps[name]
        config = yaml.safe_load(sweep["config"])
        if "scheduler" in config:
            if sweep["queue"]:
                run = self.runs[sweep["queue"].pop(0)]
                return [self._start(config, run["name"], run["config"])]
            return [{"type": "exit"}] if sweep["state"] in ("FINISHED", "CANCELED") else []
        values = self.sampler(config, sweep["handed"])
        if values is None:
            sweep["state"] = "FINISHED"
            return [{"type": "exit"}]
        sweep["handed"] += 1
        run = self.run(self.fresh("run"))
        run.update(sweep=name, state="pending")
        return [self._start(config, run["name"], {k: {"value": v} for k, v in values.items()})]

    def _start(self, config, run, values):
        known = {k: v for k, v in values.items() if k != "_wandb"}
        return {
            "type": "run",
            "run_id": run,
            "program": config.get("program", ""),
            "args": known,
            "logs": [],
            "runqueue_item_id": "",
        }

    # ------------------------------------------------------------ dashboards

    def on_UpsertView2(self, given):
        name = given.get("id") or self.fresh("view")
        view = {k: given.get(k) for k in ("name", "type", "displayName", "description", "spec")}
        view |= {"id": name, "updatedAt": "2026-01-01T00:00:00", "project": self.project}
        view |= {"createdAt": "2026-01-01T00:00:00", "user": {"name": ENTITY}}
        self.views[name] = view
        return {"upsertView": {"view": view, "inserted": True}}

    on_UpsertView = on_UpsertView2


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    backend: Backend

    def log_message(self, *arguments):
        pass

    def _body(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            data = b"".join(parts)
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _say(self, content, code=200):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        data = self._body()
        if self.path.startswith("/sdk/otel/"):
            return self._say({})  # the client's word on its own errors, sent where it was slow
        body = json.loads(data or b"{}")
        if self.path.endswith("/file_stream"):
            self.backend.stream(self.path.split("/")[-2], body)
            return self._say({"exitcode": None, "limits": {}})
        if self.path.startswith("/graphql"):
            found = NAME.search(body["query"])
            name = body.get("operationName") or (found.group(1) if found else "?")
            return self._say(self.backend.answer(name, body.get("variables") or {}))
        self.backend.unknown.append(f"POST {self.path}")
        return self._say({}, 404)

    def do_PUT(self):
        data = self._body()
        known = self.path.startswith("/storage/")
        if known:
            with self.backend.lock:
                self.backend.files[self.path.removeprefix("/storage/")] = data
        else:
            self.backend.unknown.append(f"PUT {self.path}")
        self._say({}, 200 if known else 404)

    def do_GET(self):
        self._say({}, 200 if self.path.startswith("/ready") else 404)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """The client drops kept-alive sockets when it exits."""


@contextmanager
def serve(sampler):
    """A backend at work; its `url` is what WANDB_BASE_URL should be."""
    backend = Backend(sampler)
    handler = type("Handler", (_Handler,), {"backend": backend})
    server = _Server(("127.0.0.1", 0), handler)
    backend.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield backend
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(backend, folder):
    """What the client's processes must be told; the folders keep them off the user's own."""
    places = {f"WANDB_{name}_DIR": str(folder) for name in ("DATA", "CACHE", "CONFIG")}
    return places | {
        "WANDB_DIR": str(folder),
        "WANDB_BASE_URL": backend.url,
        "WANDB_API_KEY": "x" * 40,
        "WANDB_ENTITY": ENTITY,
        "WANDB_PROJECT": PROJECT,
        "WANDB_MODE": "online",
        "WANDB_ERROR_REPORTING": "false",
    }
