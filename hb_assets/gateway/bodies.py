"""Bodies: what a request carries, read within bounds.

Belongs here: reading a body, and telling a batch's records apart. Doesn't belong here: what a
record says (`record`), and answers (`heartbeats`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NoReturn, TypeAlias

import msgspec
from starlette.types import Receive, Scope

from hb_assets import record
from hb_assets.gateway.problems import ProblemError

NDJSON_TYPES = frozenset({b"application/x-ndjson", b"application/ndjson", b"application/jsonl"})
COMMAS_PER_HEARTBEAT = 32
"""More commas per heartbeat than this (4 fields need 3) mark an array too costly to take apart."""

Records: TypeAlias = Sequence[tuple[int, record.Wire | bytes]]
"""The records of a batch, each with its index: in the common shape, or as JSON text."""

_Raws = msgspec.json.Decoder(list[msgspec.Raw])


class ClientGoneError(Exception):
    """The client went away before its request was whole; there is nobody to answer."""


async def read_body(scope: Scope, receive: Receive, most: int) -> bytes:
    """The whole body, never more than `most` bytes of it in memory (and one read of the server).

    Raises:
        ProblemError: 413, as soon as it is known, by Content-Length or by what came so far.
        ClientGoneError: the client went away before the end.
    """
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        if len(body) > most:
            _too_large(most)
        return body
    length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    if length.isdigit() and int(length) > most:
        _too_large(most)
    parts = bytearray()
    while True:
        if message["type"] != "http.request":
            raise ClientGoneError
        parts += message.get("body", b"")
        if len(parts) > most:
            _too_large(most)
        if not message.get("more_body", False):
            return bytes(parts)
        message = await receive()


def _too_large(most: int) -> NoReturn:
    raise ProblemError(
        413,
        "body-too-large",
        "The request body is too large",
        f"a body may have at most {most} bytes (HB_BODY_MAX_BYTES); "
        "send the heartbeats in several requests",
    )


def media_type(scope: Scope) -> bytes:
    """The Content-Type without its parameters, in small letters; empty when there is none."""
    value: bytes = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    return value.partition(b";")[0].strip().lower()


def split(body: bytes, media_type: bytes, most: int) -> Records:
    """The records of a batch with their indexes: in the common shape, or else as JSON text.

    An NDJSON media type, or a first character other than `[`, makes it NDJSON. The index is the
    position in the array or the line number, both from 0. Blank lines are skipped, but counted,
    so that an index is the line of the sender's file.

    Raises:
        ProblemError: 413, more than `most` records; 422, an array that is not well-formed JSON.
    """
    if media_type not in NDJSON_TYPES and body.lstrip()[:1] == b"[":
        # Counted before it is decoded: a body of `1,1,1,` would take forty times its size.
        if body.count(b",") > most * COMMAS_PER_HEARTBEAT:
            _too_many(most)
        wires = record.read_array(body)
        if wires is None:
            return list(enumerate(_elements(body, most)))
        if len(wires) > most:
            _too_many(most)
        return list(enumerate(wires))
    text = body.rstrip()
    if text.count(b"\n") >= most:
        _too_many(most)
    wires = record.read_lines(text)
    if wires is not None and len(wires) == text.count(b"\n") + 1:
        return list(enumerate(wires))
    return [(n, line) for n, line in enumerate(text.split(b"\n")) if line and not line.isspace()]


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
