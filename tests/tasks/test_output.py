"""Between hosts and the terminal: what pyinfra prints is clean, and what a host prints is read up to a limit."""

import io
import json
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from pathlib import Path

import gevent.queue
import pytest

from llamafleet.printable import finished
from tasks.lib import output
from tests import forked

ROOT = Path(__file__).parents[2]
# What a host may say: it clears the screen, turns the direction, hides text, forges a line of another host.
ODD = "\x1b[2J\x1b]0;title\x07 \x9b31m \u202eevil\u202c \u200b \x1b[8mhidden\r\n    [box2] Success"
LOCAL = f"""
from pyinfra import logger
from pyinfra.operations import server
from pyinfra.context import ctx_host
from tasks.lib import remote
ODD = {ODD!r}
ctx_host.get().log(ODD)
ctx_host.get().log_styled(ODD, fg="red", log_func=logger.error)
server.shell(name="Name " + ODD, commands=["printf '\\\\033[2J\\\\377\\\\302\\\\233cut\\\\303 \\\\033[8mhidden\\\\n'; exit 3"])
"""


def run(folder, text, *options, hosts=("@local",)):
    (folder / "deploy.py").write_text(text)
    (folder / "inventory.py").write_text(f"hosts = {list(hosts)!r}\n")
    words = ["-m", "pyinfra", *options, "-y", folder / "inventory.py", folder / "deploy.py"]
    return forked.pyinfra().run(words, env={**os.environ, "PYINFRA_PROGRESS": "off"}, text=False)


def test_nothing_of_a_host_s_reaches_the_terminal_as_it_is(tmp_path):
    done = run(tmp_path, LOCAL, "-vvv")
    printed = (done.stdout + done.stderr).decode()
    assert done.returncode != 0, printed
    assert r"\x1b[2J\x1b]0;title\x07 \x9b31m \u202eevil\u202c \u200b \x1b[8mhidden\r" in printed
    assert all(one.isprintable() or one == "\n" for one in printed), ascii(printed)
    assert r"\x1b[2J\udcff\x9bcut\udcc3 \x1b[8mhidden" in printed
    assert "\n    [box2] Success" not in printed and "        [box2] Success" in printed


def test_json_has_the_same_text_in_characters_that_print(tmp_path):
    done = run(tmp_path, LOCAL, "--dry", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"][0]["name"] == "Name " + ODD
    assert all(one.isprintable() or one == "\n" for one in done.stdout.decode())


def test_what_a_server_says_before_any_stage_is_loaded_is_clean(tmp_path):
    """A host that is to be connected to may say anything in place of SSH's greeting; config.py is read before."""
    with greeting("SSH-\x1b[2J\x9b31m\u202e-odd\r\n".encode()) as data:
        done = run(tmp_path, LOCAL, hosts=[("odd", data)])
    printed = (done.stdout + done.stderr).decode()
    assert done.returncode != 0 and r"\x1b[2J\x9b31m\u202e" in printed and "Traceback" not in printed, printed
    assert all(one.isprintable() or one == "\n" for one in printed), ascii(printed)


def test_a_server_that_cannot_be_understood_leaves_the_other_hosts_alone(tmp_path):
    """The lists of SSH's first message are no UTF-8, which paramiko raises as it is."""
    lists = b"".join(struct.pack(">I", 2) + b"\xff\xfe" for _ in range(10))
    message = b"\x14" + b"c" * 16 + lists + b"\0" * 5
    padding = 16 - (len(message) + 5) % 8
    packet = struct.pack(">IB", len(message) + padding + 1, padding) + message + b"p" * padding
    text = "from pyinfra.operations import server\nserver.shell(name='Greet', commands=['true'])\n"
    with greeting(b"SSH-2.0-odd\r\n" + packet) as data:
        done = run(tmp_path, text, hosts=[("odd", data), "@local"])
    printed = (done.stdout + done.stderr).decode()
    assert "[odd]    SSH error (UnicodeDecodeError: " in printed and "[@local] Success" in printed, printed
    assert "Traceback" not in printed


@contextmanager
def greeting(data):
    """A server that answers with these bytes; how to reach it, as an inventory says it."""

    def greet():
        connection, _ = server.accept()
        with connection:
            connection.sendall(data)
            while connection.recv(1000):
                pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        yield {"ssh_hostname": "127.0.0.1", "ssh_port": server.getsockname()[1], "ssh_connect_retries": 0}
        thread.join(10)


@pytest.fixture
def coloured(monkeypatch):
    """What click would print on a terminal."""
    printed = []
    monkeypatch.setattr(output, "_echo", lambda message, *rest, **named: printed.append(message))
    return printed


def test_pyinfra_s_own_colours_stay_and_those_of_a_host_become_visible(coloured):
    output.echo(f"[{output.style('box', bold=True)}] " + output.style("a\x1b[31mb", "red") + "\x1b[32mc")
    assert coloured == ["[\x1b[1mbox\x1b[0m] \x1b[31ma\\x1b[31mb\x1b[0m\\x1b[32mc"]


def test_a_style_within_a_style(coloured):
    output.echo(output.style(output.style("inner", "red") + "\x1b[7mouter", "green"))
    assert coloured == ["\x1b[32m\x1b[31minner\x1b[0m\\x1b[7mouter\x1b[0m"]


def record(text, *arguments):
    made = logging.LogRecord("pyinfra", logging.INFO, __file__, 1, text, arguments, None)
    assert output._clean_record(made) and output._clean_record(made)
    return made.getMessage()


def test_a_record_is_cleaned_cut_and_its_further_lines_stand_further_in():
    assert record("100 %") == "100 %"
    assert record("%s says %s", "box", "\x1b[2J\nforged\n") == "box says \\x1b[2J\n        forged\n"
    assert record("x" * 200_000) == "x" * 100_000 + "... (100000 more characters)"
    assert finished(record(output.style("red", "red"))) == "\x1b[31mred\x1b[0m"


def read(stream, **named):
    queue = gevent.queue.Queue()
    output.read_buffer("stdout", stream, queue, **named)
    return [line.line for line in queue.queue]


def test_a_command_s_output_is_read_whatever_bytes_it_is():
    assert read(io.BytesIO(b"one\n\n\xff\xc3\nlast")) == ["one", "", "\udcff\udcc3", "last"]
    long = b"x" * 300_000
    assert read(io.BytesIO(long + b"\nend\n")) == [long.decode(), "end"]


@pytest.mark.parametrize("line", [b"x\n" * 40, b"x" * 80, b"x" * 79 + b"\n"], ids=["lines", "one_line", "to_the_byte"])
def test_a_command_s_output_is_read_up_to_a_limit(monkeypatch, line):
    monkeypatch.setattr(output, "READ_BYTES", 2**17)
    lines = read(io.BytesIO(line * 2**13))
    assert lines.pop() == "it printed more than 0 MiB, which is not read"
    assert 0.4 * 2**17 < sum(map(len, lines)) <= 2**17


def test_paramiko_s_streams_are_read_as_bytes():
    from paramiko.file import BufferedFile

    class Channel(BufferedFile):
        def __init__(self, data):
            super().__init__()
            self.data = io.BytesIO(data)
            self._set_mode("r")

        def _read(self, size):
            return self.data.read(size)

    assert read(Channel(b"\xffa\nb\n" + b"c" * 100_000)) == ["\udcffa", "b", "c" * 100_000]


def test_what_a_greenlet_or_the_program_raises_is_clean():
    code = """
        import gevent, sys
        from tasks.lib import remote
        gevent.spawn(lambda: [][0], *[]).join()
        def bad():
            raise remote.RemoteError("\\x1b[2Jgreenlet")
        gevent.spawn(bad).join()
        raise remote.RemoteError("\\x1b[2Jprogram")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "\x1b" not in done.stderr
    assert r"\x1b[2Jgreenlet" in done.stderr and r"\x1b[2Jprogram" in done.stderr


def test_every_stage_brings_it_along():
    """Each imports `tasks.lib`, and that installs it before anything of ours is printed."""
    stages = [path.read_text() for path in (ROOT / "tasks").glob("*.py") if path.stem != "__init__"]
    assert len(stages) >= 9 and all(re.search("^from tasks.lib", text, re.MULTILINE) for text in stages)
    code = "import tasks.plan, click; from tasks.lib import output; assert click.echo is output.echo"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
