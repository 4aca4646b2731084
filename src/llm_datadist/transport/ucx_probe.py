"""Prints what UCX can use here, for `ucx.py`: run by itself, in a process that it may take down.

It starts UCX as NIXL does, so what keeps NIXL from starting shows as well, and has UCX print its
resources: lines that end in ` -- TRANSPORT/DEVICE`.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys

_UCP_FIELD_FEATURES, _UCP_FEATURE_RMA = 1, 2


def main(package: str) -> None:
    """The package is that of NIXL's bindings."""
    nixl = importlib.import_module(f"{package}._bindings")
    config = nixl.nixlAgentConfig()
    config.useProgThread = config.useListenThread = False
    agent = nixl.nixlAgent("probe", config)
    failure = ""
    try:
        agent.createBackend("UCX", {})
    except Exception as error:  # UCX is loaded all the same, and says what it has
        failure = f"{type(error).__name__}: {error}"
    failure = _print_resources(ctypes.CDLL(_loaded("libucp"))) or failure
    sys.stderr.write(failure)
    sys.stderr.flush()
    # what was started here is not worth ending, which may end in a crash
    os._exit(bool(failure))


def _loaded(library: str) -> str:
    """The file that it was loaded from."""
    with open("/proc/self/maps") as maps:
        return next(line.split()[-1] for line in maps if f"/{library}" in line)


def _print_resources(ucp: ctypes.CDLL) -> str:
    """Why it cannot; empty if it has."""
    major, minor, patch = ctypes.c_uint(), ctypes.c_uint(), ctypes.c_uint()
    ucp.ucp_get_version(*map(ctypes.byref, (major, minor, patch)))
    config, context = ctypes.c_void_p(), ctypes.c_void_p()
    ucp.ucp_config_read(None, None, ctypes.byref(config))
    # of a ucp_params_t, which is shorter, the mask of its fields and the one that it names
    params = (ctypes.c_uint64 * 32)(_UCP_FIELD_FEATURES, _UCP_FEATURE_RMA)
    status = ucp.ucp_init_version(major, minor, params, config, ctypes.byref(context))
    if status != 0:
        return f"UCX cannot be started: {status}"
    libc = ctypes.CDLL(None)
    libc.fdopen.restype = ctypes.c_void_p
    ucp.ucp_context_print_info(context, ctypes.c_void_p(libc.fdopen(1, b"w")))
    libc.fflush(None)
    return ""


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file: its modules are nobody's but the package's
    main(sys.argv[1])
