"""The tests of procrun, in the order of its sections; and at the foot, its benchmark.

Helpers: procfile() makes an app's folder, Run starts procrun there and shakes hands with it by its
output, eventually() retries an assertion, and leftovers() looks from outside for anything that
carries the test's own tag in its environment.
"""
import atexit
import base64
import concurrent.futures
import contextlib
import fcntl
import functools
import http.client
import itertools
import json
import os
import pathlib
import platform
import plistlib
import pty
import py_compile
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
import traceback
import unicodedata
import uuid

try:
    import pytest
except ImportError:    # the benchmark does without
    from unittest import mock
    pytest = mock.MagicMock()

import procrun

HERE = os.path.dirname(os.path.abspath(__file__))
PROCRUN = os.path.join(HERE, "procrun.py")


@functools.lru_cache(None)
def compiled():
    """What stands for `python procrun.py`, without what CPython would do anew at each of some 500
    starts: compile the file, and (-S) look for packages."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    file = py_compile.compile(PROCRUN, os.path.join(folder, "procrun.pyc"), doraise=True)
    return sys.executable, "-S", file


signal.signal(signal.SIGHUP, signal.SIG_DFL)    # or under nohup no child would have it
signal.signal(signal.SIGINT, signal.default_int_handler)    # the same for a shell's `&`
signal.signal(signal.SIGQUIT, signal.SIG_DFL)    # which ignores this one, too

# Signals 32 and 33 are the C library's, and GNU make starts its children with them ignored.
OWN_SIGNALS = ~(3 << 31)


def eventually(check, seconds=20.0):
    """Call `check` until it returns something true, and return that; fail when time is over."""
    deadline = time.monotonic() + seconds
    while True:
        result = check()
        if result:
            return result
        assert time.monotonic() < deadline, "did not come true in %s s" % seconds
        select.select((), (), (), 0.01)


def leftovers(tag):
    """The processes (id, command line) that carry the tag in their environment."""
    return from_proc(tag) if PROC else from_ps(tag)


def from_proc(tag):
    """The same by Linux's /proc."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open("/proc/%s/environ" % pid, "rb") as file:
                tagged = tag.encode() in file.read()
            with open("/proc/%s/cmdline" % pid, "rb") as file:
                found += [(int(pid), file.read())] * tagged
    return found


def from_ps(tag):
    """The same by ps, which shows the environment behind the command line, words joined by blanks;
    which of them are the command's is told by `ps` without the environment."""
    def listed(*options):
        text = subprocess.run(["ps", *options, "-o", "pid=,stat=,command="],
                              stdout=subprocess.PIPE).stdout.decode(errors="surrogateescape")
        return {int(line.split()[0]): line.split(None, 2)[2:] for line in text.splitlines()
                if not line.split()[1].startswith("Z")}
    commands = listed("axww")
    return [(pid, b"".join(os.fsencode(word) + b"\0" for word in commands[pid][0].split()))
            for pid, words in listed("axeww").items()
            if tag in "".join(words) and commands.get(pid)]


def new_tag():
    """A variable of the environment by which a test's own processes are known."""
    return "PROCRUN_TEST=" + uuid.uuid4().hex


def kill_all(tag):
    """Kill what carries the tag."""
    for pid, _ in leftovers(tag):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def free_base():
    """A base port whose neighbours, too, are free."""
    for base in random.sample(range(20000, 30000), 100):
        with contextlib.suppress(OSError):
            for port in (base, base + 1, *range(base + 50, base + 1600, 50)):
                socket.create_server(("127.0.0.1", port)).close()
            return base
    raise AssertionError("no free ports")


BASE_PORT = free_base()


def plain_environment(**more):
    """The environment, less what procrun heeds, and with more."""
    heeded = "PORT", "PS", "NO_COLOR", "FORCE_COLOR", "PYTHONUNBUFFERED"
    return {**{key: value for key, value in os.environ.items() if key not in heeded}, **more}


class Run:
    """procrun in a folder, its output collected; a context that ends with nothing left."""

    def __init__(self, folder, *args, env=None, stdout=subprocess.PIPE, python=None, **options):
        self.tag = new_tag()
        environment = plain_environment(PORT=str(BASE_PORT))
        environment.update([self.tag.split("=")], **(env or {}))
        self.output = b""
        self.process = subprocess.Popen([*(python or compiled()), *args], cwd=str(folder),
                                        env=environment, stdout=stdout, stderr=subprocess.STDOUT
                                        if stdout == subprocess.PIPE else None,
                                        stdin=subprocess.DEVNULL, **options)
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        try:
            if kind is None:
                eventually(lambda: not leftovers(self.tag))
        finally:
            kill_all(self.tag)
            self.process.wait()
            if self.process.stdout:
                self.process.stdout.close()

    def read(self, seconds):
        """Read what there is; False at the end of the output."""
        ready = select.select([self.process.stdout], (), (), seconds)[0]
        data = os.read(self.process.stdout.fileno(), 1 << 20) if ready else b""
        self.output += data
        return bool(data) or not ready

    def expect(self, pattern, seconds=20.0):
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

    def wait(self, seconds=20.0):
        """Collect the rest of the output and return the exit status."""
        deadline = time.monotonic() + seconds
        while self.process.stdout and self.read(max(0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, self.output[-2000:]
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def end(self, name="INT"):
        """End it by a signal, as which its exit status tells."""
        self.signal(getattr(signal, "SIG" + name))
        assert self.wait() == 128 + getattr(signal, "SIG" + name)

    def find(self, *command):
        """Wait for a process of the run with this command line; return its id."""
        text = b"".join(word + b"\0" for word in command)
        return eventually(lambda: [pid for pid, found in leftovers(self.tag) if found == text])[0]

    def lines(self, name):
        """What stands behind the prefix of an instance, a list of bytes."""
        return re.findall(rb"^\d\d:\d\d:\d\d " + name.encode() + rb" *\| (.*)$", self.output,
                          re.MULTILINE)


def procfile(folder, text, env=None):
    """Write a Procfile, and a .env if there is any, into the folder, which is made if missing;
    return the folder."""
    folder.mkdir(exist_ok=True)
    folder.joinpath("Procfile").write_bytes(text if isinstance(text, bytes) else text.encode())
    if env is not None:
        folder.joinpath(".env").write_bytes(env if isinstance(env, bytes) else env.encode())
    return folder


def start(folder, text, *args, kind=Run, **options):
    """Write a Procfile and run `start` there, by Run or by a kind of it."""
    return kind(procfile(folder, text), "start", *args, **options)


PYTHON = shlex.quote(sys.executable)
WAIT = "exec cat"       # for ever: nobody writes to a process's stdin, and nobody closes it
LOOP = "while :; do sleep 0.03; done"                     # the same for a shell with traps
UNTIL = "while [ ! -e %s ]; do sleep 0.03; done"          # until there is such a file
UNTIL_GO = UNTIL % "go" + "; "
LONG = bool(os.environ.get("PROCRUN_LONG"))    # the heavy ones in full
PROC = os.path.exists("/proc/self/environ") and not os.environ.get("PROCRUN_NO_PROC")
needs_linux = pytest.mark.skipif(not PROC, reason="looks into /proc")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it switches users")


def needs(*programs):
    """Skip where one of the programs is not installed."""
    missing = [each for each in programs if not shutil.which(each)]
    return pytest.mark.skipif(bool(missing), reason="not installed: " + ", ".join(missing))


def ask(folder, *args, command=None, env=None, **options):
    """Run `python procrun.py`, or another command, to its end; (exit status, stdout, stderr)."""
    done = subprocess.run([*(command or compiled()), *args], cwd=str(folder), timeout=20,
                          stderr=subprocess.PIPE, env=plain_environment(**(env or {})),
                          **{"input": b"", "stdout": subprocess.PIPE, **options})
    return done.returncode, done.stdout, done.stderr


def call(folder, *args, prepare=lambda: None):
    """The same by procrun.main() in a fork, which is quicker where no Python of its own is due."""
    files = [tempfile.TemporaryFile() for _ in range(2)]
    pid = os.fork()
    if pid == 0:
        ended = 99
        try:
            os.chdir(str(folder))
            for fd, file in enumerate(files, 1):
                os.dup2(file.fileno(), fd)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            os.environ.pop("PORT", None)
            prepare()
            ended = procrun.main(list(map(str, args)))
        except SystemExit as end:
            ended = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(ended)
    status = os.waitpid(pid, 0)[1]
    for file in files:
        file.seek(0)
    return (os.WEXITSTATUS(status), *(file.read() for file in files))


def parsed(text):
    """The Procfile's types as (name, command) pairs, or the numbers of its bad lines."""
    try:
        return [(each.name, each.command) for each in procrun.parse_procfile(text, "P")]
    except procrun.Failure as failure:
        assert all(line.startswith("P:") for line in failure.args)
        return [int(line.split(":")[1]) for line in failure.args]


# Procfile ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    (b"web: cmd a b\nworker: x\n", [("web", b"cmd a b"), ("worker", b"x")]),
    (b"web:none\na:   three\nb:\ttab\nc: \t mixed", [
        ("web", b"none"), ("a", b"three"), ("b", b"tab"), ("c", b"mixed")]),
    (b"\xef\xbb\xbfweb: byte order mark", [("web", b"byte order mark")]),
    (b"web: crlf\r\n\r\n# c\r\nz: goes \\\r\n  on\r\n", [("web", b"crlf"), ("z", b"goes   on")]),
    (b"\n  \n\t\n# web: x\n  # y\n\t#z: z\nweb: a # b\n\n", [("web", b"a # b")]),
    (b"# goes on? \\\nweb: a", [("web", b"a")]),
    (b"A-Za-z_0-9: a\n-: b\n_: c\n0: d\n", [
        ("A-Za-z_0-9", b"a"), ("-", b"b"), ("_", b"c"), ("0", b"d")]),
    (b"web: curl http://x:80/ a:b\nz:: y", [("web", b"curl http://x:80/ a:b"), ("z", b": y")]),
    (b"web: kept  \t \n", [("web", b"kept  \t ")]),
    (b"web: a\tb\x01\x0b\x0c\x1c\x7f\rc", [("web", b"a\tb\x01\x0b\x0c\x1c\x7f\rc")]),
    (b"web: \xff\xfe\xc3\x28", [("web", b"\xff\xfe\xc3\x28")]),
    ("web:\u00a0\u00e9\u0085\u2028".encode(), [("web", "\u00a0\u00e9\u0085\u2028".encode())]),
    (b"a: x \\\n  y\\\nz: 1\nb: 2", [("a", b"x   yz: 1"), ("b", b"2")]),
    (b"a: echo \\\n  # b\nc: d", [("a", b"echo   # b"), ("c", b"d")]),
    (b"a: x\\\\\nb: y\\", [("a", b"x\\\\"), ("b", b"y\\")]),
    (b"a: $PORT ${PORT} '$PORT' `id`", [("a", b"$PORT ${PORT} '$PORT' `id`")]),
    (b"all-web: a\nALL: b\nsystem: c", [("all-web", b"a"), ("ALL", b"b"), ("system", b"c")]),
    # Lines are counted as they stand, and all bad ones are named.
    (b"# c\na: x \\\ny\n\nb z\n", [5]),
    (b"a: 1\nnope\nw b: x\ngood: y\nempty:  \na: b\nx: \\\n y\nall: x\n", [2, 3, 5, 6, 9]),
])
def test_procfile(text, expected):
    assert parsed(text) == expected


@pytest.mark.parametrize("line, message", [
    (b"no colon", "colon"), (b"web", "colon"), (b"- web", "colon"),
    ("w\u00e9b: x".encode(), "bad name `w\u00e9b`"), (b": x", "name"), (b"my.web: x", "name"),
    (b"a/b: x", "name"), (b"web : x", "name"), (b"\tweb: x", "name"),
    (b"w\xffb: x", "name"), (b"w\x1bb: x", r"`w\x1bb`"), (b"\xef\xbb\xbfweb: x", "name"),
    (b"x" * 50 + b" y: x", "`" + "x" * 40 + "...`"),
    (b"web:", "empty"), (b"web: \t ", "empty"), (b"all: x", "all"), (b"first: again", "line 1"),
    (b"web: a\0b", "NUL"),
])
def test_procfile_errors(line, message):
    with pytest.raises(procrun.Failure) as failure:
        procrun.parse_procfile(b"first: a\n\n" + line + b"\nlast: z\n", "sub/Procfile")
    [error] = failure.value.args
    assert error.startswith("sub/Procfile:3: ") and message in error


@pytest.mark.parametrize("parse", [procrun.parse_procfile, procrun.parse_env])
@pytest.mark.parametrize("count, last", [(10, "F:10: "), (11, "F: and 1 more"),
                                         (33, "F: and 23 more")])
def test_the_first_ten_errors_and_a_count(parse, count, last):
    with pytest.raises(procrun.Failure) as failure:
        parse(b"?\n" * count, "F")
    assert len(failure.value.args) == min(count, 11)
    assert failure.value.args[9].startswith("F:10: ") and failure.value.args[-1].startswith(last)


def noise(size, seed=0):
    """Random bytes."""
    return random.Random(seed).getrandbits(8 * size).to_bytes(size, "little")


@pytest.mark.parametrize("parse", [procrun.parse_procfile, procrun.parse_env])
@pytest.mark.parametrize("text", [
    lambda n: noise(n), lambda n: b" " * n + b"a", lambda n: b"a" * n, lambda n: b"\n" * n,
    lambda n: b"?\n" * n, lambda n: b"A=" + b"\\" * n, lambda n: b"a: : \\\n" + b"\\\n" * n,
    lambda n: b'A="' + b'\\"' * n, lambda n: b"A='\nB=\"\n" * n, lambda n: b"A=" + b" #" * n,
    lambda n: b"A=" + b"${" * n, lambda n: b"A=" + b"${A:-" * n, lambda n: b"A=${B}\n" * n,
    lambda n: b"A=x\n" + b"A=${A}${A}\n" * n, lambda n: b"A" * n + b" " * n,
    lambda n: b"".join(b"a%d: =\n" % each for each in range(n // 10)),
    lambda n: b"".join(b"n%d=:\n" % each for each in range(n // 10)),
], ids="noise blanks letters newlines errors backslashes continued open quotes comments unclosed "
       "defaults undefined doubled name names values".split())
def test_absurd_text_is_parsed_or_refused_in_seconds(text, parse):
    began = time.monotonic()
    try:
        parse(text(1000000 if LONG else 100000))
    except procrun.Failure as failure:
        assert 0 < sum(map(len, failure.args)) < 20000
    assert time.monotonic() - began < 30


# Environment -------------------------------------------------------------------------------------

GIVEN = {b"HOME": b"/home/a", b"EMPTY": b"", b"X": b"outer", b"ODD": b"${X} \\n '\""}


@pytest.mark.parametrize("text, value", [
    (b"A=b", b"b"), (b"A=b\r\n", b"b"), (b"\tA =\tb", b"b"), (b"A=b\r", b"b"),
    (b"export A=b", b"b"), (b" export \t A = b", b"b"), (b"export\tA=b", b"b"),
    (b"A=", b""), (b"A=  ", b""), (b"A=''", b""), (b'A=""', b""), (b"A= # c", b""),
    (b"A=b \t ", b"b"), (b"A=b  c\td", b"b  c\td"),
    (b"A=b # c", b"b"), (b"A=b\t# c", b"b"), (b"A=b #", b"b"), (b"A=b # c # d", b"b"),
    (b"A=a#b", b"a#b"), (b"A=#b", b"#b"), (b"A=http://x/#y z", b"http://x/#y z"),
    (b"A=it's", b"it's"), (b"A=it's 5\" # c", b"it's 5\""), (b'A={"a": 1}', b'{"a": 1}'),
    (b"A=C:\\dir\\new", b"C:\\dir\\new"), (b"A=a\\", b"a\\"), (b"A=b=c", b"b=c"),
    (b"A='b'", b"b"), (b"A=' b # c '", b" b # c "), (b"A='b\\n\"$\\\\'", b"b\\n\"$\\\\"),
    (b"A = 'b' \t", b"b"), (b"A='b' # it's", b"b"), (b"A='b\n# c\n\nB=d\n'", b"b\n# c\n\nB=d\n"),
    (b'A="b"', b"b"), (b'A=" b # c "', b" b # c "), (b'A="it\'s"', b"it's"),
    (b'A="\\n\\t\\"\\\\\\$"', b'\n\t"\\$'), (b'A="\\x\\r\\0\\\'\\a"', b"\\x\\r\\0\\'\\a"),
    (b'A="\\\\n"', b"\\n"), (b'A="a\\\\"', b"a\\"), (b'A="b\nc" # "d"', b"b\nc"),
    (b'A="a\\\nb"', b"a\\\nb"), (b"A='b\r\nc\rd\r\n'\r\n", b"b\nc\rd\n"),
    (b'A="b\r\n\\n"\r\n', b"b\n\n"), (b"A=1\nA=2", b"2"), (b"A=1\nA=", b""),
    (b"A='1'\nexport A=2", b"2"), (b"# c\n\n  # A=x\n \t\nA=b\n", b"b"),
    (b"\xef\xbb\xbfA=\xff\xfe", b"\xff\xfe"), (b"A='\xff\n'", b"\xff\n"),
    # Expansions: from the lines above, else from the environment.
    (b"A=x\nA=p://${A}/y", b"p://x/y"), (b'A=x\nA="${A}\\n${A}"', b"x\nx"),
    (b"A=${HOME}/b", b"/home/a/b"), (b"A=${X}${X}", b"outerouter"), (b"A=${X} # ${Y}", b"outer"),
    (b"A='x y'\nA=${A} # c", b"x y"), (b"A='b\n${X}'", b"b\n${X}"), (b"A='${X}'", b"${X}"),
    (b"A=${X:-d}", b"outer"), (b"A=${NO:-d}", b"d"), (b"A=${EMPTY:-d}", b"d"),
    (b"A=${EMPTY}", b""), (b"A=${NO:-}", b""), (b"A=${NO:- a  b}", b" a  b"),
    (b'A="${NO:-a\nb}"', b"a\nb"),
    # A default is taken as it stands, to the first }; what is put in is not expanded again.
    (b"A=${NO:-${X}}", b"${X}"), (b"A=${NO:-\\$\\n}", b"\\$\\n"),
    (b'A="${NO:-\\$\\n}"', b"\\$\\n"),
    (b"A=${ODD}", b"${X} \\n '\""), (b'A="${ODD}"', b"${X} \\n '\""),
    (b"A='${X}'\nA=${A}", b"${X}"),
    # A backslash protects.
    (b"A=\\${X}", b"${X}"), (b'A="\\${X}"', b"${X}"), (b'A="\\\\${X}"', b"\\outer"),
    (b"A=\\\\${X}", b"\\${X}"), (b"A=\\$X", b"\\$X"), (b"A=\\${X:+y}", b"${X:+y}"),
    # Anything else stays.
    (b"A=$X pa$$w0rd$ $(id) `id`", b"$X pa$$w0rd$ $(id) `id`"), (b'A="$X"', b"$X"),
    (b"A=${a.b}", b"${a.b}"), (b"A=${X:+y}", b"${X:+y}"), (b"A=${X-y}", b"${X-y}"),
    (b"A=${X", b"${X"), (b"A=${X:-y", b"${X:-y"), (b"A=${}", b"${}"), (b"A=${1}", b"${1}"),
    (b"A=${ X }", b"${ X }"), (b"A={${X}}", b"{outer}"), (b"A=$${X}", b"$outer"),
])
def test_env_values(text, value):
    assert procrun.parse_env(text, ".env", GIVEN) == ({b"A": value}, [])


def test_env_names():
    names = ["a_B9", "9x", "_", "app.baseURL", "my-key", "a#b", "\u00c4", "a:b", "$X", "@a/b[0]"]
    text = "".join("%s=%s\n" % each for each in zip(names, names)).encode()
    text += b"export=4\nexport exported=5\nexport export=6\n"
    assert procrun.parse_env(text, ".env")[0] == {
        **{name.encode(): name.encode() for name in names}, b"export": b"6", b"exported": b"5"}


def test_env_undefined_names_are_warned_of():
    text = b"A=1\nB='\n'\nC=${NO}-${A}-${NO}${X}\nD=${NONE:-d}${E}\nE=${C}\n"
    variables, warnings = procrun.parse_env(text, "x/.env", GIVEN)
    assert variables[b"C"] == b"-1-outer" and variables[b"D"] == b"d"
    assert warnings == ["x/.env:%d: warning: ${%s} is not defined, so it is empty" % each
                        for each in [(4, "NO"), (5, "E")]]
    assert procrun.parse_env(b"A=${NO}\n" * 33, "F")[1][10:] == ["F: and 23 more"]


@pytest.mark.parametrize("text, lines", [
    (b"A", [1]), (b"export A", [1]), (b"=x", [1]), (b"A B=1", [1]), (b"A: 1", [1]),
    (b"'A'=1", [1]), (b'"A"=1', [1]), (b"A'B=1", [1]), (b"A\x01=1", [1]), (b"A\x7f=1", [1]),
    (b"A=1\nB\nC=1\n\nD D=2\n", [2, 5]), (b"A='1\n2'\nB", [3]), (b'A="\n\n\\\n"\n\nB', [6]),
    (b"A='b'c", [1]), (b'A="b"c', [1]), (b"A='b''c'", [1]), (b'A="b" c # d', [1]),
    (b"A='b\nc' d\nB\n", [1, 3]), (b"A=1\nB='x\nC=2\n", [2]), (b'A=1\n\nB="x\\"\n', [3]),
    (b"A=\"x\\", [1]), (b"A=b\0c", [1]), (b"A='\0'", [1]), (b"A=" + b"x" * 1100000, [1]),
    # Secrets are not shown.
    (b"1=1\nexport PASSWORD hunter2=", [2]), (b"A='a'hunter2", [1]), (b'PASSWORD="hunter2', [1]),
    (b"hunter2=\0", [1]), (b"hunter2hunter2", [1]), (b"A='hunter2'\nB=${A}${A}\nC", [3]),
])
def test_env_errors(text, lines):
    with pytest.raises(procrun.Failure) as failure:
        procrun.parse_env(text, "x/.env")
    assert [line.split(": ")[0] for line in failure.value.args] == ["x/.env:%d" % n for n in lines]
    assert "hunter2" not in str(failure.value)


def test_fuzz_what_is_written_is_read_again():
    """Any types and variables, in every way to write them."""
    chance = random.Random(4)
    escapes = {b"\n": b"\\n", b"\t": b"\\t", b'"': b'\\"', b"\\": b"\\\\", b"$": b"\\$"}
    styles = {
        "'": lambda value: b"'%s'" % value.replace(b"'", b""),
        '"': lambda value: b'"%s"' % b"".join(
            escapes.get(each, each) if each in b'\\"$' or chance.random() < 0.5 else each
            for each in (value[n:n + 1] for n in range(len(value)))),
        "": lambda value: re.sub(rb"[\n{}]", b"", value).replace(b"#", b"x#").strip(b" \t'\"")}
    for _ in range(400):
        types, procfile, variables, env = {}, b"", {}, b""
        for number in range(chance.randrange(1, 8)):
            name = "".join(chance.choices("AZaz09_-", k=3)) + str(number)
            value = bytes(chance.choices(b"\n\t \"'\\$#={}nt\x01\x80\xff", k=chance.randrange(12)))
            style = chance.choice(list(styles))
            written = styles[style](value)
            variables[name.encode()] = written if not style else (
                value.replace(b"'", b"") if style == "'" else value)
            types[name] = b"x" + value.replace(b"\n", b"") + b"."
            procfile += b"%s:%s%s\r\n" % (name.encode(), chance.choice([b"", b" \t"]), types[name])
            procfile += chance.choice([b"", b"\n", b"# c \\\r\n", b"\t\n", b"#\xff:\n"])
            env += chance.choice([b"", b"export ", b"\t"]) + name.encode()
            env += chance.choice([b"=", b" = "]) + written
            env += chance.choice([b"\n", b" # it's \"\n", b"  \n\n", b"\r\n"])
        assert parsed(procfile) == list(types.items())
        assert procrun.parse_env(env, ".env") == (variables, []), env


# Formation ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, env, dotenv, expected", [
    ("", {}, "", "web.1=5000 worker.1=5100 clock.1=5200"),
    ("worker", {}, "", "worker.1=5100"),
    ("clock web -c web=2", {}, "", "web.1=5000 web.2=5001 clock.1=5200"),
    ("-c web=2", {}, "", "web.1=5000 web.2=5001 worker.1=5100 clock.1=5200"),
    ("-c web=0,worker=3 --concurrency clock=2 web worker clock", {}, "",
     "worker.1=5100 worker.2=5101 worker.3=5102 clock.1=5200 clock.2=5201"),
    ("-c all=2,clock=0", {}, "", "web.1=5000 web.2=5001 worker.1=5100 worker.2=5101"),
    ("-m clock=2", {}, "", "clock.1=5200 clock.2=5201"),
    ("-m web=1 --formation worker=1", {}, "", "web.1=5000 worker.1=5100"),
    ("-m clock=0,all=1", {}, "", "web.1=5000 worker.1=5100"),
    ("-c worker=2 -m web=1", {}, "", "web.1=5000 worker.1=5100 worker.2=5101"),
    ("-p 6000 worker", {"PORT": "8000"}, "PORT=7000", "worker.1=6100"),
    ("--port=65335", {}, "", "web.1=65335 worker.1=65435 clock.1=65535"),
    ("clock", {"PORT": "8000"}, "PORT=7000", "clock.1=7200"),
    ("clock", {"PORT": "8000"}, "", "clock.1=8200"),
    ("clock", {"PORT": "8000"}, "PORT=", "clock.1=8200"),
    ("clock", {"PORT": ""}, "PORT=''", "clock.1=5200"),
])
def test_formation_and_ports(tmp_path, args, env, dotenv, expected):
    text = "web: {0}\nworker: {0}\nclock: {0}\n".format("echo $PS=$PORT; cat")
    app = procfile(tmp_path, text, dotenv)
    with Run(app, "start", *args.split(), env={"PORT": "", **env}) as run:
        for instance in expected.split():
            run.expect(rb"\| %s$" % instance.encode())
        run.end("TERM")
        assert b"SIGKILL" not in run.output
        started = re.findall(rb"(\S+) +\| started with pid \d+, PORT=(\d+)$", run.output, re.M)
        assert sorted(b"%s=%s" % each for each in started) == sorted(expected.encode().split())
        assert len(re.findall(rb"\.\d=\d+$", run.output, re.M)) == len(started)


# What takes the shell's place, and what stays behind the trap.
REPLACES = [
    "printenv A", "printenv A # comment", "printenv\tA \\",
    r"""printenv 'A' "A" \A ${A+A} $A $A$EMPTY""", "printenv NOSUCH",
    'printenv ${B:-A} "${NOSUCH-A}" } ${NOSUCH?no}', "printenv A}",
    "ls *.txt ?.txt [ab].txt no*such", r'''ls 'a b.txt' "a b.txt" a\ b.txt a' 'b".txt"''',
    "ls -d ~ ~/.", "ls é.txt $EMPTY", "env X=1 printenv X", r'''./script $A a\ b '$A' "$A"''',
    """script "" ''""", "./true", "no-such-program a", "./missing", "./no-program", "./folder"]
STAYS = [
    "A=1 printenv A", "A=1 B='x y' printenv A B", "A=5", "printenv A; printenv B; exit 3",
    "printenv A && printenv NOSUCH || echo $?", "printenv A | cat", "printenv A > out; cat out",
    "2>/dev/null ls no*such", "ls no*such 2>/dev/null", "cat < a.txt", "printenv A & wait",
    "printenv A &", "(printenv A; exit 4)", "{ printenv A; exit 5; }", "! printenv NOSUCH",
    "[ a = b ]", "test a = a", "true", "false", ": a", r"""echo a  'b  c' "$A" \$A""",
    "printf '%s.' a b", "exec printenv A; echo never", "exec echo a", "exec",
    "exec 2>/dev/null; ls no*such", "if true; then echo yes; fi",
    "for x in 1 2; do echo $x; done", "while false; do :; done", "until true; do :; done",
    "case $A in a*) echo a;; esac", "cd /; pwd", "cd /", ". ./script", """eval 'echo "$A"'""",
    "export A=2; printenv A", "command printenv A", "set -- 1 2; echo $#", "x() { echo in; }; x",
    "exit 7", "'printenv' A", '"printenv" A', r"\printenv A", "p'rint'env A",
    "print$EMPTY''env A", "$(echo printenv) A", "`echo printenv` A", "printenv $(echo A)",
    "printenv `echo A`", "$EMPTY printenv A", "$EMPTY", "$NOSUCH", "~/script a", "*script a",
    "# comment", "./é a", "é", "cat <<E", "printenv 'A;B'", "printenv {A,B}",
    "printenv ${A:=`echo`}", "printenv A;"]
UNTOUCHED = ["exec printenv A", "exec  ./script a", "exec\tprintenv 'A'", "exec no-such-program"]


def test_shell_text():
    table = {"exec ": REPLACES, procrun.TRAP.decode(): STAYS, "": UNTOUCHED}
    for front, commands in table.items():
        for command in commands:
            assert procrun.shell_text(command.encode()) == (front + command).encode()


@pytest.mark.parametrize("shell", ["/bin/sh", "bash", "busybox sh"])
def test_shell_text_does_what_the_command_does(tmp_path, shell):
    """In any shell, the same output and exit status."""
    words = shell.split()
    if not shutil.which(words[0]):
        pytest.skip("needs " + words[0])
    for name in "a.txt", "b.txt", "a b.txt", "é.txt", "no-program":
        tmp_path.joinpath(name).write_bytes(b"text\n")
    for name in "script", "é":
        # No #! in it; and bash gives it its absolute path as $0 if there is an exec in front.
        tmp_path.joinpath(name).write_bytes(b'echo "${0##*/}: $#: $1"\nexit 9\n')
        tmp_path.joinpath(name).chmod(0o755)
    tmp_path.joinpath("folder").mkdir()
    tmp_path.joinpath("true").symlink_to(shutil.which("true"))
    environment = {"PATH": "%s:%s" % (tmp_path, os.environ["PATH"]), "HOME": str(tmp_path),
                   "A": "a  value", "B": "b", "EMPTY": "", "LC_ALL": "C.UTF-8"}

    def run(text):
        done = subprocess.run([*words, "-c", text], cwd=str(tmp_path), env=environment,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, timeout=20)
        return done.returncode, done.stdout

    commands = [command.encode() for command in REPLACES + STAYS + UNTOUCHED]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        plain = list(pool.map(run, commands))
        found = list(pool.map(run, map(procrun.shell_text, commands)))
    assert dict(zip(commands, found)) == dict(zip(commands, plain))
    assert (0, b"a  value\n") in plain and (9, b"script: 5: a\n") in plain
    assert {126, 127} <= {status for status, _ in plain}


# Export ------------------------------------------------------------------------------------------

FORMATS = "upstart", "systemd", "launchd", "supervisord", "runit", "kubernetes"
USER = {b"HOME": b"/root", b"USER": b"root", b"LOGNAME": b"root"}
BASE = {b"PATH": b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


def export(folder, format, location, *args, status=0, app="myapp", prepare=lambda: None):
    """Export the app of a folder; return what was said, stderr and stdout."""
    names = ["-a", app] * bool(app) + ["-u", "root"] * ("-u" not in args)
    names += ["--image", "example/app:1"] * (format == "kubernetes")
    ended, out, errors = call(folder, "export", format, location, *names, *args, prepare=prepare)
    said = errors + out
    assert status in (ended, "refused") and ended < 3 and b"Traceback" not in said, said
    if status == "refused":
        assert ended
    elif status:
        assert said.startswith(b"procrun: ") and said.count(b"\n") == 1
    return said


def tree(folder):
    """All below a folder: {path: (permission bits, content)}; what is no file has None as such."""
    return {str(path.relative_to(folder)): (
        stat.S_IMODE(path.lstat().st_mode),
        path.read_bytes() if path.is_file() and not path.is_symlink() else None)
        for path in folder.rglob("*")}


def files(folder):
    """The files of an export, by path."""
    return {path: data for path, (_, data) in tree(folder).items() if data is not None}


# What the managers would run: models of how each reads its files ---------------------------------
#
# Each returns {instance: (argv, environment, working directory)}, all in bytes.

UPSTART_JOB = re.compile(r"""(?x)
    description .*\n (?: (?:start|stop) [ ]on [ ].*\n )+ respawn\n respawn [ ]limit [ ]unlimited\n
    kill [ ]timeout [ ]\d+\n setuid [ ]root\n setgid [ ]'root'\n chdir [ ]'(?P<root>.*)'\n
    script\n (?P<script> (?s:.*?\n)) [ \t\r]*end[ \t\r]+script[ \t\r]*(?:\#.*)?\n
    (?:\#.*\n | post-stop [ ]exec [ ]sleep [ ]1\n)* \Z""")


def run_by_upstart(location):
    """Its scripts end at the first line that looks so."""
    runs, folder = {}, location.parent / "scripts"
    folder.mkdir()
    for path, data in files(location).items():
        if b"\nscript\n" not in data:
            continue
        job = UPSTART_JOB.search(os.fsdecode(data))
        name = path[len("myapp-"):-len(".conf")]
        script = folder.joinpath(name)    # it is passed by /proc/self/fd/9
        script.write_bytes(os.fsencode(job["script"]))
        [root] = shlex.split("'%s'" % job["root"])
        runs[name] = [b"/bin/sh", b"-e", bytes(script)], {**BASE, b"HOME": b"/"}, root
    return runs


def run_by_launchd(location):
    runs = {}
    for path, data in files(location).items():
        job = plistlib.loads(data)
        assert job["KeepAlive"] is True and job["RunAtLoad"] is True and job["UserName"] == "root"
        assert job["Label"] + ".plist" == path
        runs[job["Label"][len("myapp-"):]] = (
            list(map(os.fsencode, job["ProgramArguments"])),
            {**BASE, **USER, **{os.fsencode(name): os.fsencode(value)
                        for name, value in job["EnvironmentVariables"].items()}},
            job["WorkingDirectory"])
    return runs


def kubernetes_expanded(text, variables):
    """$(NAME) of a variable is replaced, $$ is $; see kubernetes' expansion.go, byte for byte."""
    def expand(match):
        if match[1] is not None:
            return variables.get(match[1], match[0])
        return b"$" if match[2] == b"$" else b"$" + chr(match[2][0]).encode()
    return re.sub(rb"(?s)\$(?:\(([^)]*)\)|(.))", expand, text)


def kubernetes_items(location):
    """The objects of an export, by kind and name."""
    read = {path: json.loads(data) for path, data in files(location).items()}
    return {(each["kind"], each["metadata"]["name"]): each
            for each in [read["myapp-secret.json"]] + read["myapp.json"]["items"]}


def run_by_kubernetes(location):
    runs, items = {}, kubernetes_items(location)
    for (kind, name), item in items.items():
        if kind != "Deployment":
            continue
        (container,) = item["spec"]["template"]["spec"]["containers"]
        environment = {**BASE, **USER}
        for each in container["envFrom"]:
            secret = items["Secret", each["secretRef"]["name"]]["data"]
            environment.update((os.fsencode(key), base64.b64decode(value))
                               for key, value in secret.items())
        for each in container["env"]:
            if "valueFrom" in each:
                assert each["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
            value = each.get("value", name + "-5d4f-x2x").encode()
            environment[each["name"].encode()] = kubernetes_expanded(value, environment)
        runs[name[len("myapp-"):] + "-1"] = (
            [kubernetes_expanded(word.encode(), environment) for word in container["command"]],
            environment, container.get("workingDir"))
    return runs


MODELS = {"upstart": run_by_upstart, "launchd": run_by_launchd, "kubernetes": run_by_kubernetes}


# The real managers -------------------------------------------------------------------------------

def settle(process, tag):
    """End a manager, and see that it left nothing."""
    process.terminate()
    process.wait(20)
    try:
        eventually(lambda: not leftovers(tag))
    finally:
        kill_all(tag)


@contextlib.contextmanager
def supervisord(location):
    """A supervisord that includes *.conf of the location; yields what calls supervisorctl."""
    tag = new_tag()
    folder = location.parent
    folder.joinpath("s.conf").write_text("""
        [supervisord]
        nodaemon = true
        user = root
        logfile = %(here)s/s.log
        pidfile = %(here)s/s.pid
        childlogdir = %(here)s
        [unix_http_server]
        file = %(here)s/s.sock
        [rpcinterface:supervisor]
        supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
        [supervisorctl]
        serverurl = unix://%(here)s/s.sock
        [include]
        files = %(here)s/{}/*.conf
        """.replace("\n        ", "\n").format(location.name))

    def control(*words):
        subprocess.run(["supervisorctl", "-c", "s.conf", *words], cwd=str(folder), timeout=30,
                       stdout=subprocess.DEVNULL)
    process = subprocess.Popen(
        ["supervisord", "-c", "s.conf"], cwd=str(folder), stdout=subprocess.DEVNULL,
        env=dict(os.environ, **dict([tag.split("=")])))
    try:
        eventually(lambda: folder.joinpath("s.sock").exists() or process.poll() is not None)
        assert process.poll() is None, folder.joinpath("s.log").read_bytes()
        yield control
    finally:
        settle(process, tag)


@contextlib.contextmanager
def runsvdir(location):
    """A runsvdir of the location; yields what calls sv for one service, or for all."""
    tag = new_tag()

    def control(word, name="*"):
        services = sorted(location.glob(name))
        subprocess.run(["sv", "-w", "20", word, *map(str, services)], timeout=30,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(["runsvdir", "-P", str(location)], stdout=subprocess.DEVNULL,
                               env=dict(os.environ, **dict([tag.split("=")])))
    try:
        yield control
    finally:
        process.send_signal(signal.SIGHUP)    # ends the services; a SIGTERM beside it would win
        process.wait(20)
        settle(process, tag)


PROCESS_1 = """
mount --make-rprivate /
mount --bind "$1" /mnt
for folder in /tmp /run /var/tmp; do mount -t tmpfs tmpfs "$folder"; done
mkdir -p "$1"
mount --move /mnt "$1"
mount -t proc proc /proc
exec env -i PATH="$PATH" "$2" container=procrun SYSTEMD_UNIT_PATH="$1/out" /lib/systemd/systemd \
    --system --unit=all.target --show-status=0
"""


@contextlib.contextmanager
def systemd(location):
    """A systemd that is process 1 of a namespace and knows no unit but those of the location;
    yields what calls systemctl there.  /tmp, /run and /var/tmp are not the machine's."""
    tag = new_tag()
    wants = " ".join(each.name for each in location.glob("*.target") if each.name.count("-") == 0)
    for name in "sysinit", "basic", "shutdown", "network", "multi-user", "all":
        location.joinpath(name + ".target").write_text(
            "[Unit]\nDescription=x\nDefaultDependencies=no\nWants=%s\n" % (
                wants if name == "all" else ""))
    outer = subprocess.Popen(
        ["unshare", "--pid", "--kill-child", "--mount", "--fork", "--uts", "--ipc", "--cgroup",
         "sh", "-ec", PROCESS_1, "sh", str(location.parent), tag],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    try:
        pid = eventually(lambda: children(outer.pid) or outer.poll() is not None)

        def control(*words):
            return subprocess.run(["nsenter", "-t", str(pid[0]), "-p", "-m", "systemctl", *words],
                                  timeout=60, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if pid is True or eventually(lambda: outer.poll() is not None or control(
                "is-active", "all.target").stdout != b"active\n", 30) is True and outer.poll():
            pytest.skip("systemd cannot be process 1 of a namespace here")
        yield control
    finally:
        outer.kill()
        outer.wait()
        eventually(lambda: not leftovers(tag))


MANAGERS = {"supervisord": supervisord, "runit": runsvdir, "systemd": systemd}
STOP = {"supervisord": ("stop", "all"), "runit": ("stop",), "systemd": ("stop", "myapp.target")}


# Fidelity: what is run is what start would run ---------------------------------------------------

AWKWARD = [
    # quotes and backslashes
    r"""printf '<%s>' 'single quotes' "double quotes" un'quo'te"d" '' "" """,
    r"""printf '<%s>' "it's" 'say "hi"' 'it'\''s' "\"" '"' "'" "\\\"" '\"'""",
    r"""printf '<%s>' a\ b \' \" \\ \$x \# \; \& \| c\d""",
    r"""printf '<%s>' 'ends in \' "ends in \\" 'a\'b \\'c'""",
    r"""printf '<%s>' '\n' '\x41' "\t" '\\' '\\\' 'C:\dir\new' '\0101' '\ '  ' \x'""",
    r"""printf '<%s>' 'trailing blanks'   """,
    r"""printf '%s|' a\
b""",
    r"""'printf' '<%s>' quoted program""",
    r"""./my\ prog.sh "x  y" """,
    r"""$PROGRAM '<%s>' program from a variable""",
    # characters that formats take for something else
    r"""printf '<%s>' a#b '#' '# c' "x # y" http://x/#frag '#%' #comment""",
    r"""printf '<%s>' "a;b" 'c;d' a\;b ' ;e' "f ;g" ; printf ';end' ;""",
    r"""printf '<%s>' '%' %% %h %i %n '%s' '%(ENV_HOME)s' "100%" %%% %""",
    r"""printf '<%s>' '$PORT' "\$PORT" '${PORT}' '$(PORT)' '$$(PORT)' '$$$(PORT)' '$(no)' '$('""",
    r"""printf '<%s>' '$$PORT' '$$' '$$$$' '$' "$" a$ '$%' $; printf '$'""",
    r"""printf '<%s>' '{a,b}' {a,b} '[x]' 'a*' '?' [section] ']]>' '<!-- --'""",
    r"""printf '<%s>' '<a href="x">' '&amp;' '&lt;' "--" '-->' '<![CDATA['""",
    r"""printf '<%s>' 'end script'; : end script""",
    r"""printf '<%s>' "  leading" "trailing  " '	tab	' 	tabs	between """,
    r"""printf '<%s>' é ünï "日本語" '😀' '$é' "a$é" '%é' \é '$😀'""",
    "printf '<%s>' 'nbsp\u00a0' 'ls\u2028' 'bom\ufeff'",
    "printf '<%s>' " + "'long word, %' " * 700,
    # expansions
    r"""printf '<%s>' "$PORT" "$PS" $PYTHONUNBUFFERED "$NONE" "${NONE:-no}" ${#PORT} ${PORT%0}""",
    r"""printf '<%s>' $(printf %s sub) `printf %s back` "$(printf 'a\n\nb')" $((1 + 2))""",
    r"""printf '<%s>' "$#" "$0" "$-" "$*" "${1-unset}" "$?" """,
    r"""printf '<%s>' $SPACED "$SPACED" "$QUOTED" $QUOTED""",
    r"""printf '<%s>' "${PWD##*/}" *.txt sub/* 'sub/*' no*match""",
    r"""test $$ -gt 1 && printf '<%s>' '$$'""",
    # more than one command
    r"""cd sub && printf '<%s>' * "${PWD##*/}" """,
    r"""A=1 sh -c 'printf "<%s>" "$A"'; printf '<%s>' "${A-unset}" """,
    r"""printf 1; printf 2 && printf 3 || printf 4; false || printf 5; ! false && printf 6""",
    r"""printf '<%s>' background & wait; printf done""",
    r"""{ printf err >&2; printf out; } 2>&1""",
    r"""printf three; exit 3""",
    r"""false; printf '<%s>' "$?" ; set -u; printf '<%s>' "${UNSET-}" """,
    r"""echo ~ "$HOME" "$USER" "$LOGNAME" """,
    # first words that are not programs, or that only look like it
    r"""exec printf '<%s>' exec""",
    r""". ./snippet.sh; printf '<%s>' "$SNIPPET" """,
    r"""[ "$PORT" -gt 1 ] && printf '<%s>' bracket""",
    r"""sh -c 'sh -c "printf \"<%s>\" \"\$0\" \"\$PS\"" "q q"'""",
    r"""python3.nosuch 2>/dev/null || printf '<%s>' "$?" """,
]

VALUES = [
    b"", b" ", b"plain", b"two  words", b" leading", b"trailing ", b"\t", b"tab\tin",
    b"trailing tab\t", b"it's", b'say "hi"', b"'", b'"', b"'quoted'", b'"quoted"', b"''", b"`id`",
    b"\\", b"a\\", b"a\\\\", b"a\\ b", b" \\x", b"\\'", b'\\"', b"C:\\dir\\new", b"\\n",
    b"\\0101", b"$", b"$HOME", b"${HOME}", b"$(id)", b"$$", b"\\$x", b"%", b"%%", b"%h",
    b"%(ENV_HOME)s", b"100%", b"#", b"# x", b"a#b", b"a #b", b";", b"a ;b", b"a;b", b"=",
    b"a=b=c", b"=x", b",", b'a,B="c"', b"a:b", b"!", b"a!b", b"*", b"~", b"&", b"a|b<c>d",
    b"<a>&lt;]]>", b"{[()]}", b"line1\nline2", b"\n", b"\nx", b"x\n", b"x \n y\t\n", b"a\n\nb",
    b"x\nend script\ny", b"x\n\tend  script # c\ny", b"x\n  indented\n", b"x\n[section]\nK=v\n",
    b"a\\\nb", b"-----BEGIN KEY-----\nMIIB+/==\n-----END KEY-----\n", "é日本😀".encode(),
    "$é".encode(), b"ls\xe2\x80\xa8", b"\xef\xbb\xbfbom", b'{"a": ["b", 1]}',
    b"postgres://u:p%40ss@h/db?x=1&y=%20#f", b"x" * 3000,
]


def randomly(number, seed):
    """So many random bytes values, full of what is awkward."""
    choose = random.Random(seed)
    alphabet = [bytes([byte]) for byte in b"\\\\\\'\"$%#;=, \t\n`(){}!&ax0n"] + [
        "é".encode(), b"$(", b"%(", b"end script", b" #", b" ;", b"\\\n"]
    return [b"".join(choose.choice(alphabet) for _ in range(choose.randrange(12)))
            for _ in range(number)]


def awkward_commands():
    """Commands for the Procfile, the variables that they use, and some others."""
    words = [each.replace(b"\n", b"").replace(b"'", b"'\\''") for each in randomly(300, "words")]
    variables = dict(PROGRAM=b"printf", SPACED=b"a  b", QUOTED=b"'a' \"b\\\"", LINES=b"a\n b\n",
                     PATH="/nöwhere:".encode() + BASE[b"PATH"])
    return list(map(os.fsencode, AWKWARD)) + [b"printf '<%s>' '" + b"' '".join(words) + b"'"], {
        name.encode(): value for name, value in variables.items()}


def awkward_values():
    """Commands that show their variables, and these."""
    values = VALUES + randomly(150, "values")
    all = b" ".join(b'"$V%d"' % number for number in range(len(values)))
    return [b"""env sh -c 'printf "{%s}\n" """.replace(b"\n", b"\\n") + all + b"'",
            rb"""printf '{%s}\n' """ + all + b"; echo ${V0-unset}"], {
        b"V%d" % number: value for number, value in enumerate(values)}


def awkward_app(folder, commands, variables):
    """Write the Procfile, the .env and what the commands look for; return what start would run."""
    folder.joinpath("sub").mkdir(parents=True)
    folder.joinpath("sub", "in sub").touch()
    folder.joinpath("some.txt").touch()
    folder.joinpath("lines.txt").write_text("one\n two\\n\n")
    folder.joinpath("snippet.sh").write_text("SNIPPET='a  b'\n")
    folder.joinpath("my prog.sh").write_text("#!/bin/sh\nprintf '<%s>' \"$@\"\n")
    folder.joinpath("my prog.sh").chmod(0o755)
    quoted = {name: re.sub(rb'([\\"$])', rb"\\\1", value).replace(b"\n", b"\\n")
              for name, value in variables.items()}
    procfile(folder, b"".join(b"c%d: %s\n" % item for item in enumerate(commands, 1)),
             b"PORT=6000\nPS=nobody\n" + b"".join(b'%s="%s"\n' % item for item in quoted.items()))
    return [command.replace(b"\\\n", b"") for command in commands]


def outcome(argv, environment, folder):
    """What a command writes, and its exit status as a shell would have it."""
    result = subprocess.run(argv, env=environment, cwd=folder, timeout=30, stdout=subprocess.PIPE,
                            stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    return result.stdout, result.returncode % 256 if result.returncode >= 0 else \
        128 - result.returncode


@functools.lru_cache(maxsize=None)
def expected(command, folder, variables):
    """The outcome under start."""
    return outcome([b"/bin/sh", b"-c", command], dict(variables), folder)


def check_awkward(folder, commands, variables, names, actual):
    """Compare each command's outcome, actual(number, right), with what start would have."""
    rights = []
    for number, (command, name) in enumerate(zip(commands, names)):
        own = {b"PYTHONUNBUFFERED": b"1", b"PORT": b"%d" % (6000 + 100 * number), b"PS": name}
        rights.append(expected(command, str(folder), tuple(
            {**BASE, **USER, **variables, **own}.items())))
        assert rights[-1][0], command
    with concurrent.futures.ThreadPoolExecutor(len(commands)) as pool:    # some wait for a second
        seen = list(pool.map(actual, range(len(commands)), rights))
    assert not {command[:300]: each for command, *each in zip(commands, seen, rights)
                if each[0] != each[1]}


@pytest.mark.parametrize("awkward", [awkward_commands, awkward_values])
@pytest.mark.parametrize("format", list(MODELS))
def test_what_a_manager_would_run_is_what_start_would_run(tmp_path, format, awkward):
    folder, location = tmp_path / "it's my äpp", tmp_path / "out"
    commands, variables = awkward()
    commands = awkward_app(folder, commands, variables)
    export(folder, format, location)
    runs = MODELS[format](location)
    names = ["c%d-1" % number for number in range(1, len(commands) + 1)]
    assert sorted(runs) == sorted(names)
    assert not any(b"BEGIN KEY" in word for argv, _, _ in runs.values() for word in argv)

    def actual(number, right):
        argv, environment, place = runs[names[number]]
        return outcome(argv, environment, place or str(folder))
    titles = [name.replace("-", ".").encode() for name in names]
    if format == "kubernetes":
        titles = [runs[name][1][b"PS"] for name in names]
    check_awkward(folder, commands, variables, titles, actual)


@needs("systemd-analyze")
@pytest.mark.parametrize("options", [(), ("-l", "/var/log/my logs")])
def test_systemd_has_nothing_to_say(tmp_path, options):
    folder = tmp_path / "it's my äpp"
    awkward_app(folder, *awkward_commands())
    export(folder, "systemd", tmp_path / "out", *options)
    units = sorted(map(str, (tmp_path / "out").glob("*.target")))
    result = subprocess.run(["systemd-analyze", "verify", *units], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, timeout=30)
    assert (result.returncode, result.stdout) == (0, b"")


# Stop means stop ---------------------------------------------------------------------------------

SERVER = r"""
import os, select, signal, socket, sys
name, workers = sys.argv[1], []
def note(text):
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "notes"), "a") as file:
        file.write("%s %s\n" % (name, text))
def stop(number, frame):
    note("TERM")
    select.select((), (), (), 0.5)
    for worker in workers:
        os.kill(worker, signal.SIGUSR1)
        os.waitpid(worker, 0)
    note("done")
    os._exit(0)
def work():
    signal.signal(signal.SIGTERM, lambda *_: note("worker's TERM"))
    signal.signal(signal.SIGUSR1, lambda *_: (note("worker"), os._exit(0)))
    while True:
        select.select((), (), (), 0.05)    # pause() could miss a signal
for _ in range(3 if name.endswith("fork") else 0):
    workers.append(os.fork())
    if not workers[-1]:
        work()
signal.signal(signal.SIGTERM, stop)
server = socket.create_server(("127.0.0.1", int(os.environ["PORT"]) + 50 * name.endswith("2")))
while True:
    client, address = server.accept()
    if client.recv(1) == b"!":
        os.kill(os.getpid(), signal.SIGKILL)
    client.sendall(b"%s %d" % (os.environ["PS"].encode(), os.getpid()))
    client.close()
"""
STOPPED = """
web: PYTHON app.py web
cd: cd sub && PYTHON ../app.py cd
assign: A=1 PYTHON app.py assign; touch ran
pipe: PYTHON app.py pipe | PYTHON app.py pipe2; touch ran
paren: (PYTHON app.py paren) && touch ran
behind: PYTHON app.py behind & wait; touch ran
exec: exec PYTHON app.py exec
"""
SHAPES = """
fork: PYTHON app.py fork
cdfork: cd sub && PYTHON ../app.py cdfork
execfork: cd sub && exec PYTHON ../app.py execfork
script: ./run.sh
cdscript: cd sub && ../run.sh
env: env A=1 sh run.sh
inner: sh -c 'echo x; PYTHON app.py inner; touch ran'
left: PYTHON app.py left & exec /bin/sleep 1000
stubborn: trap '' TERM; touch up; /bin/sleep 1000; /bin/sleep 1000
"""


def name_on(port, word=b"?"):
    """The name and process id that answer on a port, or None; the word ! kills what is there."""
    with contextlib.suppress(OSError, ValueError):
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            client.sendall(word)
            name, pid = client.makefile("rb").read().split()
            return name.decode(), int(pid)


def stopping_app(folder, text):
    """Write the app that is to be stopped; return a tag of its processes and its base port."""
    tag, python = new_tag(), os.path.realpath(sys.executable) + " -S"
    folder.joinpath("sub").mkdir(parents=True)
    folder.joinpath("app.py").write_text(SERVER)
    folder.joinpath("run.sh").write_text('#!/bin/sh\n%s "%s/app.py" "${PS%%.*}"\ntouch "%s/ran"\n'
                                         % (python, folder, folder))
    folder.joinpath("run.sh").chmod(0o755)
    procfile(folder, text.replace("PYTHON", python), "%s\nPATH='%s/bin'\n" % (tag, folder))
    folder.joinpath("bin").mkdir()
    for name in "sh", "env", "touch":    # and nothing that an export's own helpers might want
        folder.joinpath("bin", name).symlink_to(shutil.which(name))
    return tag, free_base()


def check_stopped(folder, names, early=False):
    """Each got one SIGTERM and was waited for, and the commands behind it did not run; workers got
    theirs from their parent alone, unless they may get one early."""
    notes = folder.joinpath("notes").read_text().splitlines()
    for name in names:
        work = [name + " worker"] * 3 * name.endswith("fork")
        assert [line for line in notes if line.split()[0] == name and not (
            early and line.endswith("worker's TERM"))] == [name + " TERM", *work, name + " done"]
    assert not folder.joinpath("ran").exists()


def awkward_apps(tmp_path, format, location):
    """Export an app of awkward commands, and one of awkward values; return what checks their logs,
    where the output is over and over, as each command is run anew when it has ended."""
    checks = []
    for awkward in awkward_values, awkward_commands:
        commands, variables = awkward()
        folder = tmp_path / ("it's my " + awkward.__name__)
        commands = awkward_app(folder, commands[::1 if len(commands) < 9 else 7], variables)
        logs = tmp_path / "my logs" / awkward.__name__
        logs.mkdir(parents=True)
        export(folder, format, location, "-l", logs, "-t", 1, app=awkward.__name__)

        def actual(number, right, logs=logs):
            log = logs / ("c%d-1.log" % (number + 1))
            with contextlib.suppress(AssertionError):
                eventually(lambda: log.exists() and log.stat().st_size >= len(right[0]), 20)
            with open(str(log), "rb") as file:
                return file.read(len(right[0])), right[1]
        names = [b"c%d.1" % number for number in range(1, len(commands) + 1)]
        checks.append(functools.partial(check_awkward, folder, commands, variables, names, actual))
    return checks


@as_root
@needs_linux
@pytest.mark.parametrize("format", [
    pytest.param("supervisord", marks=needs("supervisord", "supervisorctl")),
    pytest.param("runit", marks=needs("runsvdir", "sv", "chpst", "svlogd")),
    pytest.param("systemd", marks=needs("systemctl", "unshare", "nsenter"))])
def test_a_real_manager_runs_restarts_and_stops_it_all(tmp_path, format):
    folder, location = tmp_path / "my app", tmp_path / "out"
    tag, base = stopping_app(folder, STOPPED + SHAPES)
    export(folder, format, location, "-c", "web=2", "-p", base, "-t", "2")
    checks = awkward_apps(tmp_path, format, location)
    names = re.findall(r"(?m)^(\w+): ", STOPPED + SHAPES)
    ports = {name + ".1": base + 100 * place for place, name in enumerate(names[:-1])}
    ports["web.2"] = base + 1
    try:
        with MANAGERS[format](location) as control:
            pids = {name: eventually(lambda: name_on(port), 20) for name, port in ports.items()}
            assert [name for name, _ in pids.values()] == list(ports)
            eventually(lambda: name_on(ports["pipe.1"] + 50))
            for name in "web.1", "cd.1", "exec.1":
                name_on(ports[name], b"!")
            for check in checks:
                check()
            for name in "web.1", "cd.1", "exec.1":
                eventually(lambda: (name_on(ports[name]) or pids[name]) != pids[name])
            eventually((folder / "up").exists)
            control(*STOP[format])
            if format == "supervisord":    # it waits for the leaders alone
                eventually(lambda: not leftovers(tag))
            assert not leftovers(tag)
            check_stopped(folder, names[1:-1] + ["pipe2"], early=format == "supervisord")
            notes = folder.joinpath("notes").read_text()
            assert notes.count("web TERM") == notes.count("web done") == 2
    finally:
        kill_all(tag)


@as_root
@needs_linux
@needs("runsvdir", "sv", "chpst", "svlogd")
@pytest.mark.parametrize("command, grace", [("exec sleep 300", 60), ("sleep 300; echo next", 1)])
def test_runit_stops_what_it_has_just_started(tmp_path, command, grace):
    """runsv is between fork and exec, or the shell has not become chpst yet; or one that waits for
    a command that has missed the SIGTERM gets SIGKILL."""
    tag, location = new_tag(), tmp_path / "out"
    procfile(tmp_path, "web: %s\n" % command, tag)
    export(tmp_path, "runit", location, "-c", "web=20", "-l", tmp_path, "-t", grace)
    services = sorted(location.iterdir())
    for each in services:
        each.joinpath("down").touch()

    def down(each, since):
        """Whether runsv says so, and that it is so since another moment (of 12 bytes)."""
        with contextlib.suppress(FileNotFoundError):
            return (each.joinpath("supervise", "stat").read_text().startswith("down")
                    and each.joinpath("supervise", "status").read_bytes()[:12] != since)
    since = dict.fromkeys(services)
    with runsvdir(location):
        for _ in range(2):
            eventually(lambda: all(map(down, services, since.values())) and not leftovers(tag))
            for each in services:
                since[each] = each.joinpath("supervise", "status").read_bytes()[:12]
                with open(str(each / "supervise" / "control"), "wb", buffering=0) as control:
                    control.write(b"ud")
        eventually(lambda: all(map(down, services, since.values())) and not leftovers(tag))


@needs_linux
@pytest.mark.parametrize("format, to_all", [("upstart", True), ("launchd", False)])
def test_sigterm_reaches_the_app_and_it_is_waited_for(tmp_path, format, to_all):
    folder, location = tmp_path / "my app", tmp_path / "out"
    tag, base = stopping_app(folder, STOPPED)
    export(folder, format, location, "-p", base)
    leaders = {}
    try:
        for name, (argv, environment, place) in MODELS[format](location).items():
            leaders[name[:-2]] = subprocess.Popen(argv, env=environment, cwd=place,
                                                  stdin=subprocess.DEVNULL, start_new_session=True)
        for port in [*range(base, base + 100 * len(leaders), 100), base + 350]:
            eventually(lambda: name_on(port), 20)
        for leader in leaders.values():
            (os.killpg if to_all else os.kill)(leader.pid, signal.SIGTERM)
        for name, leader in leaders.items():
            assert leader.wait(20) % 256 in (0, 143)
            assert (name + " done\n") in folder.joinpath("notes").read_text()
        check_stopped(folder, [*leaders, "pipe2"])
        eventually(lambda: not leftovers(tag))
    finally:
        kill_all(tag)
        for leader in leaders.values():
            leader.wait()


def test_the_jobs_of_upstart_start_and_stop_in_three_levels(tmp_path):
    export(procfile(tmp_path, "web: a\n"), "upstart", "out")
    jobs = {path: data.decode() for path, data in files(tmp_path / "out").items()}
    for name, above in ("myapp-web-1", "myapp-web"), ("myapp-web", "myapp"):
        levels = "\nstart on starting {0}\nstop on stopping {0}\n".format(above)
        assert levels in jobs[name + ".conf"]
    assert "\nstart on runlevel [2345]\n" in jobs["myapp.conf"]


# Files: whose they are, and how they come about --------------------------------------------------

@pytest.mark.parametrize("format", FORMATS)
def test_what_is_no_longer_part_of_the_app_is_removed(tmp_path, format):
    location, fresh = tmp_path / "out", tmp_path / "fresh"
    procfile(tmp_path, "web: a\nweb-api: b\nold: c\n", "SECRET=s3cr3t\n")
    first = export(tmp_path, format, location, "-c", "web=3,old=2")
    before = tree(location)
    assert b"remov" not in first
    assert first.count(b"[procrun export] writing: %s/" % os.fsencode(location)) == len(
        files(location))
    procfile(tmp_path, "web: a\nweb-api: b\n")
    said = export(tmp_path, format, location)
    export(tmp_path, format, fresh)
    assert set(tree(location)) == set(tree(fresh))    # no empty directories either
    gone = set(files(location)) ^ {path for path, (_, data) in before.items() if data is not None}
    assert sorted(re.findall(rb"^\[procrun export\] removing: (.*)$", said, re.M)) == sorted(
        os.fsencode(location / path) for path in gone)
    assert bool(gone) == (format not in ("supervisord", "kubernetes"))    # always the same files
    assert (b"] if what was removed still runs, stop it\n" in said) == bool(gone)


@pytest.mark.parametrize("format", FORMATS)
def test_other_files_are_left_alone(tmp_path, format):
    """Of other apps, made by hand, with the mark further down only, and in folders below."""
    ours, theirs, location = tmp_path / "ours", tmp_path / "theirs", tmp_path / "out"
    mark = "%s Made by procrun export " + format + " for the app myapp. Again: cd x"
    marks = "\n".join(mark % start for start in ("#", ";", "<!--"))
    procfile(theirs, "web: a\nextra: b\nx: c\n", "LINES='\n%s\n'\n" % marks)
    for app in "myapp2", "my", "myapp-web-api":
        export(theirs, format, location, app=app)
    procfile(ours, "web: a\nold: b\n")
    for place in location / "staging", location / "two" / "deep":
        export(ours, format, place)
    shutil.copytree(str(location / "staging"), str(location / "backup"))
    for name in ("myapp-extra.conf", "myapp-web-9.conf", "myapp-old.target", "myapp-web-7.service",
                 "myapp-web-9.plist", "myapp-web-8/run", "myapp-web-8/env/PORT", "myapp3.conf"):
        path = location / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text("My notes on the app myapp:\n\n\n\n%s\n" % marks)
    before = tree(location)
    procfile(ours, "web: changed\n")
    export(ours, format, location, "-c", "web=2")
    export(ours, format, location)
    after = tree(location)
    assert {path: after.get(path) for path in before} == before
    export(theirs, format, location, app="my")
    assert tree(location) == after


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_without_the_mark_is_overwritten_only_by_force(tmp_path, format):
    location, fresh = tmp_path / "out", tmp_path / "fresh"
    procfile(tmp_path, "web: a\nworker: b\n", "SECRET=s3cr3t\n")
    export(tmp_path, format, location, "-c", "web=2")
    right = tree(location)
    for path in sorted(files(location))[::3]:
        shutil.rmtree(str(location))
        location.joinpath(path).parent.mkdir(parents=True)
        location.joinpath(path).write_text("made by hand\n")
        before = tree(location)
        assert os.fsencode(path) in export(tmp_path, format, location, "-c", "web=2", status=1)
        assert tree(location) == before
    export(tmp_path, format, location, "-c", "web=2", "--force")
    assert tree(location) == right
    procfile(tmp_path, "web: changed\nworker: b\n", "SECRET=other\n")
    export(tmp_path, format, location, "-c", "web=2")    # marked: no force needed
    export(tmp_path, format, fresh, "-c", "web=2")
    assert set(tree(location)) == set(tree(fresh)) and tree(location) != right


@pytest.mark.parametrize("format", ["upstart", "systemd", "runit"])
def test_names_that_collide_are_refused(tmp_path, format):
    procfile(tmp_path, "foo: a\nfoo-1: b\n")
    said = export(tmp_path, format, tmp_path / "out", status=1)
    assert b"foo.1" in said and b"foo-1" in said and not (tmp_path / "out").exists()
    procfile(tmp_path, "foo: a\nfoo-2: b\n")
    export(tmp_path, format, tmp_path / "out")
    before = tree(tmp_path / "out")
    export(tmp_path, format, tmp_path / "out", "-c", "foo=2", status=1)
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("format", FORMATS)
def test_values_are_for_the_owner_alone(tmp_path, format):
    procfile(tmp_path, "web: a\nworker: b; c\n",
             'SECRET="s3cr3t\'"\nPLAIN=pl41n\nQUOTED="5p4ced \n5ecr3t "')
    said = export(tmp_path, format, tmp_path / "out", prepare=lambda: os.umask(0))
    assert not re.search(rb"s3cr3t|pl41n|5p4ced|5ecr3t", said)
    modes = {path: mode for path, (mode, data) in tree(tmp_path / "out").items()
             if data is not None}
    for path, data in files(tmp_path / "out").items():
        if re.search(rb"s3cr3t|pl41n|5p4ced|5ecr3t", data):
            assert modes[path] == 0o600, path
        else:
            assert modes[path] in (0o600, 0o644, 0o755), path
    assert 0o600 in modes.values()
    assert not [path for path, (mode, _) in tree(tmp_path / "out").items() if mode & 0o022]
    export(tmp_path, format, tmp_path / "out", prepare=lambda: os.umask(0o777))
    assert modes == {path: mode for path, (mode, data) in tree(tmp_path / "out").items()
                     if data is not None}


@needs("strace")
@pytest.mark.parametrize("format", ["systemd", "supervisord", "runit"])
def test_no_file_is_ever_open_to_others(tmp_path, format):
    procfile(tmp_path, "web: a\n", "SECRET=s3cr3t\n")
    log = tmp_path / "log"
    traced = subprocess.run(
        ["strace", "-o", str(log), "-e", "trace=open,openat,creat,chmod,fchmod,fchmodat,mkdir,"
         "write,fsync,rename,renameat,renameat2,link,linkat", sys.executable, PROCRUN, "export",
         format, "out", "-u", "root", "-a", "myapp", "--image", "i"],
        cwd=str(tmp_path), stdout=subprocess.DEVNULL, preexec_fn=lambda: os.umask(0))
    if traced.returncode:
        pytest.skip("strace cannot trace here")
    lines = log.read_text().splitlines()
    made = [line for line in lines if "O_CREAT" in line and str(tmp_path) + "/out" in line]
    assert made and all(re.search(r"O_EXCL.*, 0(600|[0-7]00)\)", line) for line in made
                        if "SECRET" in line or format in ("launchd", "supervisord", "kubernetes"))
    secret = {line.split()[-1] for line in lines if line.startswith("open") and "0600) = " in line}
    assert secret and not [line for line in lines if "s3cr3t" in line and line.startswith("write(")
                           and line[6:].split(",")[0] not in secret]
    assert sum(line.startswith("fsync") for line in lines) >= len(files(tmp_path / "out"))


@pytest.mark.parametrize("format", ["upstart", "runit"])
def test_a_directory_where_a_file_should_be(tmp_path, format):
    location = tmp_path / "out"
    procfile(tmp_path, "web: a\nworker: b\n")
    export(tmp_path, format, location)
    path = location / sorted(files(location))[-1]
    path.unlink()
    path.joinpath("keep").mkdir(parents=True)
    for link in (False, True):
        if link:
            path.rename(tmp_path / "folder")
            path.symlink_to(tmp_path / "folder")
        before = tree(location)
        for options in ((), ("--force",)):
            export(tmp_path, format, location, "-c", "web=2", *options, status=1)
            assert tree(location) == before


@pytest.mark.parametrize("format, there", list(zip(FORMATS, [True, False] * 3)))
def test_a_symlink_in_the_way_is_not_followed(tmp_path, format, there):
    location, target = tmp_path / "out", tmp_path / "target"
    procfile(tmp_path, "web: a\n")
    export(tmp_path, format, location)
    path = location / sorted(files(location))[0]
    path.unlink()
    path.symlink_to(target)
    if there:
        target.write_text("precious\n")
    before = tree(location)
    export(tmp_path, format, location, status=1)
    assert tree(location) == before
    export(tmp_path, format, location, "--force")
    assert not path.is_symlink() and target.exists() == there
    assert not there or target.read_text() == "precious\n"


@pytest.mark.parametrize("format", FORMATS)
def test_dry_run_writes_nothing_and_masks_values(tmp_path, format):
    procfile(tmp_path, "web: run me\n", "SECRET=s3cr3t\nOTHER='0th3r\n'\n")
    said = export(tmp_path, format, "out", "--dry-run")
    assert not (tmp_path / "out").exists()
    export(tmp_path, format, "out")
    for path in files(tmp_path / "out"):
        assert os.fsencode(tmp_path / "out" / path) in said
    assert b"run me" in said and b"SECRET" in said
    assert b"s3cr3t" not in said and b"0th3r" not in said
    before = tree(tmp_path / "out")
    procfile(tmp_path, "worker: b\n")
    export(tmp_path, format, "out", "--dry-run")
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("format", FORMATS)
def test_same_input_same_bytes_and_each_file_says_how_to_make_it(tmp_path, format):
    procfile(tmp_path, "web: a\nworker: b\n", "B=1\nA=2\n")
    said = export(tmp_path, format, "out", "-c", "web=2")
    before, times = tree(tmp_path / "out"), files(tmp_path / "out")
    assert export(tmp_path, format, "out", "-c", "web=2") == said
    assert tree(tmp_path / "out") == before
    assert re.match(rb"\[procrun export\] .*(start|launchctl|kubectl|supervisorctl|ln|sv) ",
                    said.splitlines()[-1])
    for path, data in times.items():
        mark = re.search(rb"Made by procrun export \w+ for the app myapp\. .*", data)
        assert mark and format.encode() in mark[0], path
        assert (b"cd %s && " % os.fsencode(tmp_path) in mark[0] and b"web=2" in mark[0]) == (
            format != "kubernetes")


# What it refuses, and what it says ---------------------------------------------------------------

@pytest.mark.parametrize("format, options, said", [
    (format, *case) for format, case in zip(itertools.cycle(FORMATS), [
    (("-a", "my app"), b"my app"), (("-a", "../app"), b"../app"), (("-a", "a/b"), b"a/b"),
    (("-a", "a\nb"), b"app"), (("-a", "é"), b"app"), (("-a", "-x"), b""), (("-a", "%h"), b"%h"),
    (("-a", "."), b"app"), (("-a", ""), b""), (("-u", "a b"), b"a b"), (("-u", "a:b"), b"a:b"),
    (("-u", "$(id)"), b"$(id)"), (("-u", "a\nUser=root"), b"user"), (("-u", "-x"), b""),
    (("-c", "nosuch=2"), b"nosuch"), (("-p", "65535", "-c", "web=2"), b"65535")])])
def test_what_cannot_be_carried_is_refused(tmp_path, format, options, said):
    procfile(tmp_path, "web: a\n")
    if format == "kubernetes" and "-u" in options:
        format = "launchd"    # there is no user in the other
    told = export(tmp_path, format, "out", *options, status="refused")
    lines = [line for line in told.splitlines() if b"warning" not in line]
    assert len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [
    "start -f -", "start -d . -f ROOT/Procfile", "run true",
    "export upstart ROOT/out -u root -d ROOT", "export upstart out -u root -d ROOT"])
def test_a_current_directory_that_is_gone(tmp_path, words):
    procfile(tmp_path, "web: echo hi\n")
    status, out, errors = ask(tmp_path, command=[
        "sh", "-c", 'mkdir gone; cd gone; rmdir ../gone; exec "$@"', "sh", *compiled(),
        *words.replace("ROOT", str(tmp_path)).split()], input=b"web: echo hi\n")
    assert (status, out) == (1, b"")
    assert errors.count(b"\n") == 1 and errors.startswith(b"procrun: the current directory")


def test_the_command_that_starts_it_can_be_pasted(tmp_path):
    procfile(tmp_path, "web: a\n")
    said = export(tmp_path, "runit", "it is here")
    command = said.splitlines()[-1].partition(b"start it with: ")[2].decode()
    tmp_path.joinpath("service").mkdir()
    for _ in "first", "another":
        subprocess.run(command.replace("/etc/service/", "service"), shell=True, check=True,
                       cwd=str(tmp_path))
    assert tmp_path.joinpath("service", "myapp-web-1", "run").exists()


def test_user_units_and_the_user(tmp_path):
    procfile(tmp_path, "web: a\n")
    said = export(tmp_path, "systemd", "out", "-u", "nosuchuser", "--user-units")
    units = files(tmp_path / "out")
    assert not any(b"User=" in data for data in units.values())
    assert b"WantedBy=default.target" in units["myapp.target"]
    assert b"\nSyslogIdentifier=myapp-web-1\n" in units["myapp-web-1.service"]
    assert b"systemctl --user" in said and b"linger" in said
    assert b"linger" not in export(tmp_path, "upstart", "jobs", "--user-units")


def test_the_apps_name_is_the_folders(tmp_path):
    folder = procfile(tmp_path / "shop", "web: a\n")
    export(folder, "runit", tmp_path / "out", app="")
    assert all(path.startswith("shop") for path in files(tmp_path / "out"))
    export(tmp_path, "runit", tmp_path / "again", "-d", folder, "-f", folder / "Procfile", app="")
    assert set(tree(tmp_path / "out")) == set(tree(tmp_path / "again"))
    tmp_path.joinpath("current").symlink_to(folder)    # as releases are deployed
    export(tmp_path, "runit", tmp_path / "linked", "-d", "current", app="")
    assert all(path.startswith("current") for path in files(tmp_path / "linked"))


@pytest.mark.parametrize("format, setting", [
    ("upstart", rb"(?m)^kill timeout 3$"), ("systemd", rb"(?m)^TimeoutStopSec=3s?$"),
    ("launchd", rb"<key>ExitTimeOut</key>\s*<integer>3</integer>"),
    ("supervisord", rb"(?m)^stopwaitsecs=3$"),
    ("kubernetes", rb'"terminationGracePeriodSeconds": 3\b')])
def test_grace_is_in_whole_seconds_and_never_none(tmp_path, format, setting):
    procfile(tmp_path, "web: a; b\n")
    export(tmp_path, format, "out", "-t", "2.1")
    assert re.search(setting, b"".join(files(tmp_path / "out").values()))
    export(tmp_path, format, "out", "-t", "0")
    assert re.search(setting.replace(b"3", b"1"), b"".join(files(tmp_path / "out").values()))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("command, env, said", [
    (b"a", b"OK=1\nBELL='\a'\n", b"BELL"), (b"a", b"CR='x\ry'\n", b"CR"),
    (b"a", b"BYTES=caf\xe9\n", b"BYTES"), (b"a", "NONE=\uffff\n".encode(), b"NONE"),
    (b"a", "NEL=\u0085\n".encode(), b"NEL"), (b"a", b"LONG=" + b"x" * (127 << 10), b"LONG"),
    (b"a \x1b[0m", b"", b"web"), (b"a \xff", b"", b"web"), (b"a" * (127 << 10), b"", b"web"),
    (b"a", b"A=1\n1X=2\n", b"1X"), (b"a", b"NUL='\0'\n", b"NUL"),
])
def test_values_commands_and_names_that_cannot_be_exported(tmp_path, format, command, env, said):
    procfile(tmp_path, b"ok: a\nweb: %s\n" % command, env)
    assert said in export(tmp_path, format, "out", status=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format, options, text, said", [
    ("upstart", "-u nosuch", "web: a", b"no user `nosuch`"),
    ("supervisord", "-u nosuch", "web: a", b"no user `nosuch`.*refuses its whole configuration"),
    ("supervisord", "-l /nosuch", "web: a", b"no directory /nosuch.*refuses its whole"),
    ("systemd", "-l /nosuch", "web: a", b"no directory /nosuch for the logs\n"),
    ("upstart", "-l /tmp", "web: a", b"`root` must be able to write to /tmp"),
    ("runit", "", "web: a\nrelease: b", b"release is meant to run once: -c release=0"),
])
def test_warnings(tmp_path, format, options, text, said):
    procfile(tmp_path, text)
    assert re.search(b"procrun: warning: [^\n]*" + said,
                     export(tmp_path, format, "out", *options.split()))
    assert b"warning: " not in export(tmp_path, format, "out", "-c", "all=1,web=1" + (
        ",release=0" if "release" in text else ""))


@pytest.mark.parametrize("link", ["myapp-web-1", "myapp-web-1/control", "myapp-web-1/log"])
@pytest.mark.parametrize("options", [(), ("--force",)])
def test_a_link_below_the_location_is_not_followed(tmp_path, link, options):
    location, target = tmp_path / "out", tmp_path / "target"
    procfile(tmp_path, "web: a\n")
    target.mkdir()
    target.joinpath("run").write_text("precious\n")
    location.joinpath(link).parent.mkdir(parents=True)
    location.joinpath(link).symlink_to(target)
    before = tree(tmp_path)
    assert link.encode() in export(tmp_path, "runit", location, *options, status=1)
    assert tree(tmp_path) == before


def test_the_location_may_be_a_link_and_is_made_if_missing(tmp_path):
    procfile(tmp_path, "web: a\n")
    tmp_path.joinpath("real").mkdir()
    tmp_path.joinpath("link").symlink_to("real")
    export(tmp_path, "runit", "link/new/deep")
    assert files(tmp_path / "real" / "new" / "deep")


def test_a_location_that_cannot_be_written_is_named(tmp_path):
    procfile(tmp_path, "web: a\n")
    tmp_path.joinpath("file").write_text("text")
    for location in tmp_path / "file", tmp_path / "file" / "below", "/dev/null":
        said = export(tmp_path, "upstart", location, status=1)
        assert said.startswith(b"procrun: %s: Not a directory;" % os.fsencode(location))
    assert export(tmp_path, "upstart", "/proc/x", status=1).startswith(b"procrun: /proc/x: ")
    assert tmp_path.joinpath("file").read_text() == "text"


@needs("strace")
@pytest.mark.parametrize("inject, ended, said", [
    ("write:error=ENOSPC:when=3", 1, rb"procrun: ROOT/out: No space left.* removed so far: nothing"),
    ("rename:error=EROFS:when=1", 1, rb"procrun: ROOT/out/myapp.env: .* removed so far: nothing"),
    ("rename:error=EROFS:when=3", 1,
     rb"procrun: ROOT/out/\S+: .* removed so far: ROOT/out/myapp.env, ROOT/out/myapp-web-1.service\n"),
    ("unlink:error=EROFS:when=1", 1, rb"procrun: ROOT/out/myapp-old-1.service: .*, ROOT/out/my"),
    ("rename:signal=KILL:when=2", 137, b""), ("write:signal=KILL:when=2", 137, b""),
    ("rename:signal=INT:when=1", 130, b"")])
def test_an_export_that_fails_or_is_killed_midway(tmp_path, inject, ended, said):
    strace = ["strace", "-o", os.devnull, "-e", "trace=" + inject.split(":")[0], "-e"]
    if subprocess.run([*strace, "inject=" + inject, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("strace cannot trace here")
    location = tmp_path / "out"
    command = "export", "systemd", "out", "-a", "myapp", "-u", "root"
    procfile(tmp_path, "web: a\nold: b\n")
    export(tmp_path, "systemd", location)
    before = tree(location)
    procfile(tmp_path, "web: changed\nnew: b\n")
    status, _, errors = ask(tmp_path, *command, command=[*strace, "inject=" + inject, *compiled()])
    assert status in (ended, 128 - ended), errors    # strace dies of the same signal
    assert re.match(said.replace(b"ROOT", re.escape(os.fsencode(tmp_path))), errors)
    if inject.startswith("write") and ended == 1:
        assert tree(location) == before
    assert ended == 137 or not list(location.glob(".*"))
    if ended != 130:    # Ctrl-C waits for the last rename
        export(tmp_path, "systemd", location)
    export(tmp_path, "systemd", tmp_path / "fresh")
    assert set(tree(location)) == set(tree(tmp_path / "fresh"))


@needs("strace")
@pytest.mark.parametrize("inject", ["mkdir:signal=KILL:when=4", "mkdir:signal=KILL:when=9",
                                    "rename:signal=KILL:when=1", "rename:signal=KILL:when=6"])
def test_no_empty_folder_stays_when_an_export_is_killed(tmp_path, inject):
    location, text = tmp_path / "out", "web: a\n"
    export(procfile(tmp_path, text), "runit", location)
    procfile(tmp_path, text + "new: b\nother: c\n")
    ask(tmp_path, "export", "runit", "out", "-a", "myapp", "-u", "root", command=[
        "strace", "-o", os.devnull, "-e", "trace=mkdir,rename", "-e", "inject=" + inject,
        *compiled()])
    for place in location, tmp_path / "fresh":
        export(procfile(tmp_path, text), "runit", place)
    assert set(tree(location)) == set(tree(tmp_path / "fresh"))


def test_what_is_installed_stays_a_success_whoever_reads(tmp_path):
    procfile(tmp_path, "web: a\n")
    command = "export", "runit", "out", "-a", "myapp", "-u", "root"
    with open("/dev/full", "wb") as full:
        status, _, errors = ask(tmp_path, *command, "-c", "web=9", stdout=full)
    assert (status, errors.count(b"\n")) == (0, 1) and b"No space" in errors
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x")
    for more in (), ("--dry-run",):
        process = subprocess.Popen([*compiled(), *command, *more], cwd=str(tmp_path),
                                   stdout=writing, stderr=subprocess.PIPE)
        output = b""
        while b"start it with" not in output and b"exec chpst" not in output:
            output += os.read(reading, 100)
        while select.select([reading], (), (), 0)[0] or process.poll() is None:
            os.read(reading, 1 << 16) if select.select([reading], (), (), 0.1)[0] else None
        assert (process.wait(), process.stderr.read()) == (0, b"")
        process.stderr.close()
    os.close(reading), os.close(writing)
    export(tmp_path, "runit", "fresh")
    assert set(tree(tmp_path / "out")) == set(tree(tmp_path / "fresh"))


@needs_linux
@pytest.mark.parametrize("shell", [
    pytest.param(each.split(), marks=needs(each.split()[0]))
    for each in ("busybox sh", "dash", "bash --posix", "mksh", "zsh --emulate sh")])
def test_what_stops_an_instance_runs_in_every_shell(tmp_path, shell):
    """The scripts of runit, without it, with a PATH of their own."""
    tag, location = new_tag(), tmp_path / "out"
    procfile(tmp_path, "web: sh -c 'sleep 1000 & trap \"\" TERM; touch up; wait' && touch ran\n")
    export(tmp_path, "runit", location, "-t", "1")
    service = location / "myapp-web-1"
    text = shlex.split(service.joinpath("run").read_text())[-1].partition("exec 3<&-; ")[2]
    leader = subprocess.Popen(["/bin/sh", "-c", text], cwd=str(tmp_path), start_new_session=True,
                              env={"PATH": os.environ["PATH"], **dict([tag.split("=")])})
    eventually(tmp_path.joinpath("up").exists)
    service.joinpath("supervise").mkdir()
    for name in "pid", "group":
        service.joinpath("supervise", name).write_text("%d\n" % leader.pid)
    for script in "control/t", "finish":
        done = subprocess.run([*shell, script], cwd=str(service), stdin=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, timeout=20)
        assert (done.returncode, done.stderr) == (0, b"")
        leader.wait(20)
    eventually(lambda: not leftovers(tag))
    assert not tmp_path.joinpath("ran").exists()


def test_kubernetes_objects(tmp_path):
    app = "Worker: a\nweb: b && c\nclock_1: exec d\n", "SECRET=s3cr3t\nPORT=4000\n"
    procfile(tmp_path, *app)
    export(tmp_path, "kubernetes", "out", "-c", "web=3,clock_1=0", "-t", "2.5")
    items = kubernetes_items(tmp_path / "out")
    assert sorted(items) == [
        ("Deployment", "myapp-clock-1"), ("Deployment", "myapp-web"),
        ("Deployment", "myapp-worker"), ("Secret", "myapp-env"), ("Service", "myapp-web")]
    deployments = {name: item for (kind, name), item in items.items() if kind == "Deployment"}
    assert [each["spec"]["replicas"] for each in deployments.values()] == [1, 3, 0]
    for name, item in deployments.items():
        spec, pod = item["spec"], item["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
        assert (pod["terminationGracePeriodSeconds"], pod["shareProcessNamespace"],
                pod["enableServiceLinks"], container["image"]) == (3, True, False, "example/app:1")
        surge = {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}
        assert spec.get("strategy") == (None if name == "myapp-web" else surge)
        assert ("readinessProbe" in container) == ("ports" in container) == (name == "myapp-web")
        assert "workingDir" not in container
    web = deployments["myapp-web"]["spec"]["template"]["spec"]["containers"][0]
    assert web["ports"] == [{"name": "http", "containerPort": 4100}]
    assert web["readinessProbe"] == {"tcpSocket": {"port": "http"}}
    service = items["Service", "myapp-web"]["spec"]
    assert service["ports"] == [{"port": 80, "targetPort": "http"}]
    assert service["selector"] == deployments["myapp-web"]["spec"]["selector"]["matchLabels"]
    modes = {path: mode for path, (mode, _) in tree(tmp_path / "out").items()}
    assert modes == {"myapp.json": 0o644, "myapp-secret.json": 0o600}
    public = files(tmp_path / "out")["myapp.json"]
    assert not re.search(rb"s3cr3t|%s|\{\}|\[\]" % base64.b64encode(b"s3cr3t"), public)
    elsewhere = procfile(tmp_path / "elsewhere", *app)
    export(elsewhere, "kubernetes", "out", "-c", "web=3", "-c", "clock_1=0", "-t", "2.5")
    assert files(elsewhere / "out") == files(tmp_path / "out")
    procfile(elsewhere, "Worker: a\n", "SECRET=other\n")
    export(elsewhere, "kubernetes", "out")
    digests = [kubernetes_items(place / "out")["Deployment", "myapp-worker"]["spec"]["template"][
        "metadata"]["annotations"]["procrun/environment"] for place in (tmp_path, elsewhere)]
    assert digests[0] != digests[1]


@pytest.mark.parametrize("app, text, options, said", [
    ("2048", "web: a", "", "`2048`"), ("app-", "worker: a", "", "app-"),
    ("app", "-web: a", "", "-web"), ("app", "web-: a", "", "web-"),
    ("my.app", "w: a", "", "my.app"), ("app", "w: a\nweb: b", "-p 65500 -c web=0", "65535"),
    ("app", "x" * 60 + ": a", "", "app-xxx"), ("app", "a_b: a\nA-B: a", "", "`a-b`"),
    ("app", "web: a", "-l logs", "-l"), ("app", "web: a", "--image=", "--image"),
    ("app", "web: a", "--image=a\tb", "--image"),
    ("app", "web: a", "-e big", "1 MiB")])
def test_what_kubernetes_does_not_take(tmp_path, app, text, options, said):
    """Labels and containers: RFC 1123, services: RFC 1035; see its "Object Names and IDs"."""
    procfile(tmp_path, text + "\n")
    tmp_path.joinpath("big").write_text("".join("V%d=%s\n" % (n, "x" * 120000) for n in range(9)))
    told = export(tmp_path, "kubernetes", "out", *filter(None, options.split(" ")), app=app,
                  status=1)
    assert said.encode() in told and not tmp_path.joinpath("out").exists()


# Output ------------------------------------------------------------------------------------------

def test_output_format(tmp_path):
    before = time.time()
    with start(tmp_path, "web: echo hello; echo oops >&2; exec cat\na-long-name: true\n", "web",
               env={"TZ": "XYZ-5:30"}) as run:
        run.expect(rb"oops$")
        run.end()
    clock = [time.strftime("%H:%M:%S ", time.gmtime(now + 5.5 * 3600)).encode()
             for now in range(int(before), int(time.time()) + 1)]
    lines = run.output.splitlines(True)
    pid, end = re.search(rb"pid (\d+)", run.output)[1], lines[-1][18:]
    assert {line[:9] for line in lines} <= set(clock)
    assert [line[9:] for line in lines] == [
        b"web.1  | started with pid %s, PORT=%d\n" % (pid, BASE_PORT),
        b"web.1  | hello\n", b"web.1  | oops\n",
        b"system | SIGINT received, shutting down\n",
        b"system | sending SIGTERM to all processes\n", b"web.1  | " + end]
    assert end in (b"terminated by SIGTERM\n", b"exited with code 143\n")    # cat, or sh before it


@pytest.mark.parametrize("args, prefix", [
    ("", b"TIME NAME | "), ("--no-timestamp", b"NAME | "), ("--no-prefix", b""),
    ("--no-prefix --color always", b""), ("--color always", b"\33[COLOURmTIME NAME | \33[0m"),
    ("--no-timestamp --color always", b"\33[COLOURmNAME | \33[0m"),
])
def test_prefixes(tmp_path, args, prefix):
    app = procfile(tmp_path, "web: echo of web; exec cat\nworker: echo of $PS; exec cat\n")
    with Run(app, "start", "-c", "worker=10", *args.split()) as run:
        for name, colour, text in [(b"web.1    ", b"36", b"of web"),
                                   (b"worker.10", b"33", b"of worker.10"),
                                   (b"system   ", b"37", b"SIGINT received, shutting down")]:
            if name == b"system   ":
                run.signal(signal.SIGINT)
            line = re.escape(prefix.replace(b"NAME", name).replace(b"COLOUR", colour) + text)
            run.expect(b"^" + line.replace(b"TIME", rb"\d\d:\d\d:\d\d") + b"$")
        assert run.wait() == 130
        assert prefix or re.search(rb"(?m)^web\.1 started with pid \d+", run.output)


def test_colours_go_by_type_in_procfile_order(tmp_path):
    with start(tmp_path, "".join("t%d: echo of $PS; exec cat\n" % n for n in range(14)),
               "--color", "always", "-m", "all=1,t0=2,t2=0") as run:
        plain = [b"36", b"33", b"32", b"35", b"31", b"34"]
        colours = plain + [each + b";1" for each in plain] + plain[:2]
        expected = {b"t%d.1" % place: colour for place, colour in enumerate(colours) if place != 2}
        for name, colour in {**expected, b"t0.2": b"36"}.items():
            run.expect(rb"^\x1b\[%sm..:..:.. %s +\| \x1b\[0mof %s$" % (colour, name, name))
        run.end("TERM")
        assert b"t2.1" not in run.output


@pytest.mark.parametrize("terminal, args, env, coloured", [
    (False, "", {}, False), (False, "", {"FORCE_COLOR": "1"}, True),
    (False, "--color always", {"NO_COLOR": "1"}, True), (True, "", {}, True),
    (False, "--color never", {"FORCE_COLOR": "1"}, False), (True, "--color never", {}, False),
    (False, "--color auto", {}, False), (True, "--color auto", {"NO_COLOR": "1"}, False),
])
def test_when_to_colour(tmp_path, terminal, args, env, coloured):
    reading, writing = pty.openpty() if terminal else os.pipe()
    with start(tmp_path, "web: exec cat\n", *args.split(), stdout=writing,
             env={"TERM": "xterm", **env}) as run:
        os.close(writing)
        run.process.stdout = open(reading, "rb", buffering=0)
        run.expect(rb"^\x1b\[36m.*web\.1" if coloured else rb"^\d\d:\d\d:\d\d web\.1")
        run.signal(signal.SIGINT)
        assert run.process.wait(20) == 130


def test_an_unfinished_line_appears_and_stays_open_for_its_own_process(tmp_path):
    app = procfile(tmp_path, "a: go() { " + UNTIL % "$1" + "; }; printf 'name? '; go 1; echo Jo; "
                             "printf ..; go 2; printf .; go 4; echo more; printf end; go 5\n"
                             "b: " + UNTIL % 3 + "; echo foreign; " + WAIT)
    with Run(app, "start", "--no-timestamp") as run:
        for step, text in enumerate([
                "A name? ", "A name? Jo\nA ..", "A name? Jo\nA ...", "A ...\nB foreign\n",
                "A ...\nB foreign\nA more\nA end",
                "A ...\nB foreign\nA more\nA end\n"], 1):
            text = re.sub("([AB]) ", lambda match: match[1].lower() + ".1    | ", text)
            run.expect(rb"^" + re.escape(text.encode()) + (b"" if step == 6 else rb"\Z"))
            app.joinpath(str(step)).touch()
        assert run.wait() == 0
        assert run.output.count(b"a.1    | exited with code 0\n") == 1


# -- what a terminal gets

def printed(*pieces, label=True, filter=procrun.TERMINAL, crlf=False, show=False, others=False):
    """What the pieces that a process writes become; `show`: each is shown before the next one is
    there; `others`: and another process writes a line then."""
    colour = filter is not procrun.COLOURLESS
    printer = procrun.Printer(procrun.Style(1, colour, False, label, filter), lambda: 0)
    source, other = procrun.Source("a", "36", crlf), procrun.Source("b", "33")
    for piece in pieces:
        printer.feed(source, piece)
        if show:
            printer.show(source)
        if others:
            printer.feed(other, b"other\n")
    printer.finish(source)
    return b"".join(printer.queue)


def cuts(data):
    """The data in two at every place, and in single bytes."""
    yield from ((data[:place], data[place:]) for place in range(len(data) + 1))
    yield [data[place:place + 1] for place in range(len(data))]


class Played:
    """The output as a terminal 80 columns wide shows it: `rows` of text, and the `colours` (SGR)
    in which each character of them stands.  It knows what may pass, and that is all it knows."""

    KNOWN = re.compile(
        "(?P<put>[^\0-\x1f\x7f-\x9f\udc80-\udc9f])|(?P<newline>\n)|(?P<start>\r)|(?P<back>\b)"
        r"|(?P<tab>\t)|\x1b\[0?(?P<erase>K)|\x1b\[(?P<column>\d+)G|\x1b\[(?P<left>\d*)D"
        r"|(?P<colour>\x1b\[[\d;:]*m)")

    def __init__(self, output):
        text, place, sgr = output.decode("utf-8", "surrogateescape"), 0, ""
        cells, at, self.lines = [[]], 0, [0]
        while place < len(text):
            token = self.KNOWN.match(text, place)
            assert token, (text[place:place + 9], output)
            kind, found, place, row = token.lastgroup, token[0], token.end(), cells[-1]
            if kind == "put" and unicodedata.category(found) not in ("Mn", "Me", "Cf"):
                if at == 80:
                    cells.append([])
                    row, at = cells[-1], 0
                row += [(" ", "")] * (at + 1 - len(row))
                row[at], at = (found, sgr), at + 1
            elif kind == "newline":
                assert not sgr, ("a colour meets others", output)
                self.lines.append(len(cells))    # which row it is
                cells.append([])
                at = 0
            elif kind == "start":
                at = 0
            elif kind in ("back", "left"):
                at = max(0, min(at, 79) - max(1, int(token["left"] or 1)))
            elif kind == "tab":
                at = min(79, at // 8 * 8 + 8)
            elif kind == "erase":
                del row[at:]
            elif kind == "column":
                at = min(80, int(token["column"])) - 1
            elif kind == "colour":
                sgr = sgr + found if found.strip("\x1b[0;m") else ""
        self.rows = ["".join(cell[0] for cell in row).rstrip() for row in cells]
        self.colours = [[cell[1] for cell in row] for row in cells]


TAKEN_OUT = [    # each is the terminal's or another process's business
    # the screen and the cursor
    b"\33c", b"\33[2J", b"\33[3J", b"\33[J", b"\33[H", b"\33[1;1H", b"\33[5;5f", b"\33[A",
    b"\33[2B", b"\33[9C", b"\33[9D", b"\33[E", b"\33[F", b"\33[5d", b"\33[5`", b"\33[L", b"\33[M",
    b"\33[2S", b"\33[T", b"\33[2;5r", b"\33[s", b"\33[u", b"\0337", b"\0338", b"\33D", b"\33E",
    b"\33M", b"\33H", b"\33[g", b"\33#8", b"\33[2$z", b"\33[1;1;9;9$r", b"\33[99999G",
    b"\33[5;5G", b"\33[?2K", b"\33[3b", b"\33[>4;2m", b"\33[?4m",
    # modes, character sets, the keyboard
    b"\33[?25l", b"\33[?1049h", b"\33[4h", b"\33[20l", b"\33=", b"\33>", b"\33[!p", b"\33[2 q",
    b"\33[>1u", b"\33(0", b"\33)B", b"\33*A", b"\33-A", b"\33%G", b"\33%@", b"\33 F", b"\33n",
    b"\33o", b"\33|", b"\33}", b"\33~", b"\33N", b"\33O", b"\x0e", b"\x0f", b"\x0b", b"\x0c",
    b"\0", b"\7", b"\x18", b"\x1a", b"\x7f", b"\21\23",
    # questions, and strings by their three ends
    b"\5", b"\33[c", b"\33[>c", b"\33[=c", b"\33[6n", b"\33[?6n", b"\33[5n", b"\33[18t",
    b"\33[21t", b"\33[?1$p", b"\33[x", b"\33Z", b"\33]11;?\7", b"\33]11;?\33\\",
    b"\33]4;1;?\xc2\x9c", b"\33]52;c;?\x9c", b"\33P+q544e\33\\", b"\33P$qm\33\\",
    b"\33_Gi=1\33\\", b"\33^pm\33\\", b"\33Xsos\33\\", b"\33]0;title \xd0\x9b\xc3\xa9\7",
    # eight-bit controls, as UTF-8 and as they are
    b"\xc2\x9b2J", b"\xc2\x9b6n", b"\xc2\x9d0;title\7", b"\xc2\x90$qm\xc2\x9c",
    b"\xc2\x9fapc\xc2\x9c", b"\xc2\x84", b"\xc2\x85", b"\xc2\x8d", b"\xc2\x9a", b"\xc2\x9c",
    b"\x84", b"\x85", b"\x8d", b"\x9a", b"\x9c",
    # controls within a sequence, sequences without an end
    b"\33[2\0J", b"\33[\0002J", b"\33[2\x7fJ", b"\33[2\r\x08J", b"\33[" + b"1;" * 40 + b"H",
    b"\33[2\33[2J", b"\33\33[2J", b"\33[2\x18", b"\33]0;x\x18", b"\33]0;x\33[2J",
    b"\33Pq\33]0;x\7",
]


@pytest.mark.parametrize("sequence", TAKEN_OUT)
def test_what_is_not_known_is_taken_out(sequence):
    for data in b"x" + sequence + b"y\n", b"x" + sequence + b"\n" + b"y\n":
        expected = data.replace(sequence, b"")
        assert printed(data, label=False) == expected
        for pieces in cuts(data):
            assert printed(*pieces, label=False) == expected
            assert Played(printed(*pieces, label=False, show=True)).rows == Played(expected).rows


@pytest.mark.parametrize("data, rest", [    # what is taken out builds nothing, and has an end
    (b"\33[\33[2J2J", b"2J"), (b"\33\33[2J[2J", b"[2J"), (b"\xc2\33[2J\x9b2J", b"\xc22J"),
    (b"\x9b2J", b"2J"), (b"\33]0;\33]0;a\7b\7", b"b"), (b"\33\7[2J", b"[2J"),
    (b"\33[2\33\\J", b"J"),
    (b"\xe2\x80\33[m\x9b2J", b"\xe2\33[m2J"), (b"\33]0;never closed", b""),
    (b"\33]" + b"x" * 5000, b"x" * 903), (b"\33[" + b"1" * 120 + b"m", b"1" * 20 + b"m"),
    (b"\33[", b""), (b"\33", b""), (b"\33]", b""), (b"\33(", b""), (b"\xc2", b"\xc2"),
    (b"\xf0\x9f", b"\xf0"), (b"\xe9", b"\xe9"),
])
def test_what_is_left_when_a_sequence_is_taken_out(data, rest):
    assert printed(b"x" + data + b"\ny\n", label=False) == b"x" + rest + b"\ny\n"


def test_text_is_kept_whatever_its_bytes():
    numbers = [*range(32, 127), *range(160, 0xd800), *range(0xe000, 0x110000)]
    latin = bytes(range(160, 256))
    every = "".join(map(chr, numbers)).encode()
    for data in every, latin, latin * 2 + b"a", "\t\u200d\u0301\u05d0\u00e9".encode() + latin:
        assert printed(b"\r" + data + b"\n", label=False) == b"\r" + data + b"\n"
    for pieces in cuts("aß\u00c2\u2028\u0e33\U0001f600\U0010ffff\n".encode()):
        assert printed(*pieces, label=False, show=True) == b"".join(pieces)


P = b"\33[36ma | \33[0m"


@pytest.mark.parametrize("data, line", [    # each line of the process begins behind its prefix
    (b"10 %\r20 %", b"10 %\r" + P + b"20 %"), (b"x\r\r\r\r", b"x"), (b"\rx", b"\r" + P + b"x"),
    (b"x\r\r-", b"x\r" + P + b"-"), (b"x\33[1G-", b"x\r" + P + b"-"),
    (b"x\33[G-", b"x\r" + P + b"-"), (b"x\33[0G-", b"x\r" + P + b"-"),
    (b"x\33[2K-", b"x\r" + P + b"\33[K-"),
    (b"x\33[1K-", b"x\r" + P + b"\33[K-"), (b"x\33[K-", b"x\33[K-"), (b"x\33[2G-", b"x\33[6G-"),
    (b"x\33[010G-", b"x\33[14G-"), (b"x\33[9999G-", b"x\33[10003G-"), (b"xy\b\b\b\b-", b"xy\b\b-"),
    (b"\33[999G\b\b-", b"\33[1003G-"),
    (b"\bx", b"x"), (b"xy\r\b-", b"xy\r" + P + b"-"), (b"x\t\b\b-", b"x\t\b-"),
    (b"> \33[2D> \33[D\33[0Dx", b"> \33[2D> \33[D\33[0Dx"), (b"x\33[2D-", b"x-"),    # IPython
    ("\u2764\u200d\0".encode() * 3 + b"\b\33[3D-", "\u2764\u200d".encode() * 3 + b"-"),    # joined
    (b"e\xcc\x81\b\b-", b"e\xcc\x81\b-"), (b"\xe2\xa0\x8b\b\b-", b"\xe2\xa0\x8b\b-"),
])
def test_the_start_of_a_line_is_behind_its_prefix(data, line):
    assert printed(data + b"\n") == printed(data + b"\r\r\n", crlf=True) == P + line + b"\n"
    assert printed(b"z\n" + data + b"\nz\n") == P + b"z\n" + P + line + b"\n" + P + b"z\n"
    for pieces in cuts(data + b"\n"):
        assert Played(printed(*pieces, show=True)).rows == Played(P + line + b"\n").rows
    assert printed(data + b"\n", filter=None) == P + data + b"\n"


RED, BOLD, OFF = b"\33[31m", b"\33[1m", b"\33[0m"


@pytest.mark.parametrize("data, lines", [
    (RED + b"x\ny" + OFF + b"\nz\n", [RED + b"x" + OFF, RED + b"y" + OFF, b"z"]),
    (b"x" + RED + b"\n\ny\n", [b"x" + RED + OFF, RED + OFF, RED + b"y" + OFF]),
    (RED + BOLD + b"x\ny\b\b-\n", [RED + BOLD + b"x" + OFF, RED + BOLD + b"y\b-" + OFF]),
    (RED + b"x\33[39m\ny\n", [RED + b"x\33[39m" + OFF, b"y" + OFF]),
    (RED + b"x\33[m\ny\n", [RED + b"x\33[m", b"y"]),
    (RED + b"x\ry\n", [RED + b"x\r" + P + RED + b"y" + OFF]),
    (b"x\n" + OFF, [b"x"]),
])
def test_a_colour_holds_on_the_lines_of_its_process(data, lines):
    expected = b"".join(P + line + b"\n" for line in lines)
    assert printed(data) == expected
    colours = Played(expected).colours
    for pieces in cuts(data):
        for show in False, True:
            assert Played(printed(*pieces, show=show)).colours == colours


@pytest.mark.parametrize("data, expected", [
    (b"a\r\nb\r\n", b"a\nb\n"), (b"a\r\r\n", b"a\r\n"), (b"a\rb\r\n\r\n", b"a\rb\n\n"),
    (b"\33[2Ja" + b"\r\n" * 30, b"\33[2Ja" + b"\n" * 30),
])
def test_a_pty_ends_its_lines_in_cr_lf(data, expected):
    for pieces in cuts(data):
        assert printed(*pieces, crlf=True, label=False, filter=None) == expected
        assert printed(*pieces, label=False, filter=None) == data
    shown = printed(b"50 %\r", b"99 %\r", crlf=True, show=True, filter=None)
    assert shown == P + b"50 %\r99 %\r\n"


def test_newlines_that_push_the_screen_away():
    data = b"\r\n" * 23 + b"\33[1;1H\33[0Jready\r\n"    # as vite does on a screen of 24 rows
    assert printed(b"x\r\n" + data, crlf=True) == P + b"x\n" + P + b"ready\n"
    assert printed(b"x\r\n", data, crlf=True) == P + b"x\n" + P + b"\n" + P + b"ready\n"
    assert printed(b"x\r\n" + b"\r\r\n" * 23 + b"> ", crlf=True, show=True) == (    # as IPython
        P + b"x\n" + P + b"> \n")
    assert printed(b"x" + b"\r\n" * 9, crlf=True) == P + b"x\n" + (P + b"\n") * 8
    assert printed(b"x" + b"\n" * 23) == P + b"x\n" + (P + b"\n") * 22


@pytest.mark.parametrize("data, expected", [
    (RED + b"r\33[m\33[1;38:5:9mb" + OFF + b"\n", b"rb\n"),
    (b"\33[\33[2J\33]0;\7\r\b\xff\33[?1m\n",) * 2,
])
def test_colours_alone_are_taken_out_of_a_file(data, expected):
    for pieces in cuts(data):
        for show in False, True:
            never = printed(*pieces, label=False, filter=procrun.COLOURLESS, show=show)
            assert never == expected
            assert printed(*pieces, label=False, filter=None, show=show) == data


def test_a_colour_is_bounded_and_ends_with_its_process():
    assert len(printed((RED + BOLD) * 9999 + b"\ny\n")) < 9 * 9999 + 200
    printer = procrun.Printer(procrun.Style(1, True, False, True, procrun.TERMINAL), lambda: 0)
    source = procrun.Source("a", "36")
    printer.feed(source, RED + b"x")
    printer.finish(source)
    printer.feed(source, b"started again\n")
    assert b"".join(printer.queue) == P + RED + b"x" + OFF + b"\n" + P + b"started again\n"


def test_fuzz_no_prefix_is_damaged_and_no_other_line():
    parts = [*TAKEN_OUT, *(bytes([each]) for each in range(256)), b"\33", b"\33[", b"\33]",
             b"\33[2K", b"\33[G", b"\33[7G", RED, OFF, b"\33[1;41m", b"text", b"\b\b\b",
             "ж⠋\u0301".encode(), b"x" * 90]
    for seed in range(4000 if LONG else 400):
        chance, crlf = random.Random(seed), seed % 2 == 1
        data = b"".join(chance.choices(parts, k=30)) + b"\n"
        places = sorted(chance.choices(range(len(data)), k=5))
        pieces = [data[start:end] for start, end in zip([0, *places], [*places, len(data)])]
        whole = printed(data, crlf=crlf)
        assert printed(*pieces, crlf=crlf) == whole
        assert Played(printed(*pieces, crlf=crlf, show=True)).rows == Played(whole).rows
        mixed = Played(printed(*pieces, crlf=crlf, show=True, others=True))
        begins = [mixed.rows[row] for row in mixed.lines[:-1]]
        assert begins.count("b | other") == 6
        assert all(row.startswith(("a |", "b |")) for row in begins) and not mixed.rows[-1]


# What a process gets -----------------------------------------------------------------------------

PROBE = r"""
import fcntl, json, os, select, stat
print("at once")
print(json.dumps(dict(
    pid=os.getpid(), group=os.getpgrp(), session=os.getsid(0), cwd=os.getcwd(),
    stdin_is_a_pipe=stat.S_ISFIFO(os.fstat(0).st_mode),
    stdin_mode=fcntl.fcntl(0, fcntl.F_GETFL) & os.O_ACCMODE,
    stdin_is_quiet=not select.select([0], [], [], 0.1)[0],
    output_is_a_pipe=stat.S_ISFIFO(os.fstat(1).st_mode),
    one_output=os.path.samestat(os.fstat(1), os.fstat(2)))))
select.select([], [], [])
"""


@needs_linux
def test_what_a_process_gets(tmp_path):
    """Session, group, root directory, stdin, output, signals, limits, file descriptors."""
    def before_procrun():
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        for name in "INT QUIT TERM PIPE CHLD TSTP TTIN TTOU USR1 USR2 WINCH XFSZ ALRM".split():
            signal.signal(getattr(signal, "SIG" + name), signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))

    pipe = os.pipe()
    tmp_path.joinpath("root").mkdir()
    tmp_path.joinpath("probe.py").write_text(PROBE)
    app = procfile(tmp_path, "probe: exec %s -S ../probe.py\n"
                             "many: ulimit -Sn; while read -r line; do "
                             "case $line in Sig[BI]*) echo $line;; esac; done </proc/$$/status; "
                             "for fd in /proc/$$/fd/*; do [ -e $fd ] && echo ${fd##*/}; done; "
                             "echo end; exec cat\n" % PYTHON)
    with Run(app, "start", "-f", "Procfile", "-d", "root", "-c", "many=40", pass_fds=pipe,
             preexec_fn=before_procrun) as run:
        run.expect(rb"at once$")
        got = json.loads(run.expect(rb"\| (\{.*\})$")[1].decode())
        pid = int(run.expect(rb"probe\.1 +\| started with pid (\d+)")[1])
        assert got == dict(
            pid=pid, group=pid, session=pid, cwd=os.path.realpath(str(tmp_path / "root")),
            stdin_is_a_pipe=True, stdin_mode=os.O_RDONLY, stdin_is_quiet=True,
            output_is_a_pipe=True, one_output=True)
        for number in range(1, 41):
            run.expect(rb"many\.%d +\| end$" % number)
            _, limit, blocked, ignored, *rest = run.lines("many.%d" % number)
            assert (limit, blocked) == (b"40", b"SigBlk: " + b"0" * 16)
            assert not int(ignored.split()[1], 16) & OWN_SIGNALS
            assert rest == [b"0", b"1", b"2", b"end"]
        run.end()
    for fd in pipe:
        os.close(fd)


@needs("node")
def test_a_stdin_of_its_own(tmp_path):
    """node makes its own non-blocking, and another may wait for its own nevertheless."""
    with start(tmp_path, "a: exec node -e 'process.stdin.resume(); console.log(\"up\")'\n"
                         "b: %secho reads; cat; echo never\n" % UNTIL_GO) as run:
        run.expect(rb"\| up$")
        tmp_path.joinpath("go").touch()
        run.expect(rb"\| reads$")
        cat = run.find(b"cat")
        eventually(lambda: facts(cat)["State"] == "S")    # it waits for something to read
        run.end()
        assert b"never" not in run.output


@needs_linux
def test_a_command_reaches_the_shell_byte_for_byte(tmp_path):
    command = (b"cat /proc/$$/cmdline; "
               b"echo '\xff\xfe\t\x01\r $PORT' \"$X\" $PORT \\$PS \xc3\xa9  $((1+1))  ")
    app = procfile(tmp_path, b"web:\t " + command + b"\r\n", "X='$PORT; `id`'")
    with Run(app, "start", "--no-timestamp") as run:
        assert run.wait() == 0
        assert run.expect(rb"web\.1  \| \S*sh\0-c\0(.*)\0")[1] == procrun.shell_text(command)
        said = b"\0\xff\xfe\t\x01\r $PORT $PORT; `id` %d $PS \xc3\xa9 2\n" % BASE_PORT
        assert said in run.output


@pytest.mark.parametrize("env, dotenv, expected", [
    ({}, b"", b"1"), ({"PYTHONUNBUFFERED": "x"}, b"", b"x"), ({}, b"PYTHONUNBUFFERED=y", b"y"),
    ({"PYTHONUNBUFFERED": "x"}, b"PYTHONUNBUFFERED=", b""),
])
def test_environment_of_a_process(tmp_path, env, dotenv, expected):
    app = procfile(tmp_path, 'web: echo "$A $B $C[${D-unset}] $PS $PORT [$PYTHONUNBUFFERED] $M"\n',
                   b"B=dotenv\nC=\nPS=dotenv\nPORT=6000\nM=\"\xff\n2\"\n" + dotenv)
    outer = {**dict.fromkeys(["A", "B", "C", "PS"], "outer"), "PORT": "7000", "D": "", **env}
    status, out, _ = ask(app, "start", "--no-timestamp", env=outer)
    assert status == 0
    assert b"| outer dotenv [] web.1 6000 [%s] \xff\nweb.1  | 2\n" % expected in out


# The end -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("command, status, told", [
    ("true", 0, b"exited with code 0"), ("exit 7", 7, b"exited with code 7"),
    ("exit 255", 255, b"exited with code 255"), ("no-such-command", 127, b"exited with code 127"),
    ("kill -9 $$", 137, b"terminated by SIGKILL"),
    ("kill -TERM $$", 143, b"exited with code 143"),
    ("kill -SEGV $$", 139, b"terminated by SIGSEGV"),
    pytest.param("kill -STOP $PPID; exit 3", 3, b"exited with code 3", marks=needs_linux),
])
def test_any_exit_ends_the_set(tmp_path, command, status, told):
    """With the status of the first that ended by itself, even if that has stopped the guard; its
    last words come before its exit."""
    with start(tmp_path, "first: " + UNTIL_GO + "printf 'a\\nlast'; " + command + "\n"
                         "term: trap 'echo got it; exit 9' TERM; echo up; " + LOOP + "\n"
                         "tree: sleep 300 & sleep 301 & echo up; wait\n") as run:
        run.expect(rb"term\.1 +\| up$")
        run.expect(rb"tree\.1 +\| up$")
        tmp_path.joinpath("go").touch()
        assert run.wait() == status
        first = run.lines("first.1")
        assert (first[1], first[2][:4], first[-1], len(first)) == (b"a", b"last", told, 4)
        assert run.lines("term.1")[-2:] == [b"got it", b"exited with code 9"]
        assert run.lines("tree.1")[-1] == b"exited with code 143"
        why, what = run.lines("system")
        assert re.match(rb"first\.1 %s.*, stopping the rest%s$" % (
            told.split()[0], b"" if status else rb" \(--can-die first lets it end\)"), why)
        assert what == b"sending SIGTERM to all processes"


UNWILLING = "a: trap 'echo no' TERM; echo up; %s\nb: exec sleep 300\n" % LOOP


def insist(run, number):
    """Signal until all are killed: so soon after another, a signal is the same request."""
    eventually(lambda: (run.signal(number), run.read(0.05)) and b"sending SIGKILL" in run.output)


@pytest.mark.parametrize("first, second", [("INT", "INT"), ("TERM", "TERM"), ("INT", "TERM"),
                                           ("HUP", "INT"), ("crash", "INT")])
def test_a_second_signal_kills_at_once(tmp_path, first, second):
    with start(tmp_path, UNWILLING + "c: %sexit 3\n" % UNTIL_GO, "-t", "60") as run:
        run.expect(rb"up$")
        status = begin(run, tmp_path, first)
        run.expect(rb"no$")
        run.expect(rb"\| waiting for a\.1 \(SIGKILL in \d+ s; Ctrl-C kills now\)$")
        insist(run, getattr(signal, "SIG" + second))
        assert run.wait() == status
        assert b"sending SIGKILL to a.1" in run.lines("system")
        assert run.lines("a.1")[-1] == b"terminated by SIGKILL"


@pytest.mark.parametrize("first", ["INT", "TERM", "crash"])
def test_a_signal_right_after_is_the_same_request(tmp_path, first):
    """Ctrl-C may come by two ways, or while a crash ends the set already."""
    app = procfile(tmp_path, "a: trap 'echo asked; %s; echo saved; exit' TERM; echo up; %s\n"
                             "b: %sexit 3\n" % (UNTIL % "free", LOOP, UNTIL_GO))
    soon = False
    while not soon:    # on a busy machine it may take more than one to be soon enough
        with Run(app, "start", "-t", "60") as run:
            run.expect(rb"up$")
            began = time.monotonic()
            status = begin(run, app, first)
            run.expect(rb"shutting down$|stopping the rest$")
            run.signal(signal.SIGINT)
            soon = time.monotonic() - began < 0.2
            run.expect(rb"\| asked$|SIGKILL to")
            app.joinpath("free").touch()
            assert run.wait() == status
        assert not soon or b"saved" in run.lines("a.1")
        for name in "go", "free":
            with contextlib.suppress(FileNotFoundError):
                app.joinpath(name).unlink()


@pytest.mark.parametrize("grace, polite", [("0", False), ("1", True)])
def test_grace_period(tmp_path, grace, polite):
    with start(tmp_path, UNWILLING, "--timeout=" + grace) as run:
        run.expect(rb"up$")
        run.expect(rb"b\.1 +\| started")
        run.end()
        assert (b"no" in run.lines("a.1")) == polite
        assert (b"sending SIGTERM to all processes" in run.lines("system")) == polite
        killed = b"a.1" if polite else b"a.1, b.1"
        assert b"sending SIGKILL to " + killed in run.lines("system")
        assert run.lines("a.1")[-1] == b"terminated by SIGKILL"
        assert run.lines("b.1")[-1] == b"terminated by " + (b"SIGTERM" if polite else b"SIGKILL")


def test_what_has_ended_is_not_killed(tmp_path):
    with start(tmp_path, "a: exit 3\n", "-t", "0") as run:
        assert run.wait() == 3
        assert b"SIGKILL" not in run.output


@pytest.mark.parametrize("text, args, status", [
    ("build: exit 0\nstep: exit 0\nweb: sleep 0.1; exit 5\n", "--can-die build,step", 5),
    ("build: exit 0\nweb: exit 3\n", "--can-die build,web", 3),
    ("build: exit 0\nweb: kill -9 $$\n", "--can-die build,web", 137),
    ("build: exit 0\nstep: exit 0\n", "--can-die build --can-die step", 0)])
def test_can_die(tmp_path, text, args, status):
    with start(tmp_path, text, *args.split()) as run:
        assert run.wait() == status
        fate = b"terminated by SIGKILL" if "kill" in text else b"exited with code %d" % status
        assert fates(run, "web.1") == [fate] * ("web" in text)


def test_sigusr_is_passed_on_to_every_group(tmp_path):
    loop = "trap 'echo {0} one' USR1; trap 'echo {0} two' USR2; echo {0} up; " + LOOP
    both = "(%s) & %s" % (loop.format("member"), loop.format("leader"))
    with start(tmp_path, "a: %s\nb: %s\n" % (both, both)) as run:
        for word, number in [(b"up", None), (b"one", signal.SIGUSR1), (b"two", signal.SIGUSR2)]:
            if number:
                run.signal(number)
            for name, who in itertools.product([b"a", b"b"], [b"leader", b"member"]):
                run.expect(rb"%s\.1 +\| %s %s$" % (name, who, word))
        run.end()


@needs_linux
def test_ctrl_z_stops_all_and_sigcont_continues(tmp_path):
    with start(tmp_path, "a: sleep 300 & echo $! $$; exec sleep 301\n"
                         "b: echo $$; printf half; exec sleep 302\n") as run:
        run.expect(rb"half")
        pids = [run.pid, *map(int, run.expect(rb"a\.1 +\| (\d+) (\d+)$").groups()),
                int(run.expect(rb"b\.1 +\| (\d+)$")[1])]
        for _ in range(2):
            run.signal(signal.SIGTSTP)
            eventually(lambda: all(map(is_stopped, pids)))
            run.expect(rb"half\n\Z")    # so a shell's prompt stands on a line of its own
            run.signal(signal.SIGCONT)
            eventually(lambda: not any(map(is_stopped, pids)))
        for _ in range(100):    # the last one wins
            run.signal(signal.SIGTSTP)
            run.signal(signal.SIGCONT)
        eventually(lambda: not any(map(is_stopped, pids)))
        run.end()


@needs_linux
def test_ctrl_z_in_the_middle_of_a_start(tmp_path):
    def waiting():
        """The processes that are not stopped, beside the guard."""
        return [pid for pid, _ in leftovers(run.tag) if pid != helper and not is_stopped(pid)]

    with start(tmp_path, "a: exec sleep 300\n", "-c", "a=60") as run:
        helper = guard(run)
        run.expect(rb"a\.3 +\| started")
        run.signal(signal.SIGTSTP)
        eventually(lambda: is_stopped(run.pid) and not waiting())
        pause(0.1)
        assert not waiting()
        run.signal(signal.SIGCONT)
        eventually(lambda: run.read(1) and run.output.count(b"started with") == 60)
        run.end()


# Guard and front ---------------------------------------------------------------------------------

MODES = [(), ("--pty",)]
both_ways = pytest.mark.parametrize("mode", MODES, ids=["pipes", "ptys"])
both_ways_if_long = pytest.mark.parametrize("mode", MODES if LONG else MODES[:1])

DEAF = "trap '' TERM INT HUP QUIT; echo up; while :; do sleep 0.1; done"


def pause(seconds):
    """Let time pass, where a moment or a measurement is wanted and not a handshake."""
    select.select((), (), (), seconds)


def proc(pid, name=""):
    """A file in a process's folder of /proc; where there is no /proc, the test is skipped."""
    if not PROC:
        pytest.skip("looks into /proc")
    return "/proc/%d/%s" % (pid, name)


def children(pid):
    """The ids of the children of a process."""
    with open(proc(pid, "task/%d/children" % pid)) as file:
        return [int(word) for word in file.read().split()]


def guard(run):
    """The id of procrun's helper, which is its first child."""
    return eventually(lambda: children(run.pid))[0]


def facts(pid, file="status"):
    """What /proc/PID/FILE says: a dict from each line's name to the first word behind it."""
    with open(proc(pid, file)) as lines:
        return {line.split(":")[0]: line.split(":")[1].split()[0] for line in lines
                if line.split(":")[1:] and line.split(":")[1].strip()}


def is_stopped(pid):
    """Whether a process is stopped, as the kernel says it."""
    return facts(pid)["State"] == "T"


def opened(pid):
    """What a process has open: a dict from fd to the name that the kernel has for it."""
    place = proc(pid, "fd/")
    return {int(fd): os.readlink(place + fd) for fd in os.listdir(place)}


def sleeping(run, start):
    """How many `sleep N` of the run there are with an N that starts so."""
    return sum(command.startswith(b"sleep\0" + start) for _, command in leftovers(run.tag))


def pids(run):
    """The id of each instance that was started, by its name."""
    found = re.findall(rb"^\S+ (\S+) +\| started with pid (\d+)", run.output, re.MULTILINE)
    return {name.decode(): int(pid) for name, pid in found}


def fates(run, name):
    """How an instance ended, as often as it was told."""
    pattern = rb"^\S+ %s +\| (exited with .*|terminated by .*)$" % re.escape(name.encode())
    return re.findall(pattern, run.output, re.MULTILINE)


def idle(run):
    """Whether procrun and its helper neither work nor wake up for a third of a second."""
    def cost():
        ticks = 0
        for pid in (run.pid, guard(run)):
            with open("/proc/%d/stat" % pid) as file:
                ticks += sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
            ticks += int(facts(pid)["voluntary_ctxt_switches"])
        return ticks
    before = cost()
    pause(0.3)
    return cost() - before <= 2    # clock ticks of 10 ms, and times that it woke up


def awake(run):
    """Whether procrun has come so far that it catches signals."""
    caught = int(facts(run.pid)["SigCgt"], 16)
    return all(caught >> getattr(signal, "SIG" + name) - 1 & 1
               for name in "INT TERM HUP QUIT USR1 CHLD CONT WINCH".split())


def begin(run, app, how):
    """Begin a shutdown by a signal (INT, ...) or, in an app that waits for it, by the file go."""
    if hasattr(signal, "SIG" + how):
        run.signal(getattr(signal, "SIG" + how))
        return 128 + getattr(signal, "SIG" + how)
    app.joinpath("go").touch()
    return {"crash": 3, "exit": 0}[how]


def wrapper(app, text):
    """A program to be Run as `executable`, in place of the interpreter: a shell script in which
    $PYTHON stands for that, and "$@" for the rest of the command line."""
    path = app.joinpath("wrapper")
    path.write_text("#!/bin/sh\nPYTHON='%s'\n%s\n" % (sys.executable, text))
    path.chmod(0o755)
    return str(path)


def patched(text):
    """What stands for `python procrun.py` where this Python text has changed something first."""
    imports = "import os, selectors, sys; sys.path.insert(0, %r); import procrun" % HERE
    return sys.executable, "-c", "%s\n%s\nsys.exit(procrun.main())" % (imports, text)


def require_root_and(*command):
    """Skip the test where this command does not work."""
    try:
        if os.geteuid() or subprocess.call(command, stderr=subprocess.DEVNULL):
            pytest.skip("needs root, and `%s` to work" % " ".join(command))
    except OSError:
        pytest.skip("needs %s" % command[0])


# Survive: trees, the deaf, and those that leave --------------------------------------------------

@pytest.mark.parametrize("how, mode", [
    *((how, MODES[0]) for how in ("INT", "TERM", "HUP", "QUIT", "crash", "exit")),
    *((how, MODES[-1]) for how in ("HUP", "crash"))])
def test_nothing_is_left_of_trees(tmp_path, how, mode):
    with start(tmp_path, r"""
a: sleep 300 & sleep 301
b: (sleep 302; echo never) & (sleep 303 | cat | sleep 304) & sleep 305; :
c: while :; do sleep 306; done & sh -c 'sleep 307 & sleep 308 & wait'; :
d: """ + UNTIL_GO + "exit %d\n" % (3 * (how == "crash")), *mode) as run:
        eventually(lambda: sleeping(run, b"30") == 9)
        status = begin(run, tmp_path, how)
        assert run.wait() == status
        assert fates(run, "a.1") == [b"exited with code 143"]
        if hasattr(signal, "SIG" + how):
            assert run.lines("system")[:2] == [b"SIG%s received, shutting down" % how.encode(),
                                               b"sending SIGTERM to all processes"]


@both_ways
def test_a_deaf_member_outlives_its_leader_for_the_grace_period(tmp_path, mode):
    with start(tmp_path, "a: (trap '' TERM HUP; exec >/dev/null 2>&1; touch deaf; "
                         + LOOP + ") & " + UNTIL_GO + "exit 3\n", "-t", "1.5", *mode) as run:
        eventually(tmp_path.joinpath("deaf").exists)
        tmp_path.joinpath("go").touch()
        run.expect(rb"a\.1 +\| exited with code 3$")
        run.expect(rb"\| waiting for a\.1 \(SIGKILL in")
        assert run.wait() == 3
        assert not leftovers(run.tag)         # at once: the set had not ended before
        assert run.lines("system")[-1] == b"sending SIGKILL to a.1"


@pytest.mark.parametrize("how, mode", [
    ("INT", MODES[0]), ("crash", MODES[0]), ("crash", MODES[-1])])
def test_escapees_are_found_and_ended(tmp_path, how, mode):
    with start(tmp_path, r"""
a: setsid sleep 306 & sleep 300
b: (setsid sh -c 'sleep 307 & exec sleep 308' </dev/null >/dev/null 2>&1 &); sleep 301
c: (setsid sh -c 'trap "" TERM HUP; setsid sleep 309 & while :; do echo here; sleep .1; done' &) \
   ; sleep 302
d: (setsid sh -c 'trap "echo ended >said; setsid sleep 310 & exit" TERM; sleep 311 & wait' &) \
   ; sleep 303
e: trap '' HUP; setsid sleep 312 >/dev/null 2>&1 & (setsid setsid sleep 313 >/dev/null 2>&1 &) \
   ; exit 0
f: """ + UNTIL_GO + "exit 3\n", "-t", "1", "--can-die", "e", *mode) as run:
        run.expect(rb"c\.1 +\| here$")
        run.expect(rb"e\.1 +\| exited with code 0$")
        eventually(lambda: sleeping(run, b"30") + sleeping(run, b"31") == 11)
        status = begin(run, tmp_path, how)
        assert run.wait() == status
        assert not leftovers(run.tag)
        assert (tmp_path / "said").read_text() == "ended\n"    # it was asked before it was killed


def test_what_had_left_its_group_is_named_at_the_end(tmp_path):
    with start(tmp_path, "a: (setsid sleep 305 &) ; echo up; exec sleep 306\n") as run:
        run.expect(rb"\| up$")
        eventually(lambda: sleeping(run, b"30") == 2)
        run.end()
        assert re.fullmatch(rb"also ended, out of their groups: process \d+ \(sleep\)",
                            run.lines("system")[-1])


def test_a_guard_that_is_stopped_all_the_time(tmp_path):
    with start(tmp_path, "a: trap '' TERM; echo up; " + UNTIL_GO
                         + "while :; do kill -STOP $PPID; done\n", "-t", "0.2") as run:
        run.expect(rb"\| up$")    # a guard that is stopped before has nothing to tell
        tmp_path.joinpath("go").touch()
        eventually(lambda: is_stopped(guard(run)))
        run.signal(signal.SIGINT)
        assert run.wait(20) in (1, 130)    # 130 if the guard had a moment to act


def test_a_long_chain_of_sessions_that_are_deaf(tmp_path):
    count = 1000 if LONG else 300
    tmp_path.joinpath("chain.py").write_text("""
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(%d):
    if os.fork():
        break
    os.setsid()
else:
    print("up", flush=True)
while True:
    signal.pause()
""" % count)
    with start(tmp_path, "a: exec %s -S chain.py\n" % PYTHON, "-t", "0.2") as run:
        run.expect(rb"\| up$", 60)
        run.signal(signal.SIGINT)
        assert run.wait(60) == 130
        assert not leftovers(run.tag)
        run.expect(rb"sending SIGKILL to a\.1, .*, and %d more$" % (count + 1 - 10))


def test_a_stranger_that_floods_a_pipe_is_not_waited_for(tmp_path):
    with start(tmp_path, "a: echo up; exec sleep 300\n") as run:
        run.expect(rb"\| up$")
        with open(proc(pids(run)["a.1"], "fd/1"), "wb") as pipe, \
                subprocess.Popen(["yes"], stdout=pipe) as stranger:
            run.expect(rb"\| y$")
            run.signal(signal.SIGTERM)
            try:
                eventually(lambda: (run.read(0), pause(0.02)) and not run.read(0), 30)
                assert run.process.wait(20) == 143
            finally:
                stranger.kill()


# Survive: kill -9 --------------------------------------------------------------------------------

STUBBORN = """
a: trap '' HUP; sleep 300 & sleep 301
b: %s
c: (setsid sleep 302 >/dev/null 2>&1 &); sleep 303
d: (setsid sh -c 'trap "" TERM HUP; setsid sleep 304 & while :; do sleep 0.1; done' &); sleep 305
e: while :; do echo full output; done
""" % DEAF


@both_ways
def test_kill_9_at_any_moment_leaves_nothing(tmp_path, mode):
    app = procfile(tmp_path, STUBBORN)
    moments = [0.01, 0.04, 0.06, 0.08, 0.1, 0.2]
    for moment in [n / 500 for n in range(5, 130)] if LONG else [moments]:
        with contextlib.ExitStack() as stack:
            for seconds in [moment] if LONG else moments:
                run = stack.enter_context(Run(app, "start", "-t", "0.2", *mode))
                pause(seconds)
                run.signal(signal.SIGKILL)


@both_ways
def test_kill_9_grants_the_grace_period(tmp_path, mode):
    with start(tmp_path, r"""
a: trap 'head -c 3000000 /dev/zero && touch bye.$PS; exit' TERM; echo up; sleep 300 & wait
b: trap '' HUP; (setsid sh -c 'trap "touch bye.escapee; exit" TERM; echo up; sleep 301 & wait' &) \
   ; sleep 302
c: """ + DEAF, "-t", "1", "-c", "a=2", *mode) as run:
        eventually(lambda: run.read(0.1) and run.output.count(b"| up\n") == 4)
        run.signal(signal.SIGKILL)
        began = time.monotonic()
        eventually(lambda: len(list(tmp_path.glob("bye.*"))) == 3)
        eventually(lambda: not leftovers(run.tag)[1:])    # but the unreaped procrun
        assert time.monotonic() - began >= 1


@both_ways
def test_kill_9_of_the_helper_ends_the_set(tmp_path, mode):
    with start(tmp_path, "a: sleep 300 & sleep 301\nb: (sleep 302 &) ; %s\n" % DEAF, *mode) as run:
        eventually(lambda: sleeping(run, b"30") == 3)
        os.kill(guard(run), signal.SIGKILL)
        assert run.wait() == 1
        assert run.lines("system")[-1] == b"the guard was killed"


@both_ways
def test_the_helper_holds_nothing_of_the_users(tmp_path, mode):
    # As in `procrun start | cat`: cat ends when procrun is gone, while the helper still waits.
    reading, writing = os.pipe()
    with start(tmp_path, "deaf: %s\n" % DEAF, "-t", "60", *mode, pass_fds=[writing]) as run:
        os.close(writing)
        run.expect(rb"\| up$")
        helper, leader = guard(run), pids(run)["deaf.1"]
        user = {os.readlink("/proc/self/fd/%d" % fd)
                for fd in (reading, run.process.stdout.fileno())}
        assert user <= set(opened(run.pid).values())
        assert not user & set(opened(helper).values())
        assert all(name.startswith(("pipe:", "anon_inode:", "/dev/pt") if mode
                                   else ("pipe:", "anon_inode:")) or "/libffi.so" in name
                   for name in opened(helper).values())    # libffi 3.8 keeps itself open
        assert os.readlink("/proc/%d/cwd" % helper) == "/"
        assert set(opened(leader)) == {0, 1, 2}
        run.signal(signal.SIGKILL)
        assert run.wait() == -9
        assert select.select([reading], (), (), 10)[0] and os.read(reading, 1) == b""
        assert {helper, leader} <= {pid for pid, _ in leftovers(run.tag)}
        os.killpg(leader, signal.SIGKILL)    # and the helper has nothing to wait for any more
    os.close(reading)


# Survive: terminals and stdout -------------------------------------------------------------------

@both_ways
@pytest.mark.parametrize("output", ["quiet", "noisy"])
def test_a_closed_terminal_ends_it(tmp_path, output, mode):
    with start(tmp_path, "a: trap '' HUP; sleep 300 & sleep 301\nb: %s\n" % {
            "quiet": "sleep 302", "noisy": "sleep 302 & while :; do echo noise; done"}[output],
            *mode, kind=Terminal) as run:
        run.expect(rb"(?s)started.*started")    # one that is written later would give 141
        eventually(lambda: run.read(0.01) and sleeping(run, b"30") == 3)
        run.process.stdout.close()
        run.process.stdout = None
        assert run.process.wait(20) in (129, 141)[:1 + (output == "noisy")]


@pytest.mark.parametrize("text", ["a: while :; do echo noise; done\n", "a: exec cat\n"],
                         ids=["noisy", "silent"])
def test_a_closed_reader_ends_it(tmp_path, text):
    errors = tmp_path.joinpath("errors")
    with open(str(errors), "wb") as file, start(
            tmp_path, text + "b: sleep 300 & sleep 301\n",
            preexec_fn=lambda: os.dup2(file.fileno(), 2)) as run:
        run.expect(rb"(?s)started.*started")
        eventually(lambda: run.read(0.1) and sleeping(run, b"30") == 2)
        run.process.stdout.close()
        run.process.stdout = None
        assert run.process.wait(20) == 141
    assert errors.read_bytes() == b""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_streams_closed_from_the_start_and_no_terminal(tmp_path, closed):
    with start(tmp_path, "a: ls /proc/self/fd | cat >fds; echo hello; touch done; "
                         + UNTIL_GO + "exit 7\n", start_new_session=True,
               preexec_fn=lambda: [os.close(fd) for fd in closed]) as run:
        eventually(tmp_path.joinpath("done").exists)
        assert (tmp_path / "fds").read_text() == "0\n1\n2\n3\n"    # and the one that ls opens
        assert {opened(run.pid)[fd] for fd in closed} == {"/dev/null"}
        tmp_path.joinpath("go").touch()
        assert run.wait() == 7
        assert run.lines("a.1")[1:] == ([] if 1 in closed else [b"hello", b"exited with code 7"])
        assert b"Traceback" not in run.output


def test_an_error_with_a_closed_stderr(tmp_path):
    with start(tmp_path, "wrong\n", preexec_fn=lambda: os.close(2)) as run:
        assert run.wait() == 1


def stalled(pid):
    """Whether a process that writes all the time has been waiting for a tenth of a second."""
    written = facts(pid, "io")["wchar"]
    pause(0.1)
    return (int(written) > 1000 and facts(pid, "io")["wchar"] == written
            and facts(pid)["State"] == "S")


@both_ways
def test_a_stalled_stdout_ends_with_the_grace_period_or_a_second_signal(tmp_path, mode):
    for grace in ["0.2", "60"][:1 if mode else 2]:
        app = procfile(tmp_path / grace, "a: exec yes\nb: %s\n" % DEAF)
        with Run(app, "start", "-t", grace, *mode, stdout=subprocess.PIPE) as run:
            writer = run.find(b"yes")
            eventually(lambda: stalled(writer))
            assert int(facts(run.pid)["VmHWM"]) < 64000
            eventually(lambda: idle(run))
            run.signal(signal.SIGINT)
            eventually(lambda: grace == "0.2" and run.process.poll() is not None
                       or grace == "60" and (run.signal(signal.SIGINT), pause(0.05))
                       and run.process.poll() is not None)
            assert run.process.wait() == 130


@needs_linux
def test_ctrl_s_delays_no_end(tmp_path):
    with start(tmp_path, "a: exec yes\n", "-t", "0.2", kind=Terminal) as run:
        writer = run.find(b"yes")
        run.type(b"\x13")
        eventually(lambda: stalled(writer))
        run.signal(signal.SIGTERM)
        assert run.process.wait(20) == 143


def test_the_reason_is_there_when_a_slow_reader_comes_to_it(tmp_path):
    with start(tmp_path, "a: exec seq 400000\nb: %secho no; exit 3\n" % UNTIL_GO,
               "--can-die", "a", "-t", "0.1") as run:
        writer = run.find(b"seq", b"400000")
        eventually(lambda: stalled(writer))
        tmp_path.joinpath("go").touch()
        eventually(lambda: {pid for pid, _ in leftovers(run.tag)} <= {run.pid})
        pause(1.5)    # longer than any grace period here
        assert run.wait() == 3
        assert any(line.startswith(b"b.1 exited with code 3") for line in run.lines("system"))


@both_ways_if_long
def test_a_stalled_stdout_loses_nothing(tmp_path, mode):
    with start(tmp_path, "a: seq 400000; printf end\n", *mode) as run:
        writer = run.find(b"seq", b"400000")
        eventually(lambda: stalled(writer))
        assert run.wait(30) == 0
        lines = run.lines("a.1")
        assert lines[1:-2] == [b"%d" % n for n in range(1, 400001)]
        assert lines[-2:] == [b"end", b"exited with code 0"]


# Survive: process 1, process ids, limits ---------------------------------------------------------

UNSHARE = "unshare", "--pid", "--fork", "--mount-proc"


@as_root
@needs("unshare")
@pytest.mark.parametrize("shell", [(), ("sh", "-c", '"$@"; exit $?', "sh")])
def test_a_proc_of_another_namespace(tmp_path, shell):
    """The ids in it are others.  What has left its group cannot be found then."""
    command = "unshare", "--pid", "--fork", *shell, *compiled()
    if subprocess.run([*command[:3], "true"]).returncode:
        pytest.skip("cannot make a PID namespace here")
    with start(tmp_path, "b: exec sleep 302\na: trap '' TERM; sleep 300 & setsid sleep 301 & echo up; "
               + LOOP, "-t", "0.2", python=command) as run:
        run.expect(rb"\| up$")
        inner = children(run.pid)[0]
        os.kill(children(inner)[0] if shell else inner, signal.SIGTERM)
        assert run.wait() == 143
        assert b"Traceback" not in run.output
        assert fates(run, "b.1") == [b"terminated by SIGTERM"]


@as_root
@needs("unshare", "umount")
def test_without_proc(tmp_path):
    if subprocess.run(["unshare", "--mount", "umount", "-l", "/proc"]).returncode:
        pytest.skip("cannot unmount /proc here")
    status, out, errors = ask(procfile(tmp_path, "a: echo up\n"), "start", command=[
        "unshare", "--mount", "sh", "-c", 'umount -l /proc; exec "$@"', "sh", *compiled()])
    assert (status, out) == (1, b"") and re.fullmatch(rb"procrun: [^\n]*/proc[^\n]*\n", errors)


def test_zombies_from_before(tmp_path):
    shell = "sh", "-c", 'true & true & exec "$@"', "sh"
    with start(tmp_path, "a: echo up; sleep 300\n", python=(*shell, *compiled())) as run:
        run.expect(rb"\| up$")
        eventually(lambda: len(children(run.pid)) == 1)
        run.end("TERM")


def test_process_1_of_a_container(tmp_path):
    require_root_and(*UNSHARE, "nsenter", "-t", "1", "-p", "true")
    app = procfile(tmp_path, "a: for i in 1 2 3; do (setsid sh -c 'exit 3' &) ; done;"
                             " echo up; sleep 300\n")
    with Run(app, "start",
             executable=wrapper(app, 'exec %s "$PYTHON" "$@"' % " ".join(UNSHARE))) as run:
        run.expect(rb"\| up$")
        [inner] = children(run.pid)
        with open("/proc/%d/status" % inner) as file:
            assert re.search(r"^NSpid:.*\t1$", file.read(), re.MULTILINE)

        eventually(lambda: children(children(inner)[0]) and len(children(children(inner)[0])) == 1)
        known = set(children(inner))
        subprocess.check_call(["nsenter", "-t", str(inner), "-p", "-m", "sh", "-c",
                               "cd '%s'; (%s exit 3) & :" % (app, UNTIL_GO)],
                              stdout=subprocess.DEVNULL)
        eventually(lambda: set(children(inner)) > known)     # a stranger, whose parent has gone
        app.joinpath("go").touch()
        eventually(lambda: set(children(inner)) == known)    # it was reaped
        assert run.process.poll() is None and b"exited" not in run.output
        os.kill(inner, signal.SIGTERM)
        assert run.wait() == 143


def test_a_signal_to_process_1_is_not_lost_while_it_starts(tmp_path):
    require_root_and(*UNSHARE, "true")
    os.mkfifo(str(tmp_path / "fifo"))
    with Run(tmp_path, "start", "-f", "fifo", executable=wrapper(
            tmp_path, 'exec %s "$PYTHON" "$@"' % " ".join(UNSHARE))) as run:
        with open(str(tmp_path / "fifo"), "wb") as file:    # it reads by now
            os.kill(children(run.pid)[0], signal.SIGTERM)
            file.write(b"a: exec sleep 300\n")
        assert run.wait() == 143
    mask = ask(tmp_path, "run", "grep", "SigBlk", "/proc/self/status",
               command=[*UNSHARE, *compiled()])[1]
    assert re.fullmatch(rb"SigBlk:\s0+\n", mask), mask


@pytest.mark.parametrize("name, status", [("TERM", 143), ("USR1", 0), ("KILL", 137)])
def test_an_id_that_was_reaped_is_never_signalled(tmp_path, name, status):
    # In a namespace where the id of the next process can be chosen, a stranger gets a.1's.
    require_root_and(*UNSHARE, "test", "-w", "/proc/sys/kernel/ns_last_pid")
    app = procfile(tmp_path, "a: exit 0\nb: trap 'exit 0' USR1; sleep 300 & wait\n")
    app.joinpath("init").write_text("""
        "$@" & run=$!
        until [ -s reuse ]; do sleep 0.02; done
        read pid <reuse
        helper=$(cut -d' ' -f1 /proc/$run/task/$run/children)
        echo $((pid - 1)) >/proc/sys/kernel/ns_last_pid
        setsid sleep 301 & stranger=$!
        echo "a stranger has $stranger"
        until grep -q sleep /proc/$stranger/comm; do sleep 0.02; done
        kill -s %s $run
        wait $run; status=$?
        while kill -0 $helper 2>/dev/null; do sleep 0.02; done
        kill -0 $stranger && echo spared
        exit $status
    """ % name)
    with Run(app, "start", "-t", "0.2", "--can-die", "a", executable=wrapper(
            app, 'exec %s sh ./init "$PYTHON" "$@"' % " ".join(UNSHARE))) as run:
        run.expect(rb"a\.1 +\| exited with code 0$")
        app.joinpath("new").write_text("%d\n" % pids(run)["a.1"])
        app.joinpath("new").rename(app.joinpath("reuse"))
        assert run.wait() == status
        assert b"a stranger has %d\n" % pids(run)["a.1"] in run.output
        assert b"spared\n" in run.output


def complaint(run):
    """The one line that procrun complained with."""
    [line] = re.findall(rb"^procrun: (.*)$", run.output, re.MULTILINE)
    assert b"Traceback" not in run.output
    return line.decode()


@pytest.mark.parametrize("limit, message", [
    (1, "Resource temporarily unavailable"), (2, "a.1: cannot start: Resource temp"),
    (4, "a.3: cannot start: Resource temp")])
def test_fork_failure(tmp_path, limit, message):
    # As a user of whom there is no other process, but one who may read every file.
    become = ("setpriv --reuid=%d --clear-groups --inh-caps=-all,+dac_override "
              "--ambient-caps=-all,+dac_override" % (100000 + 10 * os.getpid() + limit))
    require_root_and(*become.split(), "true")
    with start(tmp_path, "a: exec sleep 300\n", "-c", "a=5", executable=wrapper(
            tmp_path, 'exec %s "$PYTHON" "$@"' % become), preexec_fn=lambda: resource.setrlimit(
                resource.RLIMIT_NPROC, (limit, limit))) as run:
        assert run.wait() == 1
        assert message in run.output.decode() and b"Traceback" not in run.output


@pytest.mark.parametrize("text, env, name", [
    ("a: sleep 300\nb: : " + "x" * 200000, "", "b.1"),
    ("a: sleep 300\n", "A=" + "x" * 200000, "a.1")], ids=["long command", "long value"])
def test_exec_failure(tmp_path, text, env, name):
    with Run(procfile(tmp_path, text, env), "start") as run:
        assert run.wait() == 126
        assert b"procrun: cannot start: Argument list too long" in run.lines(name)


@pytest.mark.parametrize("limit", [16, 24])
def test_too_few_fds(tmp_path, limit):
    with start(tmp_path, "a: exec sleep 300\n", "-c", "a=60",
             preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))) as run:
        assert run.wait() == 1
        assert complaint(run)


@both_ways
def test_many_processes(tmp_path, mode):
    count = 600 if LONG else 110
    with start(tmp_path, "a: echo $(ulimit -Sn) $(ulimit -Hn) up; exec sleep 300\n",
               "-m", "a=%d" % count, *mode, preexec_fn=lambda: resource.setrlimit(
                   resource.RLIMIT_NOFILE, (100, 4096))) as run:
        eventually(lambda: run.read(0.1) and run.output.count(b" up\n") == count, 30)
        assert run.output.count(b"| 100 4096 up\n") == count
        eventually(lambda: sleeping(run, b"300") == count)    # none is on its way there any more
        run.signal(signal.SIGTERM)
        assert run.wait(30) == 143
        assert run.output.count(b"| terminated by SIGTERM\n") == count


# Stopping: first the program, then what it leaves ------------------------------------------------

PREFORK = r"""
import os, signal, sys, time
told = []
pids = []
for number in range(3):
    pid = os.fork()
    if not pid:
        if "session" in sys.argv:
            os.setsid()
        signal.signal(signal.SIGTERM, lambda *_: (print("too early", flush=True), os._exit(1)))
        signal.signal(signal.SIGUSR1, lambda *_: (print("worker told", flush=True), os._exit(0)))
        while True:
            time.sleep(0.05)    # pause() could miss a signal
    pids.append(pid)
def end(*_):
    signal.signal(signal.SIGTERM, lambda *_: print("twice", flush=True))
    print("parent asked", flush=True)
    time.sleep(1 if os.isatty(1) else 0.3)
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
        os.waitpid(pid, 0)
    print("parent done", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGHUP, lambda *_: print("hung up", flush=True))
print("up", flush=True)
while True:
    time.sleep(0.05)
"""
PREFORKED = [b"parent asked", b"parent done"] + [b"worker told"] * 3
SAVING = "trap 'sleep 0.5; echo saved; exit' TERM; echo up; " + LOOP
PART = "sh -c 'trap \"echo %s >&2; exit\" TERM; echo up >&2; " + LOOP + "'"


@pytest.mark.parametrize("command", [
    "echo up; exec sleep 300", "echo up; cat; echo never",
    "PATH=%s$PATH; echo up; exec sleep 300" % ("/none:" * 10000)], ids=["exec", "run", "search"])
def test_a_sigterm_right_after_a_line_is_not_lost(tmp_path, command):
    """The shell has noted it when a program replaces it, which it may have to look for in many
    places, or when it starts one and waits."""
    app = procfile(tmp_path, "a: %s\n" % command)
    for _ in range(100 if LONG else 2):
        with Run(app, "start", "-c", "a=40", "-t", "60") as run:
            eventually(lambda: run.read(0.1) and run.output.count(b"| up\n") > 30)
            run.end()
            assert b"never" not in run.output


@needs_linux
@pytest.mark.parametrize("command, args, expected", [
    ("PROGRAM", "", PREFORKED),
    ("cd . && PROGRAM", "", PREFORKED),
    ("cd . && exec PROGRAM", "", PREFORKED),
    ("A=1 PROGRAM", "", PREFORKED),
    ("cd . && PROGRAM", "--pty", PREFORKED),
    ("PROGRAM; echo never", "--pty", PREFORKED),
    ("sh run.sh", "", PREFORKED),    # without exec
    ("PROGRAM session", "", PREFORKED),    # as rq
    ("%s | %s" % (PART % "left", PART % "right"), "", [b"left", b"right"]),
    ("PROGRAM 2>&1 | cat", "", PREFORKED),
    ("(%s) & exec sleep 300" % SAVING, "", [b"saved"]),
    ("(%s) & exec sleep 300" % SAVING, "--pty", [b"saved"]),    # as npm
    ("sh run.sh", "--pty", PREFORKED),
    pytest.param("exec bash -mc 'PROGRAM; :'", "--pty", PREFORKED, marks=needs("bash")),
    ("trap '' HUP; (setsid sh -c '%s' &) ; exec sleep 300" % SAVING.replace("'", '"'), "",
     [b"saved"]),
    ("setsid --wait sh -c '%s'" % SAVING.replace("'", '"'), "", [b"saved"]),
    ("trap 'exec %s -S save.py' TERM; echo up; %s" % (PYTHON, LOOP), "", [b"saved"]),
], ids="exec cd cd-exec assignment cd-pty list-pty script session pipeline tee leader-gone "
       "leader-gone-pty script-pty job-control daemon setsid trap-that-execs".split())
def test_the_program_is_asked_first_and_then_what_it_leaves(tmp_path, command, args, expected):
    tmp_path.joinpath("prefork.py").write_text(PREFORK)
    tmp_path.joinpath("save.py").write_text("import time; time.sleep(0.5); print('saved')\n")
    program = PYTHON + " -S prefork.py"
    tmp_path.joinpath("run.sh").write_text(program + "\necho never\n")
    with start(tmp_path, "a: %s\n" % command.replace("PROGRAM", program),
               "-t", "20", *args.split()) as run:
        count = 2 if "left" in command else 1
        eventually(lambda: run.read(0.05) and run.output.count(b"| up\n") == count)
        eventually(lambda: sleeping(run, b"300") == command.count("exec sleep"))
        run.signal(signal.SIGTERM)
        assert run.wait(20) == 143
        said = [line for line in run.lines("a.1") if not re.match(
            b"(up|Terminated)?$|started with|exited with|terminated by", line)]
        assert sorted(said) == sorted(expected)


@needs_linux
def test_the_deaf_one_is_named(tmp_path):
    """Behind a shell that is not deaf, and as a daemon."""
    with start(tmp_path, "a: sh -c '%s'; :\n"
                         "b: (setsid sh -c '%s' &) ; exec sleep 300\n" % (
                                 (DEAF.replace("'", '"'),) * 2), "-t", "60") as run:
        eventually(lambda: run.read(0.05) and run.output.count(b"| up\n") == 2)
        run.signal(signal.SIGTERM)
        run.expect(rb"\| waiting for a\.1, process \d+ \(sh\) \(SIGKILL")
        insist(run, signal.SIGINT)
        assert run.wait() == 143


# Survive: signals and statuses -------------------------------------------------------------------

def test_nohup_keeps_its_meaning(tmp_path):
    with start(tmp_path, "a: trap 'echo usr1' USR1; grep SigIgn: /proc/self/status; echo up;"
                         " while :; do sleep 0.02; done\n", preexec_fn=lambda: signal.signal(
            signal.SIGHUP, signal.SIG_IGN)) as run:
        run.expect(rb"\| up$")
        ignored = int(run.expect(rb"a\.1 +\| SigIgn:\t(\w+)$")[1], 16)
        assert ignored & OWN_SIGNALS == 1 << signal.SIGHUP - 1
        run.signal(signal.SIGHUP)
        run.signal(signal.SIGUSR1)
        run.expect(rb"a\.1 +\| usr1$")
        run.end("TERM")
        assert b"SIGHUP" not in run.output


def test_without_a_subreaper_the_end_is_seen_at_once(tmp_path):
    """As on macOS: nothing says that a leader's group has ended, but it is asked."""
    with start(tmp_path, "a: sleep 300 & exec sleep 301\nb: exec sleep 302\n", "-t", "60",
               python=patched("procrun.become_subreaper = bool")) as run:
        eventually(lambda: run.read(0.05) and sleeping(run, b"30") == 3)
        run.signal(signal.SIGINT)
        assert run.wait(40) == 130    # process 1 may take its time to reap what it gets


@needs_linux
def test_a_start_that_somebody_stops_is_begun_again(tmp_path):
    text = ("hold = procrun.hold_session\n"
            "def stopped_once(*args):\n"
            "    if not os.path.exists('%s'):\n"
            "        open('%s', 'w').close()\n"
            "        os.kill(os.getpid(), 19)\n"
            "    hold(*args)\n"
            "procrun.hold_session = stopped_once" % (tmp_path / "once", tmp_path / "once"))
    with start(tmp_path, "a: echo up; exec sleep 301\n", "--pty", "-t", "60",
               python=patched(text)) as run:
        run.expect(rb"a\.1 +\| up$")
        run.end()
        assert tmp_path.joinpath("once").exists() and fates(run, "a.1")[0][:10] == b"terminated"


def test_the_guard_holds_no_orders_where_open_files_are_not_listed(tmp_path):
    """As on FreeBSD, whose /dev/fd shows 0 to 2 alone."""
    text = ("listed = os.listdir\n"
            "os.listdir = lambda path: ['0', '1', '2'] if path == '/dev/fd' else listed(path)")
    with start(tmp_path, "a: echo up; exec sleep 301\n", python=patched(text)) as run:
        run.expect(rb"\| up$")
        run.signal(signal.SIGKILL)    # the guard sees the end of the orders


@both_ways
def test_a_pause_of_the_reader_tears_no_line_and_starves_nobody(tmp_path, mode):
    """What looks like an unfinished line then is one whose rest procrun has not read."""
    with start(tmp_path, "a: exec yes %s\nb: exec yes %s\n" % ("a" * 70, "b" * 70),
               "--no-timestamp", *mode) as run:
        for _ in range(3):
            size = len(run.output) + 2500000
            eventually(lambda: run.read(1) and len(run.output) > size)
            eventually(lambda: all(map(stalled, pids(run).values())))
            pause(0.25)
        lines = [line for line in run.output.split(b"\n")[:-1] if b"started" not in line]
        run.process.kill()
        assert {b"a.1    | " + b"a" * 70, b"b.1    | " + b"b" * 70} == set(lines)
        assert min(lines.count(line) for line in set(lines)) > len(lines) / 10


def test_a_stalled_terminal_hangs_no_error(tmp_path):
    app = procfile(tmp_path, "web : x\n" * 90)
    ours, theirs = os.openpty()
    os.set_blocking(theirs, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(theirs, b"x" * 100)
    os.set_blocking(theirs, True)
    while not select.select((), (theirs,), (), 0)[1]:
        os.read(ours, 1)
    with subprocess.Popen([*compiled(), "check"], cwd=str(app), stderr=theirs) as process:
        try:
            assert process.wait(20) == 1
        finally:
            process.kill()
    os.close(ours), os.close(theirs)


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=needs_linux)])
def test_the_reader_at_a_socket_goes(tmp_path, full):
    """With a reset; or it shuts the socket down, which takes nothing more, but does not close it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))    # a reset
    if full:
        ours.close(), theirs.close()
        ours, theirs = socket.socketpair()
    with start(tmp_path, "a: %sexec yes\n" % UNTIL_GO, stdout=ours.fileno()) as run:
        guard(run), full or theirs.close(), tmp_path.joinpath("go").touch()
        if full:
            eventually(lambda: not select.select((), (ours,), (), 0)[1])
            theirs.shutdown(socket.SHUT_RDWR)
        assert run.process.wait(20) == 141
    ours.close(), theirs.close()


def test_output_that_is_lost_in_the_end_is_a_failure(tmp_path):
    app = procfile(tmp_path, "a: trap 'seq 1 100000; exit 0' TERM; touch up; " + LOOP + "\n"
                             "b: " + UNTIL % "up" + "; exit 0\n")
    with open(str(tmp_path / "log"), "wb") as log:
        status, _, errors = ask(app, "start", stdout=log, preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (100000, 100000)))
    assert (status, errors) == (1, b"procrun: cannot write the output: File too large\n")


def test_python_has_nothing_to_warn_of(tmp_path):
    with start(tmp_path, "a: echo up\n", env={"PYTHONDEVMODE": "1"}) as run:
        assert run.wait() == 0
        assert b"Warning" not in run.output


@needs_linux
def test_the_guard_is_small_and_no_signal_but_sigkill_ends_it(tmp_path):
    with start(tmp_path, "a: exec sleep 300\n", "-c", "a=10") as run:
        eventually(lambda: run.read(0.1) and sleeping(run, b"300") == len(pids(run)) == 10)
        memory = facts(guard(run), "smaps_rollup")    # 2.8 MB on 3.11, more on 3.15
        assert int(memory["Private_Clean"]) + int(memory["Private_Dirty"]) < 4096
        for number in set(range(1, 32)) - {signal.SIGKILL, signal.SIGSTOP}:
            os.kill(guard(run), number)
        run.end()
        assert fates(run, "a.1") == [b"terminated by SIGTERM"]


DOUBLED = """
import ctypes, sys
def strings(*values):
    return (ctypes.c_char_p * (len(values) + 1))(*values, None)
ctypes.CDLL(None).execve(sys.argv[1].encode(), strings(*[each.encode() for each in sys.argv[1:]]),
    strings(b"PORT=1", b"PORT=2", b"PS=1", b"PS=2", b"A=1", b"A=2", b"B=1", b"B=2", b"=", b"C"))
"""


@pytest.mark.parametrize("command", ["start", "run web"])
def test_variables_that_are_there_twice(tmp_path, command):
    """A shell would take the last one, putenv() replaces the first."""
    procfile(tmp_path, "web: echo $PORT $PS $A $B\n", "A=3\n")
    status, out, errors = ask(tmp_path, *command.split(), command=(
        sys.executable, "-c", DOUBLED, sys.executable, PROCRUN))
    assert (status, errors) == (0, b"")
    assert re.search(rb"^(.*\| )?1 web\.1 3 1$", out, re.MULTILINE), out


@both_ways
def test_a_signal_is_not_lost_at_any_moment_of_the_start(tmp_path, mode):
    app = procfile(tmp_path, "a: exec sleep 300\n")
    for moment in range(400 if LONG else 6):
        number = (signal.SIGINT, signal.SIGTERM)[moment % 2]
        with Run(app, "start", "-c", "a=10", *mode) as run:
            eventually(lambda: awake(run))
            pause(moment / (5000 if LONG else 200))
            run.signal(number)
            assert run.wait() == 128 + number
            assert run.output.count(b"received, shutting down") == 1
            assert b"SIGKILL" not in run.output
            assert all(len(fates(run, name)) == 1 for name in pids(run))


@both_ways
def test_a_signal_to_a_child_between_fork_and_exec_is_the_childs_alone(tmp_path, mode):
    with start(tmp_path, "a: exec sleep 300\n", "-c", "a=40", *mode) as run:
        helper = guard(run)
        # The first child under a PTY is the one that holds its session.
        hit = eventually(lambda: children(helper)[len(mode):])[0]
        os.kill(hit, signal.SIGINT)
        assert run.wait() == 130
        assert b"SIGINT received" not in run.output
        assert [fates(run, name) for name, pid in pids(run).items() if pid == hit] == [
            [b"terminated by SIGINT"]]


ENDINGS = {
    "exit 0": b"exited with code 0", "exit 7": b"exited with code 7",
    "kill -9 $$": b"terminated by SIGKILL", "kill -15 $$": b"terminated by SIGTERM",
    "nosuchcommand": b"exited with code 127"}


@pytest.mark.parametrize("how", ["INT", "crash"])
def test_the_exit_status_is_that_of_what_began_the_end(tmp_path, how):
    text = "a: trap 'trap - TERM; %s; exit $?' TERM; echo up; sleep 300 & wait\n" \
           "b: " + UNTIL_GO + "exit 3\n"
    with contextlib.ExitStack() as stack:
        runs = []
        for number, ending in enumerate(ENDINGS):
            app = procfile(tmp_path / str(number), text % ending)
            runs.append((app, ending, stack.enter_context(Run(app, "start", "-t", "20"))))
        for app, ending, run in runs:
            run.expect(rb"\| up$")
            status = begin(run, app, how)
            assert run.wait() == status, ending
            assert fates(run, "a.1") == [ENDINGS[ending]]


@both_ways
@pytest.mark.parametrize("seed", range(100 if LONG else 2))
def test_a_storm_of_signals(tmp_path, seed, mode):
    chance, calm = random.Random(seed), ["CHLD", "WINCH", "CONT"]
    sink = tmp_path.joinpath("output")
    app = procfile(tmp_path, "a: trap : USR1; echo up; while :; do seq 300; sleep 0.01; done\n")
    with open(str(sink), "wb") as file, Run(app, "start", "-c", "a=3", *mode, **(
            {} if seed % 2 else {"stdout": file, "preexec_fn": lambda: os.dup2(1, 2)})) as run:
        def storm(names, count):
            for _ in range(count * (5 if LONG else 1)):
                run.read(chance.random() / 500) if seed % 2 else pause(chance.random() / 500)
                run.signal(getattr(signal, "SIG" + chance.choice(names)))

        def seen():
            run.output += sink.read_bytes()[len(run.output):]
            return run.output
        eventually(lambda: awake(run))
        storm(calm, 50)
        eventually(lambda: not storm(calm, 1) and seen().count(b"| up\n") == 3)
        storm(calm + ["USR1"], 50)
        assert b"shutting down" not in seen() and not fates(run, "a.1")
        storm(calm + ["USR1", "INT", "TERM"], 100)
        assert run.wait() in (130, 143)
        assert seen().count(b"shutting down") == 1 and b"Traceback" not in run.output
        # A third Ctrl-C means that a reader who is late is not waited for any more.
        told = {len(fates(run, "a.%d" % n)) for n in (1, 2, 3)}
        assert told == {1} if not seed % 2 else told <= {0, 1}


@as_root
@needs("setpriv")
def test_another_users_process_is_given_up(tmp_path):
    unable = "setpriv", "--bounding-set=-kill", "--inh-caps=-kill"
    with start(tmp_path, "web: exec setpriv --reuid=65534 --clear-groups sleep 300\n",
               "-t", "0.2", python=[*unable, *compiled()]) as run:
        pid = run.find(b"sleep", b"300")
        run.end("INT")
        run.expect(rb"cannot end web\.1$")
        os.kill(pid, signal.SIGKILL)


# Lose nothing ------------------------------------------------------------------------------------

@both_ways
def test_the_last_lines_come_before_the_exit(tmp_path, mode):
    expected = [b"%d" % n for n in range(1, 20001)] + [b"a", b"b", b"exited with code 0"]
    app = procfile(tmp_path, "a: seq 20000; printf 'a\\nb'\n")
    for _ in range(250 if LONG else 2):    # of four at a time: both cores are busy
        with Run(app, "start", "-c", "a=4", "--can-die", "a", *mode) as run:
            assert run.wait(30) == 0
            for n in (1, 2, 3, 4):
                assert run.lines("a.%d" % n)[1:] == expected


@both_ways
def test_the_last_lines_from_a_sigterm_handler(tmp_path, mode):
    with start(tmp_path, "a: trap 'seq 50000; exit' TERM; echo up; sleep 300 & wait\n"
                         "b: " + UNTIL_GO + "exit 3\n", "-t", "30", "-c", "a=2", *mode) as run:
        eventually(lambda: run.read(0.1) and run.output.count(b"| up\n") == 2)
        tmp_path.joinpath("go").touch()
        assert run.wait(30) == 3
        for name in ("a.1", "a.2"):
            lines = run.lines(name)
            assert lines[2:-1] == [b"%d" % n for n in range(1, 50001)]
            assert lines[-1].startswith(b"exited with code")


COPY = """
import os, random, select, sys
chance, data = random.Random(sys.argv[1]), open("data", "rb").read()
while data:
    size = int(2 ** (chance.random() * 14))
    while size and data:
        size, data = 0, data[os.write(1, data[:size]):]
    quiet = 0.25 if chance.randrange(200) == 0 else 0    # long enough for a piece to be shown
    select.select((), (), (), chance.choice([0, 0, 0, 0.001, 0.002, quiet]))
"""


@both_ways
def test_any_bytes_in_any_chunks_are_passed_as_they_are(tmp_path, mode):
    with contextlib.ExitStack() as stack:
        runs = []
        for seed in range(100 if LONG else 2):
            chance, app = random.Random(seed), tmp_path / str(seed)
            awkward = b"\n\n\r\0\t \x1b[m|\xc3\xa9\xff"
            data = bytes(chance.choices(awkward * 20 + bytes(range(256)), k=50000)) + b"."
            procfile(app, "a: %s -S copy.py %d\n" % (PYTHON, seed))
            app.joinpath("data").write_bytes(data)
            app.joinpath("copy.py").write_text(COPY)
            runs.append((data, stack.enter_context(Run(app, "start", *mode))))
        for data, run in runs:
            assert run.wait(60) == 0
            assert b"\n".join(run.lines("a.1")[1:-1]) == data


def test_a_line_of_50_megabytes_takes_little_memory(tmp_path):
    size, path = 50000000, tmp_path.joinpath("output")
    text = "a: head -c %d /dev/zero | tr '\\0' x; echo; touch done; sleep 300\n" % size
    with open(str(path), "wb") as file, start(tmp_path, text, stdout=file) as run:
        eventually(tmp_path.joinpath("done").exists, 60)
        eventually(lambda: path.stat().st_size > size)
        assert int(facts(run.pid)["VmHWM"]) < 40000
        run.end()
    [line] = [line for line in path.read_bytes().split(b"\n") if b"| x" in line]
    assert line.partition(b"| ")[2] == b"x" * size


@both_ways
def test_a_child_that_closed_its_output_costs_no_cpu(tmp_path, mode):
    with start(tmp_path, "a: exec <&- >&- 2>&-; touch closed; exec sleep 300\n"
                         "b: (setsid sleep 301 >/dev/null 2>&1 &); exit 0\n",
               "--can-die", "b", *mode) as run:
        run.expect(rb"b\.1 +\| exited with code 0$")
        eventually(tmp_path.joinpath("closed").exists)
        eventually(lambda: idle(run))
        run.end()
        assert fates(run, "a.1") == [b"terminated by SIGTERM"]


# Let no one in -----------------------------------------------------------------------------------

def test_nothing_is_listening_written_or_shown(tmp_path):
    places = tmp_path / "temporary"
    places.mkdir()
    app = procfile(tmp_path / "app", "a: echo up; sleep 300\nb: sleep 301\n",
                   "A=hunter2\nB='hunter2\nhunter2'\n")
    with Run(app, "start", env={"TMPDIR": str(places), "C": "hunter2"}) as run:
        run.expect(rb"\| up$")
        eventually(lambda: sleeping(run, b"30") == 2)
        for pid in (run.pid, guard(run)):
            assert not [name for name in opened(pid).values()
                        if not re.match("pipe:|anon_inode:|/dev/null|/dev/p|.*/libffi.so", name)]
        assert not [command for _, command in leftovers(run.tag) if b"hunter2" in command]
        run.end()
        assert b"hunter2" not in run.output
        assert not list(places.iterdir())
        assert sorted(path.name for path in app.iterdir()) == [".env", "Procfile"]


@pytest.mark.parametrize("file", ["Procfile", ".env"])
@pytest.mark.parametrize("text", [b"", noise(1000000), b"a=x: " + b"x" * 10000000],
                         ids="NULs noise line".split())
def test_100_megabytes_are_an_error(tmp_path, file, text):
    app = procfile(tmp_path, "a: sleep 300\n")
    app.joinpath(file).write_bytes(text)
    os.truncate(str(app.joinpath(file)), 100000000)    # the rest is NULs
    with Run(app, "start") as run:
        assert run.wait(20) == 1 and complaint(run)
        assert len(run.output) < 1000


# Soak --------------------------------------------------------------------------------------------

@both_ways_if_long
def test_a_long_run_leaks_nothing(tmp_path, mode):
    turns, states = 400 if LONG else 12, []
    with start(tmp_path, "a: n=0; while :; do until [ -e $n ]; do sleep 0.01; done; seq 5000;"
                         " for i in 1 2 3 4 5 6 7 8; do (setsid true >/dev/null 2>&1 &); done;"
                         " echo turn $n is over; n=$((n+1)); done\n", *mode) as run:
        for n in range(turns):
            tmp_path.joinpath(str(n)).touch()
            eventually(lambda: run.read(0.1) and b"| turn %d is over" % n in run.output[-20000:])
            eventually(lambda: len(children(guard(run)) + children(run.pid)) == 2)
            states.append([(len(opened(pid)), int(facts(pid)["VmRSS"]))
                           for pid in (run.pid, guard(run))])
        for (fds, memory), (fds_then, memory_then) in zip(states[-1], states[turns // 4]):
            assert fds == fds_then and memory - memory_then < 1024, states
        run.end()


# Terminals ---------------------------------------------------------------------------------------

class Terminal(Run):
    """procrun on a terminal of its own, of which we hold the other side: screen and keyboard."""

    def __init__(self, folder, *args, size=(24, 80), prepare=lambda: None, **options):
        self.keyboard, slave = os.openpty()
        self.resize(*size)
        self.before = self.modes()
        super().__init__(folder, *args, env={"NO_COLOR": "1", "TERM": "xterm"}, stdout=slave,
                         start_new_session=True, preexec_fn=lambda: (
                             fcntl.ioctl(1, termios.TIOCSCTTY, 0), os.dup2(1, 0), os.dup2(1, 2),
                             prepare()), **options)
        os.close(slave)
        self.process.stdout = open(self.keyboard, "rb", buffering=0)

    def read(self, seconds):
        """As Run; the end is EIO here, and each line ends in CR LF."""
        try:
            return super().read(seconds)
        except OSError:
            return False
        finally:
            self.output = self.output.replace(b"\r\n", b"\n")

    def type(self, keys):
        """Press keys."""
        os.write(self.keyboard, keys)

    def resize(self, rows, columns):
        """Give the window another size."""
        fcntl.ioctl(self.keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def modes(self):
        """What stty shows."""
        return termios.tcgetattr(self.keyboard)


class Screen(Run):
    """A real terminal (tmux) and a shell in it, typed at and looked at as a person does."""

    def __init__(self, folder, shell="sh -i"):
        self.folder = folder
        super().__init__(folder, "run", "tmux", "-S", "tmux", "-f", os.devnull, "new-session",
                         "-d", "-x", "80", "-y", "24", shell, env={"ENV": "", "TMUX": ""})
        assert self.wait() == 0, self.output

    def __exit__(self, *exception):
        self.tmux("kill-server")
        super().__exit__(*exception)

    def tmux(self, *command):
        """What tmux answers."""
        return subprocess.run(["tmux", "-S", "tmux", *command], cwd=str(self.folder), check=True,
                              stdout=subprocess.PIPE).stdout.decode()

    def start(self, *args):
        """Type the command that starts procrun."""
        self.shows(SHELL)
        self.type(" ".join(["clear;", sys.executable, PROCRUN, "start", *args]), "Enter")

    def type(self, text, *keys):
        """Type text, then press keys by their names."""
        self.tmux("send-keys", "-l", text)
        if keys:
            self.tmux("send-keys", *keys)

    def text(self, *options):
        """What stands on the screen."""
        return self.tmux("capture-pane", "-p", *options).rstrip("\n")

    def shows(self, pattern):
        """Wait until the screen matches."""
        try:
            return eventually(lambda: re.search(pattern, self.text(), re.MULTILINE))
        except AssertionError:
            raise AssertionError("%s is not on the screen:\n%s" % (pattern, self.text()))


SHELL = r"^\S*[$#]\Z"
ALONE = dict(start_new_session=True)    # no terminal at all, not even a controlling one


# -- start --pty

def test_pty_is_the_controlling_terminal_of_each(tmp_path):
    with start(tmp_path, "web: test -t 1 && test -t 2 && readlink /proc/$$/fd/1;"
                         " echo by name >/dev/tty\n", "--pty", "-c", "web=2",
               "--can-die", "web", **ALONE) as run:
        assert run.wait() == 0
        outputs = [run.lines(name)[1:-1] for name in ("web.1", "web.2")]
        assert [each[1:] for each in outputs] == [[b"by name"]] * 2
        assert outputs[0][0] != outputs[1][0]


def test_pty_output_is_one_ordered_stream_and_told_before_the_exit(tmp_path):
    with start(tmp_path, "web: for i in 1 2 3; do echo o$i; echo e$i >&2; done; seq 20000;"
                         " printf 'cr\\r\\n\\n\\tlast '; exit 3\n", "--pty", **ALONE) as run:
        assert run.wait() == 3
        assert run.lines("web.1")[1:] == [
            b"o1", b"e1", b"o2", b"e2", b"o3", b"e3", *(b"%d" % n for n in range(1, 20001)),
            b"cr\r", b"", b"\tlast ", b"exited with code 3"]
        assert run.output.count(b"\r") == 1


@pytest.mark.parametrize("args, columns", [
    (["--pty", "web"], 82), (["--pty", "web", "--no-timestamp"], 91),
    (["--pty", "web", "--no-prefix"], 100), (["--pty", "-c", "web-server=10"], 75),
])
def test_window_size_is_the_terminal_less_the_prefix(tmp_path, args, columns):
    with start(tmp_path, "web: trap 'stty size </dev/tty' WINCH; stty size </dev/tty; %s\n"
                         "web-server: sleep 300\n" % LOOP,
               *args, kind=Terminal, size=(30, 100)) as run:
        run.expect(rb"(^|\| )30 %d$" % columns)
        run.resize(40, 120)
        run.expect(rb"(^|\| )40 %d$" % (columns + 20))
        run.end("TERM")


@pytest.mark.parametrize("given, expected", [("TERM=vt100", b"vt100"), ("-uTERM", b"dumb")])
def test_size_and_type_of_a_pty_without_a_terminal(tmp_path, given, expected):
    """Even where procrun is slower than its process."""
    slow = patched("procrun.port_taken = lambda port: procrun.select.select((), (), (), 0.1)")
    app = procfile(tmp_path, "web: stty size </dev/tty;"
                             " env | sed -n s/^TERM=/is=/p\n")    # a shell may set its own
    with Run(app, "run", "env", given, *slow, "start", "--pty", **ALONE) as run:
        assert run.wait() == 0
        assert run.lines("web.1")[1:3] == [b"24 80", b"is=" + expected]


@pytest.mark.parametrize("args, terminal, lines", [
    ("--color never", False, [b"red", b"\033[Kb\033["]),
    ("--color never --pty", False, [b"red", b"\033[Kb\033["]),
    ("--pty", False, [b"\033[31mred\033[m", b"\033[Kb\033["]),
    ("--color always", True, [b"\033[31mred\033[m", b"\033[Kb"]),
    ("--pty", True, [b"red", b"\033[Kb"])])
def test_what_is_taken_out_goes_by_colour_and_terminal(tmp_path, args, terminal, lines):
    options = {"kind": Terminal} if terminal else ALONE    # NO_COLOR is set there
    with start(tmp_path, "web: printf '\\033[31mred\\033[m\\n\\033[Kb\\033['\n",
               "--no-timestamp", *args.split(), **options) as run:
        assert run.wait() == 0
        for line in lines:
            run.expect(rb"^(\033\[36m)?web\.1  \| (\033\[0m)?" + re.escape(line) + b"$")


@needs("tmux")
def test_who_clears_the_screen_takes_nothing_from_others(tmp_path):
    """On a real terminal, which would type its answers into the shell; by a pipe and by a PTY."""
    lines = [b"<%d" % n + sequence + b">" for n, sequence in enumerate(TAKEN_OUT)]
    tmp_path.joinpath("taken").write_bytes(b"".join(line + b"\n" for line in lines))
    app = procfile(tmp_path, "a: echo kept; printf kept; cat\nb: " + UNTIL_GO
                   + "cat taken; printf 'one\\r\\033[Ktwo\\b\\b\\b\\bT\\033[2K\\rthree"
                   "\\033[1Gt\\033[9GX\\b\\b\\b!\\n'; cat\n")
    for options in [], ["--pty"]:
        with Screen(app) as screen:
            screen.start("--no-timestamp", *options)
            screen.shows(r"^a\.1    \| kept\n(.*\n)*a\.1    \| kept$")
            app.joinpath("go").touch()
            screen.shows(r"^b\.1    \| three   !$")
            screen.type("", "C-c")
            screen.shows(SHELL)
            shown = screen.text("-S", "-")
            assert re.findall(r"^b\.1    \| (<\d+.*)$", shown, re.MULTILINE) == [
                "<%d>" % n for n in range(len(TAKEN_OUT))]
            assert len(re.findall(r"^a\.1    \| kept$", shown, re.MULTILINE)) == 2
            assert all(re.match(r"a\.1    \| |b\.1    \| |(\^C)?system \| ", line)
                       for line in shown.split("\n")[1:-1])
        app.joinpath("go").unlink()


# -- attach

DEBUGGED = """
def area(w, h):
    breakpoint()
    return w * h
print("result", area(3, 4))
"""
TICKS = "clock: i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done\n"
FULL_SCREEN = r"""
printf '\033[?1049h\033[?25l\033[?1000h\033[?2004h\033[31mfull'; stty raw -echo; exec sleep 300
"""


def test_lines_are_typed_to_a_process_without_a_terminal(tmp_path):
    with start(tmp_path, "web: while read x; do echo got $x; done; echo end\n" + TICKS,
               kind=Terminal) as run:
        for text in (b"one", b"two"):
            run.expect(rb"clock\.1 +\| \d+\n\Z")
            run.type(b"attach web\r")
            run.expect(rb"attached to web\.1; Ctrl-D leaves it\n(attach web\n)?\Z")
            run.type(text + b"\r")
            run.expect(rb"Ctrl-D leaves it\n(attach web\n)?%s\ngot %s\n\Z" % (text, text))
            run.type(b"\x04")
            run.expect(rb"got %s\n(.*\n)*.*clock\.1 +\| \d+$" % text)
        run.type(b"\x03")
        assert run.wait() == 130
        numbers = re.findall(rb"clock\.1 +\| (\d+)$", run.output, re.MULTILINE)
        assert numbers == [b"%d" % n for n in range(1, len(numbers) + 1)]
        assert b"| end" not in run.output    # its stdin stayed open


@pytest.mark.parametrize("args", [(), ("--pty",), ("--attach", "web")])
def test_a_debugger_is_answered(tmp_path, args):
    tmp_path.joinpath("app.py").write_text(DEBUGGED)
    with start(tmp_path, "web: exec %s app.py\n" % PYTHON + TICKS, *args, kind=Terminal) as run:
        run.expect(rb"\(Pdb\) ")
        if "--attach" not in args:
            run.type(b"attach web\r")
        run.expect(rb"attached to web\.1")
        run.type(b"p w + h\r")
        run.expect(rb"7\n[^\n]*\(Pdb\) [^\n]*\Z")    # its line editor writes sequences around
        run.type(b"c\r")
        run.expect(rb"result 12$")
        run.expect(rb"web\.1 +\| exited with code 0$")
        assert run.wait() == 0
        assert run.modes() == run.before


@needs("tmux")
@pytest.mark.parametrize("options", ["", "--pty", "--attach web"])
@pytest.mark.parametrize("command, leave", [
    (PYTHON + " -i", "exit()"),
    pytest.param("node -i", "process.exit()", marks=needs("node")),
    pytest.param("irb -f", "exit", marks=needs("irb"))])
def test_a_prompt_is_answered(tmp_path, options, command, leave):
    """On a real terminal, because irb asks it where the cursor is."""
    app = procfile(tmp_path, "web: exec %s\n" % command + TICKS.replace("0.02", "0.2"))
    with Screen(app) as screen:
        screen.start(options)
        if options != "--attach web":
            screen.shows(r"clock\.1 +\| 1$")
            screen.type("attach web", "Enter")
        screen.shows(r"attached to web\.1; Ctrl-. leaves it$")
        if options == "--pty":    # its prompt may have been written before
            screen.type("", "Enter")
        if options:
            screen.shows(r"^[^ ]*> *\Z")
        screen.type("6 * 7", "Enter")
        screen.shows(r"\b42$")
        screen.type(leave, "Enter")
        screen.shows(r"web\.1 +\| exited with code 0$(.*\n)*" + SHELL)


READ_KEYS = """
import os, tty
tty.setraw(0)
print("raw", end="\\r\\n")
while True:
    print("got", os.read(0, 1), end="\\r\\n")
"""


def test_an_attached_program_gets_every_key_but_one(tmp_path):
    tmp_path.joinpath("keys.py").write_text(READ_KEYS)
    with start(tmp_path, "web: exec %s -u keys.py\n" % PYTHON + TICKS, "--attach", "web",
               kind=Terminal) as run:
        run.expect(rb"^raw$")
        for key in (b"\x03", b"\x1a", b"\x1c", b"\x13", b"\x04", b"\r"):
            run.type(key)
            run.expect(rb"^got %s$" % re.escape(repr(key).encode()))
        run.type(b"\x1d")
        run.expect(rb"clock\.1 +\| \d+$")
        eventually(lambda: run.modes() == run.before)
        run.type(b"ps\r")
        run.expect(rb"web\.1  PORT=\d+, pid \d+, running for 0:\d\d$")
        run.end("TERM")


@needs_linux
def test_what_was_not_taken_before_detach_is_dropped(tmp_path):
    """Ctrl-D, and that the program reads again, are seen at the same time."""
    got = tmp_path / "got"
    with start(tmp_path, "web: echo up; " + UNTIL_GO + "exec cat >got\n", kind=Terminal) as run:
        run.expect(rb"\| up$")
        run.type(b"attach web\n")
        run.expect(rb"attached to web\.1")
        for _ in range(40):    # more than its stdin holds
            run.type(b"x" * 200 + b"\n")
            run.read(0.01)
        eventually(lambda: run.read(0) and idle(run))
        run.signal(signal.SIGSTOP)
        eventually(lambda: is_stopped(run.pid))
        run.type(b"\x04")
        tmp_path.joinpath("go").touch()
        eventually(lambda: got.exists() and got.stat().st_size)
        run.signal(signal.SIGCONT)
        run.type(b"ps\n")
        run.expect(rb"web\.1  PORT=\d+, pid")
        run.end("TERM")
        assert b"Traceback" not in run.output


def test_an_attached_program_has_the_whole_window(tmp_path):
    with start(tmp_path, "web: trap 'stty size' WINCH; echo up; %s\n" % LOOP, "--pty",
               kind=Terminal, size=(30, 100)) as run:
        run.expect(rb"\| up$")
        run.type(b"attach web\r")
        run.expect(rb"^30 100$")
        run.type(b"\x1d")
        run.expect(rb"\| 30 82$")
        run.type(b"attach clock\r")
        run.expect(rb"unknown name for attach: `clock`; known: web, web\.1$")
        run.type(b"\x03")
        assert run.wait() == 130


@needs_linux
def test_what_others_write_meanwhile_is_held_back_and_bounded(tmp_path):
    """16 MiB of it; beyond that they wait, and nothing is lost."""
    size = 60000000
    app = procfile(tmp_path, "web: echo attached; exec cat\n"
                             "big: %shead -c %d /dev/zero | tr '\\0' x | fold -w 99;"
                             " echo 'the end'; exec cat\n" % (UNTIL_GO, size))
    with Terminal(app, "start", "--attach", "web", "--no-prefix") as run:
        run.expect(rb"^attached$")
        app.joinpath("go").touch()
        writer = run.find(b"fold", b"-w", b"99")
        eventually(lambda: stalled(writer))
        assert 16 << 20 <= int(facts(writer, "io")["wchar"]) < 24 << 20
        assert int(facts(run.pid)["VmHWM"]) < 60000
        began = time.monotonic()
        run.type(b"\x1d")
        count, data = 0, bytes(9)
        while b"the end" not in data:
            data = data[-9:] + os.read(run.keyboard, 1 << 16)
            count += data.count(b"x", 9)
        assert count == size and time.monotonic() - began < 20
        assert int(facts(run.pid)["VmHWM"]) < 60000
        run.end("TERM")


@pytest.mark.parametrize("way", [
    "program", "procrun", "TERM", "TSTP", pytest.param("less", marks=needs("less"))])
def test_the_terminal_is_as_it_was_after(tmp_path, way):
    program = ("less", "full") if way == "less" else ("sleep", "300")
    app = procfile(tmp_path, "web: exec %s full\n" % ("less" if way == "less" else "sh") + TICKS)
    app.joinpath("full").write_text(FULL_SCREEN)
    shell = "sh", "-c", '"$@"; read x', "sh"    # it leads the session, as a user's does
    with Terminal(app, "start", "--attach", "web", python=(*shell, *compiled())) as run:
        run.expect(rb"full\Z" if way != "less" else rb"(?s)\x1b\[\?1049h.*sleep 300")
        assert run.modes() != run.before
        [front] = children(run.pid)
        web = run.find(*map(str.encode, program))
        shown = len(run.output)
        if way in ("program", "less"):
            os.kill(web, signal.SIGKILL)
        else:
            os.kill(front, getattr(signal, "SIG" + way, signal.SIGKILL))
        for sequence in (rb"\x1b\[\?25h", rb"\x1b\[\?1000;1002;1003;1004;1006;2004l",
                         rb"\x1b\[\?10(49|47)l", rb"\x1b\[0m"):
            run.expect(rb"(?s)\A.{%d}.*%s" % (shown, sequence))
        eventually(lambda: run.modes() == run.before)
        if way == "TSTP":
            eventually(lambda: is_stopped(front))
            os.kill(front, signal.SIGCONT)
            eventually(lambda: run.modes() != run.before)
            os.kill(front, signal.SIGTERM)
        eventually(lambda: front not in children(run.pid))
        assert run.modes() == run.before
        run.type(b"\r")
        run.wait()


def test_a_pty_has_the_modes_of_the_users_terminal(tmp_path):
    with start(tmp_path, "web: stty -a\n", "--pty", kind=Terminal, prepare=lambda: subprocess.run(
            ["stty", "erase", "^X", "intr", "^G"], check=True)) as run:
        assert run.wait() == 0
        assert b"intr = ^G" in run.output and b"erase = ^X" in run.output


NO_EVENTS = """
register = selectors.DefaultSelector.register
def refuse(self, fd, events, data=None):
    if events == selectors.EVENT_READ and os.isatty(fd):
        raise OSError(22, os.strerror(22))
    return register(self, fd, events, data)
selectors.DefaultSelector.register = refuse
"""


@pytest.mark.parametrize("args", [(), ("--attach", "web")])
def test_a_terminal_without_events_is_one_line(tmp_path, args):
    """As on macOS, where kqueue takes no /dev/tty."""
    with start(tmp_path, "web: echo up\n", *args, kind=Terminal,
               python=patched(NO_EVENTS)) as run:
        assert run.wait() == 1
        assert run.output == b"procrun: standard input: Invalid argument; leave out </dev/tty\n"
        assert run.modes() == run.before


@needs("tmux")
def test_a_pager_keeps_its_keys_and_fg_gives_typed_commands_back(tmp_path):
    with Screen(procfile(tmp_path, "web: seq 1 100; exec sleep 300\n")) as screen:
        screen.start("--no-timestamp", "|", "less")
        screen.shows(r"^web\.1  \| 1$")
        screen.type(" ")
        screen.shows(r"^web\.1  \| 30$")
        screen.type("q")
        screen.shows(SHELL)
        screen.start("--no-timestamp", "&")
        screen.shows(r"^web\.1  \| 100$")
        screen.type("echo a''b", "Enter")
        screen.shows(r"^ab$")
        screen.type("fg", "Enter")
        screen.shows(r"fg$")
        screen.type("stop web", "Enter")
        screen.shows(r"terminated by SIGTERM|exited with code 143")
        screen.shows(SHELL)


@needs("tmux")
@needs("bash")
def test_fg_gives_an_attached_program_its_terminal_back(tmp_path):
    """Where the shell sends no signal (bash).  What others write is held back until Ctrl-]."""
    app = procfile(tmp_path, "web: %skill -TSTP $(ps -o ppid= $PPID); exec cat\n"
                             "b: while sleep 0.1; do echo tick; done\n" % UNTIL_GO)
    with Screen(app, "bash --norc") as screen:
        screen.start("--no-timestamp", "--attach", "web")
        screen.shows("attached")
        tmp_path.joinpath("go").touch()
        screen.shows("Stopped")
        screen.type("bg", "Enter")
        pause(0.3)    # procrun sees that the terminal is not its own
        screen.type("fg", "Enter")
        screen.shows(r"fg\n(?s:.*)w\n?e\n?b\Z")    # wherever the line is broken
        screen.type("", "C-]")
        screen.shows(r"\| tick$")


def test_quiet_drops_output_and_tells_exits(tmp_path):
    app = procfile(tmp_path, "a: echo a; head -c 3000000 /dev/zero; touch read\n"
                             "b: echo b; " + UNTIL % "read" + "; " + UNTIL % "c.1" + "; "
                   + UNTIL % "c.2" + "\nc: echo c; touch $PS; sleep 300\n")
    with Run(app, "start", "-c", "c=2", "--quiet", "a,c.2", "--quiet=b", "--can-die", "a") as run:
        assert run.wait() == 0
        texts = {name: [each for each in run.lines(name) if not each.startswith(b"started")]
                 for name in ("a.1", "b.1", "c.1", "c.2")}
        assert texts == {"a.1": [b"exited with code 0"], "b.1": [b"exited with code 0"],
                         "c.1": [b"c", b"Terminated", b"exited with code 143"],
                         "c.2": [b"exited with code 143"]}


@pytest.mark.parametrize("other, again", [
    ("trap 'echo bye; exit' TERM; echo up; while :; do sleep 0.1; done", True),
    ("echo up; exec sleep 300", False)])
def test_last_lines_of_what_failed_are_shown_again(tmp_path, other, again):
    with start(tmp_path, "web: " + UNTIL_GO + "for n in $(seq 20); do echo line $n; done; "
                         "printf 'half\\r50'; exit 3\nworker: %s\n" % other, kind=Terminal) as run:
        run.expect(rb"\| up$")
        tmp_path.joinpath("go").touch()
        assert run.wait() == 3
        shown = run.output.partition(b"last lines of web.1:\n")[2].split(b"\n")[:-1]
        assert [re.sub(rb"\r.*\| ", b"\r", line[9:]) for line in shown] == (
            [b"web.1    | line %d" % n for n in range(12, 21)] + [b"web.1    | half\r50"]
            if again else [])


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::"])
def test_a_port_that_is_taken(tmp_path, host):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        try:
            taken.bind((host, 0))
        except OSError:
            pytest.skip("no IPv6 here")
        taken.listen(1)
        port = taken.getsockname()[1]
        with start(tmp_path, "web: echo up $PORT\n", "-p", str(port - 1),
                 "-c", "web=2", "--can-die", "web") as run:
            assert run.wait() == 0
            run.expect(rb"\bweb\.2: port %d is already in use$" % port)
            assert run.output.count(b"web.2: port") == 1
            assert run.lines("web.2")[1] == b"up %d" % port


# Command line ------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, told", [
    ("check", b"valid procfile detected (web, worker)\n"), ("version", b"procrun 0.2.0\n"),
    ("--version", b"procrun 0.2.0\n")])
def test_check_and_version(tmp_path, args, told):
    assert call(procfile(tmp_path, "web: x\nworker: y\n", "A=1\n"), args) == (0, told, b"")


def test_help_begins_with_what_to_type_and_no_command_is_a_wrong_call(tmp_path):
    status, page, errors = ask(tmp_path, "--help")
    assert (status, errors) == (0, b"")
    assert ask(tmp_path) == (2, b"", page)
    page = page.decode()
    commands = re.findall(r"^    procrun (\w+)", page.split("\n\n")[1], re.MULTILINE)
    assert sorted(set(commands)) == sorted([*procrun.COMMANDS, "COMMAND"])
    examples = re.findall(r"python3 procrun\.py (\w+)", page)
    assert set(examples) <= set(procrun.COMMANDS)
    order = ["start [NAME", "procrun.py start", "restart [NAME ...]", "stop NAME ...",
             "attach NAME", "    ps ", "    help ", "Exit status", "--procfile", "--env"]
    assert sorted(order, key=page.index) == order
    for option in "--pty", "--attach NAME", "--quiet NAME[,NAME]", "--color", "--keep-going":
        assert "\n  %s" % option in ask(tmp_path, "start", "--help")[1].decode()


@pytest.mark.parametrize("command, told", [
    ("start", b"x in ROOT"), ("run web", b"x in ROOT"),
    ("run sh -c 'echo $A in $(pwd)'", b"x in ROOT"), ("check", b"valid procfile detected (web)"),
])
def test_common_options_before_and_after_the_command(tmp_path, command, told):
    tmp_path.joinpath("root").mkdir()
    tmp_path.joinpath("P").write_bytes(b"web: echo $A in $(pwd)\n")
    tmp_path.joinpath("e").write_bytes(b"A=x\n")
    told = told.replace(b"ROOT", os.path.realpath(str(tmp_path / "root")).encode())
    first, *rest = shlex.split(command)
    for before, after in [("-f P -d root -e e", ""), ("", "-f P -d root -e e"),
                          ("--env=e --root root", "--procfile P"), ("-d no -f P", "-d root -e e")]:
        status, out, errors = call(tmp_path, *before.split(), first, *after.split(), *rest)
        assert (status, errors) == (0, b"")
        assert told in out


def test_root_is_the_procfiles_folder_and_later_env_files_win(tmp_path):
    for name in ("app", "other"):
        procfile(tmp_path / name, "web: echo of %s $A $B $C $(pwd)\n" % name,
                 "A=%s\nB=dotenv" % name)
    tmp_path.joinpath("one").write_bytes(b"A=one\nB=one\n")
    tmp_path.joinpath("two").write_bytes(b"B=two\n")
    tmp_path.joinpath("three").write_bytes(b"C=three\n")
    tmp_path.joinpath("app", "sub").mkdir()
    tmp_path.joinpath("link").symlink_to("app/sub")    # link/.. is taken as a shell's cd does
    here = os.path.realpath(str(tmp_path)).encode()
    for args, told in [
            ("-f app/Procfile", b"of app app dotenv %s/app"),
            ("-d app", b"of app app dotenv %s/app"),
            ("-f app/Procfile -d other", b"of app other dotenv %s/other"),
            ("-f app/Procfile -e one", b"of app one one %s/app"),
            ("-f app/Procfile -e one,two -e three", b"of app one two three %s/app"),
            ("-f app/Procfile -e two --env=one", b"of app one one %s/app"),
            ("-f link/../other/Procfile", b"of other other dotenv %s/other"),
            ("-d link/../other", b"of other other dotenv %s/other")]:
        assert call(tmp_path, "run", *args.split(), "web") == (0, told % here + b"\n", b"")
    # Options before the command and behind it add up.
    told = b"of app one two three %s/app\n" % here
    assert call(tmp_path, "-e", "one", "-f", "app/Procfile", "run", "-e", "two,three", "web") == (
        0, told, b"")


@needs("bash")
@pytest.mark.parametrize("file", ["-", "/dev/stdin", "<(cat)"])
def test_a_procfile_that_is_no_regular_file(tmp_path, file):
    """Its folder says nothing, so the current directory is the root."""
    tmp_path.joinpath(".env").write_bytes(b"A=here\n")
    for words in "start -f %s", "-f %s start":
        status, out, errors = ask(tmp_path, input=b"web: echo $A $(pwd)\n", command=[
            "bash", "-c", '"$@" ' + words % file, "bash", *compiled()])
        assert (status, errors) == (0, b"")
        assert b"| here %s\n" % os.path.realpath(str(tmp_path)).encode() in out


@pytest.mark.parametrize("command, told", [
    ("check", b"valid procfile detected (web)"), ("run web", b"[]"),
    ("run sh -c 'echo [$A]'", b"[]"), ("start", b"| []")])
def test_an_env_that_cannot_be_read(tmp_path, command, told):
    """Every command says which file it is, and what is wrong; only a folder of that name, which is
    a virtual environment, may be there."""
    app, env = procfile(tmp_path, 'web: echo "[$A]"\n'), tmp_path / ".env"
    words = shlex.split(command)
    env.mkdir()
    status, out, errors = call(app, *words)
    assert (status, errors) == (0, b"") and told in out
    assert call(app, "-e", ".env", *words) == (1, b"", b"procrun: .env: Is a directory\n")
    env.rmdir()
    env.symlink_to("gone")
    assert call(app, *words) == (1, b"", b"procrun: .env: No such file or directory\n")
    env.unlink()
    env.write_bytes(b"A=1\nB C\n")
    assert call(app, *words) == (1, b"", b"procrun: .env:2: expected NAME=value\n")
    env.write_bytes(b"\xc2\xa0A=1\n")
    assert b".env:1: the name has a blank that is not a space" in call(app, *words)[2]
    if os.geteuid() == 0:
        words[:0] = ["-e", "/proc/self/mem"]    # what root cannot read either
        assert call(app, *words) == (1, b"", b"procrun: /proc/self/mem: Input/output error\n")
    else:
        env.chmod(0)
        assert call(app, *words) == (1, b"", b"procrun: .env: Permission denied\n")


def test_expansion_between_files_and_its_warnings(tmp_path):
    app = procfile(tmp_path, 'web: echo "$URL [$NO]"\n')
    tmp_path.joinpath("one").write_bytes(b"HOST=db\nNO=${NO_1}\n")
    tmp_path.joinpath("two").write_bytes(b"URL=postgres://${HOST}:${PG:-5432}/${USER_X}\n")
    for command in "run web", "start", "check", "run true":
        status, out, errors = ask(app, "-e", "one,two", *command.split(), env={"USER_X": "x"})
        assert (status, errors) == (
            0, b"procrun: one:2: warning: ${NO_1} is not defined, so it is empty\n")
        assert b"postgres://db:5432/x []" in out or command in ("check", "run true")


@pytest.mark.parametrize("args, status, out", [
    (["web"], 3, b"web.1 5100 [a  b]\n"), (["--", "web"], 3, b"web.1 5100 [a  b]\n"),
    (["-p", "7000", "web"], 3, b"web.1 7100 [a  b]\n"),
    (["echo", "a  b", "$A", "*"], 0, b"a  b $A *\n"),
    (["sh", "-c", 'echo "$A"; exit 7'], 7, b"a  b\n"),
    (["--", "echo", "--", "-f", "x", "--version"], 0, b"-- -f x --version\n"),
    (["printf", "%s.", "-e", "", "--help", "\udcff"], 0, b"-e..--help.\xff."),
    (["sh", "-c", "kill -9 $$"], -9, b""), (["sh", "-c", "kill -TERM $$"], -15, b""),
    (["cat"], 0, b"typed"),
])
def test_run(tmp_path, args, status, out):
    app = procfile(tmp_path, 'clock: x\nweb: echo $PS $PORT "[$A]"; exit 3\n', "A='a  b'")
    assert ask(app, "run", *args, input=b"typed") == (status, out, b"")


def test_run_becomes_the_command(tmp_path):
    """The same process, session, group, terminal; default signal dispositions."""
    script = "echo is $$; grep SigIgn /proc/$$/status; exec sleep 300"
    with Run(tmp_path, "run", "sh", "-c", script) as run:
        assert int(run.expect(rb"^is (\d+)$")[1]) == run.pid
        if sys.platform.startswith("linux"):
            ignored = int(run.expect(rb"^SigIgn:\t(\w+)$")[1], 16)
            assert not ignored & OWN_SIGNALS
        run.signal(signal.SIGINT)
        assert run.wait() == -signal.SIGINT


@pytest.mark.parametrize("args, status", [
    (["no-such-command"], 127), (["echo a"], 127), (["./missing"], 127), (["web", "now"], 127),
    (["./plain"], 126), (["./folder"], 126),
])
def test_run_without_success(tmp_path, args, status):
    tmp_path.joinpath("folder").mkdir()
    tmp_path.joinpath("plain").write_bytes(b"#!/bin/sh\n")
    found, out, errors = call(procfile(tmp_path, "web: echo\n"), "run", *args)
    assert (found, out) == (status, b"")
    known = b"; the process types are web" * (len(args) == 1 and status == 127)
    assert re.fullmatch(rb"procrun: %s: [^\n;]+%s\n" % (
        re.escape(args[0].encode()), known), errors)


def test_run_needs_no_procfile_and_no_port(tmp_path):
    tmp_path.joinpath(".env").write_bytes(b"A=1\nPORT=web\n")
    for _ in range(2):
        assert ask(tmp_path, "run", "sh", "-c", "echo $A $PORT") == (0, b"1 web\n", b"")
        assert call(tmp_path, "run", "env")[0] == 0
        procfile(tmp_path, "web: x\n")


KNOWN = "`nosuch`.* web, worker"


@pytest.mark.parametrize("args, status, message", [
    ("bogus", 2, "bogus"), ("--bogus", 2, ""), ("start --bogus", 2, "--bogus"), ("-f", 2, "-f"),
    ("check now", 2, "now"), ("version now", 2, "now"), ("run", 2, ""), ("run --", 2, ""),
    ("run '' x", 2, "run what"),
    ("start nosuch", 2, KNOWN), ("start web nosuch", 2, KNOWN), ("start all", 2, "web, worker"),
    ("start -c nosuch=1", 2, KNOWN), ("start -m nosuch=1", 2, KNOWN),
    ("start --can-die nosuch", 2, KNOWN), ("start -c", 2, "-c"),
    ("start -c web", 2, "web"), ("start -c web=", 2, "web="), ("start -c =2", 2, "=2"),
    ("start -c web=-1", 2, "-1"), ("start -c web=x", 2, "x"), ("start -c web=1.5", 2, "1.5"),
    ("start -c web=2,", 2, ""), ("start -c=", 2, ""), ("start -m web=\u0663", 2, ""),
    ("start -m web", 2, "web"), ("start -m web=-1", 2, "-1"),
    ("start -m all=0", 2, "nothing to run"), ("start -c web=0,worker=0", 2, "nothing to run"),
    ("start web -c web=0", 2, "nothing to run"), ("start web -m worker=1", 2, "nothing to run"),
    ("start -p x", 2, "x"), ("start -p -1", 2, "-1"), ("start -p 70000", 2, "70000"),
    ("start -p 65436", 1, "worker.1.*65536"), ("start -c web=600 -p 65000", 1, "web.537.*65536"),
    ("start -t x", 2, "x"), ("start -t -1", 2, "-1"), ("start -t nan", 2, "nan"),
    ("start -t 86400.1", 2, "a day"), ("start -t 99999999", 2, "a day"), ("start -t .", 2, "`.`"),
    ("start --can web", 2, "--can"),
    ("-c web=1 start", 2, "-c"), ("start run", 2, "unknown process type `run`"),
    ("start --color sometimes", 2, "sometimes"), ("start -f .", 1, "directory"),
    ("check -f nosuch", 1, "nosuch: No such file"), ("start -e nosuch", 1, "nosuch: No such file"),
    ("check -e .env,nosuch", 1, "nosuch: No such"), ("run -e nosuch true", 1, "nosuch: No such"),
    ("start -d nosuch -f Procfile", 1, "nosuch: No such"), ("run -d nosuch true", 1, "nosuch"),
    ("start -d Procfile -f Procfile", 1, "Procfile: Not a directory"),
    ("start --attach web", 2, "terminal"),
    ("start --attach none", 2, "unknown name for --attach"),
])
def test_errors_are_one_line(tmp_path, args, status, message):
    app = procfile(tmp_path, "web: true\nworker: true\n", "A=1\n")
    found, out, errors = call(app, *shlex.split(args))
    assert re.fullmatch("procrun: [^\n]*(%s)[^\n]*\n" % message, errors.decode()), errors
    assert (found, out) == (status, b"")


@pytest.mark.parametrize("text, env, lines", [
    (b"web: a\nnope\nweb: b\n", b"", ["Procfile:2: .*colon.*", "Procfile:3: .*line 1.*"]),
    *((text, b"", ["Procfile: no process types.*"])
      for text in (b"", b"\n\n", b"# web: x\n", b"\xef\xbb\xbf", b" \r\n")),
    (b"\xff\n", b"", ["Procfile:1: .*"]), (b"web: a\0\n", b"", ["Procfile:1: .*NUL.*"]),
    (b"web: a\n", b"A=1\nB\n C=2\nD='\n", [".env:2: .*", ".env:4: .*quote.*"]),
    (b"web: a\n", b"A\0\x1b[31m\xff\n", [r".env:1: [\x20-\x7e]+"]),
    (b"web: a\n", b"PORT=http\n", ["PORT=http .*"]),
    (b"web: a\n", b"PORT=99999\n", ["PORT=99999 .*"]), (b"web: a\n", b"PORT=0\n", ["PORT=0 .*"]),
])
def test_errors_of_the_files(tmp_path, text, env, lines):
    procfile(tmp_path, text, env)
    for command in "start", "check", "run web", "export runit out":
        status, out, errors = call(tmp_path, *command.split())
        expected = "".join("procrun: %s\n" % line for line in lines)
        assert re.fullmatch(expected, errors.decode()), errors
        assert (status, out) == (1, b"")


def test_no_procfile(tmp_path):
    """An example is shown, which is a Procfile; or the name of another that is there."""
    status, out, errors = call(tmp_path, "start")
    lines = re.findall(rb"^procrun: (.*)$", errors, re.MULTILINE)
    assert (status, out) == (1, b"") and len(lines) == 3 and b"no Procfile here" in lines[0]
    procfile(tmp_path, b"\n".join(each.strip() for each in lines[1:])).joinpath("sub").mkdir()
    assert call(tmp_path, "check")[0] == 0
    tmp_path.joinpath("Procfile").rename(tmp_path / "sub" / "Procfile.dev")
    for command in "check", "start":
        assert call(tmp_path, command, "-d", "sub") == (
            1, b"", b"procrun: no sub/Procfile here; use -f sub/Procfile.dev\n")
    tmp_path.joinpath("sub", "Procfile.b").touch()
    assert b"use -f Procfile.b or -f Procfile.dev\n" in call(tmp_path / "sub", "check")[2]
    assert call(tmp_path, "run", "web") == (127, b"", b"procrun: web: No such file or directory\n")


def test_no_fork(tmp_path):
    """As on Windows: without fork, and without the modules that only Unix has."""
    wrapper = ("import os, runpy, sys\n"
               "del os.fork, os.setsid, os.killpg, os.environb\n"
               "unix = 'fcntl termios tty pty resource pwd grp'\n"
               "sys.modules.update(dict.fromkeys(unix.split()))\n"
               "sys.argv = sys.argv[1:]\n"
               "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    for args in (["start"], ["version"], []):
        status, out, errors = ask(procfile(tmp_path, "web: echo\n"), PROCRUN, *args,
                                  command=(sys.executable, "-S", "-c", wrapper))
        assert (status, out) == (1, b"")
        assert re.fullmatch(rb"procrun: [^\n]*needs Linux[^\n]*\n", errors)


# README, Makefile --------------------------------------------------------------------------------

def read_me():
    """The README."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return file.read()


def test_readme_holds_every_option_and_command(tmp_path):
    options = set()
    for command in ["", "start", "run", "check", "version", "export"]:
        status, page, _ = call(tmp_path, *command.split(), "--help")
        for line in re.findall(r"^ +(-.*?)(?:  |$)", page.decode() * (status == 0), re.MULTILINE):
            options.update(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", line))
    assert {"-f", "--procfile", "-c", "-m", "-t", "--can-die", "--color", "--no-prefix"} <= options
    told = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", read_me()))
    assert sorted(options - told - {"-h", "--help"}) == []
    for command in ("start", "run", "check", "version"):
        assert re.search(r"procrun(\.py)? %s\b|`%s\b" % (command, command), read_me())


def answer(port):
    """The status of the answer to an HTTP GET, None if there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


def test_the_readmes_app(tmp_path):
    """Two web instances, an HTTP GET answered on each PORT, Ctrl-C, nothing left."""
    app = re.search(r"(?:^ *(?:web|worker|clock): .*\n)+", read_me(), re.MULTILINE)[0]
    procfile(tmp_path, re.sub(r"^ +", "", app, flags=re.MULTILINE))
    port = free_base()
    with Run(tmp_path, "start", "-c", "web=2", "-p", str(port)) as run:
        for number in (1, 2):
            assert eventually(lambda: answer(port + number - 1)) == 200
            run.expect(rb"web\.%d +\| .*GET / " % number)
        run.end()
        assert [answer(port), answer(port + 1)] == [None, None]


@needs("make")
def test_make_demo(tmp_path):
    tag, port = new_tag(), free_base()
    demo = subprocess.Popen(
        ["make", "-s", "demo", "DEMO=%s" % tmp_path, "ARGS=-p %d" % port,
         "PYTHON=" + sys.executable],
        cwd=HERE, env=dict([*os.environ.items(), tag.split("=")]), start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert eventually(lambda: answer(port)) == 200
        eventually(lambda: {b"sleep\x003\x00", b"sleep\x0010\x00"} <= {
            command for _, command in leftovers(tag)})
        os.killpg(demo.pid, signal.SIGINT)      # as the terminal does it
        out = demo.communicate(timeout=20)[0]
        assert all(re.search(rb"%s\.1 +\| (terminated|exited with code 143)" % name, out)
                   for name in [b"web", b"worker", b"clock"])
        eventually(lambda: not leftovers(tag))
    finally:
        kill_all(tag)
        demo.wait()
        demo.stdout.close()


@needs("make")
def test_make_install(tmp_path):
    subprocess.run(["make", "-s", "install", "DESTDIR=%s" % tmp_path, "PREFIX=/usr"], cwd=HERE,
                   check=True)
    installed = [sys.executable, "-S", str(tmp_path / "usr/bin/procrun"), "version"]
    assert subprocess.run(installed, stdout=subprocess.PIPE).stdout == b"procrun 0.2.0\n"
    assert os.access(installed[2], os.X_OK)


@pytest.mark.parametrize("command", ["procrun.py", "-mprocrun"])
def test_the_app_may_have_modules_of_any_name(tmp_path, command):
    """procrun lies beside the app's modules, which may be called as those of the library."""
    shutil.copy(PROCRUN, str(tmp_path / "procrun.py"))
    for name in ["selectors", "signal", "resource", "argparse", "ctypes", "plistlib", "json"]:
        tmp_path.joinpath(name + ".py").write_text("raise SystemExit('the app')\n")
    procfile(tmp_path, "web: echo hello\n")
    for args in [["start"], ["export", "launchd", "out", "-u", "root"]]:
        status, out, errors = ask(tmp_path, *args, command=(sys.executable, command))
        assert (status, errors) == (0, b"")


# Odd surroundings --------------------------------------------------------------------------------

@needs_linux
@pytest.mark.parametrize("command", [
    ["start"], ["check"], ["version"], ["export", "systemd", "out", "-u", "root", "--dry-run"]])
def test_a_full_disk_is_one_line(tmp_path, command):
    app = procfile(tmp_path, "a: echo up; exec sleep 300\n")
    with open("/dev/full", "wb") as full:
        status, _, errors = ask(app, *command, stdout=full)
    assert status == 1
    assert errors == b"procrun: cannot write the output: No space left on device\n"


# Typed commands ----------------------------------------------------------------------------------

def ups(run, name, count):
    """Wait until an instance has said `up` so many times."""
    eventually(lambda: run.read(0.05) and run.lines(name).count(b"up") >= count)


@pytest.mark.parametrize("opening", [":", "exec <typed", "exec </dev/null"])
def test_no_command_is_read_but_from_a_terminal(tmp_path, opening):
    """From a pipe, a file, or nothing; and its end ends nothing."""
    app = procfile(tmp_path, "a: sleep 0.2; exit 7\n")
    tmp_path.joinpath("typed").write_bytes(b"restart a\n")
    status, out, _ = ask(app, "start", input=b"restart a\n", command=(
        "sh", "-c", opening + '; "$@"; echo $?; cat', "sh", *compiled()))
    assert out.endswith(b"\n7\n" if "null" in opening else b"\n7\nrestart a\n")
    assert out.count(b"started") == 1


@pytest.mark.parametrize("typed, again", [
    (b"restart web", ["web.1", "web.2"]), (b"restart", ["web.1", "web.2", "deaf.1"]),
    (b"restart web.2", ["web.2"]), (b"restart deaf web.1", ["web.1", "deaf.1"]),
    (b"restart web.1\nrestart web.1", ["web.1"]), (b"\x04\n \nrestart web.1", ["web.1"]),
])
def test_typed_restart(tmp_path, typed, again):
    """The one that ignores SIGTERM is killed after the grace period; and one that fails when it is
    asked to end does not end the set."""
    with start(tmp_path, "web: trap 'exit 1' TERM; echo up; %s\n"
                         "deaf: trap '' TERM; echo up; %s\n" % (LOOP, LOOP),
               "-t", "0.5", "-c", "web=2", kind=Terminal) as run:
        for name in ("web.1", "web.2", "deaf.1"):
            ups(run, name, 1)
        run.type(typed + b"\n")
        for name in again:
            ups(run, name, 2)
        run.end()
        for name in ("web.1", "web.2", "deaf.1"):
            assert run.lines(name).count(b"up") == 1 + (name in again)


def test_typed_stop_ps_help_and_what_is_unknown(tmp_path):
    with start(tmp_path, "a: echo up; exec sleep 300\nb: echo up; exec sleep 301\n",
               kind=Terminal, size=(24, 200)) as run:
        ups(run, "a.1", 1), ups(run, "b.1", 1)
        eventually(lambda: sleeping(run, b"30") == 2)
        for count, word in enumerate([b"help", b"nonsense"], 1):
            run.type(word + b"\n")
            eventually(lambda: run.read(0.05) and len(run.lines("system")) > 5 * count)
            for command in b"restart [NAME ...]", b"stop NAME", b"attach NAME", b"ps", b"help":
                assert sum(line.startswith(command + b" ")
                           for line in run.lines("system")) == count
        run.type(b"restart nobody\n")
        run.expect(rb"system \| unknown .*`nobody`; known: ")
        run.type(b"stop a\n")
        run.expect(rb"a\.1 +\| terminated by SIGTERM$")
        run.type(b"ps\n")
        run.expect(rb"system \| a\.1  PORT=\d+, terminated by SIGTERM, 0:\d\d ago$")
        run.expect(rb"system \| b\.1  PORT=\d+, pid \d+, running for 0:\d\d$")
        run.type(b"restart a\nrestart a\n")
        ups(run, "a.1", 2)
        assert run.lines("b.1").count(b"up") == 1
        run.type(b"stop a b\n")    # nothing runs any more
        assert run.wait() == 0
        assert run.lines("a.1").count(b"up") == 2


def test_keep_going_and_the_restart_of_one_that_failed(tmp_path):
    with start(tmp_path, "a: echo up; exit 3\nb: echo up; " + UNTIL_GO + "exit 4\n",
               "--keep-going", kind=Terminal) as run:
        run.expect(rb"a\.1 +\| exited with code 3$")
        run.type(b"restart a\n")
        ups(run, "a.1", 2), ups(run, "b.1", 1)
        tmp_path.joinpath("go").touch()
        assert run.wait() == 3


def test_a_typed_restart_waits_for_the_group(tmp_path):
    with start(tmp_path, "a: (trap '' TERM; %secho gone) & echo up; exec sleep 300\n" % UNTIL_GO,
               "-t", "30", kind=Terminal) as run:
        ups(run, "a.1", 1)
        eventually(lambda: sleeping(run, b"300"))
        run.type(b"restart a\n")
        run.expect(rb"a\.1 +\| terminated by SIGTERM$")
        tmp_path.joinpath("go").touch()
        ups(run, "a.1", 2)
        lines = run.lines("a.1")
        assert lines.index(b"gone") < len(lines) - 1 - lines[::-1].index(b"up")
        run.type(b"restart a\n")
        run.end()    # whichever comes first


def test_a_shutdown_that_follows_a_restart_at_once(tmp_path):
    with start(tmp_path, "a: (trap 'echo saved >&2; exit' TERM; echo up >&2; %s) | cat\n" % LOOP,
               "-t", "30", kind=Terminal) as run:
        ups(run, "a.1", 1)
        run.type(b"restart a\n")
        run.expect(rb"\nrestart a\n")
        run.end()
        assert run.lines("a.1").count(b"saved") == run.lines("a.1").count(b"up")


def test_a_restart_during_a_shutdown_is_without_effect(tmp_path):
    """Neither on what is ending, nor on what has ended."""
    with start(tmp_path, "a: trap 'echo asked' TERM; echo up; %sexit 0\nb: :\n" % UNTIL_GO,
               "-t", "60", "--can-die", "b", kind=Terminal) as run:
        ups(run, "a.1", 1)
        run.expect(rb"b\.1 +\| exited")
        run.signal(signal.SIGTERM)
        run.expect(rb"\| asked$")
        run.type(b"restart\nps\n")
        run.expect(rb"system \| a\.1  PORT=\d+, pid \d+, running")    # both have been read
        tmp_path.joinpath("go").touch()
        assert run.wait() == 143
        assert run.lines("a.1").count(b"asked") == 1
        assert run.output.count(b"started with pid") == 2


@needs_linux
def test_the_last_words_of_an_attached_program_are_not_changed(tmp_path):
    """They are written before the terminal's modes are restored, though procrun learns of both
    at once.  (This terminal writes capitals but in raw mode.)"""
    text = "web: stty -olcuc; " + UNTIL_GO + "echo one; echo two\n"
    with start(tmp_path, text, "--attach", "web", kind=Terminal,
               prepare=lambda: subprocess.run(["stty", "olcuc"])) as run:
        run.expect(rb"ATTACHED TO WEB")
        helper = guard(run)
        run.signal(signal.SIGSTOP)
        tmp_path.joinpath("go").touch()
        eventually(lambda: not children(helper))
        run.signal(signal.SIGCONT)
        assert run.wait() == 0
        assert b"\none\ntwo\n" in run.output


@needs_linux
def test_a_typed_restart_asks_what_is_in_a_session_of_its_own(tmp_path):
    """When its parent has ended, and not only with SIGKILL."""
    with start(tmp_path, "a: exec setsid --wait sh -c 'trap \"echo saved; exit\" TERM; echo up; %s'\n"
               % LOOP, kind=Terminal) as run:
        ups(run, "a.1", 1)
        run.type(b"restart a\n")
        run.expect(rb"\| saved$")
        run.end()


@pytest.mark.parametrize("how, status", [(b"\x03", 130), (None, 3)])
def test_the_end_of_the_set_takes_the_terminal_back(tmp_path, how, status):
    """Or nobody would be told why, and who is waited for."""
    with start(tmp_path, "a: trap '' TERM; echo up; " + UNTIL_GO + "exit 0\n"
                         "b: " + UNTIL % "crash" + "; exit 3\n", kind=Terminal) as run:
        ups(run, "a.1", 1)
        run.type(b"attach a\n")
        run.expect(rb"attached")
        run.type(how) if how else tmp_path.joinpath("crash").touch()
        run.expect(rb"waiting for a\.1 \(SIGKILL in 5 s; Ctrl-C kills now\)$")
        tmp_path.joinpath("go").touch()
        assert run.wait() == status


def test_no_output_of_a_restarted_instance_precedes_its_start(tmp_path):
    """Not even if procrun is slower than it is."""
    with start(tmp_path, "a: echo up; trap 'echo asked; %sexit' TERM; %s\n" % (UNTIL_GO, LOOP),
               kind=Terminal) as run:
        ups(run, "a.1", 1)
        run.type(b"restart a\n")
        run.expect(rb"\| asked$")
        run.signal(signal.SIGSTOP)
        tmp_path.joinpath("go").touch()
        pause(0.3)
        run.signal(signal.SIGCONT)
        ups(run, "a.1", 2)
        run.end()
        words = [line.split()[0] for line in run.lines("a.1")]
        asked = words.index(b"asked")
        assert words[asked + 1:asked + 4] == [b"exited", b"started", b"up"]


@pytest.mark.parametrize("options, leave", [([], b"\x04"), (["--pty"], b"\x1d")])
def test_what_was_typed_to_one_that_has_ended_is_not_for_the_next(tmp_path, options, leave):
    """Nor are the modes of its PTY, where a return would not end the line."""
    text = ("a: echo up; if [ -e before ]; then read line; echo \"[$line]\"; fi; touch before; "
            "stty raw 2>/dev/null; exec sleep 300\n")
    with start(tmp_path, text, *options, kind=Terminal) as run:
        ups(run, "a.1", 1)
        eventually(lambda: sleeping(run, b"300"))
        run.type(b"attach a\r")
        run.expect(rb"attached")
        run.type(b"stale\r" + leave + b"restart a\r")
        ups(run, "a.1", 2)
        run.type(b"attach a\r")
        run.expect(rb"(?s)attached.*attached")
        run.type(b"fresh\r")
        assert run.expect(rb"\[(\w+)\]")[1] == b"fresh"
        run.end()


def test_last_lines_are_those_of_the_last_run_attached_or_not(tmp_path):
    text = ("web: [ -e before ] || echo old; touch before; echo up; read line; echo \"got $line\"; "
            + UNTIL_GO + "exit 3\nworker: trap 'echo done' TERM; " + LOOP + "\n")
    with start(tmp_path, text, kind=Terminal) as run:
        ups(run, "web.1", 1)
        run.type(b"restart web\n")
        ups(run, "web.1", 2)
        run.type(b"attach web\n")
        run.expect(rb"attached")
        run.type(b"this\n")
        run.expect(rb"got this")
        tmp_path.joinpath("go").touch()
        assert run.wait() == 3
        assert re.search(rb"last lines of web.1:\n.*\| up\n.*\| got this\n\Z", run.output)


ASK = r"""
import os, signal, tty
signal.signal(signal.SIGWINCH, lambda *_: print("drawn"))
tty.setcbreak(0)
os.write(1, b"\33[?1h\33[6n")
while True:
    print("got", os.read(0, 9))
"""


@needs_linux
def test_a_program_keeps_its_terminal_while_it_is_not_attached(tmp_path):
    """irb waits to be told where the cursor is.  Modes are set again, and it draws itself anew, also
    when procrun goes on after a stop.  Ctrl-S holds nothing; Ctrl-] as xterm may send it."""
    tmp_path.joinpath("ask.py").write_text(ASK)
    with start(tmp_path, "web: exec %s -u ask.py\n" % PYTHON, "--pty", "--no-prefix",
               kind=Terminal) as run:
        modes = run.modes()
        run.expect(rb"^got b'\\x1b\[1;2R'$")
        run.type(b"attach web\r")
        run.expect(rb"attached(?s:.*)\x1b\[\?1h(?s:.*)drawn")
        run.signal(signal.SIGSTOP)
        eventually(lambda: is_stopped(run.pid))
        termios.tcsetattr(run.keyboard, termios.TCSANOW, modes)
        run.signal(signal.SIGCONT)
        run.expect(rb"(?s)drawn.*\x1b\[\?1h.*drawn")
        eventually(lambda: not run.modes()[3] & termios.ICANON)
        run.type(b"\x13")
        run.expect(rb"^got b'\\x13'$")
        run.type(b"\x1b[27;5;93~ps\r")
        run.expect(rb"running for 0:\d\d$")
        run.end()


# Two parts, which make test runs side by side ----------------------------------------------------

if os.environ.get("PROCRUN_PART"):
    for name in [name for name in globals() if name.startswith("test_")][
            int(os.environ["PROCRUN_PART"]) % 2::2]:
        del globals()[name]


# Benchmark: python test_procrun.py bench [ROUNDS] ------------------------------------------------
#
# Nothing is asserted.  Each figure is the median of ROUNDS (5) measurements, taken in turn with
# those of its yardstick: whatever else the machine does meets both.  Linux only, for /proc.

MILLION = 1000000
PLAIN = sys.executable, PROCRUN    # as a user calls it
MODULE = sys.executable, "-m", "procrun"    # as a module, which CPython compiles but once
AS_MODULE = "the same by `python -m procrun`"
SLEEPER = "echo $$ up; exec sleep 999"
TICKER = (sys.executable + " -c \"import os, time; [os.write(1, b'%f\\n' % time.monotonic())"
          " and time.sleep(0.01) for _ in range(200)]\"")
BARE_LOOP = ("import os\nfor _ in range(%d):\n"
             "    os.fork() or os.execl('/bin/sh', 'sh', '-c', '" + SLEEPER + "')\nos.wait()")


def in_turn(rounds, *measurements):
    """Call the functions in turn, again and again; return the medians of all that they return."""
    results = [[number for each in measurements for number in each()] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*results)]


def app_of(folder, text):
    """A new app's folder within this one."""
    return procfile(pathlib.Path(tempfile.mkdtemp(dir=str(folder))), text)


def timed(command, **options):
    """Run a command; return the seconds that it takes."""
    start = time.perf_counter()
    subprocess.run(command, **options)
    return time.perf_counter() - start


def in_units(seconds):
    """Seconds, as people read them."""
    for factor, unit in (1, "s"), (1e3, "ms"), (1e6, "µs"):
        if seconds * factor >= 0.999:
            break
    return "%.3g %s" % (seconds * factor, unit)


def row(what, value, base=None, yardstick="", form=in_units):
    """The cells of a row: procrun's figure, the yardstick's, and the ratio of the two."""
    if base is None:
        return [what, form(value), "", ""]
    return [what, form(value), "%s, %s" % (form(base), yardstick), "%.2f" % (value / base)]


def copied(command, app, line):
    """Run a command with its output in a file; return the seconds, and the lines not whole."""
    with open(str(app / "out"), "wb") as out:
        seconds = timed(command, cwd=str(app), stdin=subprocess.DEVNULL, stdout=out)
    return seconds, MILLION - (app / "out").read_bytes().count(line)


def throughput_rows(folder, rounds):
    """Yield the rows about a million lines, one process for each name."""
    for what, size, names in [("1 000 000 lines of 80 bytes, into a file", 80, "a"),
                              ("the same from 8 processes", 80, "abcdefgh"),
                              ("1 000 000 lines of 9 bytes", 9, "a")]:
        data, line = folder / "data", b"x" * (size - 1) + b"\n"
        data.write_bytes(line * (MILLION // len(names)))
        app = app_of(folder, "".join("%s: cat %s\n" % (name, data) for name in names))
        start = [sys.executable, PROCRUN, "start", "--can-die", ",".join(names)]
        sed = "cat %s | sed 's/^/12:00:00 a.1    | /'" % " ".join([str(data)] * len(names))
        own, torn, piped, _, sed, _ = in_turn(rounds, *[
            functools.partial(copied, command, app, line)
            for command in (start, ["sh", "-c", '"$@" | cat', "sh", *start], ["sh", "-c", sed])])
        cells = row(what, own, sed, "`cat \\| sed`")
        cells[1] += " (%d lines torn or lost)" % torn if torn else ""
        yield cells
        if names == "a" and size == 80:
            yield row("into a pipe to `cat`", piped, sed, "`cat \\| sed` into a file")


def all_up(process, count):
    """Wait until so many processes have said `up`; return these lines."""
    lines = (line for line in process.stdout if line.endswith(b"up\n"))
    return list(itertools.islice(lines, count))


def procrun_ids(run):
    """The ids of procrun itself: it, and its helper."""
    return [pid for pid, command in leftovers(run.tag) if b"procrun" in command]


def total(pids, name, pattern):
    """The sum over the processes of a number that stands in a file of /proc/ID."""
    return sum(int(re.search(pattern, pathlib.Path("/proc/%d/%s" % (pid, name)).read_text())[1])
               for pid in pids)


def until_exit(run, pid, number):
    """Send a signal; return the seconds until procrun has exited."""
    start = time.perf_counter()
    os.kill(pid, number)
    run.process.wait()
    return time.perf_counter() - start


def first_line(app, python):
    """Seconds from the start to the first line of a process."""
    start = time.perf_counter()
    with Run(app, "start", python=python) as run:
        all_up(run.process, 1)
        seconds = time.perf_counter() - start
        until_exit(run, run.pid, signal.SIGINT)
    return [seconds]


def restarted(app):
    """Seconds from a typed restart to the first line of the new process."""
    with Terminal(app, "start", python=PLAIN) as run:
        run.expect(rb" up$")
        start = time.perf_counter()
        run.type(b"restart\n")
        run.expect(rb" up\n(.*\n)+.* up$")
        seconds = time.perf_counter() - start
        run.signal(signal.SIGINT)
        run.wait()
    return [seconds]


def latency(command, app=None):
    """Seconds (the median) from a line's being written until it can be read."""
    delays = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=app) as process:
        for data in iter(lambda: os.read(process.stdout.fileno(), 1 << 16), b""):
            now = time.monotonic()
            delays += [now - float(each) for each in re.findall(rb"(\d+\.\d{6})\n", data)]
    return [statistics.median(delays)]


def crash(app, count):
    """Seconds from the death of one process to procrun's exit."""
    with Run(app, "start", "-c", "a=%d" % count, python=PLAIN) as run:
        return [until_exit(run, int(all_up(run.process, count)[0].split()[-2]), signal.SIGKILL)]


def resting(app, count, python):
    """Start so many processes; return the seconds until all are up, the KiB of procrun, its
    wake-ups a second, and the seconds from Ctrl-C to its exit."""
    start = time.perf_counter()
    with Run(app, "start", "-c", "a=%d" % count, python=python) as run:
        all_up(run.process, count)
        up = time.perf_counter() - start
        pause(1)
        pids, switches = procrun_ids(run), r"\nvoluntary_ctxt_switches:\s*(\d+)"
        memory = total(pids, "smaps_rollup", r"Pss: *(\d+)")
        before = total(pids, "status", switches)
        pause(2)
        wakeups = (total(pids, "status", switches) - before) / 2
        return up, memory, wakeups, until_exit(run, run.pid, signal.SIGINT)


def bare_loop(count):
    """Seconds until as many processes are up, started by nothing but fork and exec in a loop."""
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", BARE_LOOP % count], stdout=subprocess.PIPE,
                          start_new_session=True) as process:
        all_up(process, count)
        seconds = time.perf_counter() - start
        os.killpg(process.pid, signal.SIGKILL)
    return [seconds]


def other_rows(folder, rounds):
    """Yield the rows that measure procrun alone."""
    sleeper = app_of(folder, "a: %s\n" % SLEEPER)
    shutil.copy(PROCRUN, str(sleeper))    # where `python -m procrun` finds it
    first_line(sleeper, MODULE)           # compiles it
    plain, module, bare = in_turn(
        rounds, lambda: first_line(sleeper, PLAIN), lambda: first_line(sleeper, MODULE),
        lambda: [timed([sys.executable, "-c", "pass"])])
    yield row("first line of a process on the screen", plain, bare, "`python -c pass`")
    yield row(AS_MODULE, module, bare, "`python -c pass`")
    _, memory, wakeups, down, _, lean, *_ = in_turn(
        rounds, lambda: resting(sleeper, 10, PLAIN), lambda: resting(sleeper, 10, MODULE))
    yield row("Ctrl-C to exit, 10 processes", down)
    yield row("crash of one to exit, 10 processes", *in_turn(rounds, lambda: crash(sleeper, 10)))
    yield row("typed `restart`, until the first line of the new process", *in_turn(
        rounds, lambda: restarted(sleeper),
        lambda: [timed(["sh", "-c", "echo"], stdout=subprocess.DEVNULL)]), "`sh -c echo`")
    stamps = app_of(folder, "a: %s\n" % TICKER)
    yield row("a line written, until it can be read", *in_turn(
        rounds, lambda: latency([sys.executable, PROCRUN, "start"], str(stamps)),
        lambda: latency(["sh", "-c", TICKER + " | cat"])), "through `cat`")
    yield row("idle, 10 processes", wakeups, form="{:.1f} wake-ups a second".format)
    mebibytes = (lambda kib: "%.1f MiB" % (kib / 1024))
    yield row("memory, 10 idle processes (PSS)", memory, form=mebibytes)
    yield row(AS_MODULE, lean, form=mebibytes)
    up, memory, _, down, quick, lean, _, _, bare = in_turn(
        rounds, lambda: resting(sleeper, 600, PLAIN), lambda: resting(sleeper, 600, MODULE),
        lambda: bare_loop(600))
    yield row("600 processes: all up", up, bare, "a bare loop of fork and exec")
    yield row(AS_MODULE, quick, bare, "a bare loop of fork and exec")
    yield row("600 processes: Ctrl-C to exit", down)
    yield row("600 processes: memory (PSS)", memory, form=mebibytes)
    yield row(AS_MODULE, lean, form=mebibytes)


def machine():
    """The processor, the cores and the kernel."""
    model = re.search(r"model name\s*: (.*)|$", pathlib.Path("/proc/cpuinfo").read_text())[1]
    return "%s, %d cores, %s %s" % (model or platform.machine(), os.cpu_count(),
                                    platform.system(), platform.release())


def bench(rounds=5):
    """Print the table, row by row."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)    # or MODULE is compiled each time
    sed = subprocess.run(["sed", "--version"], stdout=subprocess.PIPE).stdout.decode()
    print("Medians of %d on %s; procrun %s, Python %s, %s.\n" % (
        rounds, machine(), procrun.VERSION, platform.python_version(),
        sed.split("\n")[0]))
    columns = ["what", "procrun", "yardstick", "ratio"]
    print("| %s |\n|%s" % (" | ".join(columns), " --- |" * len(columns)), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for cells in itertools.chain(throughput_rows(folder, rounds), other_rows(folder, rounds)):
            print("| %s |" % " | ".join(cells), flush=True)


if __name__ == "__main__" and sys.argv[1:2] == ["bench"]:
    bench(*map(int, sys.argv[2:]))
