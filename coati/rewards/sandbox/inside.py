"""The first process inside a sandbox (process 1 of its namespace): runs a program's cases one after
the other, each in a child under limits, and reports how each ended. Standard library alone; its
text is handed to the interpreter, so that nothing of coati is in the sandbox.

Standard input brings messages, each 8 bytes of length and JSON: ``{"program", "limits", "cases"}``,
then for each case of the kind ``tests`` its tests, which come only after the child has been forked.
The descriptor that is the last argument takes a line of JSON for each case.
"""

import ctypes
import io
import json
import os
import resource
import selectors
import signal
import struct
import sys
import threading
import time
import traceback

CHUNK = 65536
TAIL = 2000  # bytes of standard error that are reported
IMPORTS = "from typing import *\nimport bisect, collections, functools, heapq, itertools, math, re"
PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
EPERM = 1
ENOSYS = 38
# Architecture -> its audit number, clone, clone3, prlimit64, and the calls that are refused: other
# namespaces, mounts, other processes' memory, memory that no limit counts, keys, kernel interfaces.
CALLS = {
    "x86_64": (
        0xC000003E,
        56,
        435,
        302,
        # unshare setns mount umount2 pivot_root chroot ptrace process_vm_readv process_vm_writev
        # memfd_create memfd_secret shmget msgget semget keyctl add_key request_key bpf
        # perf_event_open userfaultfd io_uring_setup pidfd_getfd process_madvise kcmp open_tree
        # move_mount fsopen fsconfig fsmount mount_setattr swapon reboot init_module finit_module
        # kexec_load open_by_handle_at acct quotactl personality
        (
            *(272, 308, 165, 166, 155, 161, 101, 310, 311, 319, 447, 29, 68, 64, 250, 248, 249),
            *(321, 298, 323, 425, 438, 440, 312, 428, 429, 430, 431, 432, 442, 167, 169, 175, 313),
            *(246, 304, 163, 179, 135),
        ),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        435,
        261,
        (
            *(97, 268, 40, 39, 41, 51, 117, 270, 271, 279, 447, 194, 186, 190, 219, 217, 218),
            *(280, 241, 282, 425, 438, 440, 272, 428, 429, 430, 431, 432, 442, 224, 142, 105, 273),
            *(104, 265, 89, 60, 92),
        ),
    ),
}
NEW_NAMESPACES = 0x7E020000  # the CLONE_NEW... flags


def read_message():
    size = struct.unpack(">Q", read_exactly(0, 8))[0]
    return json.loads(read_exactly(0, size))


def read_exactly(fd, size):
    parts = b""
    while len(parts) < size:
        part = os.read(fd, min(size - len(parts), CHUNK))
        if not part:
            raise EOFError
        parts += part
    return parts


def seccomp_filter():
    """BPF: the calls of CALLS fail with EPERM, so does clone with new namespaces; clone3, whose
    flags a filter cannot see, is said not to exist, and the C library takes clone."""
    audit, clone, clone3, prlimit, refused = CALLS[os.uname().machine]
    load = 0x20
    equal = 0x15
    any_bit = 0x45
    above = 0x35
    give = 0x06
    failing = 0x00050000
    allowed = 0x7FFF0000
    code = [(load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, 0x80000000), (load, 0, 0, 0)]
    code += [(above, 0, 1, 0x40000000), (give, 0, 0, failing | EPERM)]  # the x32 calls
    for number in refused:
        code += [(equal, 0, 1, number), (give, 0, 0, failing | EPERM)]
    code += [(equal, 0, 1, clone3), (give, 0, 0, failing | ENOSYS)]
    # Of another process than oneself: process 1 would get other limits.
    code += [(equal, 0, 3, prlimit), (load, 0, 0, 16), (equal, 0, 4, 0), (give, 0, 0, allowed)]
    code += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 0, 1, NEW_NAMESPACES)]
    code += [(give, 0, 0, failing | EPERM), (give, 0, 0, allowed)]
    return b"".join(struct.pack("HBBI", *each) for each in code), len(code)


def restrict(limits):
    """Limits of this process and what it starts, for good."""
    for name, value in limits["rlimits"].items():
        number = getattr(resource, "RLIMIT_" + name, None)
        if number is not None:
            hard = resource.getrlimit(number)[1]
            if hard != resource.RLIM_INFINITY:
                value = min(value, hard)
            resource.setrlimit(number, (value, value))
    libc = ctypes.CDLL(None, use_errno=True)
    text, count = seccomp_filter()
    buffer = ctypes.create_string_buffer(text, len(text))
    program = struct.pack("HxxxxxxP", count, ctypes.addressof(buffer))
    held = ctypes.create_string_buffer(program, len(program))
    for words in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, 2, held, 0, 0)):
        if libc.prctl(*words) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


class Child:
    """A forked process that runs one case; its pipes."""

    def __init__(self, case, message, number):
        pipes = {name: os.pipe() for name in ("stdin", "stdout", "stderr", "back", "more")}
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 120  # what restricts it failed
            try:
                os.setsid()
                os.dup2(pipes["stdin"][0], 0)
                os.dup2(pipes["stdout"][1], 1)
                os.dup2(pipes["stderr"][1], 2)
                back = os.dup2(pipes["back"][1], 990)
                more = os.dup2(pipes["more"][0], 991)
                os.closerange(3, 990)
                os.closerange(992, 4096)
                folder = f"/tmp/{number}"
                os.mkdir(folder)
                os.chdir(folder)
                restrict(message["limits"])
                status = run_case(case, message["program"], back, more)
            except BaseException as error:
                os.write(2, f"the sandbox could not begin: {error!r}".encode())
            finally:
                os._exit(status)
        for name, (reading, writing) in pipes.items():
            os.close(reading if name in ("stdin", "more") else writing)
        self.sending = None
        self.stdin = pipes["stdin"][1]
        self.more = pipes["more"][1]
        self.reading = {pipes[name][0]: name for name in ("stdout", "stderr", "back")}

    def send(self, text):
        """In a thread: a child that never reads it must not stop this process."""

        def work():
            left = text
            try:
                while left:
                    left = left[os.write(self.more, left) :]
            except OSError:
                pass

        self.sending = threading.Thread(target=work)
        self.sending.start()


def run_case(case, program, back, more):
    """In the child: the program, then what the case asks of it. The exit status."""
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0)), "utf-8", "replace")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")), "utf-8", "replace")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w")), "utf-8", "backslashreplace", line_buffering=True
    )
    sys.argv = ["program.py"]
    status = 0
    try:
        module = type(sys)("solution")
        sys.modules["solution"] = module
        names = module.__dict__
        names["__name__"] = "__main__" if case["kind"] == "stdin" else "solution"
        if case["kind"] != "stdin":
            exec(IMPORTS, names)
        exec(compile(program, "program.py", "exec"), names)
        if case["kind"] == "call":
            os.write(back, json.dumps({"result": call(names, case)}).encode())
        elif case["kind"] == "tests":
            tests = json.loads(read_exactly(more, struct.unpack(">Q", read_exactly(more, 8))[0]))
            run_tests(names, tests)
            os.write(back, tests["token"].encode())
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except MemoryError:
        os.write(2, b"MemoryError\n")  # a traceback would need some
        status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        sys.stdout.flush()
    except BaseException:
        status = status or 1
    return status & 255


def call(names, case):
    function = names.get(case["function"])
    if function is None and "Solution" in names:
        function = getattr(names["Solution"](), case["function"], None)
    if function is None:
        raise NameError(f"the program defines no {case['function']}")
    return function(*case["arguments"])


def run_tests(names, tests):
    """Plain assertions, a ``check(candidate)``, functions ``test_...``, or unittest classes."""
    names["__name__"] = "tests"
    before = set(names)
    exec(compile(tests["source"], "tests.py", "exec"), names)
    if tests.get("entry_point") and callable(names.get("check")):
        names["check"](names[tests["entry_point"]])
    for name in [name for name in names if name not in before]:
        if name.startswith("test_") and callable(names[name]):
            names[name]()
    unittest = sys.modules.get("unittest")
    if unittest is not None:
        suite = unittest.TestSuite(
            unittest.defaultTestLoader.loadTestsFromTestCase(kind)
            for name, kind in list(names.items())
            if name not in before
            and isinstance(kind, type)
            and kind is not unittest.TestCase
            and issubclass(kind, unittest.TestCase)
        )
        result = unittest.TextTestRunner(sys.stderr).run(suite)
        if not result.wasSuccessful():
            raise AssertionError("a unittest failed")


def watch(child, case, limits):
    """How the child ended, and what it wrote."""
    ends = time.monotonic() + limits["seconds"]
    found = {"stdout": b"", "stderr": b"", "back": b""}
    total = 0
    given = case.get("input", "").encode("utf-8", "surrogatepass")
    asking = selectors.DefaultSelector()
    for fd, name in child.reading.items():
        asking.register(fd, selectors.EVENT_READ, name)
    os.set_blocking(child.stdin, False)
    asking.register(child.stdin, selectors.EVENT_WRITE, "stdin")
    ended = status = None
    while ended is None:
        for key, _ in asking.select(0.005 if status is None else 0):
            if key.data == "stdin":
                try:
                    given = given[os.write(child.stdin, given[:CHUNK]) :]
                except BlockingIOError:
                    continue
                except OSError:
                    given = b""
                if not given:
                    asking.unregister(child.stdin)
                    os.close(child.stdin)
                    child.stdin = None
                continue
            part = os.read(key.fd, CHUNK)
            if not part:
                asking.unregister(key.fd)
            total += len(part)
            kept = found[key.data] + part
            found[key.data] = kept[-TAIL:] if key.data == "stderr" else kept
        if total > limits["output"]:
            ended = "output"
        elif status is not None:
            ended = "signal" if os.WIFSIGNALED(status) else "exit"
        elif time.monotonic() > ends:
            ended = "time"
        else:
            status = reap(child.pid)
            if status is not None:
                end_all_others()  # whoever holds the pipes open
    return ended, status, found


def reap(pid):
    """The status of ``pid`` where it has ended; of others that have, nothing is kept."""
    while True:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if ended == 0:
            return None
        if ended == pid:
            return status


def end_all_others():
    """Every process of the namespace but this one."""
    while True:
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def drained(child, found, limits):
    """Read what is left in the pipes of a child that is gone, and close them."""
    if child.sending is not None:
        child.sending.join()
    for fd, name in child.reading.items():
        os.set_blocking(fd, False)
        try:
            while len(found[name]) <= limits["output"] and (part := os.read(fd, CHUNK)):
                found[name] += part
        except BlockingIOError:
            pass
        os.close(fd)
    for fd in (child.stdin, child.more):
        if fd is not None:
            os.close(fd)


def main():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # process 1 is not sent what it does not handle
    report = int(sys.argv[-1])
    message = read_message()
    limits = message["limits"]
    for number, case in enumerate(message["cases"]):
        child = Child(case, message, number)
        if case["kind"] == "tests":
            text = json.dumps(read_message()).encode()
            child.send(struct.pack(">Q", len(text)) + text)
        ended, status, found = watch(child, case, limits)
        end_all_others()
        drained(child, found, limits)
        line = {
            "ended": ended,
            "code": None if status is None else os.waitstatus_to_exitcode(status),
            "stdout": found["stdout"].decode("utf-8", "replace"),
            "stderr": found["stderr"][-TAIL:].decode("utf-8", "replace"),
            "back": found["back"].decode("utf-8", "replace"),
        }
        text = json.dumps(line).encode() + b"\n"
        while text:
            text = text[os.write(report, text) :]


if __name__ == "__main__":
    main()
