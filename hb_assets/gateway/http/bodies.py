"""Request bodies: read and decompressed within bounds, and batches split into records.

It decides which media types and content codings are accepted. What a record means is in `record`.
"""

from __future__ import annotations

import asyncio
import codecs
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import msgspec
from starlette.types import Message, Receive, Scope

from hb_assets.core import record
from hb_assets.gateway.http.problems import ProblemError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

JSON = "application/json"
NDJSON = ("application/x-ndjson", "application/ndjson", "application/jsonl")
JSON_TYPES = frozenset({JSON.encode()})
NDJSON_TYPES = frozenset(name.encode() for name in NDJSON)
BATCH_TYPES = JSON_TYPES | NDJSON_TYPES
CODINGS = ("gzip", "zstd")
"""Content codings that are taken, besides none; x-gzip is gzip (RFC 9110, 8.4.1.3)."""
FORM = b"application/x-www-form-urlencoded"
"""The Content-Type that curl sends by default."""
CHARSETS = frozenset({b"utf-8", b"utf8", b"us-ascii"})

GONE = "hb.gone"
"""Key of the ASGI scope: a function that tells whether the client has gone."""

STEP_BYTES = 256 * 2**10
"""Bytes that are expanded in one go, at most: about a millisecond."""
STEP_SENT_BYTES = 16 * 2**10
"""Compressed bytes that are expanded in one go: they may be ten thousand empty blocks."""
TURN_SECONDS = 0.002
"""Seconds for which bodies are expanded, all of them, before other requests get their turn."""
FREE_MEMBERS = 8
MEMBER_BYTES = 256
"""A body may have so many gzip members or zstd frames, and one more for each so many bytes.

To begin one takes up to 12 us, as long as 400 bytes of heartbeats take a gateway, so that a body
that expands to little costs no more than some of what it could have carried.
"""
FREE_SECONDS = 0.002
SECONDS_PER_MESSAGE = 20e-6
SECONDS_PER_BYTE = 60e-9
"""The CPU time that expanding may take: empty blocks can't be counted from outside.

A compressor's own output takes a tenth of it. Heartbeats that come uncompressed take half of it,
and about as much for each message of the server's (a body may come byte by byte).
"""
ZSTD_WINDOW_LOG = 23
"""Largest window of a zstd frame, 8 MiB: what RFC 8878 (3.1.1.1.2) asks of every decoder."""
GZIP_BITS = 16 + zlib.MAX_WBITS
"""A gzip header and trailer are required (and checked), whatever the window."""

COMMAS_PER_HEARTBEAT = 32
"""More commas per heartbeat than this (4 fields need 3) mark an array too costly to split."""


@dataclass(frozen=True, slots=True)
class Records:
    """The records of a batch: all in the common shape, or else JSON texts with their indexes."""

    wires: Sequence[record.Wire] = ()
    texts: Sequence[tuple[int, bytes]] = ()

    def __len__(self) -> int:
        return len(self.wires) + len(self.texts)


_Raws = msgspec.json.Decoder(list[msgspec.Raw])


class ClientGoneError(Exception):
    """The client went away before its request was whole; there is nobody to answer."""


class Room:
    """Memory that all bodies (or batches) in progress share: `most` bytes, expanded."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self.turn = asyncio.Lock()
        """Held by the body that is being expanded: all of them together leave others their turn."""

    def take(self, size: int) -> None:
        """Take room for a part of a body; the body's reader gives it back.

        Raises:
            ProblemError: 503, there is none. It counts as taken all the same.
        """
        self._taken += size
        if self._taken > self._most:
            raise ProblemError(
                503,
                "too-many-bodies",
                "Too much is being received at once",
                "the bodies that are being received take all of HB_BODIES_MAX_BYTES; "
                "send it again in a moment",
                retry_after=1,
            )

    def give_back(self, size: int) -> None:
        """Give back what was taken."""
        self._taken -= size


async def read_body(
    scope: Scope,
    receive: Receive,
    most: int,
    types: frozenset[bytes] = JSON_TYPES,
    room: Room | None = None,
) -> bytes:
    """The whole body, expanded if it was compressed.

    Never more than `most` bytes of it (before and after) and one step are in memory.

    Args:
        scope: the request.
        receive: as ASGI has it.
        most: bytes, of the body as it came and as it is expanded.
        types: the media types that are taken; a body without Content-Type counts as JSON.
        room: shared with all other bodies; only one that doesn't come at once takes of it.

    Raises:
        ProblemError: 413, as soon as it is known, by Content-Length or by what came so far; 415,
            a media type, charset or content coding that isn't taken; 400, a compressed body that
            is damaged; 503, too many bodies are being received.
        ClientGoneError: the client went away before the end.
    """
    kind = coding = length = b""
    for name, value in scope["headers"]:
        if name == b"content-type":
            kind = kind + b"," + value if kind else value  # two of them are none of ours
        elif name == b"content-length":
            length = value
        elif name == b"content-encoding":
            coding = coding + b"," + value if coding else value
    if kind not in types:
        _check_type(scope, kind, types)
    if length.isdigit() and int(length) > most:
        _too_large(most)
    if coding and (coding := _checked_coding(coding)):
        return await _read_expanding(scope, receive, _Expansion(coding), most, room or Room(most))
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        if len(body) > most:
            _too_large(most)
        return body
    return await _read_on(receive, message, most, room or Room(most))


async def _read_on(receive: Receive, message: Message, most: int, room: Room) -> bytes:
    parts = bytearray()
    try:
        while True:
            if message["type"] != "http.request":
                raise ClientGoneError
            part = message.get("body", b"")
            if len(parts) + len(part) > most:
                _too_large(most)
            parts += part
            room.take(len(part))
            if not message.get("more_body", False):
                return bytes(parts)
            message = await receive()
    finally:
        room.give_back(len(parts))


async def _read_expanding(
    scope: Scope, receive: Receive, expansion: _Expansion, most: int, room: Room
) -> bytes:
    expanded = bytearray()
    gone: Callable[[], bool] = scope.get(GONE, bool)
    came = 0
    try:
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientGoneError
            compressed = message.get("body", b"")
            came += len(compressed)
            # what expands to nothing is bounded by what came
            if came > most:
                _too_large(most)
            pieces = expansion.pieces(compressed)
            while await _turn(pieces, expanded, most, room):
                if gone():
                    raise ClientGoneError
            if not message.get("more_body", False):
                expansion.end()
                return bytes(expanded)
    finally:
        room.give_back(len(expanded))


async def _turn(pieces: Iterator[bytes], expanded: bytearray, most: int, room: Room) -> bool:
    """Expand for a moment, one body at a time; returns whether there may be more to do."""
    async with room.turn:
        began = time.monotonic()
        for piece in pieces:
            if len(expanded) + len(piece) > most:
                _too_large(most)
            expanded += piece
            room.take(len(piece))
            if time.monotonic() - began > TURN_SECONDS:
                # with the turn in hand: the next body's comes after the other requests'
                await asyncio.sleep(0)
                return True
        if time.monotonic() - began > TURN_SECONDS / 4:
            await asyncio.sleep(0)
        return False


class _Gzip:
    """One gzip member (RFC 1952, 2.2)."""

    more = False
    """What is left inside comes out with the trailer, which every member has."""

    def __init__(self) -> None:
        self._inflater = zlib.decompressobj(wbits=GZIP_BITS)
        self.ended = False

    def step(self, data: bytes) -> tuple[bytes, bytes]:
        inflater = self._inflater
        piece = inflater.decompress(data, STEP_BYTES)
        self.ended = inflater.eof
        return piece, inflater.unused_data if self.ended else inflater.unconsumed_tail


class _Zstd:
    """One zstd frame, skippable ones included (RFC 8878, 3.1)."""

    def __init__(self) -> None:
        self._decompressor = zstd.ZstdDecompressor(options=_ZSTD_OPTIONS)
        self.ended = False
        self.more = False

    def step(self, data: bytes) -> tuple[bytes, bytes]:
        decompressor = self._decompressor
        piece = decompressor.decompress(data, STEP_BYTES)
        self.ended = decompressor.eof
        self.more = not self.ended and not decompressor.needs_input
        return piece, decompressor.unused_data if self.ended else b""


_ZSTD_OPTIONS = {int(zstd.DecompressionParameter.window_log_max): ZSTD_WINDOW_LOG}
_CODINGS: dict[bytes, type[_Gzip | _Zstd]] = {b"gzip": _Gzip, b"x-gzip": _Gzip, b"zstd": _Zstd}


class _Expansion:
    """Decompresses a stream of gzip members, or of zstd frames, one after the other."""

    def __init__(self, coding: bytes) -> None:
        self._coding = coding.decode()
        self._kind = _CODINGS[coding]
        self._member = self._kind()
        self._members = 1
        self._sent = 0
        self._expanded = 0
        self._seconds = 0.0
        self._may_take = FREE_SECONDS

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Yield what `data` expands to, a step at a time; a piece may be empty.

        Raises:
            ProblemError: 400, it is no such stream; 413, it takes too long for what it carries.
        """
        self._may_take += SECONDS_PER_MESSAGE
        for start in range(0, len(data), STEP_SENT_BYTES):
            rest = data[start : start + STEP_SENT_BYTES]
            while rest or self._member.more:
                if self._member.ended:
                    self._begin()
                before = len(rest)
                piece, rest = self._step(rest)
                self._sent += before - len(rest)
                self._expanded += len(piece)
                yield piece

    def _begin(self) -> None:
        self._member = self._kind()
        self._members += 1
        # by what stands before it, so that the pieces that a body comes in make no difference
        if self._members > FREE_MEMBERS + max(self._sent, self._expanded) // MEMBER_BYTES:
            self._too_costly(
                f"may have {FREE_MEMBERS} gzip members or zstd frames, and one more for each "
                f"{MEMBER_BYTES} bytes of it, expanded or not"
            )

    def _step(self, data: bytes) -> tuple[bytes, bytes]:
        began = time.thread_time()
        try:
            piece, rest = self._member.step(data)
        except (zlib.error, zstd.ZstdError):
            self._damaged("is damaged, or something else follows its end")
        self._seconds += time.thread_time() - began
        longer = max(self._sent + len(data), self._expanded + len(piece))
        if self._seconds > self._may_take + longer * SECONDS_PER_BYTE:
            self._too_costly("takes too long to expand: send larger blocks, or none")
        return piece, rest

    def _too_costly(self, why: str) -> NoReturn:
        raise ProblemError(
            413,
            "body-too-costly",
            "The request body costs too much to expand",
            f"a compressed body {why}; nothing was stored",
        )

    def end(self) -> None:
        """End the stream.

        Raises:
            ProblemError: 400, the stream is cut off.
        """
        if not self._member.ended:
            self._damaged("is cut off")

    def _damaged(self, what: str) -> NoReturn:
        raise ProblemError(
            400,
            "damaged-body",
            "The request body can't be expanded",
            f"the {self._coding} stream {what}; nothing was stored",
        )


def _checked_coding(given: bytes) -> bytes:
    """The one content coding that a body has; empty when it has none.

    Raises:
        ProblemError: 415, an unknown one, or several.
    """
    codings = [coding for text in given.lower().split(b",") if (coding := text.strip())]
    if not codings or codings == [b"identity"]:
        return b""
    if len(codings) == 1 and codings[0] in _CODINGS:
        return codings[0]
    raise ProblemError(
        415,
        "unsupported-content-encoding",
        "The content encoding isn't supported",
        f"a body may be compressed once, with {' or '.join(CODINGS)}, or not at all",
        headers={"accept-encoding": ", ".join(CODINGS)},
    )


def _check_type(scope: Scope, given: bytes, types: frozenset[bytes]) -> None:
    """Refuse a media type that isn't accepted, or that isn't UTF-8.

    Without a Content-Type it is JSON, as older clients sent it, but not from a web page: a browser
    sends that, a form or plain text to any address without asking first, and a gateway without
    keys is an address that every page may try.
    """
    kind, *parameters = (part.strip() for part in given.lower().split(b";"))
    if kind not in types:
        external = any(name == b"origin" for name, _ in scope["headers"])
        if kind or external:
            names = sorted(name.decode() for name in types)
            raise ProblemError(
                415,
                "unsupported-media-type",
                "The media type isn't supported",
                f"send {' or '.join(names)} as Content-Type"
                + (" (curl: -H 'Content-Type: application/json')" if kind == FORM else ""),
                headers={"accept-post": ", ".join(names)},
            )
    for parameter in parameters:
        name, _, value = parameter.partition(b"=")
        if name.strip() == b"charset" and value.strip().strip(b'"') not in CHARSETS:
            raise ProblemError(
                415,
                "unsupported-charset",
                "The charset isn't supported",
                "heartbeats are UTF-8; leave the charset out, or say charset=utf-8",
                headers={"accept-post": ", ".join(sorted(name.decode() for name in types))},
            )


def _too_large(most: int) -> NoReturn:
    raise ProblemError(
        413,
        "body-too-large",
        "The request body is too large",
        f"a body may have at most {most} bytes, expanded if it is compressed (HB_BODY_MAX_BYTES); "
        "send the heartbeats in several requests",
    )


def media_type(scope: Scope) -> bytes:
    """The Content-Type without its parameters, in small letters; empty when there is none."""
    value: bytes = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    return value.partition(b";")[0].strip().lower()


def split(body: bytes, media_type: bytes, most: int) -> Records:
    """Split a batch into records with their indexes: in the common shape, or else as JSON text.

    An NDJSON media type, or a first character other than `[`, makes it NDJSON. The index is the
    position in the array or the line number, both from 0. Blank lines are skipped, but counted,
    so that an index is the line of the sender's file. A byte order mark before it all is skipped.

    Raises:
        ProblemError: 413, more than `most` records; 422, an array that is not well-formed JSON.
    """
    body = body.removeprefix(codecs.BOM_UTF8)
    if media_type not in NDJSON_TYPES and body.lstrip()[:1] == b"[":
        # Counted before it is decoded: a body of `1,1,1,` would take forty times its size.
        commas = most * COMMAS_PER_HEARTBEAT
        if len(body) > commas and body.count(b",") > commas:
            _too_many(most)
        wires = record.read_array(body)
        if wires is None:
            return Records(texts=list(enumerate(_elements(body, most))))
        if len(wires) > most:
            _too_many(most)
        return Records(wires)
    text = body.rstrip()
    lines = text.count(b"\n") + 1
    if lines > most:
        _too_many(most)
    wires = record.read_lines(text, lines)
    if wires is not None:
        return Records(wires)
    texts = enumerate(text.split(b"\n"))
    return Records(texts=[(n, line) for n, line in texts if line and not line.isspace()])


def _elements(body: bytes, most: int) -> list[bytes]:
    try:
        raws = _Raws.decode(body)
    except msgspec.DecodeError as error:
        found = re.search(r"\(byte (\d+)\)", str(error))
        where = int(found[1]) if found else len(body)
        _not_json(f"the array is not well-formed JSON at byte {where}")
    except RecursionError:
        _not_json("the array is nested too deeply")
    if len(raws) > most:
        _too_many(most)
    return [bytes(raw) for raw in raws]


def _too_many(most: int) -> NoReturn:
    raise ProblemError(
        413,
        "batch-too-large",
        "The batch is too large",
        f"a batch may have at most {most} heartbeats (HB_BATCH_MAX_HEARTBEATS); "
        "send them in several requests",
    )


def _not_json(reason: str) -> NoReturn:
    raise ProblemError(
        422,
        "not-json",
        "The batch can't be read",
        f"{reason}; nothing was stored. One heartbeat a line (NDJSON) keeps a bad one from "
        "spoiling the others",
    )
