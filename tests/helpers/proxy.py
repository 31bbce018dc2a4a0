"""Between a run and its tracking server: an impatient proxy, a login page, a slow connection."""

import http.server
import threading
import time
import urllib.error
import urllib.request

LOGIN = b"<!doctype html><html><body>Please log in</body></html>"


class Proxy(http.server.ThreadingHTTPServer):
    """Forwards requests to a server, or answers in its place."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.answer: tuple[int, bytes] | None = None
        self.delay_s = 0.0
        self.answers_health = False
        """Whether /health is always forwarded."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Proxy

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.server.delay_s)
        status, content, kind = 0, b"", "text/html"
        if self.server.answer and not (self.server.answers_health and self.path == "/health"):
            status, content = self.server.answer
        else:
            request = urllib.request.Request(self.server.target + self.path, data=body or None)
            request.method = self.command
            for name in ("Content-Type",):
                if name in self.headers:
                    request.add_header(name, self.headers[name])
            try:
                with urllib.request.urlopen(request, timeout=30) as found:
                    status, content, kind = found.status, found.read(), found.headers.get_content_type()
            except urllib.error.HTTPError as error:
                status, content, kind = error.code, error.read(), error.headers.get_content_type()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def log_message(self, *args: object) -> None:
        """Print nothing."""
