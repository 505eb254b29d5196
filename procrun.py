#!/usr/bin/env python3
"""procrun - run a Procfile app: every process type of it, in one terminal, and nothing left behind.

    python procrun.py start                 all process types, until one of them ends or Ctrl-C
    python procrun.py start -c web=2        the same, with two instances of web
    python procrun.py start web             web alone
    python procrun.py run web               web's command once, in the foreground
    python procrun.py run env               any command, with the app's environment
    python procrun.py check                 is the Procfile in order?

Words (each has one meaning, here and in every message):

    Procfile      the file that names the process types, one `name: command` a line
    process type  a name and its command                       web: python app.py
    concurrency   how many instances of one type               web=2
    formation     the concurrency of every type                web=2,worker=4
    instance      one of them, with a PORT of its own          web.2, PORT=5001
    child         a forked instance; its process id is also its session and its group
    leader, group the child itself, and it with all that it started and that stayed in its group
    grace period  seconds between SIGTERM and SIGKILL          -t 5
    base port     the PORT of the first instance               -p 5000

Exit status of start: that of the first process that ended by itself (128+N if signal N killed it);
128+N if signal N to procrun began the shutdown; 1 for an error of the Procfile and the like, 2 for
a wrong call.  run: the command's own, 127 if it is not found, 126 if it cannot be executed.
"""
# How the file is built.  Data travels downwards: text becomes process types, these become
# instances, these become children.  All that only computes stands above all that talks to the
# kernel.  The cases that gave the lower half its shape:
#
# - A child leads a session and a group of its own, so that one signal reaches all that it started
#   and the terminal's Ctrl-C reaches none of it: each child gets one signal, the one procrun sends.
# - What leaves its group (a daemon) is adopted when its parent dies: procrun is a subreaper, so on
#   Linux the set has ended when the kernel says that there is no child any more, and not earlier.
# - Only ids that the kernel still reserves for us are signalled: dead children are looked at,
#   their group is signalled, and only then are they reaped.
# - Nothing but select() waits.  Signals arrive as bytes in a pipe, stdout is waited for like any
#   other file descriptor, and while it takes nothing no child is read: that is the back-pressure.
# - kill -9 of procrun runs no code of procrun.  A helper, the guard, then puts the groups down.
import errno
import os
import re
import select
import selectors
import signal
import stat
import sys
import time
from collections import namedtuple

VERSION = "0.1.0"
QUIET = 0.2        # seconds after which a line without its newline is shown
LAST = 0.5         # seconds that the end of a shutdown may take, after SIGKILL
CHUNK = 1 << 20    # bytes: one read, and the most that is kept of a line without its newline
TOO_LARGE = 1 << 24    # bytes: no Procfile and no .env is that long


class Failure(Exception):
    """An expected failure: each argument is a line for stderr; procrun ends with `status`."""
    status = 1


class UsageError(Failure):
    """A failure of the command line itself."""
    status = 2


def shown(text):
    """Bytes as one short printable str, for messages."""
    text = text.decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else "\\x%02x" % ord(c) for c in text[:60])
    return text if len(text) <= 40 else text[:40] + "..."


# Procfile: text -> process types -----------------------------------------------------------------

ProcessType = namedtuple("ProcessType", "name command line")
ProcessType.__doc__ = "A line of the Procfile: name (str), command (bytes), and its line number."

MOST_ERRORS = 100


def refuse(source, errors):
    """Raise Failure with a line for each (line number, message) of `errors`, if there are any."""
    if errors:
        lines = ["%s:%d: %s" % ((source,) + error) for error in errors[:MOST_ERRORS]]
        if len(errors) > MOST_ERRORS:
            lines.append("%s: more errors follow" % source)
        raise Failure(*lines)


def logical_lines(text):
    """Yield (line number, bytes) without line ends; a line that goes on in the next is one."""
    parts, first = [], 1
    for number, line in enumerate(text.split(b"\n"), 1):
        line = line[:-1] if line.endswith(b"\r") else line
        first = first if parts else number
        # As for the shell, an even number of backslashes escapes itself; a comment never goes on.
        backslashes = len(line) - len(line.rstrip(b"\\"))
        if backslashes % 2 and (parts or not line.lstrip().startswith(b"#")):
            parts.append(line)
            continue
        yield first, b"".join([part[:-1] for part in parts] + [line])
        parts = []
    if parts:
        yield first, b"".join([part[:-1] for part in parts[:-1]] + parts[-1:])


def entry_problem(line, lines):
    """What is wrong with this line as an entry, or None; `lines` holds the names before it."""
    name, colon, command = line.partition(b":")
    if not colon:
        return "no colon in `%s`; expected `name: command`" % shown(line)
    if not re.fullmatch(rb"[A-Za-z0-9_-]+", name):
        return "bad name `%s`; use letters, digits, _ and -" % shown(name)
    if name == b"all":
        return "the name `all` means every process type; use another"
    if name in lines:
        return "duplicate name `%s`, first on line %d; rename one" % (shown(name), lines[name])
    if not command.strip():
        return "empty command for `%s`" % shown(name)
    if b"\0" in command:
        return "NUL byte in the command of `%s`; remove it" % shown(name)
    return None


def parse_procfile(text, source="Procfile"):
    r"""Return the list of ProcessType of a Procfile (bytes), in its order.

        file     a UTF-8 byte order mark is skipped; lines end in LF or CR LF, the last may lack it
        skipped  blank lines, and lines whose first non-blank is #
        entry    name ":" blanks command
        name     one or more of A-Z a-z 0-9 _ -, each name once; "all" is taken by formations
        command  any bytes but NUL, kept as they are; if it ends in a backslash (that no other
                 backslash escapes), that is dropped and the next line is part of it

    Raises Failure that names all bad lines, or says that there is no process type at all.
    """
    types, lines, errors = [], {}, []
    for number, line in logical_lines(text[3:] if text.startswith(b"\xef\xbb\xbf") else text):
        if not line.strip() or line.lstrip().startswith(b"#"):
            continue
        problem = entry_problem(line, lines)
        if problem:
            errors.append((number, problem))
            if len(errors) > MOST_ERRORS:
                break
            continue
        name, _, command = line.partition(b":")
        types.append(ProcessType(name.decode(), command.lstrip(b" \t"), number))
        lines[name] = number
    refuse(source, errors)
    if not types:
        raise Failure("%s: no process types; a line such as `web: python app.py` is one" % source)
    return types


# Environment: text -> variables ------------------------------------------------------------------

ENV_LINE = re.compile(rb"""
    [ \t\r]* (?: \#[^\n]* )? (?: \n | \Z )
  | [ \t]* (?: export[ \t]+ )? (?P<name> [A-Za-z_0-9]+ ) [ \t]* =
    (?: [ \t]* (?: '(?P<literal> [^']* )' | "(?P<escaped> [^"\\]* (?: \\. [^"\\]* )* )" )
        [ \t\r]* (?: \#[^\n]* )?
      | (?P<bare> (?! [ \t]*['"] ) [^\n]* ) )
    (?: \n | \Z )""", re.VERBOSE | re.DOTALL)
ENV_QUOTE = re.compile(rb"[^\n=]*=[ \t]*(['\"])")
ENV_ESCAPES = {b"n": b"\n", b"t": b"\t", b'"': b'"', b"\\": b"\\", b"$": b"$"}


def env_value(match):
    """The value (bytes) of a matched ENV_LINE."""
    if match["literal"] is not None:
        return match["literal"]
    if match["escaped"] is not None:
        return re.sub(rb'\\([nt"\\$])', lambda m: ENV_ESCAPES[m[1]], match["escaped"])
    return re.split(rb"[ \t]#", match["bare"], maxsplit=1)[0].strip(b" \t\r")


def env_problem(text, start, end):
    """What is wrong with the line text[start:end], and where to go on (None: nowhere)."""
    quote = ENV_QUOTE.match(text, start, end)
    if not quote:
        return "expected NAME=value, found `%s`" % shown(text[start:end][:60]), end + 1
    closing = re.compile(rb"[^']*'" if quote[1] == b"'" else rb'[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
    closed = closing.match(text, quote.end())
    if not closed:
        return "the quote %s is never closed" % quote[1].decode(), None
    if not re.match(rb"[ \t]*(export[ \t]+)?[A-Za-z_0-9]+[ \t]*=", text[start:end]):
        return "expected NAME=value, found `%s`" % shown(text[start:end][:60]), end + 1
    after = text.find(b"\n", closed.end())
    return "text after the closing quote; only a comment may follow", after + 1 or None


def parse_env(text, source=".env"):
    r"""Return the variables of a .env file (bytes) as a dict of bytes to bytes.

        line     blank, or a comment that starts with #, or  [export] NAME = value
        NAME     one or more of A-Z a-z 0-9 _
        value    'literal', may span lines; or "escaped", may span lines, where \n \t \" \\ \$ are
                 escapes and any other backslash stays; after both only a comment may follow; or
                 bare: to the end of the line, less outer blanks and a comment, which starts with
                 a blank and #

    Nothing is expanded.  The later of two lines wins.  Raises Failure that names all bad lines.
    """
    text = text[3:] if text.startswith(b"\xef\xbb\xbf") else text
    variables, errors, place, number, counted = {}, [], 0, 1, 0
    while place is not None and place < len(text) and len(errors) <= MOST_ERRORS:
        number, counted = number + text.count(b"\n", counted, place), place
        match = ENV_LINE.match(text, place)
        if not match:
            end = text.find(b"\n", place)
            problem, place = env_problem(text, place, end if end >= 0 else len(text))
            errors.append((number, problem))
            continue
        place = match.end()
        if match["name"] and b"\0" in match[0]:
            errors.append((number, "NUL byte in the value of %s; remove it" % shown(match["name"])))
        elif match["name"]:
            variables[match["name"]] = env_value(match)
    refuse(source, errors)
    return variables


# Formation: process types -> instances -----------------------------------------------------------

class Instance(namedtuple("Instance", "type number port command")):
    """One instance: its process type's name, its number from 1, its PORT, its command (bytes)."""
    __slots__ = ()

    @property
    def name(self):
        """Its name, such as web.1."""
        return "%s.%d" % (self.type, self.number)


def parse_counts(text):
    """Return {name: count} of a formation such as "web=2,worker=4"; raises UsageError."""
    counts = {}
    for item in text.split(","):
        name, equals, count = (part.strip() for part in item.partition("="))
        if not equals or not name:
            raise UsageError("expected NAME=COUNT, found `%s`" % item)
        if not (count.isascii() and count.isdigit() and len(count) < 6):
            raise UsageError("`%s` is not a count, in `%s`" % (count, item))
        counts[name] = int(count)
    return counts


def unknown(names, known, what="process type"):
    """Raise UsageError for the first of `names` that is not among `known`."""
    for name in names:
        if name not in known:
            raise UsageError("unknown %s `%s`; there are %s" % (what, name, ", ".join(known)))


def formation(types, counts, default, names):
    """Return {process type: count} in Procfile order.

    `counts` overrides `default`, and so does its "all"; `names`, if any, are the types to run.
    """
    known = [each.name for each in types]
    unknown(names, known)
    unknown(counts, known + ["all"])
    default = counts.get("all", default)
    return {name: counts.get(name, default) if not names or name in names else 0 for name in known}


def expand(types, counts, base):
    """Return the instances, in Procfile order: PORT = base + 100 * place of the type + number - 1.

    Types that are not run keep their place, so a port never depends on what else runs.
    Raises Failure if a port is beyond 65535.
    """
    instances = [Instance(each.name, number, base + 100 * place + number - 1, each.command)
                 for place, each in enumerate(types)
                 for number in range(1, counts[each.name] + 1)]
    for instance in instances:
        if instance.port > 65535:
            raise Failure("%s: port %d is beyond 65535; choose a lower base port with -p"
                          % (instance.name, instance.port))
    return instances


def instance_variables(variables, instance):
    """Return what the instance adds to the environment: `variables`, PORT and PS (bytes)."""
    return {**variables, b"PORT": b"%d" % instance.port, b"PS": instance.name.encode()}


def base_port(option, *environments):
    """Return the base port: the option, else the first PORT of the environments, else 5000."""
    if option is not None:
        return option
    text = next((each[b"PORT"] for each in environments if b"PORT" in each), b"5000")
    if not re.fullmatch(rb"[0-9]{1,5}", text):
        raise Failure("PORT=%s in the environment is not a port; set it, or use -p" % shown(text))
    return int(text)


def selected(names, instances, option):
    """Return the set of instance names that `names` (types or instances) stand for."""
    known = list(dict.fromkeys(each.type for each in instances))
    unknown(names, known + [each.name for each in instances], "name for %s:" % option)
    return {each.name for each in instances if each.type in names or each.name in names}


# Output: bytes -> lines -> prefixed lines --------------------------------------------------------

COLOURS = tuple(code + bright for bright in ("", ";1") for code in "36 33 32 35 31 34".split())
SGR = re.compile(rb"\x1b\[[0-9;:]*m")


class Source:
    """One name in the output: its label, and the line that it has not finished yet."""
    __slots__ = ("label", "colour", "second", "prefix", "tail")

    def __init__(self, label, colour):
        self.label, self.colour = label, colour    # str, SGR code as a str
        self.second, self.prefix = None, b""       # the prefix, and the second it was made for
        self.tail = bytearray()                    # of the unfinished line, what is not shown yet


class Printer:
    """Turns what processes write into lines behind prefixes, in `queue` (buffers, in order).

    Three rules: a line begins with a prefix and only its own process adds to it; an unfinished
    line is kept back until show() or until it is CHUNK long; it is ended when another one writes.
    """

    def __init__(self, style, clock):
        self.style, self.clock = style, clock
        self.queue = []
        self.open = None        # the source whose unfinished line stands at the end of the output

    def prefix(self, source):
        """The bytes in front of each line of the source, as of now."""
        now = int(self.clock())
        if source.second != now:
            source.second, source.prefix = now, self.style.prefix(source, now)
        return source.prefix

    def lead(self, source):
        """What has to come before the next byte of the source's present line."""
        if self.open is source:
            return b""
        return (b"\n" if self.open else b"") + self.prefix(source)

    def feed(self, source, data):
        """Take bytes of a source: its whole lines are queued, the rest is kept.

        This is the hot path.  It handles chunks, not lines: one replace() puts all prefixes in,
        and the end that it put one too many on is cut off by a view, not by a copy.
        """
        end = data.rfind(b"\n") + 1
        if end:
            prefix = self.prefix(source)
            text = data.replace(b"\n", b"\n" + prefix)
            surplus = len(prefix) + len(data) - end
            self.queue += self.lead(source), bytes(source.tail), memoryview(text)[:len(text) - surplus]
            self.open = None
            source.tail = bytearray(data[end:])
        else:
            source.tail += data
        if len(source.tail) >= CHUNK:
            self.show(source)

    def show(self, source):
        """Queue the unfinished line of a source; it stays open for the source to go on with."""
        if source.tail:
            self.queue += self.lead(source), bytes(source.tail)
            self.open, source.tail = source, bytearray()

    def finish(self, source):
        """End the line of a source that will write no more."""
        if source.tail or self.open is source:
            self.feed(source, b"\n")


class Style(namedtuple("Style", "width colour stamp label")):
    """What a prefix looks like: the label's width, and whether colour, time, label are shown."""
    __slots__ = ()

    def prefix(self, source, now):
        """The prefix (bytes) of a source at `now`, in seconds since the epoch."""
        if not self.label:
            return b""
        text = "%s%-*s | " % (time.strftime("%H:%M:%S ", time.localtime(now)) if self.stamp else "",
                              self.width, source.label)
        return ("\x1b[%sm%s\x1b[0m" % (source.colour, text) if self.colour else text).encode()


def type_colours(types):
    """Return {process type: SGR code}, by place in the Procfile."""
    return {each.name: COLOURS[place % len(COLOURS)] for place, each in enumerate(types)}


# Shutdown: what to send, and when ----------------------------------------------------------------

TELL, GIVE_UP = "tell who is waited for", "give up"


def ladder(now, grace, patience):
    """Return the steps of a shutdown, as (monotonic seconds, what to do): SIGTERM, SIGKILL, end.

    `patience` is the time after which the user is told who is waited for.
    """
    steps = [(now, signal.SIGTERM), (now + patience, TELL)] if grace else []
    return steps + hurried(now + grace)


def hurried(now):
    """The last steps alone: SIGKILL now."""
    return [(now, signal.SIGKILL), (now + LAST, GIVE_UP)]


def due(steps, now):
    """Return (what is due, the steps that remain)."""
    return [what for when, what in steps if when <= now], [each for each in steps if each[0] > now]


# Everything above is pure; everything below talks to the kernel.

def complain(*lines):
    """Write lines to stderr, each behind "procrun: "; a closed stderr is no reason to fail."""
    try:
        os.write(2, "".join("procrun: %s\n" % line for line in lines).encode("utf-8", "replace"))
    except OSError:
        pass


def kill_quietly(pid, number):
    """os.kill() of a process that may be gone, or not ours to signal."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def close_quietly(fd):
    """os.close() of a number that may not be open."""
    try:
        os.close(fd)
    except OSError:
        pass


# Signals: asynchronous -> readable ---------------------------------------------------------------

CAUGHT = "INT TERM HUP QUIT USR1 USR2 TSTP CONT CHLD WINCH".split()


class Signals:
    """A context in which the caught signals are bytes to be read from `fd`, and harmless.

    Outside of it the dispositions, the mask and the wake-up fd are what they were.
    """

    def __enter__(self):
        self.caught = [getattr(signal, "SIG" + name) for name in CAUGHT]
        # nohup: a SIGHUP that is ignored from the start stays ignored, by the children too.
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            self.caught.remove(signal.SIGHUP)
        self.fd, self.wakeup = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self.wakeup, False)
        self.old_wakeup = signal.set_wakeup_fd(self.wakeup, warn_on_full_buffer=False)
        self.old = [(each, signal.signal(each, lambda *args: None)) for each in self.caught]
        self.old_mask = signal.pthread_sigmask(signal.SIG_SETMASK, ())
        return self

    def __exit__(self, *exception):
        # Blocked until the old mask returns: a late signal must not meet a half restored state.
        signal.pthread_sigmask(signal.SIG_BLOCK, self.caught)
        signal.set_wakeup_fd(self.old_wakeup)
        for number, old in self.old:
            signal.signal(number, signal.SIG_DFL if old is None else old)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.old_mask)
        os.close(self.fd)
        os.close(self.wakeup)

    def arrived(self):
        """Return the signals that came since the last call, each once, in their order."""
        try:
            return list(dict.fromkeys(os.read(self.fd, 1 << 16)))
        except BlockingIOError:
            return []

    def fork(self):
        """os.fork() with the caught signals blocked, so that none is lost between two owners.

        The parent's mask is restored here, the child's by restore_signals().
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, self.caught)
        try:
            pid = os.fork()
        except OSError:
            pid = None
            raise
        finally:
            if pid != 0:
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
        return pid


def restore_signals(keep=()):
    """In a forked child: default dispositions, but for those in `keep`, and an empty mask.

    The wake-up fd goes first, or a signal that arrives here is written into the parent's pipe.
    """
    signal.set_wakeup_fd(-1)
    for number in range(1, signal.NSIG):
        if number not in keep and signal.getsignal(number) not in (signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


# Guard: the set outlives nobody ------------------------------------------------------------------

def open_fds():
    """The numbers of the open file descriptors, as a list (of a moment ago: one may be closed)."""
    return [int(name) for name in os.listdir("/dev/fd")]


def signal_group(group, number):
    """Send a signal to a process group; return whether there was anything to receive it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):    # macOS says EPERM of a group of zombies
        return False
    return True


def guarded_groups(fd):
    """Read "+group" and "-group" lines to the end of file; return the groups that are left."""
    groups, data = {}, b""
    while True:
        chunk = os.read(fd, 4096)
        if not chunk:
            return list(groups)
        *lines, data = (data + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"+"):
                groups[int(line)] = True
            else:
                groups.pop(-int(line), None)


def remaining(sessions):
    """Return what is left of the sessions, as ids for os.kill(); `sessions` (a set) may grow.

    On Linux these are the living processes of the sessions and all their descendants, which are
    found even if they have left; elsewhere the groups in which there is anything.
    """
    try:
        names = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        names = []
    if not names:
        return [-group for group in sessions if signal_group(group, 0)]
    table = dict(filter(None, map(parentage, names)))
    size = None
    while size != len(sessions):
        size = len(sessions)
        sessions.update(session for parent, session in list(table.values())
                        if table.get(parent, (0, 0))[1] in sessions)
    return [pid for pid, (_, session) in table.items() if session in sessions]


def parentage(name):
    """Return (pid, (parent, session)) of a living process by its name in /proc, or None."""
    try:
        with open("/proc/%s/stat" % name, "rb") as file:
            state, parent, _, session = file.read().rpartition(b")")[2].split()[:4]
    except OSError:
        return None
    return None if state in b"ZX" else (int(name), (int(parent), int(session)))


def put_down(groups, grace):
    """SIGTERM to all that is left of the groups, and after the grace period SIGKILL.

    Nothing tells a process that is not the parent when others have ended (a pidfd tells of one
    process, not of a group), so this looks 50 times a second, for the grace period at most.
    """
    sessions, told = set(groups), set()
    deadline = time.monotonic() + grace
    while sessions and time.monotonic() < deadline + LAST:
        left = remaining(sessions)
        if not left:
            break
        killing = time.monotonic() >= deadline
        for each in left if killing else set(left) - told:
            kill_quietly(each, signal.SIGKILL if killing else signal.SIGTERM)
            kill_quietly(each, signal.SIGCONT)
        told.update(left)
        select.select((), (), (), 0.02)


class Guard:
    """A process that ends when procrun does, and then puts down the groups that it was told of.

    It holds the only read end of a pipe; procrun holds the write end, and each child until it has
    called exec: it announces itself there, so no moment is left in which nobody knows of it.
    """

    def __init__(self, signals, grace):
        reading, self.fd = os.pipe()
        self.pid = signals.fork()
        if not self.pid:
            self.watch(reading, grace)
        os.close(reading)

    @staticmethod
    def watch(fd, grace):
        """The forked side.  A session of its own: neither Ctrl-C nor a closed terminal reach it."""
        try:
            signal.set_wakeup_fd(-1)
            for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_IGN)
            os.setsid()
            os.chdir("/")
            for other in open_fds():
                if other != fd:
                    close_quietly(other)
            put_down(guarded_groups(fd), grace)
        finally:
            os._exit(0)

    def forget(self, group):
        """The group is empty: its id may soon be somebody else's."""
        try:
            os.write(self.fd, b"-%d\n" % group)
        except OSError:
            pass    # the guard was killed

    def dismiss(self):
        """Nothing is left to guard: let it end, and reap it."""
        os.close(self.fd)
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass


# Child: one instance, forked ---------------------------------------------------------------------

Ground = namedtuple("Ground", "root variables stdin report guard limits ignored")
Ground.__doc__ = """What all children stand on: the root directory, the environment (bytes to
bytes) before the instance's own part, the file descriptors of their stdin, of the pipe for failures
before exec, and of the guard; RLIMIT_NOFILE to restore or None; the signals to leave ignored."""


def become(ground, instance, output):
    """The forked side of a child: never returns.  A failure is reported as "pid errno" line."""
    try:
        os.setsid()
        try:
            os.write(ground.guard, b"+%d\n" % os.getpid())
        except OSError:
            pass    # the guard was killed; the child is no worse off than without one
        os.dup2(ground.stdin, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if ground.limits:
            import resource
            resource.setrlimit(resource.RLIMIT_NOFILE, ground.limits)
        restore_signals(ground.ignored)
        os.chdir(ground.root)
        os.execve("/bin/sh", [b"sh", b"-c", instance.command],
                  instance_variables(ground.variables, instance))
    except OSError as error:
        os.write(ground.report, b"%d %d\n" % (os.getpid(), error.errno))
    finally:
        os._exit(127)


def read_some(fd):
    """Return bytes that can be read now, b"" at the end of the output, None if there are none."""
    try:
        return os.read(fd, CHUNK)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno == errno.EIO:    # how a PTY says that its last writer is gone
            return b""
        raise


class Child:
    """One instance, forked.  It is done when its exit status is known and its output at its end."""
    __slots__ = ("instance", "source", "pid", "fd", "status", "began", "told")

    def __init__(self, instance, source):
        self.instance, self.source = instance, source
        self.pid = self.fd = self.status = None    # status: as of subprocess, -N for signal N
        self.began = time.monotonic()
        self.told = False                          # whether its exit is on the output

    def spawn(self, signals, ground, capacity):
        """Fork and exec; raises OSError if a pipe or the fork is not to be had."""
        self.fd, output = os.pipe()
        try:
            os.set_blocking(self.fd, False)
            widen(output, capacity)
            self.pid = signals.fork()
            if not self.pid:
                become(ground, self.instance, output)
        finally:
            os.close(output)

    def kill(self, number):
        """Send a signal to its group; only while its leader is not reaped."""
        # Between fork and setsid there is no group yet, but the leader can be reached.
        if not signal_group(self.pid, number):
            kill_quietly(self.pid, number)

    def ending(self):
        """How it ended, in words."""
        if self.status >= 0:
            return "exited with code %d" % self.status
        return "terminated by " + signal_name(-self.status)


def widen(fd, capacity):
    """Give a pipe this capacity (bytes) where the system can: fewer, larger reads."""
    try:
        import fcntl
        fcntl.fcntl(fd, getattr(fcntl, "F_SETPIPE_SZ", 1031), capacity)
    except OSError:
        pass    # not Linux, not a pipe, or beyond the user's share: it works with less


def signal_name(number):
    """SIGTERM for 15; a number for real-time signals."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return "signal %d" % number


def peek():
    """Return (pid, status) of a dead child that is not reaped yet, or (None, None)."""
    try:
        if not hasattr(os, "waitid"):    # macOS before Python 3.13: reaped here already
            pid, status = os.waitpid(-1, os.WNOHANG)
            code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            return (pid, code) if pid else (None, None)
        info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None, None
    if info is None:
        return None, None
    return info.si_pid, info.si_status if info.si_code == os.CLD_EXITED else -info.si_status


def bury(pid):
    """Reap a child that peek() has shown."""
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass


def become_subreaper():
    """Have orphaned descendants become our children (Linux); return whether that is so."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        import ctypes
        return ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0    # PR_SET_CHILD_SUBREAPER
    except (ImportError, OSError, AttributeError):
        return False


def own_children():
    """The process ids of all children, adopted ones included (Linux; elsewhere none), as a set."""
    try:
        with open("/proc/thread-self/children") as file:
            return set(map(int, file.read().split()))
    except OSError:
        return set()


# Sink: lines -> stdout ---------------------------------------------------------------------------

class Sink:
    """The stream that all output goes to.  It never blocks and never loses a byte: what it does
    not take now stays in the queue, and `full` says so."""

    def __init__(self, fd):
        self.fd, self.full, self.error = fd, False, None
        self.moved = 0            # bytes written so far
        self.most = None          # bytes to write at once, None: any number
        mode = os.fstat(fd).st_mode
        self.waits = not (stat.S_ISREG(mode) or stat.S_ISBLK(mode) or os.path.samestat(
            os.fstat(fd), os.stat(os.devnull)))
        if self.waits:
            self.open_again()

    def open_again(self):
        """Get a non-blocking file description of our own; the given one is shared with others.

        Where that cannot be had (a socket, macOS, a terminal of another user), no more is written
        at once than a writable pipe takes without blocking (PIPE_BUF, POSIX)."""
        try:
            self.fd = os.open("/proc/self/fd/%d" % self.fd,
                              os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            widen(self.fd, CHUNK)
        except OSError:
            self.most = 512

    def ready(self):
        """Whether a write can be tried without blocking."""
        return not self.most or bool(select.select((), (self.fd,), (), 0)[1])

    def write(self, queue):
        """Write buffers from the front of the queue, and take them out of it, while that goes."""
        try:
            self.full = False
            while queue and not self.full:
                self.full = not self.ready() or not self.write_once(queue)
        except BlockingIOError:
            self.full = True
        except OSError as error:
            self.error, self.full = error, False
            queue.clear()

    def write_once(self, queue):
        """One system call; returns whether anything was taken."""
        batch = [queue[0][:self.most]] if self.most else queue[:256]
        taken = os.writev(self.fd, batch)
        self.moved += taken
        for place, buffer in enumerate(batch):
            if taken < len(queue[place]):
                queue[place] = memoryview(queue[place])[taken:]
                del queue[:place]
                return True
            taken -= len(buffer)
        del queue[:len(batch)]
        return True


# Supervisor: the set -----------------------------------------------------------------------------

class Options(namedtuple("Options", "grace can_die quiet strip")):
    """How a set is run: grace period (seconds), the instances whose exit 0 does not end it, those
    whose output is dropped, and whether the children's colours are."""
    __slots__ = ()


class Supervisor:
    """The set of children, from the first fork to the last reaping; run() tells the story."""

    def __init__(self, options, printer, sink, signals):
        self.options, self.printer, self.sink, self.signals = options, printer, sink, signals
        self.system = Source("system", "37")
        self.children = {}         # process id -> Child
        self.undone = 0            # children that are not done
        self.partial = {}          # Child with an unfinished line -> when to show it; in that order
        self.steps = []            # what is left of the shutdown
        self.status = None         # the exit status, from the begin of the shutdown on
        self.over = False          # the shutdown has been given up, or is complete
        self.killed = []           # names of instances that got SIGKILL
        self.warned = set()        # adopted processes that got SIGTERM
        self.failed = set()        # process ids that never came to exec
        self.adopts = become_subreaper()
        self.strangers = own_children()    # a shell's that exec'ed procrun, say: not ours to end
        self.busy, self.stalled = selectors.DefaultSelector(), selectors.DefaultSelector()
        for selector in (self.busy, self.stalled):
            selector.register(signals.fd, selectors.EVENT_READ, self.on_signals)
        if sink.waits:
            self.stalled.register(sink.fd, selectors.EVENT_WRITE, self.flush)

    def run(self, instances, colours, ground):
        """Run the instances; return the exit status."""
        self.guard = Guard(self.signals, self.options.grace)
        self.strangers.add(self.guard.pid)
        try:
            self.start(instances, colours, ground._replace(guard=self.guard.fd))
            while not self.finished():
                self.turn()
            self.conclude()
        finally:
            self.put_down()
        return self.status

    # -- start

    def start(self, instances, colours, ground):
        """Fork all instances; they report on one pipe, which is at its end when all have exec'ed."""
        reports, report = os.pipe()
        os.set_blocking(reports, False)
        stdin, self.unwritten = os.pipe()
        self.reports, self.report_text = reports, b""
        ground = ground._replace(report=report, stdin=stdin)
        capacity = 1 << max(16, min(20, (1 << 23) // len(instances)).bit_length() - 1)
        self.busy.register(reports, selectors.EVENT_READ, self.on_reports)
        try:
            for instance in instances:
                child = Child(instance, Source(instance.name, colours[instance.type]))
                child.spawn(self.signals, ground, capacity)
                self.add(child)
        except OSError as error:
            self.fail("%s: cannot start: %s" % (instance.name, error.strerror))
        finally:
            os.close(report)
            os.close(stdin)
        self.flush()

    def add(self, child):
        """A child was forked: know it, say so, read it."""
        self.children[child.pid] = child
        self.undone += 1
        self.busy.register(child.fd, selectors.EVENT_READ, lambda: self.on_output(child))
        self.say("started with pid %d, PORT=%d" % (child.pid, child.instance.port), child.source)

    def fail(self, message):
        """procrun cannot go on: say so, end the set with status 1."""
        complain(message)
        self.begin(1, None)

    # -- output

    def say(self, text, source=None):
        """A line of procrun's own."""
        source = source or self.system
        self.printer.feed(source, text.encode() + b"\n")

    def flush(self):
        """Write what is queued, as far as stdout takes it."""
        self.sink.write(self.printer.queue)
        if self.sink.error and not self.over and self.status is None:
            self.lost_output(self.sink.error)

    def lost_output(self, error):
        """Nobody reads any more, or the disk is full: that ends the set, as SIGPIPE ends others."""
        if error.errno in (errno.EPIPE, errno.EIO):
            self.begin(128 + signal.SIGPIPE, None)
        else:
            self.fail("cannot write the output: %s" % error.strerror)

    def on_output(self, child):
        """A child has written, or its output is at its end."""
        if child.fd is None or self.sink.full:
            return
        data = read_some(child.fd)
        if data:
            self.take(child, data)
        elif data is not None:
            self.close(child)

    def take(self, child, data):
        """Pass on what was read from a child."""
        if self.sink.error or child.instance.name in self.options.quiet:
            return
        self.printer.feed(child.source, data)
        self.partial.pop(child, None)
        if child.source.tail:
            self.partial[child] = time.monotonic() + QUIET
        if len(data) > 1 << 16:
            self.flush()

    def drain(self, child):
        """A dead leader's last words: what its pipe holds now.  Others may hold the pipe, too, and
        go on writing, so this is bounded by what a pipe can hold."""
        room = CHUNK
        while child.fd is not None and room > 0 and not self.sink.full:
            data = read_some(child.fd)
            if data is None:
                return
            room -= len(data)
            self.take(child, data) if data else self.close(child)

    def close(self, child):
        """The output of a child is at its end."""
        self.busy.unregister(child.fd)
        os.close(child.fd)
        child.fd = None
        self.partial.pop(child, None)
        self.printer.finish(child.source)
        self.settle(child)

    def settle(self, child):
        """Tell the exit of a child that is done."""
        if child.fd is None and child.status is not None and not child.told:
            child.told = True
            self.undone -= 1
            self.say(child.ending(), child.source)

    # -- signals and exits

    def on_reports(self):
        """Children tell why they could not start; at the end of this pipe all have exec'ed."""
        if self.reports is None:
            return
        data = read_some(self.reports)
        if data == b"":
            self.busy.unregister(self.reports)
            os.close(self.reports)
            self.reports = None
        *lines, self.report_text = (self.report_text + (data or b"")).split(b"\n")
        for line in lines:
            pid, number = map(int, line.split())
            self.failed.add(pid)
            self.fail("%s: cannot start: %s" % (self.children[pid].instance.name,
                                                os.strerror(number)))

    def on_signals(self):
        """Act upon the signals that arrived; whatever it was, look for dead children as well:
        SIGCHLDs coalesce."""
        for number in self.signals.arrived():
            if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                self.on_end(number)
            elif number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
                self.signal_all(number)
            elif number == signal.SIGTSTP:
                self.pause()
        self.reap()

    def on_end(self, number):
        """A signal that ends procrun: the first begins the shutdown, a later Ctrl-C hurries it."""
        if self.status is None:
            self.say("%s received, shutting down" % signal_name(number))
            self.begin(128 + number, None)
        elif number in (signal.SIGINT, signal.SIGTERM) and not self.killing():
            self.steps = hurried(time.monotonic())

    def pause(self):
        """Ctrl-Z: the children are in sessions of their own, where the terminal's SIGTSTP does not
        reach them and their own would be ignored (orphaned groups), so it is SIGSTOP for all."""
        self.signal_all(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)

    def reap(self):
        """Look at each dead child, act, and only then reap it: until then its id is its own."""
        while True:
            pid, status = peek()
            if pid is None:
                break
            if pid in self.children:
                self.on_reports()    # a failure before exec is told before it is an exit
                self.on_exit(self.children[pid], status)
            bury(pid)
            self.strangers.discard(pid)
            if pid in self.children and not signal_group(pid, 0):
                self.guard.forget(pid)
        if self.steps:
            self.signal_adopted()

    def on_exit(self, child, status):
        """A leader has died."""
        child.status = status
        ended_by_itself = self.status is None and not (
            status == 0 and child.instance.name in self.options.can_die)
        if ended_by_itself:
            self.begin(status if status >= 0 else 128 - status, child)
        self.drain(child)
        self.settle(child)

    # -- the end

    def signal_all(self, number):
        """Send a signal to all groups, and to what has left them and was adopted."""
        for child in self.children.values():
            # A dead leader's group: on Linux its members are adopted when they are orphans.
            if child.status is None or (not self.adopts and child.fd is not None):
                child.kill(number)
        for pid in self.adopted():
            kill_quietly(pid, number)

    def adopted(self):
        """The children that procrun did not fork: what leaders left behind when they died."""
        return own_children() - self.strangers - set(self.children) if self.adopts else set()

    def signal_adopted(self):
        """During a shutdown: SIGTERM, once, to the newly adopted; SIGKILL if it has come to that."""
        for pid in self.adopted():
            if self.killing():
                kill_quietly(pid, signal.SIGKILL)
            elif pid not in self.warned:
                self.warned.add(pid)
                kill_quietly(pid, signal.SIGTERM)
                kill_quietly(pid, signal.SIGCONT)

    def killing(self):
        """Whether SIGKILL has been sent."""
        return self.status is not None and all(what is GIVE_UP for _, what in self.steps)

    def begin(self, status, child):
        """Begin the shutdown; `status` is procrun's, `child` the one that caused it, if any did."""
        if self.status is not None:
            return
        self.status = status
        if child:
            self.drain(child)
            self.say("%s %s after %.1f s, stopping the rest" % (
                child.instance.name, child.ending(), time.monotonic() - child.began))
        patience = 0.1 if os.isatty(1) else 1.0
        self.steps = ladder(time.monotonic(), self.options.grace, patience)
        self.obey()

    def obey(self):
        """Do what the shutdown has due."""
        if not self.steps:
            return
        whats, self.steps = due(self.steps, time.monotonic())
        for what in whats:
            if what is TELL:
                self.tell()
            elif what is GIVE_UP:
                self.give_up()
            else:
                self.send(what)

    def send(self, number):
        """SIGTERM or SIGKILL to all that is left."""
        alive = [each for each in self.children.values() if each.status is None]
        if alive or self.undone:
            self.say("sending %s to all processes" % signal_name(number))
        if number == signal.SIGKILL:
            self.killed += [each.instance.name for each in alive]
        self.signal_all(number)
        if number == signal.SIGTERM:
            self.warned |= self.adopted()
            self.signal_all(signal.SIGCONT)    # or a stopped one would not see its SIGTERM

    def tell(self):
        """Say who is waited for."""
        names = [each.instance.name for each in self.children.values() if each.status is None]
        names += ["process %d" % pid for pid in sorted(self.adopted())]
        if names:
            left = next((when for when, what in self.steps if what == signal.SIGKILL), 0)
            self.say("waiting for %s (SIGKILL in %.0f s; Ctrl-C kills now)" % (
                ", ".join(names), max(0, left - time.monotonic())))

    def give_up(self):
        """SIGKILL was sent and its time is over.  While stdout takes something, go on; else end:
        what still holds a pipe has left its group where that cannot be helped (not Linux)."""
        if self.sink.full and self.sink.moved != self.moved_before:
            self.moved_before = self.sink.moved
            self.steps = [(time.monotonic() + LAST, GIVE_UP)]
            return
        self.over = True
        for child in self.children.values():
            if child.fd is not None and not self.sink.full:
                self.drain(child)
            if child.fd is not None:
                self.say("its output is still held by a process that left its group", child.source)
                self.close(child)

    moved_before = 0

    def finished(self):
        """Whether every child is done and nothing of theirs is left, or the shutdown was given up."""
        if self.over:
            return True
        if self.undone:
            return False
        if self.status is None:
            self.begin(0, None)    # all that may die have died
        return not self.printer.queue and not self.adopted()

    def timeout(self):
        """Seconds until something is due, None if nothing is."""
        times = [when for when, _ in self.steps[:1]]
        if self.partial and not self.sink.full:
            times.append(next(iter(self.partial.values())))
        return max(0, min(times) - time.monotonic()) if times else None

    def turn(self):
        """Wait for something to happen, and act upon it.  The only place that waits."""
        selector = self.stalled if self.sink.full else self.busy
        for key, _ in selector.select(self.timeout()):
            key.data()
        self.show_partial()
        self.obey()
        self.flush()

    def show_partial(self):
        """Show the unfinished lines that have been quiet for long enough."""
        while self.partial and not self.sink.full:
            child, when = next(iter(self.partial.items()))
            if when > time.monotonic():
                break
            del self.partial[child]
            self.printer.show(child.source)

    def conclude(self):
        """The last line."""
        if self.killed:
            self.say("killed %d: %s" % (len(self.killed), ", ".join(self.killed)))
        self.flush()

    def put_down(self):
        """Whatever happened: leave no child, no helper and no zombie."""
        for child in self.children.values():
            if child.status is None:
                child.kill(signal.SIGKILL)
        for pid in self.adopted():
            kill_quietly(pid, signal.SIGKILL)
        for child in self.children.values():
            if child.status is None and not self.over:
                bury(child.pid)
        self.guard.dismiss()


# Command line ------------------------------------------------------------------------------------

def read_file(path):
    """Return the bytes of a file, "-" being standard input; raises Failure."""
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            text = file.read(TOO_LARGE + 1)
    except OSError as error:
        raise Failure("%s: %s" % (path, error.strerror))
    if len(text) > TOO_LARGE:
        raise Failure("%s: longer than %d MiB; is it the right file?" % (path, TOO_LARGE >> 20))
    return text


App = namedtuple("App", "types variables root")
App.__doc__ = "What the files say: the process types, the variables of .env, the root directory."

EXAMPLE = ("no %s here; write one, a line for each process type, such as:",
           "    web: python3 -m http.server $PORT", "    worker: python3 worker.py")


def procfile_path(args):
    """Where the Procfile is: -f, else in the root directory, else here."""
    return args.procfile or os.path.join(args.root or "", "Procfile")


def load_types(args):
    """Read the Procfile."""
    path = procfile_path(args)
    if not args.procfile and not os.path.exists(path):
        raise Failure(EXAMPLE[0] % path, *EXAMPLE[1:])
    return parse_procfile(read_file(path), path)


def load_app(args, types):
    """Read the environment files, and find the root directory."""
    path = procfile_path(args)
    root = args.root or ("." if path == "-" else os.path.dirname(path))
    default = os.path.join(root, ".env")
    files = [name for each in args.env or () for name in each.split(",")]
    variables = {}
    for name in files or [default] * os.path.exists(default):
        variables.update(parse_env(read_file(name), name))
    return App(types, variables, os.path.abspath(root))


def app_environment(app):
    """Return the environment of all instances alike: procrun's own, overlaid by .env."""
    return {b"PYTHONUNBUFFERED": b"1", **os.environb, **app.variables}


def planned(args, app):
    """Return the instances that the command line asks for."""
    for given in (args.concurrency, args.formation):
        merged = {}
        for each in given or ():
            merged.update(each)
        if given:
            break
    counts = formation(app.types, merged, 0 if args.formation else 1, getattr(args, "names", ()))
    instances = expand(app.types, counts, base_port(args.port, app.variables, os.environb))
    if not instances:
        raise UsageError("nothing to run: every process type has a count of 0")
    return instances


def wants_colour(option, environment, terminal):
    """Whether to colour: --color, else NO_COLOR, FORCE_COLOR (no-color.org), else a terminal."""
    if option != "auto":
        return option == "always"
    if environment.get("NO_COLOR"):
        return False
    if environment.get("FORCE_COLOR"):
        return True
    return terminal and environment.get("TERM") != "dumb"


def raise_fd_limit(needed):
    """Allow procrun `needed` file descriptors; return the limits to restore in a child, or None."""
    import resource
    soft, hard = old = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return None
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise Failure("too few file descriptors: %d are needed, the limit is %d (ulimit -n)"
                      % (needed, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return old


def tidy_fds():
    """Make sure that 0, 1 and 2 are open, and that no child inherits anything else."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)    # takes the lowest free number, which is fd
    for fd in open_fds():
        try:
            os.set_inheritable(fd, fd < 3)
        except OSError:
            pass    # it was the one that listed them


def cmd_start(args):
    """procrun start: run the formation until it ends."""
    app = load_app(args, load_types(args))
    instances = planned(args, app)
    can_die = selected(split_names(args.can_die), instances, "--can-die")
    quiet = selected(split_names(args.quiet), instances, "--quiet")
    if not os.path.isdir(app.root):
        raise Failure("%s: no such directory; it is to be the root directory" % app.root)
    tidy_fds()
    style = Style(max([6] + [len(each.name) for each in instances]),
                  wants_colour(args.color, os.environ, os.isatty(1)),
                  args.timestamp, args.prefix)
    ignored = {each for each in [signal.SIGHUP] if signal.getsignal(each) == signal.SIG_IGN}
    limits = raise_fd_limit(len(instances) + 20)
    ground = Ground(app.root, app_environment(app), None, None, None, limits, ignored)
    options = Options(args.timeout, can_die, quiet, args.color == "never")
    with Signals() as signals:
        supervisor = Supervisor(options, Printer(style, time.time), Sink(1), signals)
        return supervisor.run(instances, type_colours(app.types), ground)


def split_names(given):
    """["a,b", "c"] -> ["a", "b", "c"]."""
    return [name for each in given or () for name in each.split(",")]


def cmd_run(args):
    """procrun run: become the command."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UsageError("run what? name a process type, or a command")
    known = os.path.exists(procfile_path(args)) or args.procfile
    types = load_types(args) if known and len(command) == 1 else []
    app = load_app(args, types)
    environment = app_environment(app)
    counts = {each.name: int(each.name == command[0]) for each in types}
    for instance in expand(types, counts, base_port(args.port, app.variables, os.environb)):
        environment = instance_variables(environment, instance)
        command = ["/bin/sh", "-c", instance.command]
    try:
        os.chdir(app.root)
    except OSError as error:
        raise Failure("%s: %s" % (app.root, error.strerror))
    restore_signals({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT} - {signal.SIGINT})
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        complain("%s: %s" % (command[0], error.strerror))
        return 127 if error.errno in (errno.ENOENT, errno.ENOTDIR) else 126


def cmd_check(args):
    """procrun check: parse everything."""
    app = load_app(args, load_types(args))
    print("valid procfile detected (%s)" % ", ".join(each.name for each in app.types))
    return 0


def cmd_version(args):
    """procrun version."""
    print("procrun " + VERSION)
    return 0


def seconds(text):
    """An argparse type: a grace period."""
    value = float(text)
    if not 0 <= value < 1e9:
        raise ValueError(text)
    return value


def port(text):
    """An argparse type: a port."""
    if not text.isdigit() or int(text) > 65535:
        raise ValueError(text)
    return int(text)


def build_parser():
    """The command line, as argparse has it."""
    import argparse

    class Parser(argparse.ArgumentParser):
        """Errors are one line, and options are not guessed from their first letters."""

        def __init__(self, **options):
            super().__init__(allow_abbrev=False,
                             formatter_class=argparse.RawDescriptionHelpFormatter, **options)

        def error(self, message):
            raise UsageError("%s (see %s --help)" % (message, self.prog))

    def common(parser, default):
        group = parser.add_argument_group("options of every command, before or after it")
        group.add_argument("-f", "--procfile", metavar="FILE", default=default,
                           help="the Procfile (default: Procfile; - is standard input)")
        group.add_argument("-d", "--root", metavar="DIR", default=default,
                           help="where the commands run and .env is (default: the Procfile's folder)")
        group.add_argument("-e", "--env", metavar="FILE[,FILE]", action="append", default=default,
                           help="read these instead of .env; repeatable")

    parser = Parser(prog="procrun", description=__doc__)
    common(parser, None)
    parser.add_argument("--version", action="version", version="procrun " + VERSION)
    commands = parser.add_subparsers(dest="command_name", metavar="COMMAND", parser_class=Parser)

    def command(name, function, text):
        sub = commands.add_parser(name, help=text, description=text)
        common(sub, argparse.SUPPRESS)
        sub.set_defaults(function=function)
        return sub

    start = command("start", cmd_start, "run the process types until one of them ends")
    start.add_argument("names", nargs="*", metavar="NAME", help="run these process types only")
    formation_options(start)
    start.add_argument("--can-die", metavar="NAME[,NAME]", action="append",
                       help="an exit 0 of these does not end the set")
    start.add_argument("--quiet", metavar="NAME[,NAME]", action="append",
                       help="drop the output of these; their exits are told")
    start.add_argument("--color", choices=("auto", "always", "never"), default="auto",
                       help="colour the prefixes (default: auto, on a terminal)")
    start.add_argument("--no-timestamp", dest="timestamp", action="store_false",
                       help="no time in front of the lines")
    start.add_argument("--no-prefix", dest="prefix", action="store_false",
                       help="nothing in front of the lines")
    run = command("run", cmd_run, "run one process type, or any command, in the foreground")
    run.add_argument("-p", "--port", type=port, metavar="N", help="base port")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="NAME | COMMAND [ARG ...]",
                     help="a process type, or a command with its arguments")
    command("check", cmd_check, "parse the Procfile and the environment files")
    command("version", cmd_version, "print the version")
    return parser


def formation_options(parser):
    """The options that start and export share."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("-c", "--concurrency", metavar="NAME=N[,NAME=N]", action="append",
                        type=parse_counts, help="so many instances; types not named stay at 1")
    either.add_argument("-m", "--formation", metavar="NAME=N[,NAME=N]", action="append",
                        type=parse_counts, help="the same, but types not named are not run; "
                        "all=N says how many of them")
    parser.add_argument("-p", "--port", type=port, metavar="N",
                        help="base port (default: PORT of .env or the environment, or 5000)")
    parser.add_argument("-t", "--timeout", type=seconds, default=5.0, metavar="SECONDS",
                        help="grace period between SIGTERM and SIGKILL (default: 5; 0 kills at once)")


def main(argv=None):
    """Run procrun; return its exit status."""
    if not hasattr(os, "fork"):
        complain("this system has no fork(); procrun needs Linux, macOS or another Unix")
        return 1
    try:
        parser = build_parser()
        args = parser.parse_args(argv)
        if not args.command_name:
            parser.print_help()
            return 2
        return args.function(args)
    except Failure as failure:
        complain(*failure.args)
        return failure.status


if __name__ == "__main__":
    sys.exit(main())
