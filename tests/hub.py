"""A stand-in of huggingface.co that serves one folder as the repository `me/tiny`, for a process that is told of it."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "a" * 40


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """Yields what HF_ENDPOINT is set to."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            name = path.removeprefix(f"/me/tiny/resolve/{COMMIT}/")
            if path.startswith("/api/models/me/tiny/tree/"):
                tree = [{"type": "file", "oid": "0", "size": len(files[each]), "path": each} for each in files]
                self._answer(json.dumps(tree).encode())
            elif path.startswith("/api/models/me/tiny"):
                stated = {"id": "me/tiny", "sha": COMMIT, "siblings": [{"rfilename": each} for each in files]}
                self._answer(json.dumps(stated).encode())
            elif name in files:
                self._answer(
                    files[name], {"ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
                )
            else:
                self._answer(b"", {"X-Error-Code": "EntryNotFound"}, 404)

        do_HEAD = do_GET

        def _answer(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
