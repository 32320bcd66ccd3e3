"""The page's server answers this machine's browser, in one line where something is wrong."""

from __future__ import annotations

import http.client
import socket
import threading
from contextlib import contextmanager

import pytest

from cnnedge.demo import open_server
from cnnedge.demo.serve import SiteHandler


@contextmanager
def served(folder, host="127.0.0.1"):
    (folder / "models").mkdir(exist_ok=True)
    (folder / "index.html").write_text("the page")
    with open_server(folder, host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join(10)


def ask(port, host="localhost:{port}", method="GET", path="/", to="127.0.0.1"):
    connection = http.client.HTTPConnection(to, port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    for one in host if isinstance(host, list) else [host]:
        if one is not None:
            connection.putheader("Host", one.format(port=port))
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


OURS = ["localhost:{port}", "LocalHost:{port}", "127.0.0.1:{port}", "[::1]:{port}"]


@pytest.mark.parametrize("host", OURS)
def test_its_own_address_is_answered(tmp_path, host):
    with served(tmp_path) as port:
        assert ask(port, host) == (200, "the page")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "localhost",
        "localhost:1",
        "localhost:{port}.evil.example",
        "localhost.evil.example:{port}",
        "127.0.0.1.evil.example:{port}",
        "127.0.0.2:{port}",
        "user@localhost:{port}",
        "",
        None,
        ["localhost:{port}", "evil.example:{port}"],
    ],
)
def test_a_name_that_only_leads_here_is_not(tmp_path, host):
    with served(tmp_path) as port:
        status, body = ask(port, host)
        assert status == 400
        assert body.splitlines() == ["400 This is not the host that was asked for"]


def test_open_to_all_it_is_found_by_the_address_it_was_reached_at(tmp_path):
    with served(tmp_path, "0.0.0.0") as port:
        assert ask(port, "127.0.0.2:{port}", to="127.0.0.2") == (200, "the page")
        assert ask(port, f"{socket.gethostname()}:{{port}}") == (200, "the page")
        assert ask(port, "0.0.0.0.evil.example:{port}")[0] == 400
        assert ask(port, "127.0.0.3:{port}", to="127.0.0.2")[0] == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/%00", 404),
        ("GET", "/index.html%00.png", 404),
        ("GET", "/%ed%a0%80", 404),
        ("GET", "/%ff%fe", 404),
        ("GET", "/" + "n" * 300, 404),
        ("GET", "/" + "d/" * 4000, 404),
        ("GET", "/" + "n" * 70000, 414),
        ("GET", "/models/", 404),
        ("GET", "/index.html/", 404),
        ("GET", "http://evil.example/", 404),
        ("POST", "/", 405),
        ("DELETE", "/index.html", 405),
        ("<script>", "/", 405),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, capfd, method, path, status):
    with served(tmp_path) as port:
        found, body = ask(port, method=method, path=path)
        assert found == status
        (line,) = body.splitlines()
        assert line.startswith(str(status))
        assert len(line) < 100
        assert "script" not in line
        assert ask(port) == (200, "the page"), "it goes on answering"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "start", [b"", b"GET / HTTP/1.1\r\nHost: local", b"\r\n", b"\x16\x03\x01\x00\xff"]
)
def test_who_says_nothing_is_hung_up_on(tmp_path, capfd, monkeypatch, start):
    assert 0 < SiteHandler.timeout <= 60
    monkeypatch.setattr(SiteHandler, "timeout", 0.2)
    with served(tmp_path) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as silent:
            silent.sendall(start)
            while silent.recv(4096):
                pass
        assert ask(port) == (200, "the page")
    assert capfd.readouterr().err == ""
