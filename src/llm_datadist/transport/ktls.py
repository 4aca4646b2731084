"""The kernel's TLS: it seals and opens what is behind the hand-shake, where both kernels can.

A connection under TLS is then used exactly as a plain one: bytes go from the caches' memory to the
socket and back (`tcp.py`), and the kernel makes TLS 1.3's records of them on the way, of 16 KiB by
AES-128-GCM. OpenSSL is not asked to do that: Python's `ssl` cannot tell whether it did, and works
on bytes here, not on sockets. As with records of our own (`records.py`) the hand-shake is TLS's,
and the keys are ours. Why that is as safe as what TLS 1.3 does:

- *Agreement.* As with records, by a name of its own (ALPN), which each end says only over TCP and
  where a trial has shown that its kernel can: a loopback connection on which a byte crosses each
  way, looked at first as it is on the wire. A sandbox that answers options which it does not know
  with success would let all pass in plain; so each connection is asked for its keys as well.
- *Keys.* As with records: 32 random bytes of each end, sent inside TLS; HMACs under labels of their
  own. A key seals what one end sends on one connection, and the kernel keeps it.
- *The border.* TLS's own bytes and the kernel's lie behind each other in one stream, so no byte may
  be on the wrong side. Out: the keys are set when the system has taken all of the hand-shake
  (`hand_over` comes behind the flush); from then on nobody can send a plain byte by mistake, as the
  kernel has no other way out. In: they are set before anything behind the hand-shake is read. An
  end that read more than the hand-shake says "it spoke before the hand-shake had ended", and an
  honest one gives no occasion: the caller speaks first, when it has the listener's last word, and
  the listener's tickets come in front of that word. What comes while the listener flushes stays in
  the kernel, and is opened with the keys or not at all.
- *Nonces.* The number of the record xor 12 derived bytes, as RFC 8446 (5.3) has it. The kernel
  counts, and a process cannot make it go back. (A forked child has none of the connections.)
- *Place.* A record opens as the next one of its direction and connection, and as nothing else. The
  first that does not ends the connection: EBADMSG; EMSGSIZE or EINVAL where its head is no
  record's. Nobody sends anything but data: what is sealed as an alert is EIO. No byte of such a
  record reaches memory: here the kernel opens into buffers of its own (TLS_RX_EXPECT_NO_PAD, with
  which it would not, is left off). The first byte of a head is not looked at, and says nothing. An
  urgent byte of TCP's that somebody adds has Linux 6.1 open nothing more: that ends by a deadline.
- *Ends.* As without TLS: whoever knows how much must come notices.
- *Limits.* For one key RFC 8446 (5.5) allows 2**24.5 full records, 2**38.5 bytes. Nothing renews a
  key here, so a stream that has carried MOST_NBYTES is closed when its answer is whole, and another
  is dialled (`peer/streams.py`). Whoever asks decides: what it asks for is what is sealed. Control
  connections carry what links say of themselves: a message of 100 bytes each millisecond would take
  45 days.

What the kernel does with calls that a plain socket knows: a vector that is not mapped is EFAULT, of
which no byte of its record is sent, or taken; MSG_DONTWAIT, shutdown, and options of TCP stay what
they are. Time-outs do not: a call that receives has its time anew for each record that gives less
than it asks for, so a peer that trickles them, or some with nothing in them, would hold one for
ever. So nothing here waits in such a call, but beside it (`stream.py`). A call to send that has
ended may leave a part of a record with the kernel, which goes on sending it, and drops it when the
socket is closed: so whoever closes behind an answer waits until the peer has left
(`links/listener.py`).

A loop that waits for several sockets is told of a part of a record as of bytes to be read, again
and again, by Linux 6.1 at least: so whoever is told and gets nothing looks away for a moment, which
grows (`longer_s`), be it the loop or the thread of a call.

Rejected: OP_ENABLE_KTLS, see above; the exporter's keys and TLS's own traffic secrets, which Python
does not give; a KeyUpdate in place of another connection (kernels before 6.14 refuse new keys);
TLS_TX_ZEROCOPY and devices that encrypt (offered by cards; untried here).
"""

from __future__ import annotations

import errno
import hmac
import secrets
import select
import socket
import struct
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Final

from llm_datadist.running import forks
from llm_datadist.system_errors import pass_on_handlers
from llm_datadist.transport.records import ALTERED, PART_NBYTES
from llm_datadist.transport.shield import KernelKeys

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_datadist.transport.shield import Shield

#: by which ends of TLS agree that their kernels encrypt (ALPN)
PROTOCOL: Final = "llm-datadist-ktls-1"
#: what links and shields call it
ENCRYPTION: Final = "ktls"
#: of plain bytes on one stream, either way together: TLS's own limit is 2**38.5 for each
MOST_NBYTES: Final = 2**38

#: of <linux/tcp.h> and <linux/tls.h>
_TCP_ULP, _SOL_TLS, _TLS_TX, _TLS_RX = 31, 282, 1, 2
_ULP: Final = b"tls"
_TLS_1_3, _AES_GCM_128 = 0x0304, 51
#: struct tls12_crypto_info_aes_gcm_128: version, cipher, iv, key, salt, number of the next record
_INFO: Final = struct.Struct("=HH8s16s4sQ")
_KEY_NBYTES, _SALT_NBYTES, _IV_NBYTES = 16, 4, 8
#: what the kernel says of what is not the peer's next record
_BROKEN: Final = (errno.EBADMSG, errno.EIO, errno.EMSGSIZE, errno.EINVAL, errno.EKEYEXPIRED)
#: what says nothing of the kernel's TLS
_PASSING: Final = (errno.ETIMEDOUT, errno.EAGAIN, errno.ENOMEM, errno.ENOBUFS)
#: a part of a record has come, and may be all for long
_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.064
#: the trial is with this very process
_TRIAL_S: Final = 2.0
#: what is sent then, and how the record of it begins: data, TLS 1.3's type and the tag behind it
_TRIAL: Final = b"\x01"
_TRIAL_HEAD: Final = struct.pack("!BHH", 23, 0x0303, len(_TRIAL) + 1 + 16)


def keys_of(callers_part: bytes, listeners_part: bytes, *, is_caller: bool) -> KernelKeys:
    """Both parts have PART_NBYTES, are random, and known to the two ends alone."""
    both = callers_part + listeners_part
    callers, listeners = (_info(_derived(both, who)) for who in ("caller", "listener"))
    return KernelKeys(callers, listeners) if is_caller else KernelKeys(listeners, callers)


def hand_over(sock: socket.socket, keys: KernelKeys) -> None:
    """From here on the kernel seals and opens: all of the hand-shake is sent, and no more is read.

    Raises OSError, behind which the connection is of no use.
    """
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, _ULP)
    # the sender's first: nobody can send a plain byte from here on
    sock.setsockopt(_SOL_TLS, _TLS_TX, keys.sent)
    sock.setsockopt(_SOL_TLS, _TLS_RX, keys.came)
    if sock.getsockopt(_SOL_TLS, _TLS_TX, _INFO.size) != keys.sent:
        raise OSError(errno.EOPNOTSUPP, "it has taken the keys, and does not have them")


def why_broken(shield: Shield, error: OSError) -> str:
    """What the kernel means by an error, if it opens for that shield: else nothing."""
    is_broken = shield.encryption == ENCRYPTION and error.errno in _BROKEN
    return ALTERED if is_broken else ""


def why_not_taken(error: OSError) -> str:
    """Of an error of `hand_over`."""
    if error.errno == errno.ENOTCONN:
        return "the peer left in the hand-shake"
    return f"the kernel does not take the connection over: {error.strerror or error}"


def longer_s(pause_s: float) -> float:
    """How long to leave a socket that said that it can be read, and then gave nothing."""
    return min(max(2 * pause_s, _PAUSE_S), _LONGEST_PAUSE_S)


def why_not() -> str:
    """Why the kernel cannot encrypt for this process; empty where it can."""
    try:
        return _why_not()
    except OSError as error:  # that may pass
        pass_on_handlers(error)
        return f"no connection within this host shows it ({error.strerror})"


@cache
def _why_not() -> str:
    """By a trial, once. Raises OSError where there can be none."""
    with _loopback() as (caller, listener):
        try:
            for sock in (caller, listener):
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, _ULP)
        except OSError as error:
            pass_on_handlers(error)
            return (
                "the kernel has no module tls, or it is not loaded: modprobe tls "
                f"({error.strerror})"
            )
        parts = secrets.token_bytes(PART_NBYTES), secrets.token_bytes(PART_NBYTES)
        keys = keys_of(*parts, is_caller=True)
        try:
            return _try(caller, listener, keys.sent) or _try(listener, caller, keys.came)
        except OSError as error:
            pass_on_handlers(error)
            if error.errno in _PASSING:
                raise
            return f"the kernel does not encrypt by TLS 1.3 with AES-GCM ({error.strerror})"


def _try(source: socket.socket, target: socket.socket, key: bytes) -> str:
    """What is wrong with a byte that goes this way, if anything is. Raises OSError."""
    source.setsockopt(_SOL_TLS, _TLS_TX, key)
    source.send(_TRIAL)
    _wait_for(target)
    if not target.recv(64, socket.MSG_PEEK).startswith(_TRIAL_HEAD):
        return "the kernel takes keys, and sends in plain"
    target.setsockopt(_SOL_TLS, _TLS_RX, key)
    _wait_for(target)
    is_same = target.recv(2) == _TRIAL
    return "" if is_same else "what the kernel encrypts does not come out as it was"


@contextmanager
def _loopback() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection, of which neither waits. Raises OSError."""
    with ExitStack() as stack:
        server, caller = (stack.enter_context(forks.open_socket(socket.AF_INET)) for _ in "12")
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        for sock in (server, caller):
            sock.setblocking(False)
        with suppress(BlockingIOError):
            caller.connect(server.getsockname())
        _wait_for(server)
        listener = stack.enter_context(forks.accept(server)[0])
        listener.setblocking(False)
        yield caller, listener


def _wait_for(sock: socket.socket) -> None:
    """Until something has come. Raises OSError when it takes too long."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    if not poller.poll(_TRIAL_S * 1000):
        raise OSError(errno.ETIMEDOUT, f"nothing came within {_TRIAL_S:.0f} s")


def _info(secret: bytes) -> bytes:
    """As the kernel takes it: its nonces are salt and iv, xor the number of the record."""
    key, nonce = _derived(secret, "key")[:_KEY_NBYTES], _derived(secret, "iv")
    salt, iv = nonce[:_SALT_NBYTES], nonce[_SALT_NBYTES : _SALT_NBYTES + _IV_NBYTES]
    return _INFO.pack(_TLS_1_3, _AES_GCM_128, iv, key, salt, 0)


def _derived(secret: bytes, what: str) -> bytes:
    return hmac.digest(secret, f"{PROTOCOL} {what}".encode(), "sha256")
