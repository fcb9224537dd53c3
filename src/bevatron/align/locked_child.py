"""The program in which a model's code runs: it gives away what it can, then runs the code.

`locked_python.py` starts this file by its path, as a process of its own in an empty temporary
folder, without `site`. It imports nothing of Bevatron. File descriptor 3 is a socket to the parent:
JSON lines. What is enforced, by the kernel, without root:

- limits of memory, processor time, size and number of files (setrlimit);
- no other process, no program, no signals to others, no sockets, no change of modes, owners or
  attributes of files, no mounts, no shared memory that outlives it (a seccomp filter);
- files: only the temporary folder can be written, only Python's own folders and the temporary one
  can be read (Landlock).

The first line that it sends says which of these hold. It does not hide that files exist (stat), the
system's name, or the clock.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

CONTROL = 3
LONGEST = 1 << 20  # characters of a value's repr
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 38, 22, 1, 4
PR_CAPBSET_DROP, CAPABILITIES = 24, 64
SIGKILL = 9

# Landlock (linux/landlock.h). The three calls have these numbers on every architecture.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
MAKE_DEVICES = (1 << 6) | (1 << 11)  # character and block
READS = EXECUTE | READ_FILE | READ_DIR
OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | (1 << 14)
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many bits each version of it has; 16 later

# seccomp: what is refused (EPERM), as numbers on x86-64 and on the architectures with Linux's
# generic table, which arm64 has.
REFUSED = {
    "x86_64": "29 41 42 43 44 45 46 47 49 50 53 57 58 59 62 64 68 90 91 92 93 94 101 109 112 129 "
    "132 141 142 144 155 161 165 166 169 175 188 189 190 197 198 199 200 203 234 235 240 246 248 "
    "249 250 251 260 261 268 272 280 288 297 298 299 304 307 308 310 311 313 314 319 321 322 323",
    "aarch64": "5 6 7 14 15 16 30 39 40 41 51 52 53 54 55 88 97 117 118 119 122 129 130 131 138 "
    "140 154 157 180 186 190 194 198 199 200 201 202 203 206 207 211 212 217 218 219 221 240 241 "
    "242 243 265 268 269 270 271 274 279 280 281 282",
}
REFUSED_ANYWHERE = (424, 425, 426, 427, 428, 429, 430, 434, 438, 442)
NEWER = 450  # calls from this number on are unknown here, and are not there (ENOSYS)
ARCHITECTURES = {"x86_64": (0xC000003E, 56, 302), "aarch64": (0xC00000B7, 220, 261)}
CLONE3, CLONE_THREAD, X32 = 435, 0x10000, 0x40000000
ALLOW, REFUSE, ABSENT, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000


def main() -> None:
    control = os.fdopen(CONTROL, "r+b", buffering=0)
    lines = os.fdopen(os.dup(CONTROL), "rb")
    given = json.loads(lines.readline())
    sys.path[:] = [*given["paths"], *sys.path]
    _tell(control, {"guards": _lock(given)})
    request = json.loads(lines.readline())
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    _as_a_module(names)
    said = _attempt(lambda: exec(compile(request["code"], "answer.py", "exec"), names))
    if not request["talk"]:
        _leave(said)
    _tell(control, said)
    while line := lines.readline():
        asked = json.loads(line)
        if "value" in asked:
            said = _attempt(lambda: _shown(eval(asked["value"], names)))  # noqa: B023
        else:
            said = _attempt(lambda: exec(asked["run"], names))  # noqa: B023
        _tell(control, {**said, "nonce": asked["nonce"]})


def _as_a_module(names: dict[str, Any]) -> None:
    """Dataclasses and pickles look for the module that a class is of."""
    module = type(sys)("__main__")
    names.update({k: v for k, v in vars(module).items() if k not in names})
    module.__dict__.update(names)
    sys.modules["__main__"] = module


def _attempt(act: Any) -> dict[str, Any]:
    """What a call gives, or what it raises."""
    try:
        return {"value": act()}
    except SystemExit as error:
        return {"error": f"SystemExit: {error.code}", "status": error.code}
    except BaseException as error:
        with suppress(BaseException):
            return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        return {"error": "an error that cannot be shown"}


def _shown(value: Any) -> str:
    text = repr(value)
    if len(text) > LONGEST:
        raise ValueError("the value is too long")
    return text


def _leave(said: dict[str, Any]) -> None:
    """End as Python would: with status 0, or with that of the error."""
    status = said.get("status", 1 if "error" in said else 0)
    if "error" in said and "status" not in said:
        with suppress(BaseException):
            sys.stderr.write(said["error"] + "\n")
    for stream in (sys.stdout, sys.stderr):
        with suppress(BaseException):
            stream.flush()
    os._exit(status if isinstance(status, int) else 0 if status is None else 1)


def _tell(control: Any, what: dict[str, Any]) -> None:
    data = json.dumps(what, default=str).encode() + b"\n"
    while data:
        data = data[control.write(data) :]


# --- giving away


def _lock(given: dict[str, Any]) -> dict[str, bool]:
    """Give everything away. Which guards hold."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    os.umask(0o077)
    memory = _limits(given)
    if libc is None:
        return {"memory": memory, "files": False, "processes": False, "network": False}
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    for capability in range(CAPABILITIES):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    _drop_capabilities(libc)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    files = _landlock(libc, given["readable"], given["folder"])
    calls = _seccomp(libc)
    return {"memory": memory, "files": files, "processes": calls, "network": calls}


def _limits(given: dict[str, Any]) -> bool:
    cpu = int(given["seconds"]) + 1
    wanted = [(resource.RLIMIT_CPU, cpu), (resource.RLIMIT_FSIZE, given["file_bytes"])]
    wanted += [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64)]
    for limit, most in wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(limit, (most, most))
    if sys.platform != "linux":
        return False
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = now + given["memory"]
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return True


def _drop_capabilities(libc: Any) -> None:
    """Root without its powers: it owns its files and no more (capset, version 3)."""
    header = struct.pack("=Ii", 0x20080522, 0)
    libc.capset(ctypes.create_string_buffer(header), ctypes.create_string_buffer(24))


def _landlock(libc: Any, readable: list[str], folder: str) -> bool:
    """Let this process read these folders, and write the one. Whether the kernel does it."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    rights = (1 << FILE_RIGHTS.get(version, 16)) - 1
    if version < 4:
        attribute = struct.pack("=Q", rights)
    elif version < 6:
        attribute = struct.pack("=QQ", rights, 3)  # binding and connecting by TCP
    else:
        attribute = struct.pack("=QQQ", rights, 3, 3)  # abstract sockets, signals
    ruleset = libc.syscall(CREATE_RULESET, attribute, len(attribute), 0)
    if ruleset < 0:
        return False
    for path, wanted in [*((p, READS) for p in readable), (folder, rights & ~MAKE_DEVICES)]:
        with suppress(OSError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = wanted & (rights if Path(path).is_dir() else rights & OF_A_FILE)
            libc.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
            os.close(place)
    done: bool = libc.syscall(RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return done


def _seccomp(libc: Any) -> bool:
    """Refuse calls of the system. Whether the kernel does it."""
    machine = platform.machine()
    if machine not in ARCHITECTURES or struct.calcsize("P") != 8:
        return False
    architecture, clone, prlimit = ARCHITECTURES[machine]
    load, equal, above, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, KILL), (load, 0, 0, 0)]
    program += [(above, 0, 1, X32), (give, 0, 0, KILL)]
    program += [(equal, 0, 1, CLONE3), (give, 0, 0, ABSENT)]  # so that `clone` is called instead
    program += [(above, 0, 1, NEWER), (give, 0, 0, ABSENT)]
    # Threads are allowed, processes are not: of `clone`, look at the flags.
    program += [(equal, 0, 4, clone), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD)]
    program += [(give, 0, 0, REFUSE), (give, 0, 0, ALLOW)]
    # Limits of this process alone.
    program += [(equal, 0, 4, prlimit), (load, 0, 0, 16), (equal, 1, 0, 0)]
    program += [(give, 0, 0, REFUSE), (give, 0, 0, ALLOW)]
    for number in [*map(int, REFUSED[machine].split()), *REFUSED_ANYWHERE]:
        program += [(equal, 0, 1, number), (give, 0, 0, REFUSE)]
    program += [(give, 0, 0, ALLOW)]
    code = b"".join(struct.pack("=HBBI", *each) for each in program)
    held = ctypes.create_string_buffer(code)
    filter = struct.pack("@HP", len(program), ctypes.addressof(held))
    return bool(libc.prctl(PR_SET_SECCOMP, 2, filter, 0, 0) == 0)


if __name__ == "__main__":
    main()
