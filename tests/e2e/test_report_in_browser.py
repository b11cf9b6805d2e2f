"""The report in a real browser: it shows its figures, asks for nothing, and is not blank."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.e2e.browser import CHROMIUM, FLAGS, needs_chromium

from graftkit.report.html import render_report

pytestmark = needs_chromium

PAGE = "http://report.test/report.html"

DATA: dict[str, Any] = {
    "title": "A LoRA, from start to saved file",
    "summary": ["What happened."],
    "figures": [
        {"label": "language only", "value": "81.4 %", "share": 0.814, "baseline": 0.1},
        {"label": "language + vision", "value": "94.7 %", "share": 0.947, "baseline": 0.1},
    ],
    "quote": {"title": "Stock PEFT", "text": "ValueError: Target module <Wrapper> is not supported."},
    "towers": [
        {
            "name": name,
            "sites": [
                {
                    "path": f"model.{name}_tower.layers.{layer}.{kind}",
                    "state": "adapted" if kind != "router" else "possible",
                    "params": 4096,
                }
                for layer in range(30)
                for kind in ("self_attn.q_proj", "self_attn.v_proj", "router")
            ],
        }
        for name in ("vision", "language")
    ],
    "charts": [
        {
            "title": "Training loss",
            "unit": "loss",
            "curves": [
                {"label": "language only", "points": [(step, 2.3 - step / 120) for step in range(5, 205, 5)]},
                {"label": "language + vision", "points": [(step, 2.3 - step / 90) for step in range(5, 205, 5)]},
            ],
        }
    ],
    "samples": [{"pixels": [[0, 255], [255, 0]], "expected": "3", "answers": [{"run": "language", "text": "8"}]}]
    * 5,
    "checks": [{"code": "GK201", "title": "attached", "verdict": "unknown", "evidence": "no engine"}],
    "files": [{"path": "out/" + "long-" * 30 + "name.safetensors", "size": 1234}],
    "versions": {"torch": "2.13.0"},
}


@dataclass
class Net:
    """All that the browser can reach: one page at PAGE, and a record of every request."""

    port: int
    page: str
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def net() -> Iterator[Net]:
    state = Net(0, render_report(DATA))

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append(self.path)
            body = state.page.encode() if self.path == PAGE else b""
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_HEAD = do_GET  # noqa: N815

        def do_CONNECT(self) -> None:
            state.requests.append(self.path)
            self.send_error(502)

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        state.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield state
        server.shutdown()
        thread.join()


def _browse(net: Net, profile: Path, *options: str) -> str:
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--hide-scrollbars",
            *FLAGS,
            f"--user-data-dir={profile}",
            f"--proxy-server=127.0.0.1:{net.port}",
            *options,
            PAGE,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


# Hosts that a freshly started Chromium contacts whatever page it shows; no page asset is on them.
BROWSER_HOSTS = frozenset(
    {
        "accounts.google.com",
        "android.clients.google.com",
        "clients2.google.com",
        "edgedl.me.gvt1.com",
        "optimizationguide-pa.googleapis.com",
        "redirector.gvt1.com",
        "safebrowsing.googleapis.com",
        "update.googleapis.com",
        "www.google.com",
    }
)


def _host(request: str) -> str:
    return request.removeprefix("http://").split("/")[0].split(":")[0]


def _from_outside(net: Net) -> list[str]:
    """Return what the page made the browser ask for, besides the page itself."""
    return [request for request in net.requests if request != PAGE and _host(request) not in BROWSER_HOSTS]


def test_rendered_page_has_the_figures_and_asks_for_nothing(net: Net, tmp_path: Path) -> None:
    dom = _browse(net, tmp_path / "profile", "--dump-dom")
    for shown in ("81.4 %", "94.7 %", "Target module &lt;Wrapper&gt;", "GK201", "unknown"):
        assert shown in dom
    assert PAGE in net.requests
    assert _from_outside(net) == []


def test_an_outside_asset_would_be_seen(net: Net, tmp_path: Path) -> None:
    net.page = "<!doctype html><title>t</title><img src='http://elsewhere.test/a.png'>"
    _browse(net, tmp_path / "profile", "--dump-dom")
    assert "http://elsewhere.test/a.png" in _from_outside(net)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshot_is_a_page_in_its_scheme(scheme: str, net: Net, tmp_path: Path) -> None:
    target = tmp_path / "page.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    _browse(net, tmp_path / "profile", f"--screenshot={target}", "--window-size=1280,1600", *dark)
    with Image.open(target) as image:
        assert (image.format, image.size) == ("PNG", (1280, 1600))
        grey = image.convert("L")
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert len(colours) > 100
    assert (grey.getpixel((2, 2)) < 64) == (scheme == "dark")


def test_nothing_sticks_out_on_a_phone(net: Net, tmp_path: Path) -> None:
    # Scripts are this test's, in a page around the report: the report itself has none.
    inner = net.page.replace("&", "&amp;").replace('"', "&quot;")
    net.page = (
        f'<!doctype html><iframe width="390" height="2000" srcdoc="{inner}"></iframe><p id="w"></p>'
        "<script>onload = () => { const d = document.querySelector('iframe').contentDocument;"
        "document.getElementById('w').textContent = "
        "`widths ${d.documentElement.scrollWidth} ${d.documentElement.clientWidth}`; }</script>"
    )
    dom = _browse(net, tmp_path / "profile", "--dump-dom")
    assert "widths 390 390" in dom
