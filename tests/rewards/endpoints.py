"""An HTTP server that answers as a test tells it."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace


@contextmanager
def answering(answer):
    """``answer(number, body, headers)``: a value, which becomes JSON; text or bytes; or a status
    and one of them. ``url``; ``bodies``: what has arrived."""
    bodies = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(bodies)
                bodies.append(body)
            found = answer(number, body, self.headers)
            status, found = found if isinstance(found, tuple) else (200, found)
            if found is None:  # hang up
                return
            text = found if isinstance(found, bytes) else str(found).encode()
            if not isinstance(found, bytes | str):
                text = json.dumps(found).encode()
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", text.decode())
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/score", bodies=bodies)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
