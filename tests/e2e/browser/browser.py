"""Pages on an origin of their own, and a real Chromium or Node that opens them."""

import json
import os
import queue
import shutil
import signal
import tempfile
import threading
import urllib.request
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

from harness.process import HarnessError, Program, run

HERE = Path(__file__).parent
HTML = b'<!doctype html><meta charset="utf-8"><script type="module" src="/page.js"></script>'
LONGEST = 120  # seconds that a page may take


def require(command, *arguments, **options):
    code, out, problem = run(command, *arguments, timeout=600, **options)
    if code != 0:
        raise HarnessError(f"cannot run: {command} {arguments}: {problem[-2000:]}")
    return out


@cache
def bundle():
    """The page's script."""
    require("npm", "ci", "--silent", "--no-fund", "--no-audit", cwd=HERE)
    return require("node_modules/.bin/esbuild", "page.js", "--bundle", "--format=esm", cwd=HERE).encode()


@cache
def chromium():
    """Debian's, which is installed, unless there is one or CHROMIUM names one."""
    names = [os.environ.get("CHROMIUM", "chromium-headless-shell"), "chromium", "google-chrome"]
    if not any(map(shutil.which, names)):
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            raise HarnessError("cannot run: there is no Chromium; the variable CHROMIUM can name one")
        require("apt-get", "update", "-q")
        require("apt-get", "install", "-qy", "--no-install-recommends", "chromium-headless-shell")
    return next(filter(None, map(shutil.which, names)))


class Site:
    """Serves the page, and hands on what is for the simulated API, so that the page needs no other
    permission for it."""

    def __init__(self, programs, simulator, descriptor):
        self.programs = programs
        self.results = queue.Queue()
        site, files = self, {"/": HTML, "/page.js": bundle(), "/descriptor": descriptor}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.partition("?")[0]
                if path.startswith("/_simulator/"):
                    self.respond(self.ask_simulator())
                elif path in files:
                    self.respond(files[path], "text/javascript" if path == "/page.js" else "text/html")
                else:
                    self.send_error(404)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"] or 0))
                if self.path == "/results":
                    site.results.put(json.loads(body))
                    self.respond(b"")
                else:
                    self.respond(self.ask_simulator(body))

            def ask_simulator(self, body=None):
                with urllib.request.urlopen(f"http://{simulator.address}{self.path}", body) as response:
                    return response.read()

            def respond(self, content, kind="text/plain"):
                self.send_response(200)
                self.send_header("content-type", f"{kind}; charset=utf-8")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        programs.started.append(self)

    def visit(self, gateway, may, node=False):
        """What the page hands in: for each client a result for each check."""
        url = f"{self.origin}/?{urlencode({'gateway': gateway, 'may': may})}"
        with tempfile.TemporaryDirectory(prefix="grpc-web-", ignore_cleanup_errors=True) as profile:
            command = ["node", HERE / "page.js", url] if node else [
                chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                "--no-proxy-server", "--ignore-certificate-errors", "--remote-debugging-port=0",
                f"--user-data-dir={profile}", url,
            ]  # fmt: skip
            visitor = Visitor(self.programs, "visitor", *command)
            try:
                return self.results.get(timeout=LONGEST)
            except queue.Empty:
                told = f"it handed nothing in; see {visitor.log}"
                return {"page": [{"name": "runs", "ok": False, "told": told}]}
            finally:
                visitor.close()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Visitor(Program):
    """Ends with its process group: Debian's chromium is a shell script."""

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
