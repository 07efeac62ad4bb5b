"""Runs a command in namespaces of its own, by system calls: what bubblewrap does, where there is
none. A program of its own, of the standard library alone.

The argument is JSON: ``{"parent", "user", "readable", "links", "command", "environment", "bytes",
"files"}``. The command sees the ``readable`` directories, which nobody can write to, a few devices,
and an empty /tmp of so many bytes and files; no network, no other process; it is the ordinary user
``INSIDE`` of a user namespace, outside of which it is ``user``, and can be no other.
"""

import ctypes
import json
import os
import signal
import struct
import sys

INSIDE = 1000
DEVICES = ("null", "zero", "full", "random", "urandom")
MS_NOSUID = 0x2  # sys/mount.h
MS_NODEV = 0x4
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
# mount, pid, net, ipc, uts, cgroup and user namespaces
NEW_NAMESPACES = (
    0x20000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000 | 0x10000000
)
MNT_DETACH = 2
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
READ_ONLY = 0x1 | 0x2 | 0x4  # MOUNT_ATTR_RDONLY, NOSUID, NODEV
SYS_MOUNT_SETATTR = 442  # on every architecture
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38

libc = ctypes.CDLL(None, use_errno=True)


def checked(what, result):
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount(source, target, kind, flags, data=None):
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind, data)]
    done = libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])
    checked(f"mount {target}", done)


def make_read_only(path, flags=AT_RECURSIVE):
    attributes = struct.pack("QQQQ", READ_ONLY, 0, 0, 0)
    done = libc.syscall(
        SYS_MOUNT_SETATTR, AT_FDCWD, os.fsencode(path), flags, attributes, len(attributes)
    )
    checked(f"mount_setattr {path}", done)


def end_with_parent(parent):
    checked("prctl", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def write_maps(process, users, groups, setgroups):
    """Which users and groups there are in the user namespace of ``process``."""
    for name, text in (("setgroups", setgroups), ("uid_map", users), ("gid_map", groups)):
        with open(f"/proc/{process}/{name}", "w") as file:
            file.write(text)


def enter_namespaces(user):
    """An ordinary user stays who it is, under the name INSIDE. Root, which has yet to mount things,
    stays root until :func:`become_ordinary`; only a process outside the namespace may say so."""
    if user == os.getuid():
        users, groups = (f"{INSIDE} {outside} 1" for outside in (user, os.getgid()))
        checked("unshare", libc.unshare(NEW_NAMESPACES))
        write_maps("self", users, groups, "deny")
        return
    reading, writing = os.pipe()
    here = os.getpid()
    mapper = os.fork()
    if mapper == 0:
        status = 1
        try:
            os.close(writing)
            if os.read(reading, 1):
                both = f"0 0 1\n{INSIDE} {user} 1"
                write_maps(here, both, both, "allow")
                status = 0
        finally:
            os._exit(status)
    checked("unshare", libc.unshare(NEW_NAMESPACES))
    os.write(writing, b"x")
    os.close(writing)
    os.close(reading)
    if os.waitpid(mapper, 0)[1] != 0:
        raise OSError(f"the user {user} cannot be mapped")


def make_file(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def make_root(spec):
    """A root directory of what may be seen, in memory; /tmp is its only writable place."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    pivot = SYS_PIVOT_ROOT[os.uname().machine]
    checked("pivot_root", libc.syscall(pivot, b"/tmp", b"/tmp/old"))
    os.chdir("/")
    for path in spec["readable"]:
        if os.path.isdir("/old" + path):
            os.makedirs(path)
        else:
            make_file(path)
        mount("/old" + path, path, None, MS_BIND | MS_REC)
        make_read_only(path)
    for path, target in spec["links"]:
        os.symlink(target, path)
    for name in DEVICES:
        make_file(f"/dev/{name}")
        mount(f"/old/dev/{name}", f"/dev/{name}", None, MS_BIND)
    os.symlink("/tmp", "/dev/shm")
    os.makedirs("/tmp", exist_ok=True)
    limits = f"size={spec['bytes']},nr_inodes={spec['files']},mode=1777"
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, limits)
    checked("umount", libc.umount2(b"/old", MNT_DETACH))
    os.rmdir("/old")
    make_read_only("/", 0)
    os.chdir("/tmp")


def become_ordinary():
    """No way back: no capabilities after the exec, none by files either."""
    if os.geteuid() != INSIDE:
        os.setgroups([])
        os.setresgid(INSIDE, INSIDE, INSIDE)
        os.setresuid(INSIDE, INSIDE, INSIDE)
    checked("prctl", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def main():
    spec = json.loads(sys.argv[1])
    end_with_parent(spec["parent"])
    try:
        enter_namespaces(spec["user"])
        make_root(spec)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    first = os.fork()
    if first == 0:
        try:
            become_ordinary()
            end_with_parent(None)  # after the change of user, which takes it back
            os.execve(spec["command"][0], spec["command"], spec["environment"])
        except OSError as error:
            os.write(2, str(error).encode())
        finally:
            os._exit(1)
    status = os.waitpid(first, 0)[1]
    return os.waitstatus_to_exitcode(status) & 255


if __name__ == "__main__":
    sys.exit(main())
