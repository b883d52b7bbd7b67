"""OpenAPI: the gateway's interface as an OpenAPI 3.1 document, GET /openapi.json.

Belongs here: what every path takes and answers, told once for machines and (`documentation`) for
people. Doesn't belong here: the shapes of heartbeats and answers, which are derived from the
classes that the gateway itself uses. What JSON Schema can't say stands in descriptions.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

import msgspec

from hb_assets.core import record
from hb_assets.core.days import EPOCH
from hb_assets.core.record import Wire
from hb_assets.core.settings import Settings
from hb_assets.gateway import edge
from hb_assets.gateway.auth.keyring import ADMIN, INGEST, READ, ScopeName
from hb_assets.gateway.http import bodies, problems
from hb_assets.gateway.ingest.heartbeats import Refused
from hb_assets.gateway.reads import formats
from hb_assets.gateway.reads.formats import Answer, Reading
from hb_assets.gateway.reads.readings import EXAMPLE, NO, YES
from hb_assets.lake.query.aggregate import GRANULARITIES

Json = dict[str, Any]

_SCHEMAS = "#/components/schemas/"
_EXAMPLE: Json = {
    "user_id": "u1",
    "device_id": "device_a",
    "timestamp": EXAMPLE,
    "heart_rate": 75,
}


class Stored(msgspec.Struct):
    """What a heartbeat that was taken is answered with."""

    status: str


class BatchAnswer(msgspec.Struct):
    """What became of a batch; a heartbeat is either accepted or refused."""

    accepted: int
    refused: list[Refused]
    unknown_fields: int
    ignored: dict[str, int]


class Fault(msgspec.Struct, omit_defaults=True):
    """What is wrong with a field or parameter."""

    field: str
    message: str
    reason: str = ""


class Problem(msgspec.Struct, omit_defaults=True):
    """Problem details (RFC 9457). Rely on `type` and `status`; the texts are for people."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[Fault] = []


class LiveAnswer(msgspec.Struct):
    """What a gateway that lives says."""

    status: str


class HealthAnswer(msgspec.Struct):
    """How the parts of the system stand. Alarms fail nothing, and stand until they are mended."""

    status: str
    failing: list[str]
    parts: dict[str, str]
    durability: str
    alarms: list[str]


def document(settings: Settings, now: dt.datetime, version: str) -> Json:
    """The whole document.

    Args:
        settings: whose limits it states.
        now: when it is asked for; the latest timestamp that is taken depends on it.
        version: of hb.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hb: heart rates",
            "version": version,
            "summary": "Takes heartbeats of wearables, and tells the heart rate of a user over time.",
            "description": _DESCRIPTION,
        },
        "servers": [{"url": "/"}],
        "tags": [
            {"name": "heartbeats", "description": "What devices send, and dashboards read."},
            {"name": "operation", "description": "How the system does, and what it can."},
        ],
        "paths": {
            "/metrics/heart-rate": {"post": _post_one(), "get": _get_readings(settings)},
            "/metrics/heart-rate/batch": {"post": _post_batch(settings)},
            "/health": {"get": _get_ready("getHealth", "See the same (for older clients)")},
            "/health/ready": {
                "get": _get_ready("getReady", "See whether this gateway can do its work")
            },
            "/health/live": {"get": _get_live()},
            "/metrics": {"get": _get_metrics()},
            "/openapi.json": {"get": _get_openapi()},
            "/docs": {"get": _get_docs()},
        },
        "components": {
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key: `Authorization: Bearer hb_…`.",
                },
                "key": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "X-API-Key",
                    "description": "The same for clients that can't set Authorization.",
                },
            },
            "schemas": _schemas(settings, now),
            "parameters": {
                "X-Request-ID": {
                    "name": "X-Request-ID",
                    "in": "header",
                    "description": "Id to know this request by; an unusable one is replaced.",
                    "schema": {"type": "string"},
                }
            },
            "headers": {
                "X-Request-ID": {
                    "description": "Id of the request: the client's, or one made for it.",
                    "required": True,
                    "schema": {"type": "string", "pattern": f"^{edge.ID_PATTERN}$"},
                },
                "Link": {
                    "description": 'Where the next page is (`rel="next"`); none on the last one.',
                    "schema": {"type": "string"},
                },
                "HB-Warnings": {
                    "description": "What is wrong with the days of these points, as in the member "
                    "`warnings`: a JSON array of texts; none where nothing is.",
                    "schema": {"type": "string"},
                },
                "Vary": {
                    "description": "The answer depends on Accept.",
                    "schema": {"type": "string"},
                },
                "RateLimit": {
                    "description": "By policy, what is left (r) and in how many seconds there is "
                    "more (t); where there is a limit.",
                    "schema": {"type": "string"},
                },
                "RateLimit-Policy": {
                    "description": "By policy, the quota (q) and its window in seconds (w).",
                    "schema": {"type": "string"},
                },
                "HB-Ignored": {
                    "description": "Names of unknown fields or parameters, which were ignored: percent-encoded, "
                    "separated by commas; none where there were none.",
                    "schema": {"type": "string"},
                },
                "Allow": {
                    "description": "The methods of this path.",
                    "schema": {"type": "string"},
                },
                "WWW-Authenticate": {
                    "description": "How to send an API key.",
                    "schema": {"type": "string"},
                },
                "Retry-After": {
                    "description": "Seconds after which another try makes sense.",
                    "schema": {"type": "integer", "minimum": 1},
                },
                "Accept-Encoding": {
                    "description": "Content codings that a body may have; sent if that was wrong.",
                    "schema": {"type": "string"},
                },
                "Accept-Post": {
                    "description": "Media types that a body may have; sent if that was wrong.",
                    "schema": {"type": "string"},
                },
            },
        },
    }


_DESCRIPTION = f"""\
A heartbeat is one reading of a heart rate by one device. Sending it again is always safe: the key is
(`user_id`, `device_id`, `timestamp`), and the latest arrival wins. So whatever got no answer, or a
5xx, may be sent again.

Bodies may be compressed with {" or ".join(bodies.CODINGS)} (`Content-Encoding`). Errors are problem
details (RFC 9457). Every answer has an `X-Request-ID`. Times are ISO 8601; without an offset they
are UTC; kept to the millisecond.
"""


# -- schemas


def _schemas(settings: Settings, now: dt.datetime) -> Json:
    answers = [Stored, BatchAnswer, Refused, Problem, Fault, HealthAnswer, LiveAnswer]
    _, schemas = msgspec.json.schema_components(
        [Wire, *answers, Answer, Reading], ref_template=_SCHEMAS + "{name}"
    )
    schemas["Heartbeat"] = _heartbeat(schemas.pop("Wire"), settings, now)
    for schema in schemas.values():
        schema.pop("title", None)
    schemas["Problem"]["properties"]["type"]["pattern"] = f"^{problems.TYPE_PREFIX}[a-z0-9-]+$"
    schemas["HealthAnswer"]["properties"]["status"]["enum"] = ["ok", "failing"]
    schemas["LiveAnswer"]["properties"]["status"] = {"const": "ok"}
    schemas["Stored"]["properties"]["status"] = {"const": "accepted"}
    # The first and the last thing that people look for.
    return dict(sorted(schemas.items(), key=lambda item: (item[0] != "Heartbeat", item[0])))


def _heartbeat(wire: Json, settings: Settings, now: dt.datetime) -> Json:
    fields = wire["properties"]
    bounds = settings.time_bounds
    now_ms = (now - EPOCH) // dt.timedelta(milliseconds=1)
    instant = {
        "type": "string",
        "format": "date-time",
        "description": "ISO 8601: YYYY-MM-DD, T or a space, HH:MM[:SS[.fraction]], then nothing, Z "
        "or an offset (+HH:MM); any number of digits of a second; without an "
        f"offset it is UTC. From {settings.start_date} on (HB_START_DATE), and at most "
        f"{settings.max_future} ahead (HB_MAX_FUTURE).",
    }
    epoch_ms = {
        "type": "integer",
        "minimum": bounds.start_ms,
        "maximum": now_ms + bounds.future_ms,
        "description": "The same in milliseconds since 1970; where it is given it counts.",
    }
    return {
        "description": "One reading. Other fields are ignored (counted, and named in the answer); "
        "one of these twice is refused.",
        "type": "object",
        "required": [name for name in record.WIRE_FIELDS if name in wire["required"]],
        "properties": {name: fields[name] for name in ("user_id", "device_id", "heart_rate")},
        "anyOf": [
            {
                "required": ["timestamp"],
                "properties": {"timestamp": instant, "timestamp_ms": {"type": "null"}},
            },
            {"required": ["timestamp_ms"], "properties": {"timestamp_ms": epoch_ms}},
        ],
        "examples": [_EXAMPLE],
    }


def _ref(name: str) -> Json:
    return {"$ref": _SCHEMAS + name}


# -- answers


def _answer(description: str, name: str, headers: tuple[str, ...] = ()) -> Json:
    return _content(description, {"application/json": {"schema": _ref(name)}}, headers)


def _problem(description: str, *headers: str) -> Json:
    return _content(description, {problems.MEDIA_TYPE: {"schema": _ref("Problem")}}, headers)


def _content(description: str, content: Json, headers: tuple[str, ...] = ()) -> Json:
    names = (*headers, "X-Request-ID")
    return {
        "description": description,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
        "content": content,
    }


def _text(description: str, media_type: str) -> Json:
    return _content(description, {media_type: {"schema": {"type": "string"}}})


_LIMITS = ("RateLimit", "RateLimit-Policy")
_NOT_ALLOWED = {
    "401": _problem("No API key, or one that isn't known here or has expired.", "WWW-Authenticate"),
    "403": _problem("The API key isn't for this."),
    "421": _problem("No API key is asked for here, and the Host isn't a name of this gateway."),
}
_LIMITED = _problem("Too much in too short a time.", "Retry-After", *_LIMITS)
_FAILED = _problem("The gateway failed; its log says where, by the request's id.")
_REFUSED_BODY = {
    "413": _problem("The body is too large, or a batch has too many heartbeats."),
    "415": _problem(
        "A media type, charset or content coding that isn't taken.",
        "Accept-Post",
        "Accept-Encoding",
    ),
}


# -- operations


def _operation(
    name: str,
    tag: str,
    summary: str,
    responses: Mapping[str, Json],
    scope: ScopeName | None = None,
    **more: object,
) -> Json:
    """An operation; `scope`: what an API key needs for it, None where none is asked for."""
    parameters = more.pop("parameters", [])
    assert isinstance(parameters, list)
    if scope is not None:
        responses = {**responses, **_NOT_ALLOWED}
        more["security"] = [{"bearer": [scope]}, {"key": [scope]}]
    return {
        "operationId": name,
        "tags": [tag],
        "summary": summary,
        **more,
        "parameters": [*parameters, {"$ref": "#/components/parameters/X-Request-ID"}],
        "responses": {**dict(sorted(responses.items())), "500": _FAILED},
    }


def _post_one() -> Json:
    return _operation(
        "postHeartbeat",
        "heartbeats",
        "Send one heartbeat",
        {
            "200": _answer(
                "Stored, as durably as HB_DURABILITY says.", "Stored", (*_LIMITS, "HB-Ignored")
            ),
            "400": _problem("The timestamp is no time at all, or a compressed body is damaged."),
            **_REFUSED_BODY,
            "422": _problem("Not a valid heartbeat; `errors` names the field."),
            "429": _LIMITED,
            "503": _problem("Not stored: send it again, after Retry-After.", "Retry-After"),
        },
        scope=INGEST,
        requestBody={
            "required": True,
            "content": {bodies.JSON: {"schema": _ref("Heartbeat"), "example": _EXAMPLE}},
        },
    )


def _post_batch(settings: Settings) -> Json:
    # One valid heartbeat is enough for a 200; the others are refused one by one.
    schema = {
        "type": "array",
        "minItems": 1,
        "maxItems": settings.batch_max_heartbeats,
        "contains": _ref("Heartbeat"),
    }
    refused = _EXAMPLE | {"heart_rate": 0}
    return _operation(
        "postBatch",
        "heartbeats",
        "Send many heartbeats",
        {
            "200": _answer(
                "Any was stored; `refused` lists the others.",
                "BatchAnswer",
                (*_LIMITS, "Retry-After"),
            ),
            "400": _problem("A compressed body is damaged."),
            **_REFUSED_BODY,
            "422": _problem("None is valid, or the array isn't well-formed; nothing was stored."),
            "429": _LIMITED,
            "503": _problem("None could be stored: send them again.", "Retry-After"),
        },
        description="A JSON array, or NDJSON: one heartbeat a line. `index` in `refused` is the "
        "position in the array, or the line, from 0; `retry` says whether sending the same again "
        f"can help. `ignored` counts unknown fields by name, the first {record.Ignored.MOST} of them, "
        f"cut to {record.Ignored.LENGTH} characters; `{record.Ignored.OTHERS}` is all others.",
        scope=INGEST,
        requestBody={
            "required": True,
            "content": {
                bodies.JSON: {"schema": schema, "example": [_EXAMPLE, refused]},
                bodies.NDJSON[0]: {
                    "schema": schema
                    | {"description": "An item a line; blank lines are skipped, but counted."},
                },
            },
        },
    )


def _get_readings(settings: Settings) -> Json:
    least, most = record.ID_LENGTH
    instant = {"type": "string", "format": "date-time"}
    return _operation(
        "getHeartRate",
        "heartbeats",
        "Read the heart rate of a user over time",
        {
            "200": _content(
                "One point per bucket and device, ordered by time; where there are more than fit, "
                "`Link` (and `next` in JSON) is the next page. `HB-Warnings` (and `warnings` in JSON) "
                "says what is wrong with these days: heartbeats that are known to be missing.",
                {
                    formats.JSON: {"schema": _ref("Answer")},
                    formats.NDJSON: {"schema": {"type": "string"}},
                    formats.CSV: {"schema": {"type": "string"}},
                    # bytes have no schema
                    formats.ARROW: {},
                    formats.PARQUET: {},
                },
                ("Link", "HB-Warnings", "HB-Ignored", "Vary", *_LIMITS),
            ),
            "400": _problem("A time can't be used, or both make no range; `errors` names it."),
            "406": _problem("None of the formats is accepted; `offered` lists them."),
            "422": _problem("A parameter is missing or can't be used; `errors` names it."),
            "429": _LIMITED,
            "503": _problem("The buffer can't be read, or holds too much (fresh).", "Retry-After"),
        },
        scope=READ,
        description="Out of everything durable in the lake. Whole buckets: `start` is rounded down, "
        "`end` up; `heart_rate` is the mean, half rounded up. The format is chosen by `Accept`, "
        "JSON by default. Without `device_id`, of readings at exactly the same timestamp only that of the "
        "device that comes first in HB_DEVICE_PRIORITY counts.",
        parameters=[
            {
                "name": "user_id",
                "in": "query",
                "required": True,
                "description": "Who wore the devices.",
                "schema": {"type": "string", "minLength": least, "maxLength": most},
                "example": "u1",
            },
            {
                "name": "start",
                "in": "query",
                "required": True,
                "description": "From when on.",
                "schema": instant,
                "example": EXAMPLE,
            },
            {
                "name": "end",
                "in": "query",
                "required": True,
                "description": f"Until when, at most {settings.query_max_range} after `start` "
                "(HB_QUERY_MAX_RANGE).",
                "schema": instant,
                "example": EXAMPLE.replace("T10", "T11"),
            },
            {
                "name": "device_id",
                "in": "query",
                "description": "One device alone; none, or an empty one: every device.",
                "schema": {"type": "string", "maxLength": most},
            },
            {
                "name": "granularity",
                "in": "query",
                "description": "Span of one point.",
                "schema": {"type": "string", "enum": list(GRANULARITIES), "default": "1m"},
            },
            {
                "name": "fresh",
                "in": "query",
                "description": "Whether to read what still lies in the buffer, too.",
                "schema": {"type": "string", "enum": [*YES, *NO], "default": "false"},
            },
            {
                "name": "limit",
                "in": "query",
                "description": "Most points of one answer (HB_QUERY_MAX_POINTS).",
                "schema": {
                    "type": "integer",
                    "minimum": 1,
                    "maximum": settings.query_max_points,
                    "default": settings.query_max_points,
                },
            },
        ],
    )


def _get_ready(name: str, summary: str) -> Json:
    return _operation(
        name,
        "operation",
        summary,
        {
            "200": _answer(
                "It can accept heartbeats and answer queries. What else is wrong stands in `alarms`.",
                "HealthAnswer",
            ),
            "503": _answer(
                "It can't, by the parts in `failing`; their lines say why.",
                "HealthAnswer",
                ("Retry-After",),
            ),
        },
        description="Redis, drain, lake, spool, consolidation and Dagster. Only what keeps this "
        "gateway from accepting and answering fails; the rest is an alarm.",
    )


def _get_live() -> Json:
    return _operation(
        "getLive",
        "operation",
        "See whether this process answers",
        {"200": _answer("It does. Nothing else is looked at.", "LiveAnswer")},
    )


def _get_metrics() -> Json:
    return _operation(
        "getMetrics",
        "operation",
        "Scrape metrics",
        {"200": _text("Prometheus' text format.", "text/plain")},
        scope=ADMIN,
    )


def _get_openapi() -> Json:
    return _operation(
        "getOpenApi",
        "operation",
        "Fetch this document",
        {"200": _content("OpenAPI 3.1.", {"application/json": {"schema": {"type": "object"}}})},
    )


def _get_docs() -> Json:
    return _operation(
        "getDocs",
        "operation",
        "Read this document",
        {"200": _text("The same for people.", "text/html")},
    )
