#!/usr/bin/env python3
"""procrun - run a Procfile app: all its processes in one terminal, and nothing left behind

    procrun start [NAME ...]         run all process types, or those named, until one of them ends
    procrun run NAME                 run one process type's command, in the foreground
    procrun run COMMAND [ARG ...]    run any other command with the app's environment
    procrun check                    check the Procfile and the environment files
    procrun export FORMAT LOCATION   write the same app for a process manager, such as systemd
    procrun version                  print the version
    procrun COMMAND --help           list the options of a command

Examples:

    python3 procrun.py start -c web=2                two instances of web
    python3 procrun.py start web --attach web        web alone; its debugger has the terminal
    python3 procrun.py start --keep-going            whatever ends, the others go on
    python3 procrun.py run python3 manage.py migrate
    python3 procrun.py export systemd /etc/systemd/system

While start runs, its terminal takes these commands:

    restart [NAME ...]   restart all instances, those of a type (web), or a single one (web.2)
    stop NAME ...        end them; they stay ended until restart
    attach NAME          type into a process; Ctrl-D leaves it (under --pty: Ctrl-])
    ps                   list the instances: pid, PORT, and how long each has run or how it ended
    help                 list these commands

Exit status of start:

    N       that of the process whose end ended the others (128+N: signal N killed it); with
            --keep-going that of the first that failed
    128+N   signal N to procrun began the shutdown
    141     nobody reads the output any more
    1       an error, as in the Procfile
    2       an error of the command line

run has that of the command, 127 if it is not found, or 126 if it cannot be executed.
"""
# How the file is built.  Data travels downwards: text becomes process types, these become
# instances, these become files for a process manager, or children.  All that only computes stands
# above all that talks to the kernel.  The cases that gave the lower half its shape:
#
# - kill -9 of procrun runs no code of procrun.  So there are two processes: in front the one that
#   was called, which reads, prints and decides, and behind it the guard, which forks, signals and
#   reaps.  Orders go from one to the other by a pipe; when it ends, the guard ends all by itself.
# - A child leads a session and a group of its own, so that one signal reaches all that it started
#   and the terminal's Ctrl-C reaches none of it: a child gets one signal, the one procrun sends.
# - What leaves its group (a daemon) is adopted when its parent dies: the guard is a subreaper, so
#   on Linux the set has ended when the kernel says that the guard has no child any more.
# - Only ids that the kernel still reserves for us are signalled: dead children are looked at,
#   their group is signalled, and only then are they reaped (on macOS, as nearly as can be).
# - Nothing but select() waits as long as there is anything to do.  Signals arrive as bytes in a
#   pipe, stdout is waited for like any other file descriptor, and while it takes nothing no child
#   is read: that is the back-pressure.
import os
import sys

if not hasattr(os, "fork"):
    sys.exit("procrun: this system has no fork(); procrun needs Linux, macOS or another Unix")
if __name__ == "__main__" and not sys.flags.isolated:
    sys.path.pop(0)    # the app's folder: its own signal.py or resource.py is not meant below

import errno
import re
import select
import selectors
import signal
import stat
import time
from collections import namedtuple
from functools import partial

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C before there is anything: no traceback

import fcntl
import resource
import termios

VERSION = "0.1.0"
QUIET = 0.2            # seconds after which a line without its newline is shown
LAST = 0.5             # seconds that the end of a shutdown may take, after SIGKILL
CHUNK = 1 << 20        # bytes: one read, and the most that is kept of a line without its newline
LITTLE = 1 << 16       # bytes: one read where little is expected (more costs a mmap and a munmap)
TOO_LARGE = 1 << 24    # bytes: no Procfile and no .env is that long
MOST_ERRORS = 10       # of one file, in full


class Failure(Exception):
    """An expected failure: each argument is a line for stderr; procrun ends with `status`."""
    status = 1


class UsageError(Failure):
    """A failure of the command line itself."""
    status = 2


class Problems(list):
    """What is wrong with a file, as lines for stderr: the first ones, then one with a count."""
    more = 0

    def add(self, source, number, problem):
        """Add the problem of a line, by its number."""
        if len(self) < MOST_ERRORS:
            self.append("%s:%d: %s" % (source, number, problem))
        else:
            self.more += 1
            self[MOST_ERRORS:] = ["%s: and %d more" % (source, self.more)]


def printable(text):
    """Bytes as one short printable str, for messages."""
    text = repr(text[:200].decode("utf-8", "replace"))[1:-1]
    return text if len(text) <= 40 else text[:40] + "..."


def plain_lines(text):
    """The bytes of a file without a UTF-8 byte order mark, and with LF for each CR LF."""
    return re.sub(rb"\A\xef\xbb\xbf", b"", text).replace(b"\r\n", b"\n")


def is_comment(line):
    """Whether a line (bytes) is a comment, or blank."""
    return line.strip()[:1] in (b"", b"#")


# Procfile: text -> process types -----------------------------------------------------------------

ProcessType = namedtuple("ProcessType", "name command")
ProcessType.__doc__ = "A process type of the Procfile: its name (str) and its command (bytes)."


def logical_lines(text):
    """Yield (number, line) for each line; one that ends in a backslash is joined with the next."""
    parts, first = [], 1
    for number, line in enumerate(text.split(b"\n"), 1):
        # As for the shell, an even number of backslashes escapes itself; a comment never goes on.
        backslashes = len(line) - len(line.rstrip(b"\\"))
        if backslashes % 2 and (parts or not line.lstrip().startswith(b"#")):
            parts.append(line[:-1])
        else:
            yield first, b"".join(parts + [line])
            parts, first = [], number + 1
    if parts:
        yield first, b"".join(parts) + b"\\"


def entry_problem(line, lines):
    """What is wrong with this line as an entry, or None; `lines` holds the names before it."""
    name, colon, command = line.partition(b":")
    if not colon:
        return "no colon in `%s`; expected `name: command`" % printable(line)
    if not re.fullmatch(rb"[A-Za-z0-9_-]+", name):
        return "bad name `%s`; use letters, digits, _ and -" % printable(name)
    if name == b"all":
        return "the name `all` means every process type; use another"
    if name in lines:
        return "duplicate name `%s`, first on line %d; rename one" % (printable(name), lines[name])
    if not command.strip():
        return "empty command for `%s`; write one after the colon" % printable(name)
    if b"\0" in command:
        return "NUL byte in the command of `%s`; remove it" % printable(name)
    return None


def parse_procfile(text, source="Procfile"):
    r"""Return the list of ProcessType of a Procfile (bytes), in its order.

        file     a UTF-8 byte order mark is skipped; lines end in LF or CR LF, the last may lack it
        skipped  blank lines, and lines whose first non-blank is #
        entry    name ":" blanks command
        name     one or more of A-Z a-z 0-9 _ -, each name once; "all" is taken by formations
        command  any bytes but NUL, kept as they are; if it ends in a backslash (that no other
                 backslash escapes), that is dropped and the next line is part of it

    Raises Failure with the first ten errors and a count, or if there is no process type at all.
    """
    types, lines, problems = [], {}, Problems()
    for number, line in logical_lines(plain_lines(text)):
        if is_comment(line):
            continue
        problem = entry_problem(line, lines)
        name, _, command = line.partition(b":")
        if problem:
            problems.add(source, number, problem)
        else:
            types.append(ProcessType(name.decode(), command.lstrip(b" \t")))
            lines[name] = number
    if not types and not problems:
        problems = ["%s: no process types; write a line such as `web: python app.py`" % source]
    if problems:
        raise Failure(*problems)
    return types


# Environment: text -> variables ------------------------------------------------------------------

# A name, and the quote that opens the value, if there is one.
ENV_LINE = rb"""[ \t]*(?:export[ \t]+)?([^\0- \x7f='"#][^\0- \x7f='"]*)[ \t]*=(?:[ \t]*(['"]))?"""
ENV_ESCAPES = {b"n": b"\n", b"t": b"\t", b'"': b'"', b"\\": b"\\", b"$": b"$"}
# One that is never closed is matched, too: if it were not, a value that is full of them would take
# hours, because each would look for its } up to the end.
ENV_EXPANSION = rb"|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?(\}|\Z)"
MOST_VALUE = 1 << 20    # bytes; Linux gives a process no more than 128 KiB (execve(2))


def raw_value(text, quote, start):
    """Return (the value as it is written, where its last line ends).

    It begins at `start`, behind its `quote` or, if that is None, behind the =.  Raises
    ValueError(what is wrong, where its last line ends).
    """
    end = text.index(b"\n", start)
    if not quote:
        return re.split(rb"[ \t]#", text[start:end], maxsplit=1)[0].strip(b" \t"), end
    # A quote that is not escaped stands behind an even number of backslashes.
    closing = re.compile(rb"'" if quote == b"'" else rb'(?<!\\)(?:\\\\)*"').search(text, start)
    if not closing:
        raise ValueError("the quote %s is never closed" % quote.decode(), len(text))
    end = text.index(b"\n", closing.end())
    if not is_comment(text[closing.end():end]):
        raise ValueError("text after the closing quote; only a comment may follow", end)
    return text[start:closing.end() - 1], end


def expand_value(value, quote, known):
    """Return (the value with its escapes and expansions replaced, the undefined names in it)."""
    if quote == b"'":
        return value, ()
    missing = {}

    def replacement(match):
        escaped, name, default, closed = match.groups()
        if escaped:
            return ENV_ESCAPES[escaped]
        if not closed:
            return match[0]
        if name not in known and default is None:
            missing[name.decode()] = True
        return known.get(name) or default or b""

    escapes = rb'\\([nt"\\$])' if quote else rb"\\(\$)(?=\{)"
    return re.sub(escapes + ENV_EXPANSION, replacement, value), missing


def parse_env(text, source=".env", environment=()):
    r"""Return (variables, warnings) of a .env file (bytes): a dict of bytes to bytes, and lines
    for stderr, one for each name in a value that nothing defines.

        file     as a Procfile, a UTF-8 byte order mark is skipped, and lines end in LF or CR LF
        line     blank, or a comment that starts with #, or  [export] NAME = value
        NAME     any characters but = " ' blanks and control characters; # is not the first
        value    'literal', may span lines; or "escaped", may span lines, where \n \t \" \\ \$ are
                 escapes and any other backslash stays; after both only a comment may follow; or
                 bare: to the end of the line, less outer blanks and a comment, which starts with
                 a blank and #; there \${ is ${
        ${X}     unless literal or behind a backslash: the value of X by a line above, else by
                 `environment` (bytes to bytes), else nothing; X has letters, digits and _
        ${X:-d}  the same, but d if that is empty; d is taken as it stands, to the first }

    Any other $ stays as it is, and what was put in is not expanded again.  The later of two lines
    wins.  Raises Failure with the first ten errors and a count; it shows no value.
    """
    text = plain_lines(text + b"\n")
    variables, known, problems, warnings = {}, dict(environment), Problems(), Problems()
    place, number = 0, 1
    while place < len(text):
        end = text.index(b"\n", place)
        line = re.compile(ENV_LINE).match(text, place)
        try:
            if line:
                name, quote = line.groups()
                value, end = raw_value(text, quote, line.end())
                value, missing = expand_value(value, quote, known)
                if b"\0" in value:
                    raise ValueError("NUL byte in the value; remove it", end)
                if len(value) > MOST_VALUE:
                    # The rest is not read: it could make a longer one of this, line by line.
                    raise ValueError("the value is longer than 1 MiB", len(text))
                variables[name] = known[name] = value
                for each in missing:
                    warning = "warning: ${%s} is not defined, so it is empty" % each
                    warnings.add(source, number, warning)
            elif not is_comment(text[place:end]):
                raise ValueError("expected NAME=value", end)    # not shown: it may be a secret
        except ValueError as error:
            problem, end = error.args
            problems.add(source, number, problem)
        number += text.count(b"\n", place, end + 1)
        place = end + 1
    if problems:
        raise Failure(*problems)
    return variables, warnings


# Formation: process types -> instances -----------------------------------------------------------

# What some /bin/sh (dash, bash, busybox, ksh, mksh, yash, zsh) does not run as a program.
NOT_PROGRAMS = frozenset(b"""! . : [ [[ alias autoload bg bind break builtin caller case cd chdir
    command compgen complete compopt continue coproc declare dirs disown do done echo elif else
    enable esac eval exec exit export false fc fg fi float for foreach function getopts global hash
    help history if in integer jobs kill let limit local logout mapfile namespace newgrp nocorrect
    noglob popd print printf pushd pwd read readarray readonly rehash repeat return sched select
    set setopt shift shopt source suspend test then time times trap true type typeset ulimit
    umask unalias unset until vared wait whence where which while""".split())
TRAP = b"""trap 'trap "" TERM; wait; exit 143' TERM; """


def shell_text(command):
    """The text (bytes) that /bin/sh -c gets for a command (bytes), under start and exported.

    A command that is plainly one program takes the shell's place, so that its process id, the
    signal and the exit status are its own; Debian's sh does not do that by itself.  Anything
    else, or in doubt, stands behind a trap that makes the shell outlive what it runs: it waits
    on SIGTERM, and does not go on to the next command.
    """
    program = re.match(rb"(exec[ \t]+)?([A-Za-z0-9_./][A-Za-z0-9_./+-]*)(?=[ \t]|\Z)", command)
    syntax = re.search(rb"[;&|()<>`!\n]|(?<!\$)\{", command)
    if syntax or not program or program[2] in NOT_PROGRAMS:
        return TRAP + command
    return command if program[1] else b"exec " + command


class Instance(namedtuple("Instance", "type number port command")):
    """One instance: its process type's name, its number from 1, its PORT, its command (bytes)."""
    __slots__ = ()

    @property
    def name(self):
        """Its name, such as web.1."""
        return "%s.%d" % (self.type, self.number)

    @property
    def dashed(self):
        """Its name where a dot will not do: web-1."""
        return "%s-%d" % (self.type, self.number)

    @property
    def variables(self):
        """What it adds to the environment (bytes to bytes)."""
        return {b"PORT": b"%d" % self.port, b"PS": self.name.encode()}


def parse_counts(items):
    """Return {name: count} of a formation such as ["web=2", "worker=4"]; raises UsageError."""
    counts = {}
    for item in items:
        match = re.fullmatch(r"\s*([^=\s]+)\s*=\s*([0-9]{1,5})\s*", item)
        if not match:
            raise UsageError("expected NAME=N with a whole number N, found `%s`" % item)
        counts[match[1]] = int(match[2])
    return counts


def check_names(names, known, what="process type"):
    """Raise UsageError for the first of `names` that is not among `known`."""
    for name in names:
        if name not in known:
            raise UsageError("unknown %s `%s`; there are %s" % (what, name, ", ".join(known)))


def formation(types, counts, default, names=()):
    """Return {process type: count} in Procfile order.

    A type has the count that `counts` gives it, else that of "all" in `counts`, else `default`.
    If there are `names`, only these types are run.  Raises UsageError for an unknown name.
    """
    known = [each.name for each in types]
    check_names(names, known)
    check_names(counts, known + ["all"])
    default = counts.get("all", default)
    return {name: counts.get(name, default) if not names or name in names else 0 for name in known}


def expand(types, counts, base):
    """Return the instances, in Procfile order: PORT = base + 100 * place of the type + number - 1.

    Types that are not run keep their place, so a port never depends on what else runs.
    Raises Failure if a port is beyond 65535.
    """
    instances = []
    for place, (name, command) in enumerate(types):
        for number in range(1, counts[name] + 1):
            port = base + 100 * place + number - 1
            if port > 65535:
                raise Failure("%s.%d: port %d is beyond 65535; choose a lower base port with -p"
                              % (name, number, port))
            instances.append(Instance(name, number, port, command))
    return instances


def port_number(text):
    """Return the port that a text (str) is, 1 to 65535; raises UsageError."""
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise UsageError("`%s` is not a port, 1 to 65535" % text)
    return int(text)


def base_port(option, *environments):
    """Return the base port: the option, else the first PORT of the environments that is not empty,
    else 5000.  Raises Failure if that is not a port."""
    given = [printable(each[b"PORT"]) for each in environments if each.get(b"PORT")]
    if option or not given:
        return option or 5000
    try:
        return port_number(given[0])
    except UsageError:
        raise Failure("PORT=%s in .env or the environment is not a port; use -p" % given[0])


def selected(names, instances, option):
    """Return the instances that `names` stand for (of types, or their own), in their order;
    raises UsageError that says for what `option` the names are."""
    known = [each.type for each in instances] + [each.name for each in instances]
    check_names(names, dict.fromkeys(known), "name for %s:" % option)
    return [each for each in instances if each.type in names or each.name in names]


# Export: instances -> files ----------------------------------------------------------------------

File = namedtuple("File", "path mode text")
File.__doc__ = "A file to be written: its path below the location, its permission bits, its text."

Plan = namedtuple("Plan", "app user group root log grace mark variables types counts base image "
                          "user_units location")
Plan.__doc__ = """What an export is about, beside the instances: names of the app, the user and the
user's group; root directory; directory of log files or ""; grace period in whole seconds, 1 or
more; the text of the first comment; the variables that all instances share (str to str); the
process types, {type: concurrency} and the base port; the options --image and --user-units; and the
absolute path of the location."""

FORWARD = """trap 'trap "" TERM; kill -TERM 0; wait; exit 143' TERM; (trap - INT QUIT; """
CHILDREN = ("others=; if [ ! -e /proc/$pid/task/$pid/children ]; then others=-$pid; "
            "elif [ /proc/$pid/exe -ef /bin/sh ]; "
            "then read -r others </proc/$pid/task/$pid/children; fi; ")


def is_text(text):
    """Whether any format can hold this str: neither control characters but tab and newline, nor
    bytes that are not UTF-8 (surrogates), nor noncharacters (Unicode 23.7; systemd refuses them).
    """
    return (not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef]", text)
            and all(ord(char) & 0xfffe != 0xfffe for char in text))


def exportable(what, data):
    """Return bytes as str; raises Failure, which says `what` it is, if no format can hold them, or
    no Linux can pass them to a process (execve(2): 128 KiB a string)."""
    text = data.decode("utf-8", "surrogateescape")
    if not is_text(text) or len(data) >= 127 << 10:
        raise Failure("%s cannot be exported: it has control characters, is not UTF-8, or is "
                      "longer than 127 KiB" % what)
    return text


def shell_quote(text):
    """The text as one word of a shell."""
    if re.fullmatch(r"(?a)[\w%+,./:=@-]+", text):
        return text
    return "'" + text.replace("'", "'\\''") + "'"


def stays(text):
    """Whether the shell that runs this text outlives what it runs; see shell_text()."""
    return text.startswith(TRAP.decode())


def forwarded(text):
    """Shell text in place of `text` where the manager sends SIGTERM to the leader alone.

    A shell acts upon a signal at once only while it waits for a background job; that job has
    SIGINT and SIGQUIT ignored (POSIX, Shell 2.12), which bash takes back and dash does not.
    """
    if not stays(text):
        return text
    return "%sexec /bin/sh -c %s) & wait $!" % (FORWARD, shell_quote(text))


def stop_leader(text):
    """Shell text that sends SIGTERM to $pid, the leader of an instance that runs `text`.

    A leader that is a shell that stays, and has not been replaced by an exec within the text, only
    waits for its children: they get SIGTERM, too, or its group where /proc does not tell them.
    """
    if stays(text):
        return CHILDREN + "kill -TERM $pid $others"
    return "kill -TERM $pid"


def template_values(plan, each, **others):
    """What the templates of the formats are filled with, for one instance."""
    log = "%s/%s.log" % (plan.log, each.dashed) if plan.log else ""
    return {**plan._asdict(), **each._asdict(), "name": each.name, "log": log,
            "job": "%s-%s" % (plan.app, each.dashed), **others}


def own_variables(plan, each):
    """The variables (str to str) with those of the instance."""
    return {**plan.variables, "PORT": str(each.port), "PS": each.name}


def shell_variables(plan, each):
    """Shell text that sets an instance's environment; HOME, USER and LOGNAME are the user's unless
    the app has its own.  It is the shell that looks for ~USER, where and when the app starts."""
    lines = ["HOME=~{0} USER={0} LOGNAME={0}; export HOME USER LOGNAME".format(plan.user)]
    for name, value in own_variables(plan, each).items():
        lines.append("export %s=%s" % (name, shell_quote(value)))
    return "\n".join(lines) + "\n"


UPSTART = """# %(mark)s
description "%(app)s %(name)s"
start on starting %(app)s-%(type)s
stop on stopping %(app)s-%(type)s
respawn
respawn limit unlimited
kill timeout %(grace)d
setuid %(user)s
setgid %(gid)s
chdir %(chdir)s
script
%(script)s
end script
# Upstart respawns without a pause.
post-stop exec sleep 1
"""


def upstart_word(text):
    """The text as one word of a stanza, where a backslash escapes between single quotes, too."""
    return "'%s'" % text.replace("\\", "\\\\").replace("'", "'\"'\"'")


def export_upstart(plan, instances):
    """Three levels of jobs: app, process type, instance.  See init(5) of Upstart.

    Its parser alters what stands in `exec` and `env` lines, and carries a script as it is, but for
    a line `end script`; and a script of more lines than one is passed by a pipe, not in argv.
    """
    for each in instances:
        values = template_values(plan, each, chdir=upstart_word(plan.root),
                                 gid=upstart_word(plan.group))
        script = shell_variables(plan, each)
        if plan.log:
            script += "exec >>%s 2>&1\n" % shell_quote(values["log"])
        script += "exec /bin/sh -c " + shell_quote(each.command)
        script = re.sub(r"(?m)^([ \t]*end)(?=[ \t]+script)", r"\1''", script)
        yield File(values["job"] + ".conf", 0o600, UPSTART % dict(values, script=script))
    for name in dict.fromkeys(each.type for each in instances):
        yield File("%s-%s.conf" % (plan.app, name), 0o644, "# %s\nstart on starting %s\n"
                   "stop on stopping %s\n" % (plan.mark, plan.app, plan.app))
    yield File(plan.app + ".conf", 0o644, "# %s\nstart on runlevel [2345]\n"
               "stop on runlevel [!2345]\n" % plan.mark)


SYSTEMD = """# %(mark)s
[Unit]
Description=%(app)s %(name)s
PartOf=%(app)s-%(type)s.target
After=network.target %(app)s-%(type)s.target
StartLimitIntervalSec=0

[Service]
%(run_as)sWorkingDirectory=%(root)s
EnvironmentFile=%(location)s/%(app)s.env
Environment=PORT=%(port)d PS=%(name)s
ExecStart=/bin/sh -c %(word)s
# First the leader; what is left then gets SIGTERM, the same time again, and SIGKILL.
ExecStop=/bin/sh -c %(stop)s
Restart=always
RestartSec=1
TimeoutStopSec=%(grace)d
SuccessExitStatus=143
SyslogIdentifier=%(job)s
%(output)s"""
# The PATH is the app's; MAINPID is empty if the leader ended by itself.
SYSTEMD_STOP = ('exec 2>/dev/null; PATH=/bin:/usr/bin:$PATH; pid=$MAINPID; [ "$pid" ] || exit 0; '
                "%s; while kill -0 $pid; do sleep 0.1; done")


def systemd_word(text):
    """The text as one word of ExecStart=; see systemd.service(5), systemd.syntax(7)."""
    return '"%s"' % re.sub(r'(["\\])', r"\\\1", text).replace("%", "%%").replace("$", "$$")


def systemd_target(plan, name, wants, more):
    """A target that wants units: the app itself, or a process type of it."""
    return File(name + ".target", 0o644, "# %s\n[Unit]\nDescription=%s\nWants=%s\n%s" % (
        plan.mark, name, " ".join(wants), more))


def export_systemd(plan, instances):
    """A service for each instance, a target for each process type, one for the app, and one
    environment file (systemd.exec(5) has its quoting): Environment= would show its values on the
    bus; PORT and PS are no secrets.  By After=, a target has stopped when its units have."""
    yield File(plan.app + ".env", 0o600, "# %s\n" % plan.mark + "".join(
        '%s="%s"\n' % (name, re.sub(r'(["\\$`])', r"\\\1", value))
        for name, value in plan.variables.items()))
    run_as = "" if plan.user_units else "User=%s\n" % plan.user
    units = {}
    for each in instances:
        values = template_values(plan, each, run_as=run_as, word=systemd_word(each.command),
                                 stop=systemd_word(SYSTEMD_STOP % stop_leader(each.command)))
        output = ""
        if plan.log:
            output = "StandardOutput=append:%(log)s\nStandardError=inherit\n" % values
        units.setdefault("%s-%s" % (plan.app, each.type), []).append(values["job"] + ".service")
        yield File(values["job"] + ".service", 0o644, SYSTEMD % dict(values, output=output))
    for name, wants in units.items():
        yield systemd_target(plan, name, wants, "PartOf={0}.target\nAfter={0}.target\n".format(
            plan.app))
    yield systemd_target(plan, plan.app, [name + ".target" for name in units],
                         "\n[Install]\nWantedBy=%s.target\n"
                         % ("default" if plan.user_units else "multi-user"))


def export_launchd(plan, instances):
    """A property list for each instance; see launchd.plist(5)."""
    import plistlib
    comment = "<!-- %s -->\n<plist" % plan.mark.replace("--", "-&#45;")
    for each in instances:
        values = template_values(plan, each)
        job = dict(
            Label=values["job"], UserName=plan.user, WorkingDirectory=plan.root,
            ProgramArguments=["/bin/sh", "-c", forwarded(each.command)],
            EnvironmentVariables=own_variables(plan, each),
            KeepAlive=True, RunAtLoad=True, ThrottleInterval=1, ExitTimeOut=plan.grace)
        if plan.log:
            job.update(StandardOutPath=values["log"], StandardErrorPath=values["log"])
        text = plistlib.dumps(job).decode()
        yield File(values["job"] + ".plist", 0o600, text.replace("<plist", comment, 1))


SUPERVISORD = """
[program:%(job)s]
command=/bin/sh -c %(word)s
directory=%(root)s
user=%(user)s
environment=PROCRUN="%(environment)s"
autostart=true
autorestart=true
startsecs=0
stopsignal=TERM
stopwaitsecs=%(grace)d
stopasgroup=true
killasgroup=true
redirect_stderr=true
%(output)s"""
SUPERVISORD_START = 'sleep 1; eval "$(printf %b "$PROCRUN")"; unset PROCRUN; '


def supervisor_word(text):
    """The text as one word of a supervisord command: shlex's quoting, % doubled, and no blank
    before ; or #, where the rest of the line would be taken for a comment."""
    text = "'%s'" % text.replace("'", "'\"'\"'").replace("%", "%%")
    return re.sub(r"(\s)(?=[;#])", r"\1''", text)


def printf_word(text):
    r"""The text with \0ooo, which `printf %b` turns back, for each byte but the plainest."""
    return re.sub(rb"[^\w ./:,=@+-]", lambda match: b"\\0%03o" % ord(match[0]),
                  text.encode()).decode()


def export_supervisord(plan, instances):
    """A program for each instance, and a group; see supervisord.org, "Configuration File".

    It restarts without a pause, or after ever longer ones and not for ever: the shell pauses.
    `environment` can hold neither newlines nor every quote: one variable has all, escaped.
    """
    text, jobs = "; %s\n" % plan.mark, []
    for each in instances:
        environment = printf_word(shell_variables(plan, each))
        if len(environment) >= 127 << 10:
            raise Failure("supervisord takes less than 127 KiB of variables; they are longer")
        values = template_values(plan, each, environment=environment,
                                 word=supervisor_word(SUPERVISORD_START + each.command))
        output = "stdout_logfile=%(log)s\n" % values if plan.log else ""
        text += SUPERVISORD % dict(values, output=output)
        jobs.append(values["job"])
    yield File(plan.app + ".conf", 0o600, "%s\n[group:%s]\nprograms=%s\n" % (
        text, plan.app, ",".join(jobs)))


RUNIT_RUN = """echo $$ >supervise/group
exec %(output)s 3<environment
cd %(directory)s || exit 111
exec chpst -P -u %(user)s /bin/sh -c %(word)s
"""
RUNIT_START = 'eval "$(cat <&3)"; exec 3<&-; '
RUNIT_TERM = """# First the leader.
read -r pid <supervise/pid || exit 1
%s
(n=0
while [ $n -lt %d ]; do
  sleep 1
  read -r now <supervise/pid && [ "$now" = "$pid" ] || exit 0
  n=$((n+1))
done
kill -KILL $pid -$pid) >/dev/null 2>&1 &
"""
RUNIT_FINISH = """# Then what the leader has left in its group.
exec 2>/dev/null
read -r group <supervise/group || exit 0
kill -TERM -$group
n=0
while [ $n -lt %d ] && kill -0 -$group; do
  sleep 0.1
  n=$((n+1))
done
kill -KILL -$group
rm -f supervise/group
"""


def export_runit(plan, instances):
    """A service directory for each instance; see runsv(8), chpst(8), svlogd(8).

    chpst's own environment files lose trailing blanks.  So root opens a file of its own, and the
    user's shell reads it: no variable, such as PATH or LD_PRELOAD, is in force for root.
    """
    head = "#!/bin/sh\n# %s\n" % plan.mark
    for each in instances:
        values = template_values(plan, each, directory=shell_quote(plan.root),
                                 word=shell_quote(RUNIT_START + each.command))
        output = ">>%s 2>&1" % shell_quote(values["log"]) if plan.log else "2>&1"
        yield File(values["job"] + "/environment", 0o600,
                   "# %s\n%s" % (plan.mark, shell_variables(plan, each)))
        if not plan.log:
            yield File(values["job"] + "/log/run", 0o755,
                       head + "mkdir -p main && exec svlogd -tt main\n")
        yield File(values["job"] + "/control/t", 0o755,
                   head + RUNIT_TERM % (stop_leader(each.command), plan.grace))
        yield File(values["job"] + "/finish", 0o755, head + RUNIT_FINISH % (10 * plan.grace))
        yield File(values["job"] + "/run", 0o755, head + RUNIT_RUN % dict(values, output=output))


def kubernetes_word(text):
    """The text as an element of `command`: $(NAME) is expanded there, and $$ becomes $."""
    return re.sub("\\$+(?=[(\x80-\U0010ffff])|\\$\\$+", lambda match: match[0] * 2, text)


def kubernetes_name(name):
    """The name of a process type as a label has it."""
    return name.lower().replace("_", "-")


def kubernetes_labels(plan, component):
    """The recommended labels that tell the app and a part of it."""
    return {"app.kubernetes.io/name": plan.app, "app.kubernetes.io/component": component}


def kubernetes_object(plan, kind, component, **content):
    """An object with a mark and the recommended labels."""
    return dict(apiVersion="apps/v1" if kind == "Deployment" else "v1", kind=kind, metadata=dict(
        annotations={"procrun/made-by": plan.mark}, name="%s-%s" % (plan.app, component),
        labels={**kubernetes_labels(plan, component), "app.kubernetes.io/managed-by": "procrun"}),
        **content)


def kubernetes_deployment(plan, each, port, digest):
    """The Deployment of a process type; another digest of the environment rolls its pods.

    SIGTERM goes to the container's first process alone.  That is not process 1, for which the
    kernel would ignore the signal: the pod's processes share a namespace.
    """
    name = kubernetes_name(each.name)
    labels = kubernetes_labels(plan, name)
    container = dict(
        name=name, image=plan.image,
        command=["/bin/sh", "-c", kubernetes_word(forwarded(each.command))],
        env=[dict(name="PORT", value=str(port)),
             dict(name="PS", valueFrom=dict(fieldRef=dict(fieldPath="metadata.name")))],
        envFrom=[dict(secretRef=dict(name=plan.app + "-env"))])
    if plan.root:
        container.update(workingDir=plan.root)
    spec = dict(replicas=plan.counts[each.name], selector=dict(matchLabels=labels))
    if name == "web":
        container.update(ports=[dict(name="http", containerPort=port)],
                         readinessProbe=dict(tcpSocket=dict(port="http")))
    else:
        spec.update(strategy=dict(rollingUpdate=dict(maxSurge=0, maxUnavailable=1)))
    return kubernetes_object(plan, "Deployment", name, spec=dict(spec, template=dict(
        metadata=dict(labels=labels, annotations={"procrun/environment": digest}),
        spec=dict(terminationGracePeriodSeconds=plan.grace, shareProcessNamespace=True,
                  enableServiceLinks=False, containers=[container]))))


def export_kubernetes(plan, _):
    """A Secret; and a List of a Deployment for each process type, and a Service for web."""
    import base64
    import hashlib
    import json

    def file(name, mode, content):
        return File(plan.app + name, mode, json.dumps(content, indent=2) + "\n")

    data = {name: base64.b64encode(value.encode()).decode()
            for name, value in plan.variables.items()}
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    yield file("-secret.json", 0o600, kubernetes_object(plan, "Secret", "env", data=data))
    items = []
    for place, each in enumerate(plan.types):
        items.append(kubernetes_deployment(plan, each, plan.base + 100 * place, digest))
        if kubernetes_name(each.name) == "web":
            items.append(kubernetes_object(plan, "Service", "web", spec=dict(
                selector=kubernetes_labels(plan, "web"),
                ports=[dict(port=80, targetPort="http")])))
    yield file(".json", 0o644, dict(apiVersion="v1", kind="List", items=items))


Format = namedtuple("Format", "function help start")
Format.__doc__ = "An export format: its generator, what that makes, the command that starts it."

FORMATS = {
    "upstart": Format(export_upstart, "jobs for /etc/init", "start {app}"),
    "systemd": Format(export_systemd, "units for /etc/systemd/system",
                      "systemctl daemon-reload && systemctl enable --now {app}.target"),
    "launchd": Format(export_launchd, "property lists for /Library/LaunchDaemons",
                      "launchctl bootstrap system {location}/{app}-*.plist"),
    "supervisord": Format(export_supervisord, "a file for /etc/supervisor/conf.d",
                          "supervisorctl update"),
    "runit": Format(export_runit, "service directories for /etc/sv",
                    "ln -s {location}/{app}-* /etc/service/"),
    "kubernetes": Format(export_kubernetes, "Deployments, a Secret and a Service",
                         "kubectl apply --server-side -f {location}/{app}-secret.json "
                         "-f {location}/{app}.json"),
}


def kubernetes_problem(plan):
    """What Kubernetes alone cannot take, or None."""
    if not re.fullmatch(r"(?a)\w[\w.:/@-]*", plan.image or ""):
        return "kubernetes needs --image IMAGE, such as registry.example/app:1"
    if plan.log:
        return "kubernetes keeps the logs itself; leave -l out"
    if plan.base + 100 * (len(plan.types) - 1) > 65535:
        return "a port is beyond 65535; choose a lower base port with -p"
    if sum(len(value.encode()) for value in plan.variables.values()) > 1 << 20:
        return "kubernetes takes no Secret of more than 1 MiB; the variables are longer"
    names = [kubernetes_name(each.name) for each in plan.types]
    for name in names:
        if names.count(name) > 1:
            return "kubernetes would call two process types `%s`; rename one" % name
    for name in [plan.app] + names + ["%s-%s" % (plan.app, each) for each in names]:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
            return ("kubernetes takes no name `%s`: only a-z, 0-9 and between them -, at most 63"
                    % name)
    if "web" in names and plan.app[0].isdigit():
        return "kubernetes takes no service `%s-web`: a letter has to be the first" % plan.app
    return None


def plan_problem(plan, format):
    """What no format, or not this one, can take of the plan; None if all is well."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", plan.app):
        return "the app cannot be named %r; use letters, digits, _ . - with -a" % plan.app
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", plan.user):
        return "there can be no user %r; give another with -u" % plan.user
    for path in (plan.root, plan.log, plan.location):
        if not is_text(path) or re.search(r'["\\%*?\[\t\n]|\s$|\s[;#]', path):
            return "the path `%s` has characters that cannot be exported" % printable(
                os.fsencode(path))
    names = [printable(os.fsencode(name)) for name in plan.variables
             if not re.fullmatch(r"(?a)[A-Za-z_]\w*", name)]
    if names:
        return "variables with such names do not pass /bin/sh: " + ", ".join(names)
    if not is_text(plan.mark) or "\n" in plan.mark:
        return "this command line has characters that a comment cannot have"
    return kubernetes_problem(plan) if format == "kubernetes" else None


def export_files(plan, instances, format):
    """Return the list of File of an export; raises Failure if something cannot be exported.

    The commands that the generators get are shell texts (str)."""
    problem = plan_problem(plan, format)
    for each in instances:
        if each.dashed in plan.counts:
            problem = "%s and the process type %s would collide; rename one" % (
                each.name, each.dashed)
    if problem:
        raise Failure(problem)
    types = [each._replace(command=exportable("the command of " + each.name,
                                              shell_text(each.command))) for each in plan.types]
    texts = {each.name: each.command for each in types}
    instances = [each._replace(command=texts[each.type]) for each in instances]
    return list(FORMATS[format].function(plan._replace(types=types), instances))


# Output: bytes -> lines -> prefixed lines --------------------------------------------------------

COLOURS = tuple(code + bright for bright in ("", ";1") for code in "36 33 32 35 31 34".split())

# On a terminal a process may not leave its line, change the terminal, or make it answer.  So this
# filter keeps what it knows and takes out everything else (ECMA-48, 5.3 to 5.6; xterm's ctlseqs).
# It keeps whole sequences and whole characters only: what stands around something that is taken
# out never forms a new sequence.  It reads str, decoded from UTF-8 with surrogateescape: there a
# C1 control (U+0080 to U+009F) cannot be mistaken for a byte in the middle of a character.
TERMINAL = re.compile(r"""
      # Characters that surely take a column; all others are kept further down.
      (?P<text> [ -~\xa0-\xac\xae-\u02ff\u0370-\u0482\u2010-\u2027\u2100-\u2bff\u4e00-\ua48f]+ )
    | (?P<newlines> \n+ )
    | (?P<colour> \x1b\[ [0-9;:]{0,99} m )
    | (?P<start> \r (?![\r\n]|\Z) | \x1b\[ 0{0,9} 1? G | \x1b\[ [12] (?P<erase> K ) )
    | \x1b\[ 0{0,9} (?P<column> [1-9] [0-9]{0,3} ) G
    | (?P<back> \x08 )
      # What lacks its end at \Z may get it with the next read.
    | (?P<sequence> (?: \r | [\udcc2-\udcf4] [\udc80-\udcbf]{0,2} ) \Z
        | (?: \x1b[PX\]^_] | [\x90\x98\x9d-\x9f] )                         # DCS SOS OSC PM APC
          [^\x07\x18\x1a\x1b\n\x80-\x9f\udc80-\udc9f]{0,4096}
        | (?: \x1b\[ (?!0?K) | \x9b ) [\0-\x09\x0b-\x17\x19\x1c-?\x7f]{0,99}    # CSI
        | \x1b (?!\[0?K) [ -/]{0,9}
      ) (?P<end> [0-~] )?
    | (?P<kept> \t+ | \x1b\[0?K | [^\0-\x9f\udc80-\udcff]+
        | [\udca0-\udcff]+ (?! [\udc80-\udcff]{0,2} \Z) | [\udca0-\udcff] )
    | \r+ (?=[\r\n]) | [\0-\x07\x0e-\x1a\x1c-\x1f\x7f\udc80-\udc9f]+ | .""",
    re.VERBOSE | re.DOTALL)
# For files and pipes under --color never, where everything else passes.
COLOURLESS = re.compile(r"""
      (?P<colour> \x1b\[ [0-9;:]{0,99} m )
    | (?P<sequence> \x1b (?: \[ [0-9;:]{0,99} )? \Z )""", re.VERBOSE)
UTF8 = "utf-8", "surrogateescape"                # any bytes come back as they were
CONTROLS = bytes({*range(32), 127} - {9, 10})    # but tab and newline


def harmless(data):
    """Whether TERMINAL would keep all of these bytes as they are; quick, where it is so."""
    if any(map(data.__contains__, CONTROLS)):
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return b"\xc2" not in data or not re.search(rb"\xc2[\x80-\x9f]", data)


Style = namedtuple("Style", "width colour stamp label filter")
Style.__doc__ = """A prefix: the label's width, and whether colour, time and label are shown; and
the filter of what processes write: TERMINAL, COLOURLESS, or None, where every byte passes."""


class Source:
    """One name in the output: its label, and the line that it has not finished yet."""
    __slots__ = "label colour crlf second prefix tail sgr column".split()

    def __init__(self, label, colour, crlf=False):
        self.label, self.colour = label, colour    # str, SGR code as a str
        self.crlf = crlf                           # whether its lines end in CR LF, as a PTY's do
        self.second, self.prefix = None, b""       # the prefix, and the second it was made for
        self.tail = bytearray()                    # of the unfinished line, what is not shown yet
        self.sgr = ""                              # the sequences that set the line's colours
        self.column = 0                            # how far the line goes, at least

    def unix_lines(self, data):
        """The data of a PTY with LF for CR LF, also where that was read in two."""
        if self.tail.endswith(b"\r"):
            self.tail.pop()
            data = b"\r" + data
        return data.replace(b"\r\n", b"\n")

    def begin_line(self):
        """Go to the next line.  Colours hold there, unless the last of them ended another one."""
        self.column = 0
        if self.sgr and re.search(r"\[(2[2-9]|[3-5]9)m\Z", self.sgr):
            self.sgr = ""


class Printer:
    """Turns what processes write into lines behind prefixes, in `queue` (buffers, in order).

    A line of the output begins with a prefix and only its own process adds to it; an unfinished
    line is kept back until show() or until it is CHUNK long; it is ended when another one writes.
    """

    def __init__(self, style, clock):
        self.style, self.clock = style, clock
        self.margin = 0         # columns of a prefix
        if style.label:
            self.margin = style.width + (12 if style.stamp else 3)
        self.queue = []
        self.open = None        # the source whose unfinished line stands at the end of the output

    def prefix(self, source):
        """The bytes in front of each line of the source, as of now."""
        style, now = self.style, int(self.clock())
        if source.second != now and style.label:
            stamp = time.strftime("%H:%M:%S ", time.localtime(now)) if style.stamp else ""
            text = "%s%-*s | " % (stamp, style.width, source.label)
            text = "\x1b[%sm%s\x1b[0m" % (source.colour, text) if style.colour else text
            source.second, source.prefix = now, text.encode()
        return source.prefix

    def line_end(self):
        """What ends the unfinished line at the end of the output, if there is one."""
        if not self.open:
            return b""
        return b"\x1b[0m\n" if self.open.sgr else b"\n"

    def lead(self, source):
        """What has to come before the next byte of the source's present line."""
        if self.open is source:
            return b""
        source.begin_line()
        return self.line_end() + self.prefix(source) + source.sgr.encode()

    def feed(self, source, data):
        """Take bytes of a source: its whole lines are queued, the rest is kept.

        This is the hot path.  It handles chunks, not lines: one replace() puts all prefixes in,
        and the end that it put one too many on is cut off by a view, not by a copy.
        """
        if source.crlf:
            data = source.unix_lines(data)
            if self.style.filter is TERMINAL:    # so many only push the screen away, as vite does
                data = re.sub(rb"\n\n{9,}", b"\n", data)
        end = data.rfind(b"\n") + 1
        if end:
            lead, tail, rest = self.lead(source), source.tail, data[end:]
            if self.style.filter:
                data = self.filtered(source, b"".join((tail, memoryview(data)[:end])))
                tail = b""
            text = data.replace(b"\n", b"\n" + self.prefix(source))
            self.queue += lead, tail, memoryview(text)[:text.rfind(b"\n") + 1]
            self.open, source.tail = None, bytearray(rest)
        else:
            source.tail += data
        if len(source.tail) >= CHUNK:
            self.show(source)

    def show(self, source):
        """Queue the unfinished line of a source; it stays open for the source to go on with.

        Where there is a filter, a sequence that has no end yet stays in the source's tail.
        """
        lead, tail = self.lead(source), source.tail
        source.tail = bytearray()
        text = self.filtered(source, tail)
        if text:
            self.queue += lead, text
            self.open = source

    def filtered(self, source, data):
        """What the style's filter makes of a source's bytes; it takes most of them as they are."""
        if not self.style.filter:
            return data
        if data.endswith(b"\n") and not source.sgr and harmless(data):
            return data
        text = self.style.filter.sub(partial(self.answer, source), data.decode(*UTF8))
        if self.open is not source and re.fullmatch(r"(\x1b\[[0-9;:]*m)*", text):
            return b""    # colours alone open no line; lead() puts them in front of the next one
        return text.encode(*UTF8)

    def answer(self, source, match):
        """What the output gets in place of a match of the filter."""
        kind, found = match.lastgroup, match[0]
        if kind == "text":
            source.column += len(found)
        elif kind == "newlines":
            if source.sgr:
                found = "\x1b[0m" + found
            source.begin_line()
            found += source.sgr
        elif kind == "colour" and self.style.colour:
            source.sgr = source.sgr + found if len(source.sgr) < 100 else found
            if not found.strip("\x1b[0;:m"):
                source.sgr = ""
        elif kind == "start":
            source.column = 0
            found = "\r" + self.prefix(source).decode() + source.sgr
            if match["erase"]:
                found += "\x1b[K"
        elif kind == "column":
            source.column = 0
            found = "\x1b[%dG" % (self.margin + int(match["column"]))
        elif kind == "back" and source.column:
            source.column -= 1
        elif kind != "kept":
            if kind == "sequence" and match.end() == len(match.string):
                source.tail += found.encode(*UTF8)    # its rest may come
            found = ""
        return found

    def finish(self, source):
        """End the line of a source that will write no more, or only when it is started again."""
        self.show(source)
        if source.tail or self.open is source:
            self.feed(source, b"\n")
        source.sgr = ""

    def close_line(self):
        """End the unfinished line, for the shell that comes to the front."""
        self.queue.append(self.line_end())
        self.open = None


# Shutdown: what to send, and when ----------------------------------------------------------------

TELL, GIVE_UP = "tell who is waited for", "give up"


def hurried(when):
    """The last steps of a shutdown, as (monotonic seconds, what to do)."""
    return [(when, signal.SIGKILL), (when + LAST, GIVE_UP)]


def ladder(now, grace, patience):
    """All steps: SIGTERM, after `patience` a word on who is waited for, SIGKILL, end."""
    steps = [(now, signal.SIGTERM), (now + min(patience, grace), TELL)] if grace else []
    return steps + hurried(now + grace)


def due(steps, now):
    """Return (what is due, the steps that remain)."""
    return [what for when, what in steps if when <= now], [each for each in steps if each[0] > now]


def until(times, now):
    """Seconds from now until the first of some times, but a day at most (epoll takes no more than
    24); None if there is none."""
    return max(0, min(86400, min(times) - now)) if times else None


# Everything above is pure; everything below talks to the kernel.

def complain(*lines):
    """Write lines to stderr, each behind "procrun: "; a closed stderr is no reason to fail, and a
    stalled one none to hang."""
    text = "".join("procrun: %s\n" % line for line in lines).encode("utf-8", "backslashreplace")
    try:
        while text and select.select((), (2,), (), 0)[1]:
            # So much does not block: PIPE_BUF of POSIX; a terminal promises no more than a byte.
            text = text[os.write(2, text[:1 if os.isatty(2) else 512]):]
    except OSError:
        pass


def open_fds():
    """The numbers of the open file descriptors, as a list (of a moment ago: one may be closed);
    raises Failure."""
    try:
        return [int(name) for name in os.listdir("/dev/fd")]
    except OSError as error:
        raise Failure("/dev/fd: %s; on Linux, /proc has to be mounted" % error.strerror)


def read_some(fd, most=LITTLE):
    """Return bytes that can be read now, b"" at the end of the output, None if there are none."""
    try:
        return os.read(fd, most)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno == errno.EIO:    # how a PTY says that its last writer is gone
            return b""
        raise


def own_description(fd, flags):
    """Open anew what an fd is open for: a file description of our own, non-blocking, as the given
    one is shared with others.  Raises OSError."""
    flags |= os.O_NONBLOCK | os.O_NOCTTY
    try:
        return os.open("/proc/self/fd/%d" % fd, flags)
    except PermissionError:    # su: the terminal is another user's
        os.tcgetpgrp(fd)       # raises OSError if it is not the controlling one either, which is
        return os.open("/dev/tty", flags)    # open to everybody


def widen(fd, capacity):
    """Give a pipe this capacity (bytes) where the system can: fewer, larger reads."""
    try:
        fcntl.fcntl(fd, getattr(fcntl, "F_SETPIPE_SZ", 1031), capacity)
    except OSError:
        pass    # not Linux, not a pipe, or beyond the user's share: it works with less


def tell(text):
    """Write text to stdout; raises Failure."""
    data = text.encode("utf-8", "surrogateescape")
    try:
        while data:
            data = data[os.write(1, data):]
    except OSError as error:
        raise Failure("cannot write the output: %s" % error.strerror)


# Signals: asynchronous -> readable ---------------------------------------------------------------

ENDING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT
PASSED_ON = signal.SIGUSR1, signal.SIGUSR2
CAUGHT = {*ENDING, *PASSED_ON, signal.SIGTSTP, signal.SIGCONT, signal.SIGCHLD, signal.SIGWINCH}


def nothing(*_):
    """A signal handler: the signal's byte in the wake-up pipe says it all."""


def wakeup_pipe():
    """Have the caught signals arrive as bytes in a pipe; return its reading end."""
    fd, wakeup = os.pipe()
    os.set_blocking(fd, False)
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    return fd


def catch_signals():
    """Have the caught signals arrive as bytes in a pipe, and do nothing else.

    Return its reading end, and the signals that no child is to see as they are here: procrun
    catches some, CPython ignores SIGPIPE and SIGXFSZ, and others may have been ignored before.
    """
    # nohup: a SIGHUP that is ignored from the start stays ignored, by the children too.
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    fd = wakeup_pipe()
    for number in CAUGHT - ignored:
        signal.signal(number, nothing)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return fd, [number for number in set(range(1, signal.NSIG)) - ignored
                if signal.getsignal(number) not in (signal.SIG_DFL, None)]


def signal_name(number):
    """SIGTERM for 15; a number for real-time signals."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return "signal %d" % number


def signal_group(group, number):
    """Send a signal to a process group; return whether there was anything to receive it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):    # macOS says EPERM of a group of zombies
        return False
    return True


# Child: one instance, forked ---------------------------------------------------------------------

class Child:
    """One instance; the pipe or PTY of its output; what is known of it.

    It is done when its exit status is known and its output at its end.
    """
    __slots__ = "place instance source terminal fd output appetite pid status began".split()

    def __init__(self, place, instance, source, terminal):
        self.place, self.instance, self.source = place, instance, source
        self.terminal = terminal                # whether it gets a PTY
        self.fd = self.output = None            # the end that procrun reads, and the other one
        self.appetite = LITTLE                  # bytes: how much to read at once
        self.pid = self.status = None           # status: as of subprocess, -N for signal N
        self.began = None                       # when (monotonic)

    def open(self, capacity, echo):
        """Make its pipe of this capacity (bytes), or its PTY; raises OSError."""
        if self.terminal:
            self.fd, self.output = os.openpty()
            modes = termios.tcgetattr(self.output)
            modes[1] &= ~termios.OPOST    # or each line ends in CR LF
            modes[3] &= ~(0 if echo else termios.ECHO)
            termios.tcsetattr(self.output, termios.TCSANOW, modes)
        else:
            self.fd, self.output = os.pipe()
            widen(self.output, capacity)
        os.set_blocking(self.fd, False)

    def release(self):
        """Let go of the other end: its output is at its end when the last process has done so.

        A PTY's is held until the child has ended: if nobody else holds it, reading it is an error
        already, and to close it then would be a hangup for a child that lives on without output.
        """
        if self.output is not None:
            os.close(self.output)
            self.output = None

    @property
    def ending(self):
        """How it ended, in words."""
        if self.status >= 0:
            return "exited with code %d" % self.status
        return "terminated by " + signal_name(-self.status)


Ground = namedtuple("Ground", "root environment stdin limits signals")
Ground.__doc__ = """What all children stand on: the root directory, the environment (bytes to
bytes), the fd of their stdin, RLIMIT_NOFILE, and the signals that are to have their default
disposition."""


def environment(variables):
    """The environment of this process with these variables (bytes to bytes) of .env over it."""
    inherited = {name: value for name, value in os.environb.items() if name}
    # Python's prints appear at once.
    return {b"PYTHONUNBUFFERED": b"1", **inherited, **variables}


def become(ground, child, reports):
    """The forked side of a child; never returns.  It reports itself before exec, so that this is
    known before any of its output, or why it could not."""
    try:
        signal.set_wakeup_fd(-1)    # the guard's, whose number may be stdout's below
        os.setsid()
        os.write(reports, b"started %d %d\n" % (child.place, os.getpid()))
        if child.terminal:
            fcntl.ioctl(child.output, termios.TIOCSCTTY, 0)
            ground.environment.setdefault(b"TERM", b"dumb")
        os.dup2(child.output if child.terminal else ground.stdin, 0)
        os.dup2(child.output, 1)
        os.dup2(child.output, 2)
        os.chdir(ground.root)
        resource.setrlimit(resource.RLIMIT_NOFILE, ground.limits)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execve("/bin/sh", [b"/bin/sh", b"-c", child.instance.command], ground.environment)
    except OSError as error:
        os.write(reports, b"failed %d %d\n" % (child.place, error.errno))
    finally:
        os._exit(127)


# Guard: the set outlives nobody ------------------------------------------------------------------

def become_subreaper():
    """Have orphaned descendants become our children (Linux); return whether that is so."""
    try:
        import ctypes
        return ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0    # PR_SET_CHILD_SUBREAPER
    except (ImportError, OSError, AttributeError):
        return False


def own_children():
    """The process ids of all children, adopted ones included, as a set; None where nothing tells
    them: not on Linux, nor if /proc is missing or that of another PID namespace."""
    try:
        if os.readlink("/proc/self") == str(os.getpid()):
            with open("/proc/thread-self/children") as file:
                return set(map(int, file.read().split()))
    except OSError:
        pass
    return None


def peek():
    """Return (pid, status) of a dead child that is not reaped yet, or (None, None).

    Raises ChildProcessError if there is no child at all.
    """
    if not hasattr(os, "waitid"):    # macOS before Python 3.13: reaped here already
        pid, status = os.waitpid(-1, os.WNOHANG)
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return (pid, code) if pid else (None, None)
    info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if info is None:
        return None, None
    return info.si_pid, info.si_status if info.si_code == os.CLD_EXITED else -info.si_status


class Guard:
    """The parent of all children: a process that forks, signals and reaps them.

    It reads orders, each a byte: a signal for all groups.  Their end means that procrun is gone:
    then SIGTERM, after the grace period SIGKILL.  It reports in lines, `started PLACE PID`,
    `failed PLACE ERRNO`, `ended PLACE STATUS` and, of what a leader left behind and had to be
    killed, `killed 0 PID` (0 is no place).  The end of the reports means that nothing is left.
    """

    def __init__(self, ground, children, grace, keyboard):
        self.ground, self.waiting, self.grace = ground, list(children), grace
        self.keyboard = keyboard    # whose terminal is restored if procrun is killed, or None
        self.leaders = {}           # process id -> Child, not reaped
        self.orphaned = set()       # groups that outlived their leader, where none is adopted
        self.last = None            # SIGTERM or SIGKILL once it was sent
        self.told = set()           # the groups that got it
        self.steps = []             # of a shutdown without procrun
        self.stopped = False        # Ctrl-Z: fork no more until SIGCONT
        self.over = False

    def fork(self):
        """Fork it; return its process id, the fd for orders and the fd of the reports."""
        (orders, order), (report, self.reports) = os.pipe(), os.pipe()
        os.set_blocking(report, False)
        # The named ones: of others, CPython takes 100 us to tell a child that they were blocked.
        mask = signal.pthread_sigmask(signal.SIG_SETMASK, signal.Signals)
        try:
            pid = os.fork()
        except OSError as error:
            raise Failure("cannot fork: %s" % error.strerror)
        if pid == 0:
            try:
                self.run(orders)
                os._exit(0)
            finally:
                os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(orders)
        os.close(self.reports)
        return pid, order, report

    def run(self, orders):
        """The forked side.  A session of its own, and all signals blocked but SIGCHLD (those
        without a name: caught): neither Ctrl-C nor a closed terminal reach it.  It holds nothing
        that anybody waits for, but for a terminal that it could not open by name later."""
        os.setsid()
        os.chdir("/")
        keep = {orders, self.reports, self.ground.stdin, *(child.output for child in self.waiting)}
        keep.add(self.keyboard and self.keyboard.spare)
        for fd in set(open_fds()) - keep:
            os.closerange(fd, fd + 1)    # one of them is closed already
        self.adopts = become_subreaper() and own_children() is not None
        # Once, not in each child: here they are blocked, and exec turns handlers into the default.
        nameless = signal.valid_signals() - set(signal.Signals)
        for number in nameless.union(self.ground.signals) - {signal.SIGCHLD}:
            signal.signal(number, nothing if number in nameless else signal.SIG_DFL)
        signals = wakeup_pipe()
        self.selector = selectors.DefaultSelector()
        self.selector.register(orders, selectors.EVENT_READ, self.on_order)
        self.selector.register(signals, selectors.EVENT_READ, read_some)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        while not self.over:
            self.turn()

    def turn(self):
        """Wait for something to happen, and act upon it; between two forks, do not wait."""
        now, times = time.monotonic(), [when for when, _ in self.steps[:1]]
        if self.waiting and not self.stopped:
            times.append(now)
        if self.last and self.orphaned:
            times.append(now + 0.05)    # nothing tells when those have ended
        events = self.selector.select(until(times, now))
        for key, _ in events:
            key.data(key.fd)
        whats, self.steps = due(self.steps, time.monotonic())
        for what in whats:
            if what is not GIVE_UP:
                self.send(what)
        if self.waiting and not self.stopped:
            self.spawn(self.waiting.pop(0))
        if events or not self.waiting:
            self.reap()
        self.over = self.over or GIVE_UP in whats

    def on_order(self, fd):
        """procrun orders a signal, or is gone."""
        orders = os.read(fd, 4096)
        self.reap()    # what has ended is not to be reported as killed
        for number in orders:
            self.send(signal.Signals(number))
        if not orders:
            self.selector.unregister(fd)
            if self.keyboard:
                self.keyboard.give_back()
            if not self.last:
                self.send(signal.SIGTERM)
            killing = self.last == signal.SIGKILL
            self.steps = hurried(time.monotonic() + (0 if killing else self.grace))

    def report(self, *words):
        """Write a line to procrun, which may be gone."""
        try:
            os.write(self.reports, b"%s %d %d\n" % words)
        except BrokenPipeError:
            pass

    def spawn(self, child):
        """Fork a child; if that fails, no more."""
        self.ground.environment.update(child.instance.variables)
        try:
            pid = os.fork()
            if not pid:
                become(self.ground, child, self.reports)
            self.leaders[pid] = child
        except OSError as error:
            self.waiting.clear()
            self.report(b"failed", child.place, error.errno)
        child.release()

    def adopted(self):
        """The children that it did not fork: what leaders left behind when they died."""
        return (own_children() or set()) - set(self.leaders) if self.adopts else set()

    def groups(self):
        """The groups of all children: an unreaped child keeps its group's id from being reused."""
        return set(self.leaders) | set(map(os.getpgid, self.adopted())) | self.orphaned

    def send(self, number):
        """Signal all groups."""
        if number in (signal.SIGTERM, signal.SIGKILL):
            self.waiting.clear()
            self.last, self.told = number, set()
            self.pursue()
        else:
            self.stopped = number == signal.SIGSTOP or self.stopped and number != signal.SIGCONT
            for group in self.groups():
                self.signal(group, number)

    def signal(self, group, number):
        """Signal a group; between fork and setsid there is none yet, but the leader."""
        if not signal_group(group, number) and group in self.leaders:
            try:
                os.kill(group, number)
            except PermissionError:
                pass    # it has become another user's (sudo)

    def pursue(self):
        """During a shutdown: the last signal to the groups that did not get it yet; SIGKILL to
        all, which cannot be too much, and a word on those that are in no instance's group."""
        groups, killing = self.groups(), self.last == signal.SIGKILL
        for pid in self.adopted() if killing else ():
            if os.getpgid(pid) not in self.told | set(self.leaders):
                self.report(b"killed", 0, pid)
        for group in groups if killing else groups - self.told:
            self.signal(group, self.last)
            self.signal(group, signal.SIGCONT)    # or a stopped one would not see its SIGTERM
        self.told |= groups

    def reap(self):
        """Look at each dead child, act, and only then reap it: until then its id is its own."""
        try:
            for pid, status in iter(peek, (None, None)):
                child = self.leaders.pop(pid, None)
                if child and not self.adopts and signal_group(pid, 0):
                    self.orphaned.add(pid)
                if hasattr(os, "waitid"):
                    os.waitpid(pid, 0)
                if child:
                    self.report(b"ended", child.place, status)
        except ChildProcessError:
            self.over = not self.waiting
        self.orphaned = {group for group in self.orphaned if signal_group(group, 0)}
        self.over = self.over and not self.orphaned
        if self.last:
            self.pursue()


# Sink: lines -> stdout ---------------------------------------------------------------------------

class Sink:
    """The stream that all output goes to.  It never blocks and never loses a byte: what it does
    not take now stays in the queue, and `full` says so."""

    def __init__(self, fd):
        self.fd, self.full, self.error = fd, False, None
        self.moved = False        # whether anything was written since that was last asked
        self.most = None          # bytes to write at once, None: any number
        self.selector = selectors.DefaultSelector()
        try:
            self.selector.register(fd, selectors.EVENT_WRITE)
            self.waits = not stat.S_ISREG(os.fstat(fd).st_mode)
        except OSError:           # epoll takes no files, nor /dev/null and /dev/full
            self.waits = False
        if self.waits:
            self.open_again()

    def open_again(self):
        """Get a non-blocking file description of our own; the given one is shared with others.

        Where that cannot be had (a socket, macOS), no more is written at once than a writable pipe
        takes without blocking (PIPE_BUF, POSIX); a terminal promises no more than a byte."""
        try:
            self.fd = own_description(self.fd, os.O_WRONLY)
            widen(self.fd, CHUNK)
        except OSError:
            self.most = 1 if os.isatty(self.fd) else 512

    def write(self, queue):
        """Write buffers from the front of the queue, and take them out of it, while that goes."""
        try:
            while queue:
                if self.most and not self.selector.select(0):
                    raise BlockingIOError
                self.write_once(queue)
            self.full = False
        except BlockingIOError:
            self.full = True
        except OSError as error:
            self.error, self.full = error, False
            queue.clear()

    def write_once(self, queue):
        """One system call."""
        batch = [queue[0][:self.most]] if self.most else queue[:256]
        taken = os.writev(self.fd, batch)
        self.moved |= taken > 0
        while queue and taken >= len(queue[0]):
            taken -= len(queue.pop(0))
        if taken:
            queue[0] = memoryview(queue[0])[taken:]


# Keyboard: keys -> bytes -------------------------------------------------------------------------

class Keyboard:
    """The user's terminal (fd 0) while an instance is attached: it passes each key on as it is."""

    def __init__(self):
        self.old, modes = termios.tcgetattr(0), termios.tcgetattr(0)
        modes[0] &= ~(termios.BRKINT | termios.ICRNL | termios.ISTRIP | termios.IXON)
        modes[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
        modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
        characters = [modes[6][each] for each in (termios.VINTR, termios.VQUIT, termios.VSUSP)]
        self.keys = dict(zip(characters, (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP)))
        self.keys.pop(bytes([os.fpathconf(0, "PC_VDISABLE") & 255]), None)    # switched off
        self.interrupted = float("-inf")    # when the key of SIGINT was last pressed (monotonic)
        self.set(modes)
        self.raw = termios.tcgetattr(0)     # as the terminal has it
        try:
            self.fd = own_description(0, os.O_RDONLY)    # or a read would block after an fg
        except OSError:
            self.fd = 0
        self.path = self.spare = None       # how the guard gets at it: it is to hold no terminal
        try:
            self.path = os.ttyname(0)
            os.close(os.open(self.path, os.O_RDWR | os.O_NOCTTY))
        except OSError:
            self.spare = os.dup(0)          # su, or another mount namespace: it cannot be opened

    def in_background(self):
        """Whether the terminal is that of another group now."""
        try:
            return os.tcgetpgrp(0) != os.getpgrp()
        except OSError:
            return False    # it is gone, or not the controlling one

    def set(self, modes):
        """Set the terminal's modes, to .raw or .old; not from the background, where SIGTTOU would
        stop procrun: `fg` brings a SIGCONT."""
        try:
            if not self.in_background():
                termios.tcsetattr(0, termios.TCSANOW, modes)
        except termios.error:
            pass    # it is gone

    def give_back(self):
        """The same from another session: .old, if it has .raw (it may be another's by now)."""
        try:
            fd = self.spare or os.open(self.path, os.O_RDWR | os.O_NOCTTY)
            if termios.tcgetattr(fd) == self.raw:
                termios.tcsetattr(fd, termios.TCSANOW, self.old)
            os.close(fd)
        except (OSError, termios.error):
            pass    # it is gone

    def split(self, typed):
        """Yield (signal or None, bytes): keys that stand for signals, and what is between."""
        keys = b"|".join(map(re.escape, self.keys)) or b"(?!)"
        for part in filter(None, re.split(b"(%s)" % keys, typed)):
            yield self.keys.get(part), part


# Supervisor: the set -----------------------------------------------------------------------------

Options = namedtuple("Options", "grace can_die quiet")
Options.__doc__ = """How a set is run: grace period (seconds); the instances whose exit 0 does not
end it; the instances whose output is dropped."""


def port_taken(port):
    """Whether somebody listens on a port."""
    import _socket    # the module that socket wraps; that one would take 3 ms to import
    try:
        probe = _socket.socket()
    except OSError:
        return False
    try:
        probe.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        probe.bind(("", port))
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    finally:
        probe.close()
    return False


class Supervisor:
    """The set of children, from the first fork to the last reaping; run() tells the story."""

    def __init__(self, options, printer, sink, signals):
        self.options, self.printer, self.sink, self.signals = options, printer, sink, signals
        self.system = Source("system", "37")
        self.partial = {}          # Child with an unfinished line -> when to show it; in order
        self.steps = []            # what is left of the shutdown
        self.status = None         # the exit status, from the begin of the shutdown on
        self.patience = 0          # until when (monotonic) to wait for a stdout that takes nothing
        self.over = False          # the shutdown has been given up
        self.lost = False          # output could not be written
        self.read_last = 0         # the fd of the child that was read last
        self.killed = []           # what got SIGKILL: names of instances, "process N"
        self.attached = self.keyboard = self.guard = self.guard_status = None
        self.typed = bytearray()   # what the attached child has not taken yet
        self.report = b""          # the unfinished line of the guard's reports
        self.arrived = b""         # signals (bytes) that are not acted upon yet
        become_subreaper()         # for the case that the guard is killed
        self.reap()                # what has died before anybody could tell
        self.strangers = own_children() or set()    # of a shell that became procrun, say
        self.busy, self.stalled = selectors.DefaultSelector(), selectors.DefaultSelector()
        self.watch(signals, self.on_signals)
        if sink.waits:
            self.stalled.register(sink.fd, selectors.EVENT_WRITE, self.flush)

    def run(self, children, ground, attached):
        """Run the children; return the exit status."""
        self.children, self.left = children, set(children)
        try:
            self.start(ground, attached)
            while not self.finished():
                self.turn()
        finally:
            self.put_down()
        return self.status

    def watch(self, fd, method):
        """Call the method when the fd can be read, whether stdout takes anything or not."""
        self.busy.register(fd, selectors.EVENT_READ, method)
        self.stalled.register(fd, selectors.EVENT_READ, method)

    def unwatch(self, fd):
        """No longer."""
        self.busy.unregister(fd)
        self.stalled.unregister(fd)

    def start(self, ground, attached):
        """Fork the guard, which forks the children."""
        for instance in (child.instance for child in self.children):
            if port_taken(instance.port):
                self.say("%s: port %d is already in use" % (instance.name, instance.port))
        if attached:
            self.attached = attached
            self.keyboard = Keyboard()
            self.watch(self.keyboard.fd, self.on_keys)
        self.resize()
        guard = Guard(ground, self.children, self.options.grace, self.keyboard)
        self.guard, self.orders, self.reports = guard.fork()
        self.watch(self.reports, self.on_reports)
        for child in self.children:
            if not child.terminal:
                child.release()
            self.busy.register(child.fd, selectors.EVENT_READ, partial(self.on_output, child))

    # -- output

    def say(self, text, source=None):
        """A line of procrun's own."""
        self.printer.feed(source or self.system, text.encode() + b"\n")

    def flush(self):
        """Write what is queued, as far as stdout takes it."""
        self.sink.write(self.printer.queue)
        if self.sink.error and not self.lost:
            self.lost = True
            self.on_lost(self.sink.error)

    def on_lost(self, error):
        """Output is lost, because nobody reads any more, or for a worse reason."""
        unread = error.errno in (errno.EPIPE, errno.EIO, errno.ECONNRESET)
        if not unread:
            complain("cannot write the output: %s" % error.strerror)
        if self.status is None:
            self.begin(128 + signal.SIGPIPE if unread else 1)
        elif not unread:
            self.status = self.status or 1

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
        if child.fd is None and child.status is not None:
            self.say(child.ending, child.source)

    def read(self, child, most):
        """Pass on what a child has written, `most` bytes of it; return how many there were."""
        if child.fd is None or self.sink.full:
            return 0
        data = read_some(child.fd, most)
        if data == b"":
            self.close(child)
        elif data and not self.sink.error and child.instance not in self.options.quiet:
            self.printer.feed(child.source, data)
            self.partial.pop(child, None)
            if child.source.tail:
                self.partial[child] = time.monotonic() + QUIET
            if len(data) >= LITTLE:
                self.flush()
        return len(data or b"")

    def on_output(self, child):
        """A child has written, or its output is at its end, or it takes what is typed again."""
        if self.typed and child is self.attached:
            self.type(b"")
        if child.pid is None:
            self.on_reports()    # it reported itself before it wrote anything
        fd, size = child.fd, self.read(child, child.appetite)
        child.appetite = CHUNK if size >= LITTLE else LITTLE
        self.read_last = fd if size else self.read_last

    def drain(self, child):
        """A dead leader's last words: what its pipe holds now.  Others may hold the pipe, too, and
        go on writing, so this is bounded by what a pipe can hold."""
        room = size = CHUNK
        while room > 0 and size:
            size = self.read(child, CHUNK)
            room -= size

    def show_partial(self):
        """Show the unfinished lines that have been quiet for long enough."""
        while self.partial and not self.sink.full:
            child, when = next(iter(self.partial.items()))
            if when > time.monotonic():
                break
            del self.partial[child]
            self.printer.show(child.source)

    # -- what the guard reports

    def on_reports(self):
        """Act upon the guard's reports; at their end nothing is left."""
        data = None if self.reports is None else read_some(self.reports)
        if data is None:
            return
        *lines, self.report = (self.report + data).split(b"\n")
        for line in lines:
            word, place, value = line.decode().split()
            getattr(self, "on_" + word)(self.children[int(place)], int(value))
        if not data:
            self.on_guard_gone()

    def on_started(self, child, pid):
        """A child was forked."""
        child.pid, child.began = pid, time.monotonic()
        self.say("started with pid %d, PORT=%d" % (pid, child.instance.port), child.source)

    def on_failed(self, child, number):
        """A child could not be forked, or not come to exec."""
        self.fail("%s: cannot start: %s" % (child.instance.name, os.strerror(number)))

    def on_killed(self, _, pid):
        """A process that a leader left behind had to be killed."""
        self.killed.append("process %d" % pid)

    def on_ended(self, child, status):
        """A leader has died."""
        child.status = status
        self.left.discard(child)
        child.release()
        # First what it has written last, then the word on its end, then why the set ends.
        self.settle(child)
        self.drain(child)
        if self.status is None and (status != 0 or child.instance not in self.options.can_die):
            self.begin(status if status >= 0 else 128 - status, child)
        elif self.status is None and not self.left:
            self.begin(0)    # all that may die have died

    def on_guard_gone(self):
        """The guard has ended: nothing is left, or it was killed, and the rest is ours to end.
        What a pipe holds is still to be read; and where there is no subreaper, a process that has
        left its group may hold it."""
        self.unwatch(self.reports)
        if not self.bury_guard():
            self.fail("the guard was killed")
        self.steps = [(max(time.monotonic() + LAST, self.patience), GIVE_UP)]
        for child in self.children:
            child.release()
            self.drain(child)
        if self.killed:
            self.say("killed %d: %s" % (len(self.killed), ", ".join(self.killed)))

    def take_over(self):
        """The guard was killed: end its children, which are ours now (elsewhere than on Linux, the
        leaders, by their ids)."""
        for child in self.left:
            if child.pid:
                signal_group(child.pid, signal.SIGKILL)
        for pids in iter(lambda: (own_children() or set()) - self.strangers, set()):
            for pid in pids:
                group = os.getpgid(pid)
                if group != os.getpgrp() and signal_group(group, signal.SIGKILL):
                    os.waitpid(pid, 0)
                else:
                    self.strangers.add(pid)    # not of the set, or another user's by now (sudo)
        self.left.clear()

    def bury_guard(self):
        """Reap the guard; return whether it did its work; if it was killed, do it."""
        os.close(self.reports)    # or it could wait for somebody to read them
        self.reports = None
        if self.guard_status is None:
            self.guard_status = os.waitpid(self.guard, 0)[1]
        if self.guard_status != 0:
            self.take_over()
        return self.guard_status == 0

    # -- signals and keys

    def on_signals(self):
        """Act upon the signals that arrived, each once, in their order."""
        self.arrived += read_some(self.signals) or b""
        while self.arrived:
            number = self.arrived[0]
            self.arrived = self.arrived.replace(self.arrived[:1], b"")
            if number in ENDING:
                self.on_end(number)
            elif number in PASSED_ON:
                self.order(number)
            elif number == signal.SIGTSTP:
                self.pause()
            elif number == signal.SIGCONT:
                self.go_on()
            elif number == signal.SIGWINCH:
                self.resize()
            else:
                self.reap()

    def on_end(self, number):
        """A signal that ends procrun: the first begins the shutdown, SIGINT or SIGTERM after it
        hurry it."""
        if self.status is None:
            self.say("%s received, shutting down" % signal_name(number))
            self.begin(128 + number)
        elif number in (signal.SIGINT, signal.SIGTERM):
            if self.reports is None:
                self.over = self.sink.full    # only stdout is waited for
            elif any(what == signal.SIGKILL for _, what in self.steps):
                self.steps = hurried(time.monotonic())

    def reap(self):
        """Reap what has ended: the guard, and as process 1 of a container others' orphans."""
        try:
            for pid, status in iter(partial(os.waitpid, -1, os.WNOHANG), (0, 0)):
                if pid == self.guard:
                    self.guard_status = status
        except ChildProcessError:
            pass

    def pause(self):
        """Ctrl-Z: the children are in sessions of their own, where the terminal's SIGTSTP does not
        reach them and their own would be ignored (orphaned groups), so it is SIGSTOP for all."""
        if os.getpid() == 1:
            return    # process 1 cannot be stopped
        self.order(signal.SIGSTOP)
        self.printer.close_line()
        self.sink.write(self.printer.queue)
        if self.keyboard:
            self.keyboard.set(self.keyboard.old)
        self.arrived += read_some(self.signals) or b""
        if signal.SIGCONT not in self.arrived:    # or it would sleep through that
            os.kill(os.getpid(), signal.SIGSTOP)

    def go_on(self):
        """After a stop; the terminal may have been used and resized since."""
        self.order(signal.SIGCONT)
        if self.keyboard:
            self.keyboard.set(self.keyboard.raw)
        self.resize()

    def resize(self):
        """Pass on the size of the terminal, less the prefix, or 80x24 if there is none."""
        columns, rows = 80, 24
        try:
            wide, high = os.get_terminal_size(1)
            if wide and high:    # a terminal that was never told has 0x0
                rows, columns = high, max(1, wide - self.printer.margin)
        except OSError:
            pass
        size = b"".join(each.to_bytes(2, sys.byteorder) for each in (rows, columns, 0, 0))
        for child in self.children:
            if child.terminal and child.fd is not None:
                fcntl.ioctl(child.fd, termios.TIOCSWINSZ, size)

    def on_keys(self):
        """Keys for the attached child; those of signals end the set, or stop it."""
        typed, now = read_some(self.keyboard.fd), time.monotonic()
        if typed == b"":
            self.unwatch(self.keyboard.fd)
        self.keyboard.set(self.keyboard.raw)    # a shell's bg and fg may not have told
        for number, data in self.keyboard.split(typed or b""):
            first = self.status is None and now - self.keyboard.interrupted > 1
            if number == signal.SIGTSTP:
                self.arrived += bytes([number])
                self.on_signals()
            elif number == signal.SIGINT and first and self.attached.fd is not None:
                self.keyboard.interrupted = now
                self.type(data)
            elif number:
                self.on_end(number)
            else:
                self.type(data)

    def type(self, data):
        """Write to the attached child's PTY; what it does not take now, later."""
        fd = self.attached.fd
        if fd is None:
            return
        self.typed += data
        try:
            del self.typed[:os.write(fd, self.typed)]
        except BlockingIOError:
            pass
        except OSError:
            self.typed.clear()    # it has ended
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.typed else 0)
        self.busy.modify(fd, events, self.busy.get_key(fd).data)

    # -- the end

    def begin(self, status, child=None):
        """Begin the shutdown; `status` is procrun's, `child` the one that caused it, if any."""
        self.status, now = status, time.monotonic()
        if child:
            self.say("%s %s after %.1f s, stopping the rest" % (
                child.instance.name, child.ending, now - (child.began or now)))
            self.patience = now + self.options.grace + LAST
        self.steps = ladder(now, self.options.grace, 0.1 if os.isatty(1) else 1.0)
        self.obey()

    def fail(self, message):
        """procrun cannot go on: say so, end the set with status 1."""
        if self.status is None:
            complain(message)
            self.begin(1)

    def obey(self):
        """Do what the shutdown has due."""
        whats, self.steps = due(self.steps, time.monotonic())
        for what in whats:
            if what is TELL:
                self.tell()
            elif what is GIVE_UP:
                self.give_up()
            else:
                self.send(what)

    def order(self, number):
        """Have the guard signal all groups."""
        try:
            os.write(self.orders, bytes([number]))
        except OSError:
            pass    # it has ended, or was killed

    def alive(self):
        """The names of the instances that were started and have not ended."""
        return [child.instance.name for child in self.children if child.pid and child in self.left]

    def send(self, number):
        """SIGTERM or SIGKILL to all that is left."""
        if self.left:
            self.say("sending %s to all processes" % signal_name(number))
        if number == signal.SIGKILL:
            self.killed += self.alive()
        self.order(number)
        if self.guard_status is None:
            os.kill(self.guard, signal.SIGCONT)    # in case that somebody has stopped it

    def tell(self):
        """Say who is waited for."""
        for when, what in self.steps:
            if what == signal.SIGKILL and self.reports is not None:
                self.say("waiting for %s (SIGKILL in %.0f s; Ctrl-C kills now)" % (
                    ", ".join(self.alive()) or "what was left behind", when - time.monotonic()))

    def give_up(self):
        """The time is over.  While stdout takes something, go on; else end: what still holds a
        pipe has left its group where that cannot be helped (not Linux)."""
        if self.sink.full and self.sink.moved:
            self.sink.moved = False
            self.steps = [(time.monotonic() + LAST, GIVE_UP)]
            return
        self.over = True
        for child in self.children:
            self.drain(child)
            if child.fd is not None and child.pid:
                self.printer.finish(child.source)
                self.say("its output is still held by a process that could not be ended",
                         child.source)

    def finished(self):
        """Whether nothing is left and everything is told, or the shutdown was given up."""
        return self.over or (self.reports is None and not self.printer.queue
                             and all(child.fd is None for child in self.children))

    def turn(self):
        """Wait for something to happen, and act upon it."""
        times = [when for when, _ in self.steps[:1]]
        if self.partial and not self.sink.full:
            times.append(next(iter(self.partial.values())))
        selector = self.stalled if self.sink.full else self.busy
        events = selector.select(until(times, time.monotonic()))
        # In turn, and first those behind who was read last: once stdout is full, no more are read.
        for _, _, key in sorted((each.fd <= self.read_last, each.fd, each) for each, _ in events):
            key.data()
        if selector is self.busy:    # or what looks quiet was only not read
            self.show_partial()
        if self.steps:
            self.obey()
        self.flush()

    def put_down(self):
        """Whatever happened: leave no child, no guard, and the terminal as it was.

        CPython takes its signal handlers down at exit: late signals are blocked, not to end it so.
        """
        if self.guard:
            self.order(signal.SIGKILL)
            os.close(self.orders)
            if self.reports is not None:
                self.bury_guard()
        if self.keyboard:
            self.keyboard.set(self.keyboard.old)
        signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)


# Files: text -> LOCATION -------------------------------------------------------------------------

def write_new(path, mode, data):
    """Create a file with this content (bytes), private from its first byte on; have it on disk."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fchmod(fd, mode)
        os.fsync(fd)


def begins_with(path, pattern):
    """Whether a regular file begins as the compiled pattern says; what cannot be read does not."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return bool(pattern.match(file.read(CHUNK)))
    except OSError:
        return False


def marked(location, app, mark):
    """Return the relative paths of the files that an export of the app may have written (in a
    folder, and in service directories) whose first comment begins with the mark (bytes); links are
    not followed."""
    place = re.compile(r"(%s-[\w-]+-\d+/((env|control|log)/)?)?[^/]+" % re.escape(app))
    first = rb'(?:.*\n){0,2}(?:# |; |<!-- )%s|\{\n(?:.*\n){0,9} *"procrun/made-by": "%s'
    mark = re.escape(mark).replace(rb"\-\-", rb"\-(?:\-|&#45;)")    # as an XML comment has it
    pattern = re.compile(first % (mark, mark))
    found = []
    for folder, _, names in os.walk(location):
        paths = (os.path.relpath(os.path.join(folder, name), location) for name in names)
        found += [path for path in paths if place.fullmatch(path)
                  and begins_with(os.path.join(location, path), pattern)]
    return sorted(found)


def in_the_way(location, files, ours, force):
    """Raise Failure if something stands where a file or its folder is to be: a file that is not
    among `ours`, or a link in place of a folder."""
    for file in files:
        path = os.path.join(location, file.path)
        if os.path.isdir(path) and not os.path.islink(path):
            raise Failure("%s: is a directory; move it away" % path)
        if os.path.lexists(path) and file.path not in ours and not force:
            raise Failure("%s: exists and is not of this app and format; move it away, or use "
                          "--force" % path)
        folder = os.path.dirname(path)
        while folder != location:
            if os.path.islink(folder) or os.path.lexists(folder) and not os.path.isdir(folder):
                raise Failure("%s: is a link or no directory; move it away" % folder)
            folder = os.path.dirname(folder)


def stage(folder, files):
    """Write all files into a new private folder, with numbers for names; one that an export which
    was killed has left there goes."""
    import shutil
    if os.path.lexists(folder):
        shutil.rmtree(folder)
    os.makedirs(folder, 0o700)
    for number, file in enumerate(files):
        write_new(os.path.join(folder, str(number)), file.mode, file.text.encode())


def prune(location, name):
    """Remove the folders between a location and a file that is gone, as far as they are empty."""
    try:
        while "/" in name:
            name = os.path.dirname(name)
            os.rmdir(os.path.join(location, name))
    except OSError:
        pass    # not empty


def install(location, staging, files, gone):
    """Write all files to a folder (its path) below the location, move each to its place, and
    remove what is gone (relative paths).  Signals wait.

    Raises Failure.  Nothing has changed before all files are written; then it tells what has.
    """
    import shutil
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    path, done = location, []
    try:
        stage(staging, files)
        for number, file in enumerate(files):
            path = os.path.join(location, file.path)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.replace(os.path.join(staging, str(number)), path)
            done.append(path)
        for name in gone:
            path = os.path.join(location, name)
            os.unlink(path)
            prune(location, name)
            done.append(path)
    except OSError as error:
        raise Failure("%s: %s; already replaced or removed: %s" % (
            path, error.strerror, ", ".join(done) or "nothing"))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


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


def absolute(path):
    """The absolute path (os.path.abspath); raises Failure."""
    try:
        return os.path.abspath(path)
    except OSError:
        raise Failure("the current directory has been removed; change to one that is there")


App = namedtuple("App", "types variables root")
App.__doc__ = """What the files say: the process types; the variables of the environment files
(bytes to bytes); the root directory."""


def procfile_path(args):
    """Where the Procfile is: -f, else in the root directory, else here."""
    return args.procfile or os.path.join(args.root or "", "Procfile")


def load_types(args):
    """Read the Procfile; if there is none, say what can be done about it."""
    path = procfile_path(args)
    if args.root and not os.path.isdir(args.root):
        raise Failure("%s: no such directory; -d gives the root directory" % args.root)
    if not args.procfile and not os.path.exists(path):
        import glob
        others = sorted(glob.glob(glob.escape(path) + ".*"))
        if others:
            raise Failure("no %s here; use -f %s" % (path, " or -f ".join(others)))
        raise Failure("no %s here; write one, a line for each process type, such as:" % path,
                      "    web: python3 -m http.server $PORT", "    worker: python3 worker.py")
    return parse_procfile(read_file(path), path)


def load_app(args, types):
    """Read the environment files, and find the root directory."""
    path = procfile_path(args)
    root = args.root or os.path.dirname(path)
    if os.path.exists(path) and not os.path.isfile(path):    # such as /dev/stdin
        root = args.root or ""
    default, names = os.path.join(root, ".env"), args.env
    if not names and os.path.lexists(default) and not os.path.isdir(default):    # a virtualenv
        names = [default]
    variables = {}
    for name in names:
        found, warnings = parse_env(read_file(name), name, {**os.environb, **variables})
        variables.update(found)
        complain(*warnings)
    return App(types, variables, absolute(root))


def planned(args, app):
    """Return ({type: concurrency}, base port, instances) that the command line asks for."""
    if args.concurrency and args.formation:
        raise UsageError("-c and -m exclude each other")
    given = parse_counts(args.concurrency + args.formation)
    counts = formation(app.types, given, 0 if args.formation else 1, getattr(args, "names", ()))
    base = base_port(args.port, app.variables, os.environb)
    instances = expand(app.types, counts, base)
    if not instances:
        raise UsageError("nothing to run: what is asked for has a concurrency of 0")
    return counts, base, instances


def wants_colour(option, environment, terminal):
    """Whether to colour: --color, else NO_COLOR, FORCE_COLOR (no-color.org), else a terminal."""
    if option != "auto":
        return option == "always"
    if environment.get("NO_COLOR"):
        return False
    return bool(environment.get("FORCE_COLOR")) or (terminal and environment.get("TERM") != "dumb")


def output_filter(option, terminal):
    """What of the processes' output is filtered; `option` is that of --color."""
    if terminal:
        return TERMINAL
    return COLOURLESS if option == "never" else None


def raise_fd_limit(needed):
    """Allow procrun `needed` file descriptors; return the limits before, for the children."""
    soft, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and needed > soft:
        if hard != resource.RLIM_INFINITY and needed > hard:
            raise Failure("too few file descriptors: %d are needed, the limit is %d; raise it "
                          "with ulimit -n" % (needed, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return limits


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


def wait_for_front():
    """Before --attach: stop by SIGTTOU as long as the terminal is another group's (`&`)."""
    try:
        termios.tcdrain(0)
    except termios.error:
        pass    # no shell is there to continue it (an orphaned group)


def open_children(args, types, instances):
    """Return (the children, the attached one or None), with their pipes and PTYs open."""
    wanted = selected([args.attach], instances, "--attach")[:1] if args.attach else []
    if wanted and not (os.isatty(0) and os.isatty(1)):
        raise UsageError("--attach needs a terminal as standard input and output")
    if wanted:
        wait_for_front()
    colours = {each.name: COLOURS[place % len(COLOURS)] for place, each in enumerate(types)}
    share = (1 << 23) // len(instances)    # of what an ordinary user's pipes may hold together
    capacity = 1 << max(16, min(20, share.bit_length() - 1))
    children = []
    for place, each in enumerate(instances):
        source = Source(each.name, colours[each.type])
        children.append(Child(place, each, source, args.pty or each in wanted))
        children[-1].open(capacity, each in wanted)
    return children, next((child for child in children if child.instance in wanted), None)


def enter_root(root):
    """Make the root directory the current one."""
    try:
        os.chdir(root)
    except OSError as error:
        raise Failure("%s: %s; it is to be the root directory" % (root, error.strerror))


def cmd_start(args):
    """procrun start: run the formation until it ends."""
    app = load_app(args, load_types(args))
    instances = planned(args, app)[2]
    options = Options(args.timeout, selected(args.can_die, instances, "--can-die"),
                      selected(args.quiet, instances, "--quiet"))
    enter_root(app.root)
    tidy_fds()
    limits = raise_fd_limit(2 * len(instances) + 20 + len(open_fds()))
    style = Style(max([6] + [len(each.name) for each in instances]),
                  wants_colour(args.color, os.environ, os.isatty(1)), args.timestamp, args.prefix,
                  output_filter(args.color, os.isatty(1)))
    try:
        children, attached = open_children(args, app.types, instances)
    except OSError as error:
        raise Failure("cannot open a pipe or PTY: %s" % error.strerror)
    signals, altered = catch_signals()
    stdin = os.pipe()[0]    # its writing end is open as long as procrun is there
    ground = Ground(app.root, environment(app.variables), stdin, limits, altered)
    supervisor = Supervisor(options, Printer(style, time.time), Sink(1), signals)
    return supervisor.run(children, ground, attached)


def cmd_run(args):
    """procrun run: become the command."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command or not command[0]:
        raise UsageError("run what? name a process type, or a command")
    may_be_type = len(command) == 1 and (args.procfile or os.path.exists(procfile_path(args)))
    types = load_types(args) if may_be_type else []
    app = load_app(args, types)
    variables, names = environment(app.variables), [each.name for each in types]
    if command[0] in names:
        base = base_port(args.port, app.variables, os.environb)
        [instance] = expand(types, formation(types, {}, 1, command), base)
        variables.update(instance.variables)
        command = ["/bin/sh", "-c", instance.command]
    enter_root(app.root)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):    # which CPython ignores
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, variables)
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        hint = "; the process types are " + ", ".join(names) if missing and names else ""
        complain("%s: %s%s" % (command[0], error.strerror, hint))
        return 127 if missing else 126


def cmd_check(args):
    """procrun check: parse everything."""
    app = load_app(args, load_types(args))
    base_port(None, app.variables, os.environb)
    tell("valid procfile detected (%s)\n" % ", ".join(each.name for each in app.types))
    return 0


def cmd_version(_):
    """procrun version."""
    tell("procrun %s\n" % VERSION)
    return 0


def primary_group(user):
    """The name of the user's group, or None if this machine has no such user."""
    import grp
    import pwd
    try:
        return grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name
    except KeyError:
        return None


def mark_of(format, app):
    """How the first comment of each file begins."""
    return "Made by procrun export %s for the app %s. " % (format, app)


def make_plan(args, app, counts, base):
    """Return the Plan of an export."""
    name = os.path.basename(app.root) if args.app is None else args.app
    user = name if args.user is None else args.user
    log = absolute(args.log) if args.log else ""
    mark, root = mark_of(args.format, name), app.root
    if args.format == "kubernetes":    # its files are shared: nothing of this machine is in them
        root = root if args.root else ""
    else:
        again = [each for each in args.argv if each not in ("--force", "--dry-run")]
        mark += "Again: cd %s && python3 %s" % (
            shell_quote(absolute(".")), " ".join(map(shell_quote, [sys.argv[0]] + again)))
    variables = {key.decode("utf-8", "surrogateescape"):
                 exportable("the value of " + printable(key), value)
                 for key, value in {b"PYTHONUNBUFFERED": b"1", **app.variables}.items()
                 if key not in (b"PORT", b"PS")}    # an instance has its own
    grace = max(1, -int(-args.timeout // 1))
    group = primary_group(user) or user
    return Plan(name, user, group, root, log, grace, mark, variables, app.types, counts, base,
                args.image, args.user_units, absolute(args.location))


def warn(plan, format):
    """Say what this machine lacks for an export, and what was perhaps not meant."""
    refused = ""
    if format == "supervisord":
        refused = "; until it is there, supervisord refuses its whole configuration"
    if not (primary_group(plan.user) or plan.user_units or format == "kubernetes"):
        complain("warning: this machine has no user `%s`%s" % (plan.user, refused))
    if plan.log and not os.path.isdir(plan.log):
        complain("warning: there is no directory %s for the logs%s" % (plan.log, refused))
    if plan.log and format == "upstart":
        complain("warning: `%s` must be able to write to %s" % (plan.user, plan.log))
    if plan.counts.get("release"):
        complain("warning: release is meant to run once: -c release=0 leaves it out")


def tell_export(text):
    """Write text to stdout, and wait while that takes nothing; raises Failure."""
    ready = select.poll()
    ready.register(1, select.POLLOUT)
    for start in range(0, len(text), 1000):    # no more than a pipe that is ready takes
        ready.poll()
        tell(text[start:start + 1000])


def dry_run(plan, instances, format):
    """Print every file with its name, the values masked."""
    masked = plan._replace(variables=dict.fromkeys(plan.variables, "********"))
    for file in export_files(masked, instances, format):
        path = os.path.join(plan.location, file.path)
        tell_export("[procrun export] would write: %s, mode %04o\n%s" % (
            path, file.mode, file.text))


def tell_done(plan, args, written, gone):
    """Say what an export has done, and how to start it; an error of stdout is no failure of it."""
    start = FORMATS[args.format].start.format(app=plan.app, location=shell_quote(plan.location))
    if args.user_units and args.format == "systemd":
        start = start.replace("systemctl", "systemctl --user") + " && loginctl enable-linger"
    lines = ["writing: " + os.path.join(plan.location, name) for name in written]
    lines += ["removing: " + os.path.join(plan.location, name) for name in gone]
    try:
        for line in lines + ["start it with: " + start]:
            tell_export("[procrun export] %s\n" % line)
    except Failure as failure:
        complain(*failure.args)


def cmd_export(args):
    """procrun export: write the configuration of a process manager."""
    app = load_app(args, load_types(args))
    counts, base, instances = planned(args, app)
    plan = make_plan(args, app, counts, base)
    files = export_files(plan, instances, args.format)
    warn(plan, args.format)
    if args.dry_run:
        dry_run(plan, instances, args.format)
        return 0
    os.umask(0o022)
    ours = marked(plan.location, plan.app, mark_of(args.format, plan.app).encode())
    in_the_way(plan.location, files, ours, args.force)
    written = [file.path for file in files]
    gone = sorted(set(ours) - set(written))
    install(plan.location, os.path.join(
        plan.location, ".procrun-%s-%s" % (args.format, plan.app)), files, gone)
    tell_done(plan, args, written, gone)
    return 0


def seconds(text):
    """An argparse type: a grace period."""
    if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]*)?|\.[0-9]+", text) or float(text) > 86400:
        raise UsageError("-t: `%s` is not a number of seconds from 0 to 86400, a day" % text)
    return float(text)


def split_names(text):
    """An argparse type: "a,b" -> ["a", "b"]."""
    return text.split(",")


# What each command takes, as a manual page has it: --help shows it, and add_options() reads it.
COMMON = """
-f, --procfile FILE     the Procfile (default: Procfile in the root directory; - is standard input)
-d, --root DIR          where the commands run and .env is (default: the Procfile's folder)
-e, --env FILE[,FILE]   read these files instead of .env; repeatable
"""
BASE_PORT = """
-p, --port N            base port (default: PORT of .env or the environment, or 5000)
"""
FORMATION = BASE_PORT + """
-c, --concurrency NAME=N[,NAME=N]   run N instances; types that are not named run once, or as often
                                    as all=N says; repeatable
-m, --formation NAME=N[,NAME=N]     the same, but types that are not named do not run, unless all=N
                                    is given
-t, --timeout SECONDS   grace period between SIGTERM and SIGKILL, at most a day (default: 5; start:
                        0 kills at once; export: rounded up to a whole second)
"""
START = FORMATION + """
NAME ...                run only these process types
--can-die NAME[,NAME]   an exit 0 of these does not end the others; repeatable
--keep-going            no exit of a process ends the others
--quiet NAME[,NAME]     drop the output of these, but not their starts and ends; repeatable
--pty                   give each process a terminal of its own
--attach NAME           give this terminal to one process, such as web or web.2, from its start;
                        Ctrl-] takes it back
--color auto|always|never   colour the prefixes (default: auto, on a terminal); never: no colours
                        at all, not those of the processes either
--no-timestamp          write no time in front of the lines
--no-prefix             write nothing in front of the lines
"""
RUN = BASE_PORT + """
NAME|COMMAND [ARG ...]  a process type, or a command with its arguments
"""
EXPORT = FORMATION + """
FORMAT                  the process manager
LOCATION                the folder to write to, made if missing
-a, --app NAME          the app's name (default: the root directory's)
-u, --user USER         who runs it (default: the app's name)
-l, --log DIR           log to files DIR/web-1.log (default: the manager's own logging)
--image IMAGE           the container image (kubernetes)
--user-units            units for systemctl --user (systemd)
--dry-run               print every file with its values masked, write nothing
--force                 overwrite files not of this app and format
"""
WORDS = {    # what the words for values and arguments mean to argparse
    "N": {"type": port_number}, "SECONDS": {"type": seconds, "default": 5.0},
    "FILE": {"type": os.path.normpath}, "DIR": {"type": os.path.normpath},
    "auto|always|never": {"choices": ("auto", "always", "never"), "default": "auto"},
    "NAME ...": {"dest": "names", "nargs": "*"}, "FORMAT": {"dest": "format", "choices": FORMATS},
    "LOCATION": {"dest": "location"},
    "NAME|COMMAND [ARG ...]": {"dest": "command", "nargs": "..."}}
COMMANDS = {
    "start": (cmd_start, START), "run": (cmd_run, RUN), "check": (cmd_check, ""),
    "export": (cmd_export, EXPORT), "version": (cmd_version, "")}


def add_options(parser, text):
    """Have an argparse parser take what a text describes, an option or an argument a line.

    A line holds the flags, if any, and the word for the value, if any, then two or more blanks
    and what it does, which goes on in lines that begin with a blank.
    """
    for flags, word, meaning in re.findall(
            r"^(-[^\s,]+(?:, -\S+)?)? ?(\S+(?: \S+)*)?  +(.*(?:\n +.*)*)", text, re.MULTILINE):
        details = dict(WORDS.get(word, {}), help=meaning)
        if word:
            details["metavar"] = word
        elif flags.startswith("--no-"):
            details.update(dest=flags[len("--no-"):], action="store_false")
        else:
            details["action"] = "store_true"
        if "[," in word:
            details.update(type=split_names, action="extend", default=[])
        parser.add_argument(*flags.split(", ") if flags else (), **details)


def parse_words(words):
    """Return (the function of the command, its arguments as argparse has them) that the words of
    the command line mean; --help and the like end procrun.  Raises UsageError."""
    import argparse

    class Parser(argparse.ArgumentParser):
        """Errors are one line, and options are not guessed from their first letters."""

        def __init__(self, text, **details):
            # Its width is given, or argparse imports shutil to find it out (3 ms).
            page = partial(argparse.RawDescriptionHelpFormatter, width=100)
            super().__init__(allow_abbrev=False, formatter_class=page, **details)
            add_options(self, COMMON + text)

        def error(self, message):
            raise UsageError("%s (see %s --help)" % (message, self.prog))

    top = Parser("", prog="procrun", usage=argparse.SUPPRESS, description=__doc__)
    top.add_argument("--version", action="version", version="procrun " + VERSION)
    top.add_argument("words", nargs="...", help=argparse.SUPPRESS)
    args = top.parse_args(words)
    if not args.words:
        top.exit(UsageError.status, top.format_help())
    name, *rest = args.words
    if name not in COMMANDS:
        top.error("unknown command `%s`; there are %s" % (name, ", ".join(COMMANDS)))
    function, text = COMMANDS[name]
    page = function.__doc__
    if name == "export":
        page += "".join("\n    %-12s %s" % (key, each.help) for key, each in FORMATS.items())
    # What stands before the command is in args already, and lists are extended.
    return function, Parser(text, prog="procrun " + name, description=page).parse_args(rest, args)


def main(argv=None):
    """Run procrun; return its exit status."""
    words = sys.argv[1:] if argv is None else argv
    try:
        function, args = parse_words(words)
        args.argv = words
        return function(args)
    except Failure as failure:
        complain(*failure.args)
        return failure.status


if __name__ == "__main__":
    sys.exit(main())
