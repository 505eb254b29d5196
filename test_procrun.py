"""The tests of procrun, in the order of its sections.

Four helpers: procfile() makes an app's folder, Run starts procrun there and shakes hands with it
by its output, eventually() retries an assertion, and leftovers() looks from outside for anything
that carries the test's own tag in its environment.
"""
import os
import re
import selectors
import signal
import subprocess
import sys
import time
import uuid

import pytest

import procrun

PROCRUN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "procrun.py")


def eventually(check, seconds=10.0):
    """Call `check` until it returns something true, and return that; fail when time is over."""
    deadline = time.monotonic() + seconds
    while True:
        result = check()
        if result:
            return result
        assert time.monotonic() < deadline, "did not come true in %s s" % seconds
        selectors.select.select((), (), (), 0.01)


def leftovers(tag):
    """The processes (id, command line) that carry the tag in their environment, and our zombies."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/environ" % pid, "rb") as file:
                tagged = tag.encode() in file.read()
            with open("/proc/%s/stat" % pid, "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
            with open("/proc/%s/cmdline" % pid, "rb") as file:
                command = file.read()
        except OSError:
            continue
        if tagged or (state == b"Z" and int(parent) == os.getpid()):
            found.append((int(pid), command))
    return found


class Run:
    """procrun in a folder, its output collected; a context that ends with nothing left."""

    def __init__(self, folder, *args, env=None, stdout=subprocess.PIPE, grace=1.0, **options):
        self.tag = "PROCRUN_TEST=" + uuid.uuid4().hex
        environment = {key: value for key, value in os.environ.items()
                       if key not in ("PORT", "PS", "NO_COLOR", "FORCE_COLOR")}
        environment.update([self.tag.split("=")], **(env or {}))
        self.grace, self.output = grace, b""
        self.process = subprocess.Popen([sys.executable, PROCRUN, *args], cwd=str(folder),
                                        env=environment, stdout=stdout, stderr=subprocess.STDOUT
                                        if stdout == subprocess.PIPE else None,
                                        stdin=subprocess.DEVNULL, **options)
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        try:
            if kind is None:
                eventually(lambda: not leftovers(self.tag), self.grace)
        finally:
            for pid, _ in leftovers(self.tag):
                os.kill(pid, signal.SIGKILL)
            self.process.wait()
            if self.process.stdout:
                self.process.stdout.close()

    def read(self, seconds):
        """Read what there is; False at the end of the output."""
        ready = selectors.select.select([self.process.stdout], (), (), seconds)[0]
        data = os.read(self.process.stdout.fileno(), 1 << 20) if ready else b""
        self.output += data
        return bool(data) or not ready

    def expect(self, pattern, seconds=10.0):
        """Wait until the output matches; return the match."""
        deadline = time.monotonic() + seconds
        while True:
            match = re.search(pattern, self.output, re.MULTILINE)
            if match:
                return match
            more = self.read(max(0, deadline - time.monotonic()))
            assert more and time.monotonic() < deadline, (pattern, self.output[-2000:])

    def signal(self, number):
        """Send a signal to procrun."""
        os.kill(self.pid, number)

    def wait(self, seconds=10.0):
        """Collect the rest of the output and return the exit status."""
        deadline = time.monotonic() + seconds
        while self.process.stdout and self.read(max(0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, self.output[-2000:]
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def lines(self, name):
        """What stands behind the prefix of an instance, a list of bytes."""
        return re.findall(rb"^\d\d:\d\d:\d\d " + name.encode() + rb" *\| (.*)$", self.output,
                          re.MULTILINE)


def procfile(folder, text, env=None):
    """Write a Procfile, and a .env if there is any, into the folder; return the folder."""
    folder.joinpath("Procfile").write_bytes(text if isinstance(text, bytes) else text.encode())
    if env is not None:
        folder.joinpath(".env").write_bytes(env if isinstance(env, bytes) else env.encode())
    return folder


# Procfile ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    (b"web: cmd a b\n", [("web", b"cmd a b")]),
    (b"web:cmd", [("web", b"cmd")]),
    (b"web:\t  cmd  \n", [("web", b"cmd  ")]),
    (b"\xef\xbb\xbfweb: a\r\nz: b\r\n", [("web", b"a"), ("z", b"b")]),
    (b"# web: x\n\n   \n  # y\nmy-web_1: a:b # c\n", [("my-web_1", b"a:b # c")]),
    (b"a: x \\\n  y\nb: z\\\\\nc: w\\", [("a", b"x   y"), ("b", b"z\\\\"), ("c", b"w\\")]),
    (b"web: printf '\xff\x01'\n", [("web", b"printf '\xff\x01'")]),
])
def test_procfile_entries(text, expected):
    assert [(each.name, each.command) for each in procrun.parse_procfile(text)] == expected


def test_procfile_errors_name_every_bad_line():
    text = b"web: a\nnope\nw b: x\nempty:  \nweb: b\nall: x\nnul: a\0b\n"
    with pytest.raises(procrun.Failure) as failure:
        procrun.parse_procfile(text, "P")
    assert [line.split(":")[:2] for line in failure.value.args] == [["P", str(n)] for n in range(2, 8)]
    assert "first on line 1" in failure.value.args[3]


# Environment -------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, value", [
    (b"A=b", b"b"), (b"A=", b""), (b"export A = b c  d  ", b"b c  d"), (b"A=a#b", b"a#b"),
    (b"A=b # c", b"b"), (b"A= # c", b""), (b"A=it's", b"it's"), (b"A=C:\\dir\\new", b"C:\\dir\\new"),
    (b'A={"a": 1}', b'{"a": 1}'), (b"A='a\nb' # c", b"a\nb"), (b'A="a\\n\\t\\"\\\\\\$\\x"', b'a\n\t"\\$\\x'),
    (b"A=$HOME", b"$HOME"), (b"A=1\nA=2", b"2"), (b"A=\xff", b"\xff"), (b"A=b\r\n", b"b"),
])
def test_env_values(text, value):
    assert procrun.parse_env(text) == {b"A": value}


@pytest.mark.parametrize("text, where", [
    (b"A=1\nB", ".env:2: expected NAME=value"), (b"A=1\nB='x\n\n", ".env:2: the quote"),
    (b"A='x'y\nB=1", ".env:1: text after"), (b"A-B=1", ".env:1: expected"), (b"A=a\0", ".env:1: NUL"),
])
def test_env_errors(text, where):
    with pytest.raises(procrun.Failure) as failure:
        procrun.parse_env(text)
    assert failure.value.args[0].startswith(where)


# Supervisor --------------------------------------------------------------------------------------

def test_first_exit_ends_the_set(tmp_path):
    app = procfile(tmp_path, "web: echo hello $PORT $PS; read x; exit 3\n"
                             "worker: echo up; while :; do sleep 0.1; done\n"
                             "crash: while [ ! -e go ]; do sleep 0.05; done; echo last; exit 7\n")
    with Run(app, "start") as run:
        run.expect(rb"hello 5000 web\.1$")
        run.expect(rb"up$")
        app.joinpath("go").touch()
        assert run.wait() == 7
        assert run.lines("crash.1")[-2:] == [b"last", b"exited with code 7"]
        assert run.lines("worker.1")[-1] == b"terminated by SIGTERM"


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "QUIT"])
def test_signal_ends_trees(tmp_path, name):
    number = getattr(signal, "SIG" + name)
    with Run(procfile(tmp_path, "a: sleep 300 & sleep 301 & echo up; wait\n"
                                "b: (setsid sleep 302 &) ; echo up2; sleep 303\n"), "start") as run:
        run.expect(rb"up$")
        run.expect(rb"up2$")
        run.signal(number)
        assert run.wait() == 128 + number


def test_kill_9_leaves_nothing(tmp_path):
    with Run(procfile(tmp_path, "a: trap '' HUP; echo up; sleep 300 & sleep 301\n"), "start") as run:
        run.expect(rb"up$")
        run.signal(signal.SIGKILL)
        run.process.wait()


def test_a_member_that_ignores_sigterm_is_killed_after_the_grace_period(tmp_path):
    with Run(procfile(tmp_path, "a: (trap '' TERM; exec >/dev/null 2>&1; while :; do sleep 1; done) &"
                                " echo up; sleep 300\n"), "start", "-t", "0.3") as run:
        run.expect(rb"up$")
        run.signal(signal.SIGINT)
        assert run.wait() == 130
