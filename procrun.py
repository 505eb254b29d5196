#!/usr/bin/env python3
"""procrun - run a Procfile app: all its processes in one terminal, and nothing left behind

    procrun start [NAME ...]         run all process types, or those named, until a process ends
    procrun run NAME                 run one process type's command, in the foreground
    procrun run COMMAND [ARG ...]    run any other command with the app's environment
    procrun check                    check the Procfile and the environment files
    procrun export FORMAT LOCATION   write the same app for a process manager, such as systemd
    procrun version                  print the version
    procrun COMMAND --help           list the options of a command

Examples:

    python3 procrun.py start -c web=2                two instances of web
    python3 procrun.py start web --attach web        web alone; its debugger gets the terminal
    python3 procrun.py start --keep-going            whatever ends, the others go on
    python3 procrun.py run python3 manage.py migrate
    python3 procrun.py export systemd /etc/systemd/system

While start runs, its terminal takes these commands:

    restart [NAME ...]   restart all instances, those of a type (web), or a single one (web.2)
    stop NAME ...        end instances; they stay ended until restart
    attach NAME          type to a process, until Ctrl-D (under --pty, or with --attach: Ctrl-])
    ps [NAME ...]        list the instances: PORT, pid, and how long each has run or how it ended
    help                 list these commands

Exit status of start:

    N       that of the process that ended the others (128+N: signal N killed it); with
            --keep-going that of the first that failed
    128+N   signal N to procrun began the shutdown
    141     the reader of the output has gone
    126     a process could not be executed, for instance because its environment is too large
    1       an error, for instance in the Procfile
    2       an error of the command line

The exit status of run is that of the command, 127 if it is not found, or 126 if it cannot be
executed.
"""
# How the file is built.  Data travels downwards: text becomes process types, these become
# instances, these become files for a process manager, or children.  All that only computes stands
# above all that talks to the kernel.  Below, procrun is two processes:
#
#                 orders: signals, typed commands, "nobody reads any more"
#     user --->  FRONT -------------------------------------------------> GUARD ---> children
#     terminal <-- shows <--------------------------------------------- decides,        |
#                  ^     reports: started, ended, a line to say,        forks, signals, |
#                  |     the exit status                                reaps           |
#                  +---------------- output: a pipe or PTY for each <-------------------+
#
# - kill -9 of procrun runs no code of procrun.  So the guard decides alone, and the end of its
#   orders is one more order: the front is gone, end the set.  The front only shows.  It does not
#   trust the guard to be alive: every wait has a limit.
# - A child leads a group of its own, outside procrun's session.  The terminal's Ctrl-C does not
#   reach it, so it gets one signal, the one that the guard sends.
# - First the program, then what it leaves: SIGTERM goes to the leader alone (and to what a shell
#   runs that waits for it), and to what is left of its group when that has lost its parent.
#   Servers tell their own workers; a signal sent behind their back costs work.
# - What leaves its group (a daemon) is adopted when its parent dies: the guard is a subreaper, so
#   on Linux the set has ended when the kernel says that the guard has no child any more.
# - The guard keeps its ends of the pipes open, so an instance can be forked anew on the same pipe.
#   It is read only after its start was reported, and started anew only after what it had written
#   is shown: no output precedes the start.
# - Only select() waits.  Signals arrive as bytes in a pipe, stdout is waited for like any other
#   file descriptor, and while it takes nothing no child is read: that is the back-pressure.
import os
import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", sys.flags.isolated):
    sys.path.pop(0)    # the app's folder: its own signal.py or resource.py must not be imported

import argparse
import errno
import gc
import math
import re
import select
import signal
import stat
import struct
import time
from collections import namedtuple
from contextlib import suppress
from functools import partial
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from signal import SIGCHLD, SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM, SIGTSTP
from time import monotonic

if __name__ == "__main__" and signal.getsignal(SIGINT) is signal.default_int_handler:
    signal.signal(SIGINT, signal.SIG_DFL)    # an early Ctrl-C prints no traceback
if __name__ == "__main__" and os.getpid() == 1:    # to which an early signal would be lost
    signal.pthread_sigmask(signal.SIG_BLOCK, {SIGINT, SIGTERM, SIGHUP})

try:
    import fcntl
    import resource
    import termios
    import tty
except ImportError as missing:
    sys.exit(f"procrun: {missing}; procrun needs Linux, macOS or another Unix, and the whole "
             "standard library (on Debian, apt install python3)")

VERSION = "0.2.0"
MOST_NAMES = 10        # in one line
MOST_HELD = 1 << 24    # bytes held back of other processes while one is attached
SETTLING = 0.2         # seconds that a shell may take to fork a program
ONE_REQUEST = 0.4      # seconds: the terminal and npm both deliver Ctrl-C, so two are one
PATIENCE = 0.3         # seconds after SIGTERM until it is said who is waited for
UNFINISHED = 0.2       # seconds after which a line without its newline is shown
GIVE_UP = 0.5          # seconds after SIGKILL in which nothing has ended
SHOWN_AGAIN = 2048     # bytes, at most ten lines, of a process that failed
CHUNK = 1 << 20        # bytes: one read, and the most that is kept of a line without its newline
LITTLE = 1 << 16       # bytes: one read where little is expected (more costs an mmap and a munmap)
TOO_LARGE = 1 << 24    # bytes: no Procfile or .env is that long
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
            self.append(f"{source}:{number}: {problem}")
        else:
            self.more += 1
            self[MOST_ERRORS:] = [f"{source}: and {self.more} more"]


def printable(text):
    """Bytes as one short printable str, for messages."""
    text = repr(text[:200].decode("utf-8", "replace"))[1:-1]
    return text if len(text) <= 40 else text[:40] + "..."


def is_comment(line):
    """Whether a line (bytes) is a comment, or blank."""
    return line.strip()[:1] in (b"", b"#")


# Procfile: text -> process types -----------------------------------------------------------------

ProcessType = namedtuple("ProcessType", "name command")
ProcessType.__doc__ = "A process type of the Procfile: its name (str) and its command (bytes)."

# A line with those that continue it, each after a backslash that no other backslash escapes.  As
# in the shell, a comment never continues.
PROCFILE_LINE = rb"(?s)([^\S\n]*#[^\n]*|(?:[^\\\n]+|\\.)*\\?)(?:\n|\Z)"


def numbered(pattern, text):
    """Yield (line number, match) for each match of a pattern in the text of a file (bytes), less
    its UTF-8 byte order mark and the CR of each CR LF."""
    text = re.sub(rb"\A\xef\xbb\xbf", b"", text).replace(b"\r\n", b"\n")
    number = 1
    for match in re.finditer(pattern, text):
        yield number, match
        number += match[0].count(b"\n")


def entry_problem(line, lines):
    """What is wrong with this line as an entry, or None; `lines` holds the names before it."""
    name, colon, command = line.partition(b":")
    shown = printable(name)
    if not colon:
        return f"no colon in `{shown}`; expected `name: command`"
    if not re.fullmatch(rb"[A-Za-z0-9_-]+", name):
        return f"bad name `{shown}`; use letters, digits, _ and -"
    if name == b"all":
        return "the name `all` means every process type; use another"
    if name in lines:
        return f"duplicate name `{shown}`, first on line {lines[name]}; rename one"
    if not command.strip():
        return f"empty command for `{shown}`; write one after the colon"
    if b"\0" in command:
        return f"NUL byte in the command of `{shown}`; remove it"
    return None


def parse_procfile(text, source="Procfile"):
    r"""Return the list of ProcessType of a Procfile (bytes), in its order.

        file     a UTF-8 byte order mark is skipped; lines end in LF or CR LF, the last may lack it
        skipped  blank lines, and lines whose first non-blank is #
        entry    name ":" blanks command
        name     one or more of A-Z a-z 0-9 _ -, each name once; "all" is taken by formations
        command  any bytes but NUL, kept as they are; if it ends in a backslash (that no other
                 backslash escapes), it is dropped and the next line is joined

    Raises Failure with the first ten errors and a count, or if there is no process type at all.
    """
    types, lines, problems = [], {}, Problems()
    for number, match in numbered(PROCFILE_LINE, text):
        line = re.sub(rb"(\\[^\n])|\\\n", rb"\1", match[1])
        if is_comment(line):
            continue
        name, _, command = line.partition(b":")
        problem = entry_problem(line, lines)
        if problem:
            problems.add(source, number, problem)
        else:
            types.append(ProcessType(name.decode(), command.lstrip(b" \t")))
            lines[name] = number
    if problems:
        raise Failure(*problems)
    if not types:
        raise Failure(f"{source}: no process types; write a line such as `web: python app.py`")
    return types


# Environment: text -> variables ------------------------------------------------------------------

# Any line; if it is an entry: its name; a 'literal' value; an "escaped" one, whose closing quote
# follows an even number of backslashes; a quote that is never closed (with all that follows); a
# bare value.  Then the rest of the line.
ENV_ENTRY = rb"""(?xs)
    (?: [ \t]* (?: export [ \t]+ )? ( [^\0- \x7f='"\#] [^\0- \x7f='"]* ) [ \t]* =
        (?: [ \t]* (?: '([^']*)' | "(.*?(?<!\\)(?:\\\\)*)" | (['"]) .* )
          | ([^\n]*?) (?= [ \t]\# | \n ) )
    )? ([^\n]*) \n"""
# It also matches one that is not closed, or each of many would search to the end for its }.
ENV_EXPANSION = rb"|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?(\}|\Z)"


def entry_value(entry, known):
    """Return (value, the undefined names in it) of a match of ENV_ENTRY; see parse_env().  Raises
    ValueError that says what is wrong; it does not show the line, which may be a secret."""
    name, value, escaped, quote, bare, rest = entry.groups()
    missing = {}

    def replacement(match):
        """Return what stands for an escape or an expansion."""
        special, key, default, closed = match.groups()
        if special:
            return {b"n": b"\n", b"t": b"\t"}.get(special, special)
        if not closed:
            return match[0]
        if key not in known and default is None:
            missing[key.decode()] = True
        return known.get(key) or default or b""

    if not name:
        raise ValueError("expected NAME=value")
    if re.search("[\xa0\u200b\ufeff]", name.decode("utf-8", "replace")):
        raise ValueError("the name has a blank that is not a space; remove it")
    if quote:
        raise ValueError(f"the quote {quote.decode()} is never closed")
    if not is_comment(rest):
        raise ValueError("text after the closing quote; only a comment may follow")
    if bare is not None:
        value = re.sub(rb"\\(\$)(?=\{)" + ENV_EXPANSION, replacement, bare.strip(b" \t"))
    elif escaped is not None:
        value = re.sub(rb'\\([nt"\\$])' + ENV_EXPANSION, replacement, escaped)
    if b"\0" in value:
        raise ValueError("NUL byte in the value; remove it")
    return value, missing


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
    variables, known, problems, warnings = {}, dict(environment), Problems(), Problems()
    for number, entry in numbered(ENV_ENTRY, text + b"\n"):
        if is_comment(entry[0]):
            continue
        try:
            value, missing = entry_value(entry, known)
        except ValueError as error:
            problems.add(source, number, error)
            continue
        variables[entry[1]] = known[entry[1]] = value
        for name in missing:
            warnings.add(source, number, f"warning: ${{{name}}} is not defined, so it is empty")
        if len(value) > 1 << 20:
            # The rest is not read: later lines could double it again and again.
            problems.add(source, number, "the value is longer than 1 MiB")
            break
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
    """Return the text that /bin/sh -c is given for a command (both bytes), by start and exports.

    A command that is plainly one program replaces the shell, so that the process id, the signal
    and the exit status are its own; Debian's sh does not do that by itself.  Any other stands
    behind a trap: on SIGTERM the shell waits for what it runs, and then ends.
    """
    program = re.match(rb"(exec[ \t]+)?([A-Za-z0-9_./][A-Za-z0-9_./+-]*)(?=[ \t]|\Z)", command)
    syntax = re.search(rb"[;&|()<>`!\n]|(?<!\$)\{", command)
    if syntax or not program or program[2] in NOT_PROGRAMS:
        return TRAP + command
    return command if program[1] else b"exec " + command


Instance = namedtuple("Instance", "type name port command variables")
Instance.__doc__ = """One instance: its process type's name, its own, such as web.1, its PORT, its
command (bytes), and what it adds to the environment (bytes to bytes)."""


def check_names(names, known, what="process type"):
    """Raise UsageError for the first of `names` that is not among `known`."""
    for name in names:
        if name not in known:
            raise UsageError(f"unknown {what} `{name}`; known: {', '.join(known)}")


def formation(types, items, default, names=()):
    """Return {process type: count} in Procfile order: what an item such as "web=2" says, else one
    such as "all=2", else `default`; but 0 if there are `names` and the type's is not among them.
    Raises UsageError."""
    known, counts = [each.name for each in types], {}
    for item in items:
        match = re.fullmatch(r"\s*([^=\s]+)\s*=\s*([0-9]{1,5})\s*", item)
        if not match:
            raise UsageError(f"expected NAME=N with a whole number N, found `{item}`")
        counts[match[1]] = int(match[2])
    check_names(names, known)
    check_names(counts, known + ["all"])
    default = counts.get("all", default)
    return {name: counts.get(name, default) if not names or name in names else 0 for name in known}


def expand(types, counts, base):
    """Return the instances, in Procfile order: PORT = base + 100 * index of the type + number - 1.
    Types that are not run are counted, so a port never depends on what else runs.  Raises Failure
    if a port is beyond 65535."""
    instances = []
    for index, (kind, command) in enumerate(types):
        for number in range(counts[kind]):
            name, port = f"{kind}.{number + 1}", base + 100 * index + number
            if port > 65535:
                raise Failure(f"{name}: port {port} is beyond 65535; choose a lower base port "
                              "with -p")
            variables = {b"PORT": b"%d" % port, b"PS": name.encode()}
            instances.append(Instance(kind, name, port, command, variables))
    return instances


def port_number(text):
    """Return the port, 1 to 65535, that a text (str) stands for; raises UsageError."""
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise UsageError(f"`{text}` is not a port, 1 to 65535")
    return int(text)


def base_port(option, variables, environment):
    """Return the base port: the option, else a PORT of the two that is not empty, else 5000;
    raises Failure if that is not a port."""
    given = printable(variables.get(b"PORT") or environment.get(b"PORT") or b"5000")
    try:
        return option or port_number(given)
    except UsageError:
        raise Failure(f"PORT={given} in .env or the environment is not a port; use -p")


def selected(names, instances, option):
    """Return the instances that `names` stand for (of types, or their own), in their order;
    raises UsageError that names the `option`."""
    known = [each.type for each in instances] + [each.name for each in instances]
    check_names(names, dict.fromkeys(known), f"name for {option}:")
    return [each for each in instances if each.type in names or each.name in names]


# Export: instances -> files ----------------------------------------------------------------------

# Each format is a generator: it takes a Plan and the list of Jobs, and yields the files, each as
# (path below the location, permission bits, text).

Plan = namedtuple("Plan", "format app user group root log grace mark variables counts image "
                          "user_units location")
Plan.__doc__ = """What an export is about, beside the instances: the format; names of the app, the
user and, if it is known, the user's group; root directory; directory of log files or ""; whole
seconds of grace, 1 or more; text of the first comment; the variables that all instances share (str
to str); {type: concurrency}; --image; --user-units; absolute path of the location."""

Job = namedtuple("Job", "name type port text id log variables")
Job.__doc__ = """An instance as a manager gets it: its name, process type and PORT; its shell text;
what the manager calls it; its log file or ""; its variables (str to str)."""

MADE_BY = "Made by procrun export %s for the app %s. "    # the first comment of each file
STOP_SHELL = ("others=; if [ ! -e /proc/$pid/task/$pid/children ]; then others=-$pid; "
              "elif [ /proc/$pid/exe -ef /bin/sh ]; "
              "then read -r others </proc/$pid/task/$pid/children; fi; kill -TERM $pid $others")


def exportable(what, data):
    """Return bytes as str; raises Failure, which names `what` they are, if no process can get them
    (execve(2): 128 KiB a string) or a format cannot hold them: control characters but tab and
    newline, surrogates (bytes that are not UTF-8), noncharacters (Unicode 23.7; for systemd)."""
    text = data.decode("utf-8", "surrogateescape")
    if (re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef]", text)
            or any(ord(char) & 0xfffe == 0xfffe for char in text) or len(data) >= 127 << 10):
        raise Failure(f"{what} cannot be exported: it has control characters, is not UTF-8, or is "
                      "longer than 127 KiB")
    return text


def shell_quote(text):
    """Quote a text as one word for a shell."""
    import shlex    # 2 ms, which only an export needs
    return shlex.quote(text)


def forwarding(text):
    """Return shell text that runs `text` where the manager sends SIGTERM to the leader alone.  A
    shell reacts to a signal at once only while it waits for a background job; that job starts with
    SIGINT and SIGQUIT ignored (POSIX, Shell 2.12), which bash can undo and dash cannot."""
    if not text.startswith(TRAP.decode()):
        return text
    return ("""trap 'trap "" TERM; kill -TERM 0; wait; exit 143' TERM; (trap - INT QUIT; """
            f"exec /bin/sh -c {shell_quote(text)}) & wait $!")


def stop_leader(text):
    """Return shell text that sends SIGTERM to $pid, the leader of an instance that runs `text`;
    and to its children (its group, where /proc does not list them) while it is a shell that waits
    for them, not replaced by an exec."""
    return STOP_SHELL if text.startswith(TRAP.decode()) else "kill -TERM $pid"


def shell_variables(plan, job):
    """Return shell text that sets an instance's environment, with HOME, USER and LOGNAME of the
    user, unless the app sets them.  The shell expands ~USER where and when the app is started."""
    home = "HOME=~{0} USER={0} LOGNAME={0}; export HOME USER LOGNAME\n".format(plan.user)
    return home + "".join(f"export {name}={shell_quote(value)}\n"
                          for name, value in job.variables.items())


def upstart_word(text):
    """Quote a text as one word of a stanza; a backslash escapes even between single quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "'\"'\"'") + "'"


def export_upstart(plan, jobs):
    """Three levels of jobs: app, process type, instance; see init(5) of Upstart.  It alters `exec`
    and `env` lines, but keeps a script as it is, except for a line `end script`; and it passes a
    script of several lines through a pipe, not in argv."""
    for job in jobs:
        output = f"exec >>{shell_quote(job.log)} 2>&1\n" if job.log else ""
        script = f"{shell_variables(plan, job)}{output}exec /bin/sh -c {shell_quote(job.text)}"
        script = re.sub(r"(?m)^([ \t]*end)(?=[ \t]+script)", r"\1''", script)
        yield f"{job.id}.conf", 0o600, f"""# {plan.mark}
description "{plan.app} {job.name}"
start on starting {plan.app}-{job.type}
stop on stopping {plan.app}-{job.type}
respawn
respawn limit unlimited
kill timeout {plan.grace}
setuid {plan.user}
setgid {upstart_word(plan.group or plan.user)}
chdir {upstart_word(plan.root)}
script
{script}
end script
# Upstart respawns without a pause.
post-stop exec sleep 1
"""
    for name in dict.fromkeys(job.type for job in jobs):
        yield f"{plan.app}-{name}.conf", 0o644, (
            f"# {plan.mark}\nstart on starting {plan.app}\nstop on stopping {plan.app}\n")
    yield f"{plan.app}.conf", 0o644, (
        f"# {plan.mark}\nstart on runlevel [2345]\nstop on runlevel [!2345]\n")


# The PATH is the app's; MAINPID is empty if the leader ended by itself.
SYSTEMD_STOP = ('exec 2>/dev/null; PATH=/bin:/usr/bin:$PATH; pid=$MAINPID; [ "$pid" ] || exit 0; '
                "%s; while kill -0 $pid; do sleep 0.1; done")


def systemd_word(text):
    """Quote a text as one word of ExecStart=; see systemd.service(5), systemd.syntax(7)."""
    return '"%s"' % re.sub(r'(["\\])', r"\\\1", text).replace("%", "%%").replace("$", "$$")


def systemd_service(plan, job):
    """Return the text of an instance's service."""
    user = "" if plan.user_units else f"User={plan.user}\n"
    log = f"StandardOutput=append:{job.log}\nStandardError=inherit\n" if job.log else ""
    return f"""# {plan.mark}
[Unit]
Description={plan.app} {job.name}
PartOf={plan.app}-{job.type}.target
After=network.target {plan.app}-{job.type}.target
StartLimitIntervalSec=0

[Service]
{user}WorkingDirectory={plan.root}
EnvironmentFile={plan.location}/{plan.app}.env
Environment=PORT={job.port} PS={job.name}
ExecStart=/bin/sh -c {systemd_word(job.text)}
# First the leader; what is left then gets SIGTERM, the same time again, and SIGKILL.
ExecStop=/bin/sh -c {systemd_word(SYSTEMD_STOP % stop_leader(job.text))}
Restart=always
RestartSec=1
TimeoutStopSec={plan.grace}
SuccessExitStatus=143
SyslogIdentifier={job.id}
{log}"""


def systemd_target(plan, name, wants, more):
    """Return the text of a target that wants other units, and has `more` lines."""
    return f"""# {plan.mark}
[Unit]
Description={name}
Wants={" ".join(wants)}
{more}
"""


def export_systemd(plan, jobs):
    """A service for each instance, a target for each process type, a target for the app, and an
    environment file (for its quoting see systemd.exec(5)), because Environment= shows its values
    on the bus.  After= makes a target stop only when its units have stopped."""
    lines = ['%s="%s"\n' % (name, re.sub(r'(["\\$`])', r"\\\1", value))
             for name, value in plan.variables.items()]
    yield f"{plan.app}.env", 0o600, f"# {plan.mark}\n{''.join(lines)}"
    app, units = f"{plan.app}.target", {}
    for job in jobs:
        units.setdefault(f"{plan.app}-{job.type}", []).append(f"{job.id}.service")
        yield f"{job.id}.service", 0o644, systemd_service(plan, job)
    for name, wants in units.items():
        yield f"{name}.target", 0o644, systemd_target(
            plan, name, wants, f"PartOf={app}\nAfter={app}")
    wanted_by = "default" if plan.user_units else "multi-user"
    yield app, 0o644, systemd_target(plan, plan.app, [f"{name}.target" for name in units],
                                     f"\n[Install]\nWantedBy={wanted_by}.target")


def export_launchd(plan, jobs):
    """A property list for each instance; see launchd.plist(5)."""
    import plistlib
    comment = f"<!-- {plan.mark.replace('--', '-&#45;')} -->\n<plist"
    for job in jobs:
        keys = dict(
            Label=job.id, UserName=plan.user, WorkingDirectory=plan.root,
            ProgramArguments=["/bin/sh", "-c", forwarding(job.text)],
            EnvironmentVariables=job.variables,
            KeepAlive=True, RunAtLoad=True, ThrottleInterval=1, ExitTimeOut=plan.grace)
        if job.log:
            keys.update(StandardOutPath=job.log, StandardErrorPath=job.log)
        yield f"{job.id}.plist", 0o600, plistlib.dumps(keys).decode().replace("<plist", comment, 1)


SUPERVISORD_START = 'sleep 1; eval "$(printf %b "$PROCRUN")"; unset PROCRUN; '


def export_supervisord(plan, jobs):
    r"""A program for each instance, and a group; see supervisord.org, "Configuration File".  It
    restarts without a pause, or with growing ones and only so often; so the shell pauses.  Its
    `environment` cannot hold newlines and some quotes; so one variable holds all, where any but
    plain characters are \0ooo for `printf %b`."""
    text = f"; {plan.mark}\n"
    for job in jobs:
        escaped = re.sub(rb"[^\w ./:,=@+-]", lambda match: b"\\0%03o" % ord(match[0]),
                         shell_variables(plan, job).encode())
        environment = exportable(f"the whole environment of {job.name}", escaped)
        log = f"stdout_logfile={job.log}\n" if job.log else ""
        # There, % begins an expansion, and a ; or # behind a blank a comment.
        word = shell_quote(SUPERVISORD_START + job.text).replace("%", "%%")
        word = re.sub(r"(\s)(?=[;#])", r"\1''", word)
        text += f"""
[program:{job.id}]
command=/bin/sh -c {word}
directory={plan.root}
user={plan.user}
environment=PROCRUN="{environment}"
autostart=true
autorestart=true
startsecs=0
stopsignal=TERM
stopwaitsecs={plan.grace}
stopasgroup=true
killasgroup=true
redirect_stderr=true
{log}"""
    programs = ",".join(job.id for job in jobs)
    yield f"{plan.app}.conf", 0o600, f"{text}\n[group:{plan.app}]\nprograms={programs}\n"


RUNIT_HEAD = "#!/bin/sh\n# {plan.mark}\n"
# The scripts of a service directory; `run` is last, as runsvdir starts a service that has one.
RUNIT = {
    "log/run": "mkdir -p main && exec svlogd -tt main\n",
    "control/t": """# First the leader.
read -r pid <supervise/pid || exit 1
{stop}
(n=0
while [ $n -lt {plan.grace} ]; do
  sleep 1
  read -r now <supervise/pid && [ "$now" = "$pid" ] || exit 0
  n=$((n+1))
done
kill -KILL $pid -$pid) >/dev/null 2>&1 &
""",
    "finish": """# Then what the leader has left in its group.
exec 2>/dev/null
read -r group <supervise/group || exit 0
kill -TERM -$group
n=0
while [ $n -lt {tenths} ] && kill -0 -$group; do
  sleep 0.1
  n=$((n+1))
done
kill -KILL -$group
rm -f supervise/group
""",
    "run": """echo $$ >supervise/group
exec {output}2>&1 3<environment
cd {root} || exit 111
[ "$(id -un)" = {plan.user} ] || set -- -u {plan.user}
exec chpst -P "$@" /bin/sh -c {word}
"""}


def export_runit(plan, jobs):
    """A service directory for each instance; see runsv(8), chpst(8), svlogd(8).  Since chpst takes
    trailing blanks off its files, root opens one file and the user's shell reads it; so no
    variable, such as PATH or LD_PRELOAD, takes effect for root."""
    for job in jobs:
        yield f"{job.id}/environment", 0o600, f"# {plan.mark}\n{shell_variables(plan, job)}"
        values = dict(
            plan=plan, stop=stop_leader(job.text), tenths=10 * plan.grace,
            output=f">>{shell_quote(job.log)} " if job.log else "", root=shell_quote(plan.root),
            word=shell_quote(f'eval "$(cat <&3)"; exec 3<&-; {job.text}'))
        for name, text in RUNIT.items():
            if name != "log/run" or not job.log:
                yield f"{job.id}/{name}", 0o755, (RUNIT_HEAD + text).format(**values)


KUBERNETES_HEAD = """{"metadata": {"annotations": {
    "procrun/made-by": "%(mark)s"},
  "labels": {"app.kubernetes.io/name": "%(app)s", "app.kubernetes.io/component": "%(part)s",
    "app.kubernetes.io/managed-by": "procrun"},
  "name": "%(app)s-%(part)s"},
"""
KUBERNETES_SECRET = KUBERNETES_HEAD + """"apiVersion": "v1", "kind": "Secret",
"data": %(data)s}
"""
# SIGTERM goes to the container's first process alone.  That is not process 1, for which the kernel
# would ignore the signal: the pod's processes share a namespace.
KUBERNETES_DEPLOYMENT = KUBERNETES_HEAD + """"apiVersion": "apps/v1", "kind": "Deployment",
"spec": {
  "replicas": %(replicas)d, %(strategy)s
  "selector": {"matchLabels": {
    "app.kubernetes.io/name": "%(app)s", "app.kubernetes.io/component": "%(part)s"}},
  "template": {
    "metadata": {
      "annotations": {"procrun/environment": "%(digest)s"},
      "labels": {
        "app.kubernetes.io/name": "%(app)s", "app.kubernetes.io/component": "%(part)s"}},
    "spec": {
      "terminationGracePeriodSeconds": %(grace)d,
      "shareProcessNamespace": true,
      "enableServiceLinks": false,
      "containers": [{
        "name": "%(part)s",
        "image": "%(image)s", %(directory)s
        "command": ["/bin/sh", "-c", %(word)s],
        "env": [
          {"name": "PORT", "value": "%(port)d"},
          {"name": "PS", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
        "envFrom": [{"secretRef": {"name": "%(app)s-env"}}]%(ports)s}]}}}}"""
KUBERNETES_STRATEGY = """
  "strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},"""
KUBERNETES_PORTS = """,
        "ports": [{"name": "http", "containerPort": %d}],
        "readinessProbe": {"tcpSocket": {"port": "http"}}"""
KUBERNETES_SERVICE = KUBERNETES_HEAD + """"apiVersion": "v1", "kind": "Service",
"spec": {
  "ports": [{"port": 80, "targetPort": "http"}],
  "selector": {
    "app.kubernetes.io/name": "%(app)s", "app.kubernetes.io/component": "%(part)s"}}}"""


def kubernetes_names(plan):
    """Return {process type: its label}; raises Failure if Kubernetes cannot take the plan."""
    if not re.fullmatch(r"(?a)\w[\w.:/@-]*", plan.image or ""):
        raise Failure("kubernetes needs --image IMAGE, such as registry.example/app:1")
    if plan.log:
        raise Failure("kubernetes keeps the logs itself; leave -l out")
    if sum(len(value.encode()) for value in plan.variables.values()) > 1 << 20:
        raise Failure("kubernetes takes no Secret of more than 1 MiB; the variables are longer")
    parts = {name: name.lower().replace("_", "-") for name in plan.counts}
    names = list(parts.values())
    for name in [plan.app] + names + [f"{plan.app}-{each}" for each in names]:
        if names.count(name) > 1:
            raise Failure(f"kubernetes would call two process types `{name}`; rename one")
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", name):
            raise Failure(f"kubernetes takes no name `{name}`: only a-z, 0-9 and -, at most 63; "
                          "the first is a letter, the last no -")
    return parts


def export_kubernetes(plan, jobs):
    """A Secret; and a List of a Deployment for each process type, of which `jobs` has an instance,
    and a Service for web.  A changed environment changes the digest: that replaces the pods."""
    import base64
    import hashlib
    import json
    parts = kubernetes_names(plan)
    data = json.dumps({name: base64.b64encode(value.encode()).decode()
                       for name, value in plan.variables.items()}, indent=2, sort_keys=True)
    values = dict(plan._asdict(), part="env", data=data,
                  digest=hashlib.sha256(data.encode()).hexdigest(),
                  directory=f'"workingDir": "{plan.root}",' if plan.root else "")
    yield f"{plan.app}-secret.json", 0o600, KUBERNETES_SECRET % values
    items = []
    for job in jobs:
        # Kubernetes expands $(NAME) in `command`, and makes $ of $$.
        word = re.sub("\\$+(?=[(\x80-\U0010ffff])|\\$\\$+", lambda match: match[0] * 2,
                      forwarding(job.text))
        values.update(part=parts[job.type], replicas=plan.counts[job.type], word=json.dumps(word),
                      port=job.port, strategy=KUBERNETES_STRATEGY, ports="")
        if values["part"] == "web":
            values.update(strategy="", ports=KUBERNETES_PORTS % job.port)
            items.append(KUBERNETES_SERVICE % values)
        items.append(KUBERNETES_DEPLOYMENT % values)
    yield f"{plan.app}.json", 0o644, (
        '{"apiVersion": "v1", "kind": "List", "items": [\n' + ",\n".join(items) + "]}\n")


FORMATS = {    # the generator of the files, and the command that starts the app
    "upstart": (export_upstart, "start {app}"),
    "systemd": (export_systemd, "systemctl daemon-reload && systemctl enable --now {app}.target"),
    "launchd": (export_launchd, "launchctl bootstrap system {location}/{app}-*.plist"),
    "supervisord": (export_supervisord, "supervisorctl update"),
    "runit": (export_runit, "ln -sf {location}/{app}-* /etc/service/"),
    "kubernetes": (export_kubernetes, "kubectl apply --server-side "
                   "-f {location}/{app}-secret.json -f {location}/{app}.json")}


def check_plan(plan):
    """Raise Failure if the formats cannot take the plan."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", plan.app):
        raise Failure(f"the app cannot be named {plan.app!r}; use letters, digits, _ . - with -a")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", plan.user):
        raise Failure(f"{plan.user!r} is not a valid user name; give another with -u")
    for path in map(os.fsencode, (plan.root, plan.log, plan.location)):
        shown = printable(path)
        if re.search(r'["\\%*?\[\t\n]|\s$|\s[;#]', exportable(f"the path `{shown}`", path)):
            raise Failure(f"the path `{shown}` has characters that cannot be exported")
    names = [printable(os.fsencode(name)) for name in plan.variables
             if not re.fullmatch(r"(?a)[A-Za-z_]\w*", name)]
    if names:
        raise Failure(f"/bin/sh drops variables with these names: {', '.join(names)}")
    if "\n" in exportable("this command line", os.fsencode(plan.mark)):
        raise Failure("this command line has a newline, which a comment cannot have")


def export_files(plan, instances):
    """Return {path: (mode, text)} of an export; raises Failure if something cannot be exported."""
    check_plan(plan)
    jobs = []
    for each in instances:
        dashed = each.name.replace(".", "-")
        if dashed in plan.counts:
            raise Failure(f"{each.name} and the process type {dashed} would collide; rename one")
        text = exportable(f"the command of {each.type}", shell_text(each.command))
        log = f"{plan.log}/{dashed}.log" if plan.log else ""
        jobs.append(Job(each.name, each.type, each.port, text, f"{plan.app}-{dashed}", log,
                        {**plan.variables, "PORT": str(each.port), "PS": each.name}))
    generate = FORMATS[plan.format][0]
    return {path: (mode, text) for path, mode, text in generate(plan, jobs)}


# Output: bytes -> lines -> prefixed lines --------------------------------------------------------

COLOURS = "36 33 32 35 31 34 36;1 33;1 32;1 35;1 31;1 34;1".split()

# On a terminal a process may not leave its line, change the terminal, or make it answer.  So this
# filter keeps what it knows and takes out everything else (ECMA-48, 5.3 to 5.6; xterm's ctlseqs).
# It keeps whole sequences and whole characters only: what stands around something that is taken
# out never forms a new sequence.  It reads str, decoded from UTF-8 with surrogateescape: there a
# C1 control (U+0080 to U+009F) cannot be mistaken for a byte in the middle of a character.
TERMINAL = r"""(?xs)
      # Newlines, and characters that take one column; others are kept further down.
      (?P<text> [\n -~\xa0-\xac\xae-\u02ff\u0370-\u0482\u2010-\u2027\u2100-\u2bff\u4e00-\ua48f]+ )
    | (?P<colour> \x1b\[ [0-9;:]{0,99} m )
    | (?P<start> \r (?![\r\n]|\Z) | \x1b\[ 0{0,9} 1? G | \x1b\[ [12] (?P<erase> K ) )
    | \x1b\[ 0{0,9} (?P<column> [1-9] [0-9]{0,3} ) G
    | (?P<back> \x08 | \x1b\[ 0{0,9} (?P<columns> [1-9] [0-9]{0,3} )? D )
      # What lacks its end at \Z may get it with the next read.
    | (?P<sequence> (?: \r | [\udcc2-\udcf4] [\udc80-\udcbf]{0,2} ) \Z
        | (?: \x1b[PX\]^_] | [\x90\x98\x9d-\x9f] )                         # DCS SOS OSC PM APC
          [^\x07\x18\x1a\x1b\n\x80-\x9f\udc80-\udc9f]{0,4096}
        | (?: \x1b\[ (?!0?K) | \x9b ) [\0-\x09\x0b-\x17\x19\x1c-?\x7f]{0,99}    # CSI
        | \x1b (?!\[0?K) [ -/]{0,9}
      ) (?P<end> [0-~] )?
    | (?P<kept> \t+ | \x1b\[0?K | [^\0-\x9f\udc80-\udcff]+
        | [\udca0-\udcff]+ (?! [\udc80-\udcff]{0,2} \Z) | [\udca0-\udcff] )
    | \r+ (?=[\r\n]) | [\0-\x07\x0e-\x1a\x1c-\x1f\x7f\udc80-\udc9f]+ | ."""
# For files and pipes under --color never, where everything else passes.
COLOURLESS = r"""(?x)
      (?P<colour> \x1b\[ [0-9;:]{0,99} m )
    | (?P<sequence> \x1b (?: \[ [0-9;:]{0,99} )? \Z )"""
UTF8 = "utf-8", "surrogateescape"    # any bytes come back as they were

Style = namedtuple("Style", "width colour stamp label filter")
Style.__doc__ = """A prefix: the label's width, and whether colour, time and label are shown; and
the filter of what processes write: TERMINAL, COLOURLESS, or None, where every byte passes."""


class Source:
    """One name in the output, and the line that it has not finished yet."""

    prefix, second = b"", None    # the prefix, and the second it was made for
    sgr = ""                      # the sequences that set the line's colours
    column = 0                    # columns that the line has, at least

    def __init__(self, name, colour, pty=False):
        self.name, self.colour = name, colour    # str, SGR code as a str
        self.pty = pty                           # whether its lines end in CR LF, as a PTY's do
        self.tail = bytearray()                  # of the unfinished line, what is not shown yet

    def begin_line(self):
        """Begin a new line.  Colours go on there, unless the last sequence ended one."""
        self.column = 0
        if re.search(r"\[(2[2-9]|[3-5]9)m\Z", self.sgr):
            self.sgr = ""


class Printer:
    """Turns what processes write into lines behind prefixes, in `queue` (buffers, in order).  Only
    its own process adds to a line; an unfinished one is kept back until show(), or until it is
    CHUNK long, and ended when another process writes."""

    def __init__(self, style, clock):
        self.style, self.clock = style, clock
        self.margin = 0         # columns of a prefix
        if style.label:
            self.margin = style.width + (12 if style.stamp else 3)
        self.queue = []
        self.open = None        # the source whose unfinished line stands at the end of the output

    def prefix(self, source):
        """Return the present prefix of a source."""
        style, now = self.style, int(self.clock())
        if source.second != now and style.label:
            stamp = time.strftime("%H:%M:%S ", time.localtime(now)) if style.stamp else ""
            text = f"{stamp}{source.name:{style.width}} | "
            text = f"\x1b[{source.colour}m{text}\x1b[0m" if style.colour else text
            source.second, source.prefix = now, text.encode()
        return source.prefix

    def lead(self, source):
        """Return what to write before the source's next bytes."""
        end = b""
        if self.open is source:
            return end
        if self.open:
            end = b"\x1b[0m\n" if self.open.sgr else b"\n"
        source.begin_line()
        return end + self.prefix(source) + source.sgr.encode()

    def feed(self, source, data):
        """Take bytes of a source: its whole lines are queued, the rest is kept.  This is the hot
        path: one replace() inserts all prefixes, and a view, not a copy, cuts off the last one."""
        end = data.rfind(b"\n") + 1
        if end:
            lead, tail, rest = self.lead(source), source.tail, bytearray(data[end:])
            if source.pty or self.style.filter:
                data = self.filtered(source, b"".join((tail, memoryview(data)[:end])))
                tail = b""
            text = data.replace(b"\n", b"\n" + self.prefix(source))
            self.queue += lead, tail, memoryview(text)[:text.rfind(b"\n") + 1]
            self.open, source.tail = None, rest
        else:
            source.tail += data
        if len(source.tail) >= CHUNK:
            self.show(source)

    def show(self, source):
        """Queue the unfinished line of a source; it stays open for the source to go on with.  With
        a filter, a sequence that has no end yet stays in the source's tail."""
        lead, tail = self.lead(source), source.tail
        source.tail = bytearray()
        text = self.filtered(source, tail)
        if text:
            self.queue += lead, text
            self.open = source

    def filtered(self, source, data):
        """Return what the filter makes of a source's bytes; ordinary text stays as it is."""
        if source.pty:
            data = data.replace(b"\r\n", b"\n")
            if self.style.filter is TERMINAL:    # so many only push the screen away, as vite does
                data = re.sub(rb"\n(\r*\n){9,}", b"\n", data)
        if not self.style.filter:
            return data
        text = re.sub(self.style.filter, partial(self.answer, source), data.decode(*UTF8))
        if self.open is not source and re.fullmatch(r"(\x1b\[[0-9;:]*m)*", text):
            return b""    # colours alone start no line; lead() puts them in front of the next one
        return text.encode(*UTF8)

    def answer(self, source, match):
        """Return the replacement for a match of the filter."""
        kind, found = match.lastgroup, match[0]
        if kind == "text":
            columns = len(found) - found.rfind("\n") - 1
            if "\n" in found:
                end = "\x1b[0m\n" if source.sgr else "\n"
                source.begin_line()
                found = found.replace("\n", end + source.sgr)
            source.column += columns
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
            found = f"\x1b[{self.margin + int(match['column'])}G"
        elif kind == "back" and source.column >= int(match["columns"] or 1):
            source.column -= int(match["columns"] or 1)
        elif kind == "kept" and "\u200d" in found:
            source.column = -1    # terminals may join what follows, which takes no column then
        elif kind != "kept":
            if kind == "sequence" and match.end() == len(match.string):
                source.tail += found.encode(*UTF8)    # its rest may come
            found = ""
        return found

    def finish(self, source):
        """End the unfinished line of a source, if there is one, and its colours."""
        self.show(source)
        if source.tail or self.open is source:
            self.feed(source, b"\n")
        source.sgr = ""


# Everything above is pure; everything below talks to the kernel.

# File descriptors: kernel -> bytes ---------------------------------------------------------------

def safe_size(fd):
    """How many bytes do not block if an fd is ready: PIPE_BUF of POSIX; on a terminal, one."""
    return 1 if os.isatty(fd) else 512


def wait_ready(fd, event, timeout):
    """Wait at most so many milliseconds (None: any time) for POLLIN or POLLOUT of an fd, or until
    its other end has gone (for which select() does not wake up); return whether that came."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(timeout))


def write_ready(fd, data, timeout=None):
    """Write bytes to a file descriptor, as long as it is ready within so many milliseconds."""
    most = safe_size(fd)
    while data and wait_ready(fd, select.POLLOUT, timeout):
        data = data[os.write(fd, data[:most]):]


def print_error(*lines):
    """Write lines to stderr, each behind "procrun: "; if it is closed or stalled, drop them."""
    text = "".join(f"procrun: {line}\n" for line in lines)
    with suppress(OSError):
        write_ready(2, text.encode("utf-8", "backslashreplace"), 0)


def print_out(text):
    """Write text to stdout, and wait while that takes nothing; raises Failure."""
    try:
        write_ready(1, text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise Failure(f"cannot write the output: {error.strerror}")


def open_fds():
    """The open file descriptors, as a list (one may be closed by now); raises Failure."""
    try:
        numbers = list(map(int, os.listdir("/dev/fd")))
        if max(numbers) < 3:    # FreeBSD lists no others; what procrun opened has the lowest ones
            free = os.dup(0)
            os.close(free)
            numbers = list(range(free))
        return numbers
    except OSError as error:
        raise Failure(f"/dev/fd: {error.strerror}; on Linux, /proc has to be mounted")


def read_some(fd, most=LITTLE):
    """Return bytes that can be read now, b"" at the end, None if there are none at present."""
    try:
        return os.read(fd, most)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno == errno.EIO:    # how a PTY or a terminal says that its other end is gone
            return b""
        raise


def resize_pipe(fd, capacity):
    """Give a pipe this capacity (bytes) if the system can and the user may."""
    with suppress(OSError):
        fcntl.fcntl(fd, getattr(fcntl, "F_SETPIPE_SZ", 1031), capacity)


# Signals: asynchronous -> readable ---------------------------------------------------------------

ENDING = SIGINT, SIGTERM, SIGHUP, signal.SIGQUIT
PASSED_ON = signal.SIGUSR1, signal.SIGUSR2
CAUGHT = {*ENDING, *PASSED_ON, SIGTSTP, SIGCONT, SIGCHLD, signal.SIGWINCH}
# Not the real-time ones: CPython takes 100 us a child to list them.
STANDARD = set(range(1, 32)) - {SIGKILL, SIGSTOP}


def no_action(*_):
    """A signal handler that does nothing: the byte in the wake-up pipe is enough."""


def handle(numbers, handler):
    """Set the handler of signals, except for a SIGHUP that is ignored (nohup)."""
    for number in numbers:
        if number != SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def catch_signals(numbers, blocked=()):
    """Have signals arrive as bytes in a pipe, and block others; return the pipe's reading end."""
    fd, wakeup = os.pipe()
    os.set_blocking(fd, False)
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    handle(numbers, no_action)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return fd


def send_signal(target, number):
    """Send a signal to a process, or to the group -target; return whether it was sent: the target
    may be gone, or another user's (sudo); and for a group of zombies macOS says EPERM."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(target, number)
        return True
    return False


def dispatch(selector, timeout=0):
    """Call the function that a selector holds for each file descriptor that is ready."""
    for key, _ in selector.select(timeout):
        key.data()


class Loop:
    """What the front and the guard have in common: timers, and reading each other's lines."""

    def __init__(self):
        self.timers = {}    # function -> when to call it, once (monotonic seconds)
        self.line = b""     # what has arrived of an unfinished line

    def turn(self, selector):
        """Wait until something is ready or due, and call the function for it."""
        timeout = None
        if self.timers:
            timeout = max(0, min(self.timers.values()) - monotonic())
        dispatch(selector, timeout)
        now = monotonic()
        for function in [each for each, when in self.timers.items() if when <= now]:
            if self.timers.pop(function, None) is not None:    # unless an earlier one removed it
                function()

    def after(self, seconds, function):
        """Have a function called in so many seconds, instead of when it was due before."""
        self.timers[function] = monotonic() + seconds

    def receive(self, fd):
        """Read lines `WORD NUMBER ...` and call on_WORD(NUMBER, ...), or say(TEXT) for `say TEXT`;
        return False at their end."""
        data = read_some(fd)
        *lines, self.line = (self.line + (data or b"")).split(b"\n")
        for line in lines:
            word, _, values = line.decode().partition(" ")
            if word == "say":
                self.say(values)
            else:
                getattr(self, "on_" + word)(*map(int, values.split()))
        return data != b""


# Child: one instance, forked ---------------------------------------------------------------------

class Child(Source):
    """One instance and its state; the front and the guard have a copy each.  Its output goes
    through a pipe, and it reads another one; or both are a PTY."""
    pid = None               # of its leader, while that lives
    ended = "queued to start"    # in words, while .pid is None
    read_size = LITTLE       # bytes
    group = None             # the guard's: its group, until all of that is gone
    asked = None             # the guard's: "stop" or "restart"
    holder = None            # the guard's: the process that leads the session of its PTY
    show_line = None         # the front's: shows its unfinished line
    last = b""               # the front's: what it has written last
    screen = None            # the front's: the modes of the terminal that it has set (see MODES)

    def __init__(self, index, instance, colour, pty):
        super().__init__(instance.name, colour, pty)
        self.index, self.instance, self.type = index, instance, instance.type
        self.text = shell_text(instance.command)
        self.since = monotonic()           # when it was forked, or has ended

    def open(self, capacity):
        """Open its pipes, the output's with this capacity (bytes); or its PTY, with the modes of
        the user's terminal, such as the erase character."""
        if self.pty:
            self.fd, self.output = os.openpty()
            self.stdin, self.input = self.output, os.dup(self.fd)
            self.modes = termios.tcgetattr(0 if os.isatty(0) else self.output)
            self.modes[0] &= ~termios.IXON    # or a Ctrl-S would outlast its attach
        else:
            self.fd, self.output = os.pipe()
            self.stdin, self.input = os.pipe()
            resize_pipe(self.fd, capacity)
            resize_pipe(self.input, 4096)    # counts towards what the user's pipes may hold
        os.set_blocking(self.fd, False)
        os.set_blocking(self.input, False)

    def reset_input(self):
        """Drop what was typed to a process that has ended, and undo what it did to its PTY or to
        its pipe, for the one that is started in its place."""
        with suppress(OSError, termios.error):    # the front may be gone
            if self.pty:
                termios.tcflush(self.stdin, termios.TCIFLUSH)
                termios.tcsetattr(self.stdin, termios.TCSANOW, self.modes)
            else:
                os.set_blocking(self.stdin, False)
                read_some(self.stdin)
                os.set_blocking(self.stdin, True)


def how_it_ended(status):
    """Describe an exit status; -N means signal N, as in subprocess."""
    if status >= 0:
        return f"exited with code {status}"
    with suppress(ValueError):
        return f"terminated by {signal.Signals(-status).name}"
    return f"terminated by signal {-status}"    # a real-time one has no name


Options = namedtuple("Options", "root environment limits grace can_die keep_going quiet")
Options.__doc__ = """How a set is run: the root directory, environment (bytes to bytes) and
RLIMIT_NOFILE of all children; grace period in seconds; the instances whose exit 0 does not end the
set; whether no exit ends it; the instances whose output is dropped."""


def child_environment(variables):
    """Return the environment of this process, overlaid by the variables of .env."""
    inherited = {name: value for name, value in os.environb.items() if name}
    # Python's prints appear at once.
    return {b"PYTHONUNBUFFERED": b"1", **inherited, **variables}


def hold_session(child, tell, life):
    """Split a forked process, the leader of a PTY's session, in two.  The leader stays, as a shell
    that waits for the end of the pipe `life`.  The other one returns when the guard has adopted
    it, in a group of its own, and has written its process id to the pipe `tell`.

    When the leader of a session ends, the kernel hangs up what is in the foreground: a server, for
    instance, that npm has just told to end.
    """
    adopted, not_yet = os.pipe()
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        os.dup2(life, 0)
        os.execv("/bin/sh", ["sh", "-c", f"# terminal of {child.name}\nread -r nothing"])
    if os.fork():
        os._exit(0)
    os.close(not_yet)
    os.read(adopted, 1)    # the end
    os.setpgid(0, 0)
    os.tcsetpgrp(child.output, os.getpid())
    os.write(tell, b"%d" % os.getpid())


def exec_child(options, child, hold=no_action):
    """Become the child's command, in the forked process; `hold` is called for a PTY.  Never
    returns; if it fails, it writes the reason to the child's output."""
    try:
        signal.set_wakeup_fd(-1)    # the guard's, whose number may be stdout's below
        os.setsid()
        if child.pty:
            fcntl.ioctl(child.output, termios.TIOCSCTTY, 0)
            hold()
            options.environment.setdefault(b"TERM", b"dumb")
        for fd, given in enumerate((child.stdin, child.output, child.output)):
            os.dup2(given, fd)
        os.chdir(options.root)
        resource.setrlimit(resource.RLIMIT_NOFILE, options.limits)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execve("/bin/sh", [b"/bin/sh", b"-c", child.text], options.environment)
    except OSError as error:
        os.write(2, f"procrun: cannot start: {error.strerror}\n".encode())
    finally:
        os._exit(126)


# Guard: decides, and outlives nobody -------------------------------------------------------------

def become_subreaper():
    """Adopt orphaned descendants from now on (Linux); return whether that works."""
    with suppress(ImportError, OSError, AttributeError):
        import ctypes
        return ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0    # PR_SET_CHILD_SUBREAPER
    return False


def read_proc(pid, name):
    """Return a file of a process in /proc, as bytes; empty if there is none."""
    with suppress(OSError), open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()
    return b""


def children_of(pid):
    """Return the process ids of the children of all of a process's threads (proc(5)), as a list:
    an empty one if it is gone, or where the system does not tell."""
    found = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, read_proc(pid, f"task/{thread}/children").split())
    return found


def stdin_pipe(pid):
    """Return the name of the pipe that a process has as its stdin (proc(5)), or ""."""
    with suppress(OSError):
        name = os.readlink(f"/proc/{pid}/fd/0")
        return name if name.startswith("pipe:") else ""
    return ""


def groups_below(pids):
    """Return {group: process ids} of these processes and all their descendants.  Any of them may
    end meanwhile; but before the kernel gives out its id again, it gives out all others."""
    groups, pids = {}, list(pids)
    for pid in pids:
        with suppress(ProcessLookupError):
            groups.setdefault(os.getpgid(pid), []).append(pid)
        pids += children_of(pid)    # the list grows while it is read
    groups.pop(os.getpgrp(), None)    # of a child that has not called setsid() yet
    return groups


def process_name(pid):
    """Describe a process: its id and, if known, the name of its command."""
    name = printable(read_proc(pid, "comm").strip())
    return f"process {pid} ({name})" if name else f"process {pid}"


def list_names(names):
    """Join names; of many, only the first ones."""
    names = list(names)
    if len(names) > MOST_NAMES:
        names[MOST_NAMES:] = [f"and {len(names) - MOST_NAMES} more"]
    return ", ".join(names)


def is_shell(pid):
    """Whether a process still is the shell, which an `exec` in the command may have replaced."""
    with suppress(OSError):
        return os.path.samefile(f"/proc/{pid}/exe", "/bin/sh")
    return True


def peek():
    """Return (pid, status) of a dead child that is not reaped yet, or None; raises
    ChildProcessError if there is no child at all."""
    if not hasattr(os, "waitid"):    # macOS before Python 3.13: reaped here already
        pid, status = os.waitpid(-1, os.WNOHANG)
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return (pid, code) if pid else None
    info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if info is None:
        return None
    # The status has 32 bits on macOS and the BSDs.
    return info.si_pid, (info.si_status & 255 if info.si_code == os.CLD_EXITED
                         else -info.si_status)


class Guard(Loop):
    """The parent of all children: forks, signals and reaps them, and decides when the set ends.

    Orders are `signal N`, `end STATUS`, `restart INDEX`, `stop INDEX`, `start INDEX` (the answer
    to `gone INDEX`), and `raw 1` or `raw 0`.  Reports are `started INDEX PID`, `ended INDEX
    STATUS` (of a leader), `gone INDEX` (its group, before a restart), `failed INDEX` (which ends
    the set), `say TEXT`, `paused`, `ending` (again whenever that makes progress), and as the last
    one `exit STATUS`.
    """
    raw = False         # whether the front has put the user's terminal into raw mode
    paused = False      # Ctrl-Z: fork no more until SIGCONT
    status = None       # procrun's exit status, once the set is ending
    ending = None       # the steps of that, a generator
    first_failure = 0   # under --keep-going: the exit status of the first to fail
    killing = False     # whether SIGKILL has been sent to all
    progress = False    # whether anything has ended since it was last asked
    over = False        # whether run() is to return

    def __init__(self, children, options, terminal):
        super().__init__()
        self.children, self.options = children, options
        self.terminal = terminal       # to be restored if the front is killed; or None
        self.to_fork = list(children)  # to be forked
        self.running = {}              # group id -> Child, until the whole group is gone
        self.terminated = set()        # process ids that got SIGTERM
        self.stopping = set()          # groups that a typed command ends
        self.holders = set()           # process ids of those that lead the sessions of PTYs
        self.strays = []               # names of what had left its group and got SIGTERM

    def fork(self):
        """Fork the guard, with all signals blocked; return its process id, the fd for orders and
        the fd of its reports, both non-blocking.  Raises OSError."""
        (orders, order), (report, self.reports) = os.pipe(), os.pipe()
        os.set_blocking(order, False)
        os.set_blocking(report, False)
        resize_pipe(report, CHUNK)    # for a front that is stopped
        resize_pipe(order, CHUNK)     # for commands that are typed faster than they are obeyed
        signal.pthread_sigmask(signal.SIG_SETMASK, STANDARD)
        gc.freeze()    # or a collection would copy the memory that the two processes share
        pid = os.fork()
        if pid == 0:
            try:
                self.run(orders)
                os._exit(0)
            finally:
                os._exit(1)
        os.close(orders)
        os.close(self.reports)
        return pid, order, report

    def run(self, orders):
        """Be the guard, in the forked process.  Neither Ctrl-C nor a closed terminal reaches it,
        and it keeps nothing open whose closing others wait for."""
        os.setsid()
        os.chdir("/")
        keep = {orders, self.reports}
        keep.update(*((child.fd, child.stdin, child.output) for child in self.children))
        for fd in set(open_fds()) - keep:
            os.closerange(fd, fd + 1)    # no error if it is closed already
        # /proc may be missing, or be that of another PID namespace.
        self.adopts = (become_subreaper() and os.getpid() in children_of(os.getppid())
                       and os.readlink("/proc/self") == str(os.getpid()))
        handle(STANDARD, signal.SIG_DFL)    # once, not in each child
        self.signals = catch_signals({SIGCHLD}, STANDARD - {SIGCHLD})
        self.life = os.pipe()[0]    # nobody writes to it; its end is that of the guard
        selector = DefaultSelector()
        selector.register(orders, EVENT_READ, partial(self.on_orders, orders, selector))
        selector.register(self.signals, EVENT_READ, self.reap)
        self.after(0, self.spawn)
        while not self.over:
            self.turn(selector)
        for holder in list(self.holders):
            self.release(holder)
        if self.strays:
            self.say(f"also ended, out of their groups: {list_names(self.strays)}")
        self.report(f"exit {self.status}")

    def report(self, line):
        """Send a line to the front; if that is gone, restore its terminal."""
        try:
            os.write(self.reports, line.encode() + b"\n")
        except BrokenPipeError:
            if self.raw:
                self.terminal.restore()
                self.raw = False

    def say(self, text):
        """Have the front show a line."""
        self.report(f"say {text}")

    # -- orders

    def on_orders(self, fd, selector):
        """Obey orders; if the front is gone, end the set as if the terminal had been closed."""
        self.reap()    # so that what has ended is not signalled
        if not self.receive(fd):
            selector.unregister(fd)
            for child in self.children:    # or writing would fail, and cost them their work
                selector.register(child.fd, EVENT_READ, partial(read_some, child.fd, CHUNK))
            self.on_signal(SIGHUP)

    def on_raw(self, raw):
        """The front has put the user's terminal into raw mode, or back."""
        self.raw = raw

    def on_signal(self, number):
        """Act upon a signal that procrun got.  Two within 0.4 s are one request, because the
        terminal and npm both deliver Ctrl-C; a later one kills at once."""
        if number not in ENDING:
            self.pass_on(number)
        elif self.status is None:
            self.say(f"{signal.Signals(number).name} received, shutting down")
            self.on_end(128 + number)
        elif (number in (SIGINT, SIGTERM) and not self.killing
              and monotonic() > self.since + ONE_REQUEST):
            self.ending = self.kill(self.alive)
            self.advance(self.ending)

    def pass_on(self, number):
        """Send a signal to all groups; after SIGSTOP, no child is forked until SIGCONT."""
        for group in self.alive():
            self.signal(group, number)
        if number == SIGSTOP:
            self.paused = True
            self.report("paused")
        elif number == SIGCONT:
            self.paused = False
            self.after(0, self.spawn)

    def on_stop(self, index, then="stop"):
        """End an instance without ending the set."""
        child = self.children[index]
        if self.status is not None:
            return
        if child in self.to_fork:
            self.to_fork.remove(child)
        self.after(0, self.reap)    # it may be that nothing else runs
        already, child.asked = child.asked, then
        if child.group is None and then == "restart":
            self.report(f"gone {index}")
        elif child.group and not already:
            groups = {child.group, *groups_below([child.group])}
            self.stopping |= groups
            self.advance(self.stop(partial(self.alive, groups)))

    def on_restart(self, index):
        """End an instance and start it again; or start it, if it has ended."""
        self.on_stop(index, "restart")

    # -- children

    def on_start(self, index):
        """Queue an instance to be forked, if that is still wanted."""
        child = self.children[index]
        if self.status is None and child.asked == "restart" and not child.group:
            child.asked = None
            self.to_fork.append(child)
            self.after(0, self.spawn)

    def release(self, holder):
        """End a process that leads the session of a PTY (see hold_session())."""
        self.holders.remove(holder)
        os.kill(holder, SIGKILL)
        os.waitpid(holder, 0)

    def fork_child(self, child):
        """Fork a child; return its process id.  Raises OSError, of which TimeoutError says that
        somebody has stopped what holds its session."""
        if not (child.pty and self.adopts):
            pid = os.fork()
            if not pid:
                exec_child(self.options, child)
            return pid
        if child.holder in self.holders:
            self.release(child.holder)
        reading, writing = os.pipe()
        child.holder = os.fork()
        if not child.holder:
            os.close(self.reports)    # the front waits for its end
            exec_child(self.options, child, partial(hold_session, child, writing, self.life))
        self.holders.add(child.holder)
        os.close(writing)
        told = os.read(reading, 20) if wait_ready(reading, select.POLLIN, 1000) else None
        os.close(reading)
        if told is None:
            self.release(child.holder)
            raise TimeoutError
        if not told:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return int(told)

    def spawn(self):
        """Fork the next child; the others follow after a look at what has happened meanwhile."""
        if self.paused or not self.to_fork:
            return
        self.after(0, self.spawn)
        child = self.to_fork.pop(0)
        self.options.environment.update(child.instance.variables)
        child.reset_input()
        try:
            pid = self.fork_child(child)
        except TimeoutError:
            self.to_fork.insert(0, child)    # once more, but first look for orders
            return
        except OSError as error:
            self.say(f"{child.name}: cannot start: {error.strerror}")
            return self.on_end(1)
        self.running[pid] = child
        child.pid = child.group = pid
        self.terminated.discard(pid)    # a process of the past may have had this id
        self.stopping.discard(pid)
        child.since = monotonic()
        self.report(f"started {child.index} {pid}")

    def reap(self):
        """Act upon each dead child, and only then reap it: until then its id is not reused."""
        read_some(self.signals)
        nothing_left = False
        try:
            for pid, status in iter(peek, None):
                self.progress = True
                self.holders.discard(pid)
                if pid in self.running:
                    self.on_leader_ended(self.running[pid], status)
                if hasattr(os, "waitid"):
                    os.waitpid(pid, 0)
        except ChildProcessError:
            nothing_left = True
        leaderless = [group for group, child in self.running.items() if not child.pid]
        for group in leaderless:
            if not send_signal(-group, 0):
                child = self.running.pop(group)
                child.group = None
                if child.asked == "restart":
                    self.report(f"gone {child.index}")
        self.pursue()
        if self.status is not None:
            if not self.running and (nothing_left or self.holders and not self.adopted()):
                self.over = True
            self.report("ending")
        elif not self.to_fork and not any(child.pid or child.asked == "restart"
                                          for child in self.children):
            self.say("nothing is running any more")
            self.on_end(self.first_failure)
        if leaderless and not self.adopts:
            self.after(0.05, self.reap)    # no signal tells when those end

    def on_leader_ended(self, child, status):
        """Report the end of a leader, and decide whether it ends the set."""
        self.report(f"ended {child.index} {status}")
        self.terminated.discard(child.pid)    # what it leaves is to get a SIGTERM of its own
        child.pid = None
        code = status if status >= 0 else 128 - status
        if self.status is not None or child.asked:
            return
        if self.options.keep_going:
            self.first_failure = self.first_failure or code
        elif code or child.instance not in self.options.can_die:
            if code:
                self.report(f"failed {child.index}")
            remedy = "" if code else f" (--can-die {child.type} lets it end)"
            self.say(f"{child.name} {how_it_ended(status)} after "
                     f"{monotonic() - child.since:.1f} s, stopping the rest{remedy}")
            self.on_end(code)

    # -- the end

    def on_end(self, status):
        """Begin to end the set, unless that has begun; `status` becomes procrun's exit status."""
        if self.status is not None:
            return
        self.status, self.since = status, monotonic()
        self.report("ending")
        self.to_fork.clear()
        if any(child.pid for child in self.children) and self.options.grace:
            self.say("sending SIGTERM to all processes")
        self.ending = self.stop(self.alive)
        self.after(0, self.reap)    # first, so that what has ended is neither signalled nor named
        self.after(0, partial(self.advance, self.ending))

    def stop(self, groups):
        """End groups, as a generator of steps that yields the seconds until the next one; `groups`
        is a function that returns those that are left, such as alive()."""
        grace, patience = self.options.grace, min(self.options.grace, PATIENCE)
        if grace:
            self.terminate(groups())
            yield patience
            if groups():
                now = "; Ctrl-C kills now" if self.status is not None else ""
                self.say(f"waiting for {self.names(groups())} "
                         f"(SIGKILL in {grace - patience:.0f} s{now})")
                yield grace - patience
        yield from self.kill(groups)

    def kill(self, groups):
        """The last steps: send SIGKILL as long as something ends by it, then give up."""
        self.killing = self.status is not None
        self.progress, left = True, groups()
        if left:
            self.say(f"sending SIGKILL to {self.names(left)}")
        while left and self.progress:
            self.progress = False
            for group in left:
                self.signal(group, SIGKILL)
            yield GIVE_UP
            left = groups()
        if left:
            self.say(f"cannot end {self.names(left)}")

    def advance(self, steps):
        """Take the next step; once the whole set is being ended, only of that.  After its last
        step the guard is done."""
        if self.ending in (None, steps):
            wait = next(steps, None)
            if wait is not None:
                self.after(wait, partial(self.advance, steps))
            elif self.ending:
                self.over = True

    # -- groups: {group: process ids of members}

    def adopted(self):
        """Return the process ids of the guard's children, but of those that hold a session."""
        return set(children_of(os.getpid())) - self.holders

    def alive(self, among=None):
        """Return the groups that are left, all or those that are `among` some."""
        groups = {group: [group] for group in self.running}
        if self.adopts:
            groups.update(groups_below(self.adopted()))
        return {group: groups[group] for group in groups if among is None or group in among}

    def pursue(self):
        """End what leaders have left in their groups; and what has left them, when the set ends or
        its instance was asked to."""
        leaders = {group for group, child in self.running.items() if child.pid}
        left = {group: [group] for group in self.running if group not in leaders}
        if self.adopts and (left or self.stopping or self.status is not None):
            left = groups_below(self.adopted() - leaders)
        for group, pids in left.items():
            if self.killing:
                self.signal(group, SIGKILL)
            elif self.status is not None or group in self.stopping:
                self.terminate({group: pids})

    def names(self, groups):
        """Return a user's names for groups, as one text."""
        return list_names(self.running[group].name if group in self.running
                          else process_name(pids[0]) for group, pids in groups.items())

    def signal(self, group, number):
        """Send a signal to a group, or to its leader if that has not called setsid() yet."""
        if not send_signal(-group, number):
            send_signal(group, number)

    def terminate(self, groups):
        """Send SIGTERM, once, to the leaders of groups; where none is left, to the members whose
        parent is gone, which the guard has adopted.  A program tells its own children itself, in
        whatever group they are; what it leaves gets SIGTERM when it has ended."""
        own = set(children_of(os.getpid()) if self.adopts else groups)
        for group, pids in groups.items():
            child = self.running.get(group)
            leader = child.pid if child else None
            for pid in own.intersection([leader] if leader else pids) - self.terminated:
                self.terminated.add(pid)
                if leader:
                    self.terminate_leader(child, leader)
                else:
                    self.send_sigterm(pid if self.adopts else -group, pid)
                if not child:
                    self.strays.append(process_name(pid))
                self.signal(group, SIGCONT)    # or a stopped one would not act on it

    def terminate_leader(self, child, leader):
        """Send SIGTERM to a leader and, if it is a shell that waits, to what this runs.  While it
        is one, more looks follow: dash notes a signal, and then an `exec` forgets it, or a program
        that was just started is waited for."""
        if child.pid != leader:
            return
        if not (child.text.startswith(TRAP) and is_shell(leader)):
            send_signal(leader, SIGTERM)
        elif not self.adopts:
            send_signal(-leader, SIGTERM)    # no /proc tells what it runs
        else:
            # Looked for before the signal: a trap of its own may start a program.
            found, pipes = children_of(leader), ("", stdin_pipe(leader))
            # Of `app | tee log`, app is told, and tee when that has ended.
            runs = {pid for pid in found if stdin_pipe(pid) in pipes} or set(found)
            if len(runs) < len(found) or b"trap" not in child.instance.command:
                self.after(SETTLING, partial(self.terminate_leader, child, leader))
            send_signal(leader, SIGTERM)    # a shell that waits ignores a second one
            for pid in runs - self.terminated:
                self.send_sigterm(pid, pid)
            self.terminated |= runs

    def send_sigterm(self, target, pid):
        """Send SIGTERM to a process, or to its group (see send_signal()).  What may be a shell's
        fork, which has our trap until it becomes a program, is given some time: dash would note
        the signal and then forget it."""
        if TRAP in read_proc(pid, "cmdline"):
            self.after(SETTLING, partial(send_signal, target, SIGTERM))
        else:
            send_signal(target, SIGTERM)


# Front: shows ------------------------------------------------------------------------------------

def own_description(fd, flags):
    """Open what an fd refers to once more, non-blocking, because others share the given file
    description.  Raises OSError, for instance if the terminal is another user's (su)."""
    path = os.ttyname(fd) if os.isatty(fd) else f"/proc/self/fd/{fd}"
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


class Sink:
    """The stream that all output goes to.  It never blocks and keeps every byte: what it does
    not take now stays in the queue, and `full` says so."""

    def __init__(self, fd):
        self.fd, self.full = fd, False
        self.most = None        # bytes to write at once, None: any number
        mode = os.fstat(fd).st_mode
        self.is_pipe = stat.S_ISFIFO(mode)
        self.waits = self.is_pipe or stat.S_ISSOCK(mode) or os.isatty(fd)    # may be full
        try:
            if self.waits:
                self.fd = own_description(fd, os.O_WRONLY)
                resize_pipe(self.fd, CHUNK)
        except OSError:    # a socket, another user's terminal (su), or a pipe on macOS
            self.most = safe_size(fd)

    def write(self, queue):
        """Write as much of the queue (a list of buffers) as the stream takes, and remove that;
        return whether anything was written.  Raises OSError."""
        moved = self.full = False
        try:
            while queue:
                if self.most and not wait_ready(self.fd, select.POLLOUT, 0):
                    raise BlockingIOError
                batch = [queue[0][:self.most]] if self.most else queue[:256]
                taken = os.writev(self.fd, batch)
                moved = True
                while queue and taken >= len(queue[0]):
                    taken -= len(queue.pop(0))
                if taken:
                    queue[0] = memoryview(queue[0])[taken:]
        except BlockingIOError:
            self.full = True
        return moved


# Ctrl-], also as xterm and kitty send it to a program that has asked for unambiguous keys.
LEAVE = re.compile(rb"\x1d|\x1b\[(?:27;5;93~|93[:\d]*;(?:5|69|133|197)[:;\d]*u)")
MODES = re.compile(rb"(\x1b\[\?[\d;]+)([hl])")    # on and off: alternate screen, mouse, cursor
# What leaves no trace of a program: scroll region, keyboard, insert mode, cursor keys, keypad,
# wrap, cursor and its shape, mouse, focus and paste reports, colours, character set, and what
# stands below the cursor.
RESET = (b"\x1b7\x1b[r\x1b[<u\x1b8\x1b[>4m\x1b[4l\x1b[?1l\x1b>\x1b[?7h\x1b[?25h\x1b[0 q"
         b"\x1b[?1000;1002;1003;1004;1006;2004l\x1b[0m\x1b(B\x0f\x1b[J")


class Terminal:
    """The user's terminal, standard input: it gives lines typed for procrun or, in raw mode, the
    keys for an attached program.  Raises Failure if the system cannot tell when it is ready."""

    def __init__(self):
        self.modes, self.raw = termios.tcgetattr(0), False
        try:
            self.path = os.ttyname(0)
            self.fd = own_description(0, os.O_RDONLY)    # another reader may be faster
        except OSError:
            self.path, self.fd = os.devnull, 0
        try:
            DefaultSelector().register(self.fd, EVENT_READ)
        except OSError as error:    # macOS has no events for /dev/tty
            raise Failure(f"standard input: {error.strerror}; leave out </dev/tty")

    def is_ours(self):
        """Whether procrun may read it: not in the background, where reading stops procrun, nor
        while another program, such as a pager in the same pipeline, has put it into raw mode, nor
        if it is gone."""
        with suppress(OSError, termios.error):
            return (os.tcgetpgrp(0) == os.getpgrp()
                    and (self.raw or termios.tcgetattr(0)[3] & termios.ICANON))
        return False

    def restore(self):
        """Restore its modes and screen from the guard, when the front was killed."""
        with suppress(OSError, termios.error):
            fd = os.open(self.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
            termios.tcsetattr(fd, termios.TCSANOW, self.modes)
            os.write(fd, RESET + b"\x1b[?1047l\x1b[999H\r\n")
            os.close(fd)


def port_taken(port):
    """Whether somebody listens on a port."""
    import _socket    # the module that socket wraps; that one would take 3 ms to import
    try:
        probe = _socket.socket()
        try:
            probe.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
        finally:
            probe.close()
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


# As the manual above lists them (python -OO has none).
TYPED_COMMANDS = re.findall(r"(?m)^    ((?:restart|stop|attach|ps|help) .*)", __doc__ or "")


class Front(Loop):
    """What the user sees: prints what children write and the guard reports, and passes signals,
    typed commands and keys on.  It decides nothing; run() tells the story."""
    status = None          # the exit status, which is the guard's last report
    signalled = None       # when a signal first asked for the end (monotonic)
    pausing = False        # Ctrl-Z, until the guard has stopped all
    failed = None          # the Child whose failure ended the set
    writer = None          # the Child that has written last
    lost = 0               # the exit status for output that could not be written
    attached = None        # the Child that the terminal belongs to
    attach_first = ()      # the instance that is to be attached when it starts, if any
    in_line = False        # whether what the attached program wrote ends in mid-line
    held = 0               # bytes of others that are held back meanwhile

    def __init__(self, guard, printer, sink):
        super().__init__()
        self.children, self.options = guard.children, guard.options
        self.printer, self.sink, self.terminal = printer, sink, guard.terminal
        self.resize()    # before there is a program that asks for the size
        self.guard, self.orders, self.reports = guard.fork()
        self.system = Source("system", "37")
        self.queue = printer.queue    # what stdout has not taken yet
        self.typed = bytearray()      # what the attached program has not taken yet
        # What is watched always, only while stdout takes output, and only while it does not.
        self.always, self.busy, self.stalled = [DefaultSelector() for _ in range(3)]

    def run(self):
        """Run the set and return the exit status."""
        self.signals = catch_signals(CAUGHT)
        self.reap()    # what ended before SIGCHLD was caught
        for child in self.children:
            for fd in {child.stdin, child.output}:    # one and the same if it is a PTY
                os.close(fd)
            child.show_line = partial(self.show_line, child)
            if port_taken(child.instance.port):
                self.say(f"{child.name}: port {child.instance.port} is already in use")
        self.watch_all()
        try:
            while self.reports is not None or self.queue:
                self.turn(self.stalled if self.sink.full else self.busy)
                self.flush()
        finally:
            self.detach()
            self.flush()
            # CPython takes its handlers down at exit: a late signal must not end it.
            signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)
        return self.status or self.lost

    def watch_all(self):
        """Watch all but the children, which follow when they are started."""
        for selector in (self.busy, self.stalled):
            selector.register(self.always, EVENT_READ, partial(dispatch, self.always))
        self.always.register(self.signals, EVENT_READ, self.on_signals)
        self.always.register(self.reports, EVENT_READ, self.on_reports)
        if self.sink.waits:
            self.stalled.register(self.sink.fd, EVENT_WRITE, self.flush)
        if self.sink.is_pipe:
            # Nothing can be read there, but so epoll and kqueue tell that the reader has gone;
            # writing then finds it out.
            self.busy.register(self.sink.fd, EVENT_READ, partial(self.queue.append, b"\n"))
        if self.terminal:
            self.watch_terminal()
            if self.terminal.is_ours():
                self.say("type help for the commands; Ctrl-C ends everything")

    # -- output

    def say(self, text, source=None):
        """Print a line of procrun's own, of the system or of a source."""
        if source and not self.printer.style.label:
            text = f"{source.name} {text}"
        self.printer.feed(source or self.system, text.encode() + b"\n")

    def flush(self):
        """Write what is queued, as much as stdout takes."""
        try:
            moved = self.sink.write(self.queue)
            if moved and self.reports is None and self.on_limit in self.timers:
                self.set_limit()
        except OSError as error:
            self.on_lost(error)

    def on_lost(self, error):
        """End the set because the output cannot be written."""
        self.queue.clear()
        if self.lost:
            return
        self.lost = 128 + signal.SIGPIPE
        if error.errno not in (errno.EPIPE, errno.EIO, errno.ECONNRESET):
            self.lost = 1
            print_error(f"cannot write the output: {error.strerror}")
        if self.sink.is_pipe:
            self.busy.unregister(self.sink.fd)
        self.order("end", self.lost)

    def show(self, child, data):
        """Show what an instance has written: behind its prefix, or as it is if attached."""
        if child.pty:
            child.screen.update(MODES.findall(data))
            if b"\x1b[6n" in data and child is not self.attached:
                with suppress(OSError):    # irb asks where the cursor is, and waits for an answer
                    os.write(child.input, b"\x1b[1;2R")
        if child is self.attached:
            self.queue.append(data)
            self.in_line = not data.endswith(b"\n")
        elif child.instance in self.options.quiet:
            return
        else:
            self.print(child, data)
        child.last = (child.last + data[-SHOWN_AGAIN:])[-SHOWN_AGAIN:]
        self.writer = child

    def print(self, child, data):
        """Print what an instance has written; while another one is attached, hold it back."""
        self.printer.feed(child, data)
        if b"\n" in data or not child.tail:
            self.timers.pop(child.show_line, None)
        if child.tail and child.show_line not in self.timers:
            self.after(UNFINISHED, child.show_line)
        self.held += len(data) if self.attached else 0
        if self.held > MOST_HELD and child.fd in self.busy.get_map():
            self.busy.unregister(child.fd)

    def show_line(self, child):
        """Show a line that has been unfinished for a while, unless its end can be read now."""
        tail = child.tail
        if self.sink.full or child.fd not in self.busy.get_map():    # its end may be there, unread
            return self.after(UNFINISHED, child.show_line)
        self.on_output(child)
        if child.tail is tail:
            self.timers.pop(child.show_line, None)
            self.printer.show(child)

    def read(self, child, most):
        """Read and show at most so many bytes of an instance; return how many there were."""
        data = read_some(child.fd, most)
        if data and not self.lost:
            self.show(child, data)
            if len(data) >= LITTLE:
                self.flush()
        return len(data or b"")

    def on_output(self, child):
        """Read an instance once; each that has written gets its turn, even if stdout is full."""
        child.read_size = CHUNK if self.read(child, child.read_size) >= LITTLE else LITTLE

    def end_line(self, child):
        """End an instance's unfinished line."""
        self.timers.pop(child.show_line, None)
        self.printer.finish(child)

    def drain(self, child):
        """Show what an instance's pipe holds now, and end its line.  Others may go on writing to
        it, so this is bounded by what a pipe can hold."""
        room = size = CHUNK
        while room > 0 and size:
            size = self.read(child, CHUNK)
            room -= size
        self.end_line(child)

    # -- reports

    def on_reports(self):
        """Act upon the guard's reports."""
        if not self.receive(self.reports):
            self.on_guard_gone()
        elif self.on_limit in self.timers:
            self.set_limit()

    def on_started(self, index, pid):
        """An instance was started; from now on its output is read."""
        child = self.children[index]
        child.pid, child.since, child.last, child.screen = pid, monotonic(), b"", {}
        self.say(f"started with pid {pid}, PORT={child.instance.port}", child)
        self.watch_output(child)
        if child.instance in self.attach_first:
            self.attach_first = ()
            self.attach(child)

    def watch_output(self, child):
        """Watch an instance's output, unless it is watched already."""
        if child.fd not in self.busy.get_map():
            self.busy.register(child.fd, EVENT_READ, partial(self.on_output, child))

    def on_ended(self, index, status):
        """A leader has ended: show what it has written last, then how it ended."""
        child = self.children[index]
        self.drain(child)
        if child is self.attached:
            self.detach()
        child.pid, child.since, child.ended = None, monotonic(), how_it_ended(status)
        self.say(child.ended, child)

    def on_gone(self, index):
        """An instance is to be started anew, once what it wrote before is shown."""
        self.drain(self.children[index])
        self.order("start", index)

    def on_failed(self, index):
        """An instance has failed, which ends the set."""
        self.failed = self.children[index]

    def on_ending(self):
        """The set is being ended, or that makes progress: the terminal is procrun's again."""
        self.detach()

    def show_last(self):
        """Show again what the failed instance wrote last, if others have written since then."""
        if self.failed and self.failed.last and self.writer is not self.failed and os.isatty(1):
            self.say(f"last lines of {self.failed.name}:")
            lines = self.failed.last.rstrip(b"\n").split(b"\n")
            self.printer.feed(self.failed, b"\n".join(lines[-10:]))
            self.end_line(self.failed)

    def on_paused(self):
        """After Ctrl-Z the guard has stopped all; stop procrun too, unless it was continued
        meanwhile.  (The terminal's SIGTSTP does not reach the children in their own sessions, and
        they would ignore one, because their groups are orphaned.)"""
        if not self.pausing:
            return
        if self.printer.open:    # or the shell's prompt would stand on its line
            self.end_line(self.printer.open)
        self.set_raw(False)
        self.flush()
        # A blocked SIGTSTP stays pending, until a SIGCONT removes it (POSIX, Signal Concepts).
        signal.pthread_sigmask(signal.SIG_BLOCK, {SIGTSTP})
        os.kill(os.getpid(), SIGTSTP)
        self.on_signals()
        if self.pausing and SIGTSTP in signal.sigpending():
            os.kill(os.getpid(), SIGSTOP)
        signal.signal(SIGTSTP, signal.SIG_IGN)    # which removes it as well
        signal.signal(SIGTSTP, no_action)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGTSTP})

    def on_exit(self, status):
        """Note the exit status, which is the last report."""
        self.status = status

    def on_guard_gone(self):
        """The guard has ended, and with it the set; or it was killed, which ends the set.  From
        now on run() waits for stdout alone."""
        self.always.unregister(self.reports)
        self.reports = None
        if self.status is None:
            self.say("the guard was killed")
            self.status = 1
            for child in self.children:
                if child.pid:
                    send_signal(-child.pid, SIGKILL)
        self.detach()
        for child in self.children:
            self.drain(child)
        self.show_last()
        self.timers.clear()
        if self.signalled:
            self.set_limit()

    # -- orders and limits

    def order(self, word, number):
        """Give the guard an order, and wake it if somebody has stopped it.  It may have ended, or
        take nothing: there is a limit for that."""
        with suppress(OSError):
            os.write(self.orders, f"{word} {number:d}\n".encode())
            os.kill(self.guard, SIGCONT)

    def set_limit(self):
        """Wait for the guard's next report, at most the grace period and a second more; or, when
        the guard has ended, at most the grace period for stdout to take anything."""
        seconds = max(self.options.grace, GIVE_UP)
        self.after(seconds if self.reports is None else seconds + 1, self.on_limit)

    def on_limit(self):
        """Give up waiting."""
        if self.reports is None:
            size = sum(map(len, self.queue))
            print_error(f"standard output takes nothing; the last {size} bytes of output are lost")
            self.queue.clear()
        else:
            print_error("the guard does not answer; killing it and all processes")
            send_signal(self.guard, SIGKILL)
            self.on_guard_gone()

    def on_signals(self):
        """Act upon the signals that arrived, in their order; but SIGCONT is the last of a batch,
        because a handler that interrupts another one runs first."""
        numbers = read_some(self.signals) or b""
        self.reap()
        for number in sorted(numbers, key=lambda number: number == SIGCONT):
            if number in ENDING:
                self.on_ending_signal(number)
            elif number in PASSED_ON:
                self.order("signal", number)
            elif number == SIGTSTP and os.getpid() != 1:    # process 1 cannot be stopped
                self.pausing = True
                self.order("signal", SIGSTOP)
            elif number == SIGCONT:
                self.pausing = False
                self.order("signal", number)
                self.resume()
            elif number == signal.SIGWINCH:
                self.resize()

    def on_ending_signal(self, number):
        """Pass an ending signal on to the guard; when that has ended, a second signal ends the
        wait for stdout."""
        now = monotonic()
        if self.reports is None and self.signalled and now > self.signalled + ONE_REQUEST:
            return self.on_limit()
        self.signalled = self.signalled or now
        self.order("signal", number)
        if self.on_limit not in self.timers:
            self.set_limit()

    def reap(self):
        """Reap the guard and, as process 1, others' orphans; wake the guard if it was stopped."""
        with suppress(ChildProcessError):
            pid = None
            while pid != 0:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
                if pid == self.guard and os.WIFSTOPPED(status):
                    os.kill(pid, SIGCONT)

    def resize(self):
        """Give the PTYs the size of the terminal less the prefix, or 80x24 without a terminal."""
        wide = high = 0    # as on a terminal that was never told its size
        with suppress(OSError):
            wide, high = os.get_terminal_size(1)
        for child in self.children:
            if child.pty:
                margin = self.printer.margin if wide and child is not self.attached else 0
                size = struct.pack("4H", high or 24, max(1, (wide or 80) - margin), 0, 0)
                fcntl.ioctl(child.fd, termios.TIOCSWINSZ, size)

    # -- typed commands, or an attached program's keys

    def watch_terminal(self):
        """Watch the terminal for what is typed."""
        self.always.register(self.terminal.fd, EVENT_READ, self.on_typed)

    def on_typed(self):
        """Act upon what is typed.  If the terminal is not procrun's at present, look again in a
        second, because a shell's `fg` sends no signal."""
        data = read_some(self.terminal.fd) if self.terminal.is_ours() else None
        if not data and not (data == b"" and self.attached):    # which is Ctrl-D
            self.always.unregister(self.terminal.fd)
            self.after(1, self.watch_terminal)
        elif self.attached:
            keys, *rest = LEAVE.split(data, 1)
            self.type(keys)
            if rest or not keys:
                self.detach()
                self.on_lines(b"".join(rest))
        else:
            self.on_lines(data)

    def on_lines(self, data):
        """Obey typed commands, given as bytes."""
        for line in data.decode("utf-8", "replace").splitlines():
            try:
                self.on_command(*line.split())
            except UsageError as error:
                self.say(str(error))

    def on_command(self, word="", *names):
        """Obey a typed command; do nothing for a blank line."""
        if word in ("restart", "ps") or word in ("stop", "attach") and names:
            for child in selected(names, self.children, word) if names else self.children:
                if word == "ps":
                    self.say(self.state(child))
                elif word != "attach":
                    self.order(word, child.index)
                elif not self.attached:
                    self.attach(child)
        elif word:
            for line in TYPED_COMMANDS:
                self.say(line)

    def state(self, child):
        """Return the line of ps for an instance."""
        minutes, seconds = divmod(int(monotonic() - child.since), 60)
        state = f"{child.ended}, {minutes}:{seconds:02} ago"
        if child.pid:
            state = f"pid {child.pid}, running for {minutes}:{seconds:02}"
        return f"{child.name}  PORT={child.instance.port}, {state}"

    def attach(self, child):
        """Connect the terminal to an instance: its keys or lines, and its output as it is."""
        if not child.pid:
            return self.say(f"{child.name} is not running")
        if child.pty and not os.isatty(1):
            return self.say("a program under --pty needs standard output to be a terminal")
        self.end_line(child)
        key = "Ctrl-]" if child.pty else "Ctrl-D"
        self.say(f"attached to {child.name}; {key} leaves it")
        self.flush()
        self.attached, self.printer.queue, self.in_line = child, [], False
        self.resume()

    def resume(self):
        """Give the terminal to the attached program, if there is one, now or again."""
        self.set_raw(True)
        self.resize()

    def set_raw(self, raw):
        """Switch the terminal to raw mode for an attached program with a PTY, or back; but not
        from the background, where SIGTTOU would stop procrun."""
        terminal = self.terminal
        if not (self.attached and self.attached.pty):
            return
        if not terminal.is_ours():
            return self.after(1, self.resume)    # a shell's `fg` sends no signal
        screen = self.attached.screen
        self.order("raw", raw)
        if raw:
            tty.setraw(0, termios.TCSANOW)
            self.queue += [mode + b"h" for mode, state in screen.items() if state == b"h"]
            send_signal(-self.attached.pid, signal.SIGWINCH)    # so that it draws itself anew
        elif terminal.raw:
            self.flush()    # what was written for raw mode
            termios.tcsetattr(0, termios.TCSANOW, terminal.modes)
            self.queue.append(RESET)
            if screen.get(b"\x1b[?1049") == b"h":
                self.queue.append(b"\x1b[?1049l")
        terminal.raw = raw

    def detach(self):
        """Disconnect the terminal, and show what others have written meanwhile."""
        if not self.attached:
            return
        self.set_raw(False)
        self.typed.clear()
        self.type()
        self.attached, self.held = None, 0
        self.queue += [b"\n"] if self.in_line else []
        self.queue += self.printer.queue
        self.printer.queue = self.queue
        for child in self.children:
            if child.screen is not None:    # it was started, but may wait, as too much was held
                self.watch_output(child)
        self.resize()

    def type(self, data=b""):
        """Write to the attached program; what it does not take now is written later."""
        if not self.attached:
            return    # it was detached by what was read at the same time
        fd = self.attached.input
        self.typed += data
        if fd in self.always.get_map():
            self.always.unregister(fd)
        try:
            del self.typed[:os.write(fd, self.typed)]
        except BlockingIOError:
            pass
        except OSError:
            self.typed.clear()    # it has ended
        if self.typed:
            self.always.register(fd, EVENT_WRITE, self.type)


# Files: text -> LOCATION -------------------------------------------------------------------------

def begins_with(path, pattern):
    """Whether a file can be read and begins as a pattern (bytes) says; links do not count."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)    # a FIFO would block
        with open(fd, "rb") as file:
            return bool(re.match(pattern, file.read(CHUNK)))
    return False


def marked(location, app, mark):
    """Return the set of the relative paths of the files that an export of the app may have written
    (in a folder, and in service directories) whose first comment begins with the mark (str)."""
    where = re.compile(rf"({re.escape(app)}-[\w-]+-\d+/((env|control|log)/)?)?[^/]+")
    mark = re.escape(mark).replace(r"\-\-", r"\-(?:\-|&#45;)")    # as an XML comment has it
    first = rf'(?:.*\n){{0,2}}(?:# |; |<!-- | *"procrun/made-by": "){mark}'.encode()
    paths = [os.path.relpath(f"{folder}/{name}", location)
             for folder, _, names in os.walk(location) for name in names]
    return {path for path in filter(where.fullmatch, paths)
            if begins_with(f"{location}/{path}", first)}


def in_the_way(location, files, ours, force):
    """Raise Failure if something stands where a file or its folder is to be: a file that is not
    among `ours`, or a link in place of a folder."""
    real = os.path.realpath(location)
    for name in files:
        path = f"{location}/{name}"
        if os.path.isdir(path):
            raise Failure(f"{path}: is a directory; move it away")
        if os.path.lexists(path) and name not in ours and not force:
            raise Failure(f"{path}: already exists, and is not from an export of this app and "
                          "format; move it away, or use --force")
        if os.path.realpath(os.path.dirname(path)) != os.path.dirname(f"{real}/{name}"):
            raise Failure(f"{path}: its folder is a link; move that away")


def stage(folder, files):
    """Write all files below a new folder, each with its permission bits from its first byte on."""
    os.makedirs(folder, 0o700)
    for path, (mode, text) in files.items():
        os.makedirs(os.path.dirname(f"{folder}/{path}"), exist_ok=True)
        with open(f"{folder}/{path}", "xb", opener=partial(os.open, mode=mode)) as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file)


def install(location, staging, files, gone):
    """Write all files below the folder `staging`, move each to its place (a new service directory
    as a whole), and remove what is gone (relative paths).  Signals wait.  Raises Failure, which
    tells what has changed; nothing has before all files are written."""
    import shutil
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    path, done = location, []
    names = [name for path in files for name in (path.partition("/")[0], path)]
    os.umask(0o022)
    shutil.rmtree(staging, ignore_errors=True)    # of an export that was killed
    try:
        stage(staging, files)
        for name in names:
            path = f"{location}/{name}"
            if os.path.lexists(f"{staging}/{name}") and not os.path.isdir(path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                os.replace(f"{staging}/{name}", path)
                done.append(path)
        for name in gone:
            path = f"{location}/{name}"
            os.unlink(path)
            done.append(path)
            with suppress(OSError):    # the first that is not empty: the location holds `staging`
                os.removedirs(os.path.dirname(path))
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}; replaced or removed so far: "
                      f"{', '.join(done) or 'nothing'}")
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
        raise Failure(f"{path}: {error.strerror}")
    if len(text) > TOO_LARGE:
        raise Failure(f"{path}: longer than {TOO_LARGE >> 20} MiB; is it the right file?")
    return text


def procfile_path(args):
    """Where the Procfile is: -f, else in the root directory, else here."""
    return args.procfile or os.path.join(args.root or "", "Procfile")


def load_types(args):
    """Read the Procfile; if there is none, raise a Failure that says what to do."""
    path = procfile_path(args)
    if not args.procfile and not os.path.exists(path):
        import glob
        others = sorted(glob.glob(glob.escape(path) + ".*"))
        if others:
            raise Failure(f"no {path} here; use -f {' or -f '.join(others)}")
        raise Failure(f"no {path} here; write one, a line for each process type, such as:",
                      "    web: python3 -m http.server $PORT", "    worker: python3 worker.py")
    return parse_procfile(read_file(path), path)


def load_environment(args):
    """Read the environment files; return (their variables, bytes to bytes, the root directory)."""
    path, names = procfile_path(args), args.env
    special = os.path.exists(path) and not os.path.isfile(path)    # such as /dev/stdin
    root = args.root or ("" if special else os.path.dirname(path))
    default = os.path.join(root, ".env")
    if not names and os.path.lexists(default) and not os.path.isdir(default):    # a virtualenv
        names = [default]
    variables = {}
    for name in names:
        found, warnings = parse_env(read_file(name), name, {**os.environb, **variables})
        variables.update(found)
        print_error(*warnings)
    try:
        return variables, os.path.normpath(os.path.join(os.getcwd(), root))
    except OSError:
        raise Failure("the current directory has been removed; change to one that is there")


def planned(args, types, variables):
    """Return ({type: concurrency}, base port, instances) that the command line asks for."""
    counts = formation(types, args.concurrency + args.formation, 0 if args.formation else 1,
                       getattr(args, "names", ()))
    base = base_port(args.port, variables, os.environb)
    instances = expand(types, counts, base)
    if not instances:
        raise UsageError("nothing to run: every process type asked for has a concurrency of 0")
    return counts, base, instances


def output_style(args, instances, terminal):
    """Return the Style of the output: coloured as --color says, else NO_COLOR and FORCE_COLOR
    (no-color.org), else on a terminal."""
    colour = args.color == "always"
    if args.color == "auto" and not os.environ.get("NO_COLOR"):
        plain = not terminal or os.environ.get("TERM") == "dumb"
        colour = bool(os.environ.get("FORCE_COLOR")) or not plain
    colourless = COLOURLESS if args.color == "never" else None
    return Style(max(6, *(len(each.name) for each in instances)),    # as long as "system"
                 colour, not args.no_timestamp, not args.no_prefix,
                 TERMINAL if terminal else colourless)


def prepare_fds(instances):
    """Open what is closed of fds 0, 1 and 2, let children inherit no others, and allow procrun as
    many as it needs; return the limits before, for the children."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)    # takes the lowest free number, which is fd
    for fd in open_fds():
        with suppress(OSError):    # of the one that listed them
            os.set_inheritable(fd, fd < 3)
    soft, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 4 * len(instances) + 20 + len(open_fds())
    if needed > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        except (ValueError, OSError):    # above the hard limit, or above macOS's own
            raise Failure(f"too few file descriptors: {needed} are needed, the limit is {hard}; "
                          "raise it with ulimit -n")
    return limits


def open_children(types, instances, terminals):
    """Return the children with their pipes open, or PTYs for the instances in `terminals`."""
    colours = {each.name: COLOURS[index % len(COLOURS)] for index, each in enumerate(types)}
    # All that an ordinary user's pipes hold counts, up to 64 MiB (pipe(7)).
    capacity = max(LITTLE, min(CHUNK, (1 << 23) // len(instances)))
    children = [Child(index, each, colours[each.type], each in terminals)
                for index, each in enumerate(instances)]
    for child in children:
        child.open(capacity)
    return children


def enter_root(root):
    """Make the root directory the current one."""
    try:
        os.chdir(root)
    except OSError as error:
        raise Failure(f"{root}: {error.strerror}; it is to be the root directory")


def cmd_start(args):
    """procrun start: run all process types, or those named, until a process ends."""
    types, (variables, root) = load_types(args), load_environment(args)
    instances, is_terminal = planned(args, types, variables)[2], os.isatty(1)
    attached = selected([args.attach], instances, "--attach")[:1] if args.attach else []
    can_die = selected(args.can_die, instances, "--can-die")
    quiet = selected(args.quiet, instances, "--quiet")
    enter_root(root)
    try:
        limits = prepare_fds(instances)
    except OSError as error:
        raise Failure(f"{os.devnull}: {error.strerror}; it is needed where 0, 1 or 2 is closed")
    terminal = Terminal() if os.isatty(0) else None
    if attached and not (terminal and terminal.is_ours() and is_terminal):
        raise UsageError("--attach needs a terminal as standard input and output, and procrun in "
                         "its foreground")
    options = Options(root, child_environment(variables), limits, args.timeout, can_die,
                      args.keep_going, quiet)
    printer = Printer(output_style(args, instances, is_terminal), time.time)
    try:
        children = open_children(types, instances, instances if args.pty else attached)
        front = Front(Guard(children, options, terminal), printer, Sink(1))
    except OSError as error:
        raise Failure(f"cannot open a pipe or PTY, or fork: {error.strerror}")
    front.attach_first = attached
    return front.run()


def cmd_run(args):
    """procrun run: run one command in the foreground, in place of procrun."""
    command = args.command
    if command[:1] == ["--"]:
        del command[0]
    if not command or not command[0]:
        raise UsageError("run what? name a process type, or a command")
    may_be_type = len(command) == 1 and (args.procfile or os.path.exists(procfile_path(args)))
    types = load_types(args) if may_be_type else []
    variables, root = load_environment(args)
    environment, names = child_environment(variables), [each.name for each in types]
    if command[0] in names:
        base = base_port(args.port, variables, os.environb)
        [instance] = expand(types, formation(types, (), 1, command), base)
        environment.update(instance.variables)
        command = ["/bin/sh", "-c", instance.command]
    enter_root(root)
    handle((signal.SIGPIPE, signal.SIGXFSZ), signal.SIG_DFL)    # which CPython ignores
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)    # as process 1 they were blocked
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        hint = f"; the process types are {', '.join(names)}" if missing and names else ""
        print_error(f"{command[0]}: {error.strerror}{hint}")
        return 127 if missing else 126


def cmd_check(args):
    """procrun check: check the Procfile and the environment files."""
    types, variables = load_types(args), load_environment(args)[0]
    base_port(args.port, variables, os.environb)
    print_out(f"valid procfile detected ({', '.join(each.name for each in types)})\n")
    return 0


def cmd_version(_):
    """procrun version: print the version."""
    print_out(f"procrun {VERSION}\n")
    return 0


def make_plan(args, root, variables, counts):
    """Return the Plan of an export."""
    import grp
    import pwd
    name = os.path.basename(root) if args.app is None else args.app
    user = name if args.user is None else args.user
    group, mark = "", MADE_BY % (args.format, name)
    log = os.path.abspath(args.log) if args.log else ""
    with suppress(KeyError):
        group = grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name
    if args.format == "kubernetes":    # its files are shared: nothing of this machine is in them
        root = root if args.root else ""
    else:
        again = [each for each in args.argv if each not in ("--force", "--dry-run")]
        words = " ".join(map(shell_quote, [sys.argv[0]] + again))
        mark += f"Again: cd {shell_quote(os.getcwd())} && python3 {words}"
    shared = {os.fsdecode(key): exportable(f"the value of {printable(key)}", value)
              for key, value in {b"PYTHONUNBUFFERED": b"1", **variables}.items()
              if key not in (b"PORT", b"PS")}    # an instance has its own
    return Plan(args.format, name, user, group, root, log, max(1, math.ceil(args.timeout)), mark,
                shared, counts, args.image, args.user_units, os.path.abspath(args.location))


def warn(plan):
    """Warn of what this machine lacks for an export, and of a release process."""
    refused = ""
    if plan.format == "supervisord":
        refused = "; until it is there, supervisord refuses its whole configuration"
    if not (plan.group or plan.user_units or plan.format == "kubernetes"):
        print_error(f"warning: this machine has no user `{plan.user}`; make it or use -u{refused}")
    if plan.log and not os.path.isdir(plan.log):
        print_error(f"warning: there is no directory {plan.log} for the logs{refused}")
    if plan.log and plan.format == "upstart":
        print_error(f"warning: `{plan.user}` must be able to write to {plan.log}")
    if plan.counts.get("release"):
        print_error("warning: release is meant to run once: -c release=0 leaves it out")


def tell_done(plan, files, gone):
    """Say what an export has done, and how to start it; an error of stdout is no failure of it."""
    start = FORMATS[plan.format][1].format(app=plan.app, location=shell_quote(plan.location))
    if plan.user_units and plan.format == "systemd":
        start = start.replace("systemctl", "systemctl --user") + " && loginctl enable-linger"
    lines = [f"writing: {plan.location}/{name}" for name in files]
    lines += [f"removing: {plan.location}/{name}" for name in gone]
    if gone:
        lines += ["if what was removed still runs, stop it"]
    lines += [f"start it with: {start}"]
    try:
        print_out("".join(f"[procrun export] {line}\n" for line in lines))
    except Failure as failure:
        print_error(*failure.args)


def cmd_export(args):
    """procrun export: write the configuration of a process manager.

    upstart       jobs for /etc/init
    systemd       units for /etc/systemd/system
    launchd       property lists for /Library/LaunchDaemons
    supervisord   a file for /etc/supervisor/conf.d
    runit         service directories for /etc/sv
    kubernetes    Deployments, a Secret and a Service
    """
    types, (variables, root) = load_types(args), load_environment(args)
    counts, base, instances = planned(args, types, variables)
    if args.format == "kubernetes":    # which makes the instances itself, from one of each type
        instances = expand(types, dict.fromkeys(counts, 1), base)
    plan = make_plan(args, root, variables, counts)
    files = export_files(plan, instances)
    warn(plan)
    if args.dry_run:
        masked = plan._replace(variables=dict.fromkeys(plan.variables, "********"))
        for name, (mode, text) in export_files(masked, instances).items():
            path = f"{plan.location}/{name}"
            print_out(f"[procrun export] would write: {path}, mode {mode:04o}\n{text}")
        return 0
    ours = marked(plan.location, plan.app, MADE_BY % (plan.format, plan.app))
    in_the_way(plan.location, files, ours, args.force)
    gone = sorted(ours.difference(files))
    staging = f"{plan.location}/.procrun-{plan.format}-{plan.app}"
    install(plan.location, staging, files, gone)
    tell_done(plan, files, gone)
    return 0


def grace_period(text):
    """Return the grace period that a text is, in seconds; raises UsageError."""
    if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]*)?|\.[0-9]+", text) or float(text) > 86400:
        raise UsageError(f"-t: `{text}` is not a number of seconds from 0 to 86400 (a day)")
    return float(text)


# What each command takes, as a manual page has it: --help shows it, and make_parser() reads it.
COMMON = """
-f, --procfile FILE     the Procfile (default: Procfile in the root directory; - is standard input)
-d, --root DIR          where the commands run and .env is (default: the Procfile's folder)
-e, --env FILE[,FILE]   read these files instead of .env; repeatable
-p, --port N            base port (default: PORT of .env or the environment, or 5000)
"""
FORMATION = """
-c, --concurrency NAME=N[,NAME=N]   run N instances; types that are not named run once, or as often
                                    as all=N says; repeatable
-m, --formation NAME=N[,NAME=N]     the same, but types that neither -c nor -m names do not run,
                                    unless all=N is given
-t, --timeout SECONDS   grace period between SIGTERM and SIGKILL, at most a day (default: 5; start:
                        0 kills at once; export: rounded up to a whole second)
"""
START = FORMATION + """
NAME ...                run only these process types
--can-die NAME[,NAME]   exit status 0 of these does not end the others; repeatable
--keep-going            a process that ends does not end the others
--quiet NAME[,NAME]     drop the output of these, but report their starts and ends; repeatable
--pty                   give each process a terminal of its own
--attach NAME           give this terminal to one process, such as web or web.2, from its start;
                        Ctrl-] takes it back
--color auto|always|never   colour the prefixes (default: auto, on a terminal); never: no colours
                        at all, not even the processes' own
--no-timestamp          lines without the time
--no-prefix             lines without any prefix
"""
RUN = """
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
--force                 overwrite files that are not from an export of this app and format
"""
WORDS = {    # what the words for values and arguments mean to argparse
    "N": {"type": port_number}, "SECONDS": {"type": grace_period, "default": 5.0},
    "FILE": {"type": os.path.normpath}, "DIR": {"type": os.path.normpath},
    "auto|always|never": {"choices": ("auto", "always", "never"), "default": "auto"},
    "NAME ...": {"dest": "names", "nargs": "*", "metavar": "NAME"},
    "FORMAT": {"dest": "format", "choices": FORMATS},
    "LOCATION": {"dest": "location"},
    "NAME|COMMAND [ARG ...]": {"dest": "command", "nargs": "..."}}
COMMANDS = {
    "start": (cmd_start, START), "run": (cmd_run, RUN), "check": (cmd_check, ""),
    "export": (cmd_export, EXPORT), "version": (cmd_version, "")}


def make_parser(text, **details):
    """Return an argparse parser for what a text describes, an option or an argument a line: the
    flags, if any, the word for the value, if any, two or more blanks, and what it does, which goes
    on in lines that begin with a blank.  Options are not guessed from their first letters."""
    def error(message):
        """Raise an error of argparse, which would exit, as one line."""
        raise UsageError(f"{message} (see {parser.prog} --help)")

    # Its width is given, or argparse imports shutil to find it out (3 ms).
    page = partial(argparse.RawDescriptionHelpFormatter, width=100)
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=page, **details)
    parser.error = error
    for flags, word, meaning in re.findall(
            r"^(-[^\s,]+(?:, -\S+)?)? ?(\S+(?: \S+)*)?  +(.*(?:\n +.*)*)", text, re.MULTILINE):
        more = {"metavar": word, **WORDS.get(word, {})} if word else {"action": "store_true"}
        if "[," in word:
            more.update(type=partial(str.split, sep=","), action="extend", default=[])
        parser.add_argument(*flags.split(", ") if flags else (), help=meaning, **more)
    return parser


def parse_words(words):
    """Return (the command's function, its arguments) for a command line; raises UsageError."""
    top = make_parser(COMMON, prog="procrun", usage=argparse.SUPPRESS, description=__doc__)
    top.add_argument("--version", action="version", version=f"procrun {VERSION}")
    top.add_argument("words", nargs="...", help=argparse.SUPPRESS)
    args = top.parse_args(words, argparse.Namespace(argv=words))
    if not args.words:
        top.exit(UsageError.status, top.format_help())
    name, *rest = args.words
    if name not in COMMANDS:
        top.error(f"unknown command `{name}`; known: {', '.join(COMMANDS)}")
    function, text = COMMANDS[name]
    # What stands before the command is in args already, and lists are extended.
    parser = make_parser(COMMON + text, prog=f"procrun {name}", description=function.__doc__)
    return function, parser.parse_args(rest, args)


def main(argv=None):
    """Run procrun; return its exit status."""
    try:
        function, args = parse_words(sys.argv[1:] if argv is None else argv)
        return function(args)
    except Failure as failure:
        print_error(*failure.args)
        return failure.status


if __name__ == "__main__":
    sys.exit(main())
