"""An interview as a page on this machine alone.

It listens on 127.0.0.1; the address holds a random token, and a request without it, or with a
Host that is not this machine (a page elsewhere that re-bound its name), is refused. Nothing is
loaded from anywhere, and whatever comes out of the data is set as text, never as markup.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hf_recipe.instruments.interview import Interview, png

MOST_BYTES = 4_096
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>hf-recipe</title>
<style nonce="NONCE">
body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem}
#text{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #999;padding:1rem}
img{image-rendering:pixelated;min-width:12rem;max-width:100%}
button{margin:.25rem;padding:.4rem .8rem;font:inherit}
@media (prefers-color-scheme:dark){body{background:#111;color:#eee}}
</style>
<p id="place" role="status" aria-live="polite"></p><p id="hint"></p>
<div><img id="picture" alt="the row's picture" hidden><div id="text"></div></div>
<div id="choices"></div>
<p><button id="undo">u undo</button><button id="skip">s skip</button></p>
<script nonce="NONCE">
const at = id => document.getElementById(id); let now = null, typed = "";
async function send(path, body) {
  const how = body ? {method: "POST", body: JSON.stringify(body)} : {};
  const reply = await fetch(path, how);
  show(await reply.json());
}
function show(state) {
  now = state; typed = "";
  at("place").textContent = state.place === null
    ? `Done: all ${state.total} are saved. You may close this page.`
    : `${state.place + 1} of ${state.total}`;
  at("hint").textContent = state.hint; at("text").textContent = state.text;
  at("text").hidden = !state.text; at("picture").hidden = !state.picture;
  if (state.picture) at("picture").src = "data:image/png;base64," + state.picture;
  at("choices").replaceChildren(...state.choices.map((name, i) => {
    const b = document.createElement("button"); b.textContent = `${i} ${name}`;
    b.dataset.choice = i; b.disabled = state.place === null; b.onclick = () => pick(i); return b;
  }));
}
const pick = choice => now && now.place !== null && send("answer", {place: now.place, choice});
at("undo").onclick = () => send("undo", {}); at("skip").onclick = () => pick(null);
document.onkeydown = e => {
  if (e.ctrlKey || e.metaKey || e.altKey || !now) return;
  if (e.key === "u") send("undo", {}); else if (e.key === "s") pick(null);
  else if (/^[0-9]$/.test(e.key)) {
    typed += e.key;
    if (now.choices.length <= 10) { if (+e.key < now.choices.length) pick(+e.key); typed = ""; }
  } else if (e.key === "Enter" && typed) {
    if (+typed < now.choices.length) pick(+typed);
    typed = "";
  }
};
send("state");
</script></html>
"""


class LocalPage:
    """Serves one interview until `close`, or until its last question is answered."""

    def __init__(self, interview: Interview, *, port: int = 0) -> None:
        self.interview = interview
        self.token = secrets.token_urlsafe(24)
        self.done = threading.Event()
        self._lock = threading.Lock()
        page = self

        class Handler(_Handler):
            owner = page

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self.hosts = {f"127.0.0.1:{self.port}", f"localhost:{self.port}"}
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """What to open in the browser."""
        return f"http://127.0.0.1:{self.port}/{self.token}/"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def state(self) -> dict[str, Any]:
        """What the page shows now."""
        interview = self.interview
        place = interview.place
        found: dict[str, Any] = {
            "place": place,
            "total": len(interview.questions),
            "choices": list(interview.choices),
            "hint": "",
            "text": "",
            "picture": "",
        }
        if place is not None:
            question = interview.questions[place]
            picture = png(question.picture)
            found |= {"hint": question.hint, "text": question.text, "picture": picture}
        else:
            self.done.set()
        return found

    def act(self, action: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """Do what the page asks for; None: no such thing."""
        with self._lock:
            if action == "answer":
                place, choice = body.get("place"), body.get("choice")
                whole = type(place) is int and (choice is None or type(choice) is int)
                if not whole:
                    return None
                self.interview.answer(int(place or 0), choice)
            elif action == "undo":
                self.interview.undo()
            else:
                return None
            return self.state()


class _Handler(BaseHTTPRequestHandler):
    owner: LocalPage
    server_version, sys_version = "hf-recipe", ""

    def do_GET(self) -> None:
        path = self._allowed()
        if path == "":
            nonce = secrets.token_urlsafe(16)
            self._send(PAGE.replace("NONCE", nonce).encode(), "text/html; charset=utf-8", nonce)
        elif path == "state":
            with self.owner._lock:
                state = self.owner.state()
            self._send(json.dumps(state).encode(), "application/json")
        elif path is not None:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        path = self._allowed()
        if path is None:
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        try:
            body = json.loads(self.rfile.read(int(length)) or b"{}")
        except ValueError:
            body = None
        found = self.owner.act(path, body) if isinstance(body, dict) else None
        if found is None:
            self.send_error(HTTPStatus.BAD_REQUEST)
        else:
            self._send(json.dumps(found).encode(), "application/json")

    def _allowed(self) -> str | None:
        """What stands after the token; None, and 403 sent, for a stranger."""
        token, _, rest = self.path.removeprefix("/").partition("/")
        known = hmac.compare_digest(token.encode(), self.owner.token.encode())
        origin = self.headers.get("Origin")
        own = origin is None or origin.removeprefix("http://") in self.owner.hosts
        if not known or not own or self.headers.get("Host") not in self.owner.hosts:
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        return rest

    def _send(self, content: bytes, kind: str, nonce: str = "none") -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")
        policy = (
            "default-src 'none'; img-src data:; connect-src 'self'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'; "
            f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
        )
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet: the token stands in every request."""
