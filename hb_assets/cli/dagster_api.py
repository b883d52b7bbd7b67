"""Client of Dagster's webserver: the GraphQL queries that commands make, over HTTP."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from hb_assets.core.errors import HbError
from hb_assets.core.settings import Settings

JOB = "consolidate_day"
"""The job that consolidates one day and builds its minutes; partitioned by day."""

_PARTITION = "dagster/partition"
_TIMEOUT = 30.0
_RELOAD_SECONDS = 120.0
_POLL_SECONDS = 0.2
_ENDED = ("SUCCESS", "FAILURE", "CANCELED")
_BACKFILL_OVER = ("COMPLETED", "COMPLETED_SUCCESS", "COMPLETED_FAILED", "CANCELED")

_LAUNCH = """
mutation ($params: ExecutionParams!) {
  launchRun(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on Error { message }
  }
}"""
_RUNS = """
query ($filter: RunsFilter!) {
  runsOrError(filter: $filter, limit: 10000) {
    __typename
    ... on Runs { results { runId rootRunId status creationTime tags { key value } } }
    ... on Error { message }
  }
}"""
_CHECKS = """
query ($run: ID!, $after: String) {
  logsForRun(runId: $run, afterCursor: $after, limit: 1000) {
    __typename
    ... on EventConnection {
      events { __typename ... on AssetCheckEvaluationEvent { evaluation { checkName success } } }
      cursor hasMore
    }
    ... on Error { message }
  }
}"""
_BACKFILL = """
mutation ($params: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $params) {
    __typename
    ... on LaunchBackfillSuccess { backfillId }
    ... on PartitionKeysNotFoundError { partitionKeys }
    ... on Error { message }
  }
}"""
_BACKFILL_STATUS = """
query ($id: String!) {
  partitionBackfillOrError(backfillId: $id) {
    __typename
    ... on PartitionBackfill { status error { message } }
    ... on Error { message }
  }
}"""
_REPOSITORIES = """
query {
  repositoriesOrError {
    __typename
    ... on RepositoryConnection { nodes { name location { name } jobs { name } } }
    ... on Error { message }
  }
}"""
_FIRST_DAY = """
query {
  assetNodeOrError(assetKey: {path: ["heartbeats"]}) {
    __typename
    ... on AssetNode { partitionKeysByDimension(startIdx: 0, endIdx: 1) { partitionKeys } }
    ... on Error { message }
  }
}"""
_SENSORS = """
query ($repository: RepositorySelector!) {
  sensorsOrError(repositorySelector: $repository) {
    __typename
    ... on Sensors { results { name sensorState { id status ticks(limit: 1) { timestamp } } } }
    ... on Error { message }
  }
}"""
_START_SENSOR = """
mutation ($sensor: SensorSelector!) {
  startSensor(sensorSelector: $sensor) { __typename ... on Error { message } }
}"""
_STOP_SENSOR = """
mutation ($id: String!) {
  stopSensor(id: $id) { __typename ... on Error { message } }
}"""
_DAEMONS = """
query {
  instance { daemonHealth { allDaemonStatuses {
    daemonType required healthy lastHeartbeatTime
  } } }
}"""


@dataclass(frozen=True, slots=True)
class Run:
    """The latest attempt of one run of a day."""

    run_id: str
    day: dt.date
    status: str
    retries: bool = False

    @property
    def ended(self) -> bool:
        """Whether it ended, and Dagster won't try it again."""
        return self.status in _ENDED and not self.retries

    @property
    def succeeded(self) -> bool:
        """Whether it ended well."""
        return self.status == "SUCCESS"


@dataclass(frozen=True, slots=True)
class Sensor:
    """A sensor of our definitions; `ticked` is its latest tick, epoch seconds."""

    name: str
    running: bool
    ticked: float | None
    state_id: str


class ControlRoom:
    """A client of the webserver at `url`; use it as a context manager.

    Every method raises HbError when the webserver doesn't answer or refuses.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._http = httpx.Client(
            base_url=url,
            timeout=_TIMEOUT,
            trust_env=False,
            verify=False,  # noqa: S501  # plain HTTP on loopback, and a tenth of a second less
        )
        self._repository: dict[str, str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def answers(self) -> bool:
        """Whether the webserver is up."""
        try:
            return self._http.get("/server_info", timeout=2).is_success
        except httpx.HTTPError:
            return False

    def loaded(self) -> bool:
        """Whether the webserver has loaded our definitions."""
        try:
            self._our_repository()
        except HbError:
            return False
        return True

    def daemons_alive(self, since: float) -> bool:
        """Whether every required daemon is healthy and had a heartbeat after `since` (epoch s)."""
        try:
            health = self._ask(_DAEMONS, timeout=5)["instance"]["daemonHealth"]
        except HbError:
            return False
        required = [one for one in health["allDaemonStatuses"] if one["required"]]
        return bool(required) and all(
            one["healthy"] and (one["lastHeartbeatTime"] or 0) > since for one in required
        )

    def wait_for_partition(self, day: dt.date) -> None:
        """Wait until the loaded definitions have a partition of this day of the lake.

        Raises:
            HbError: they still haven't after two minutes.
        """
        deadline = time.monotonic() + _RELOAD_SECONDS
        while (first := self._first_day()) > day:
            if time.monotonic() > deadline:
                raise HbError(
                    f"Dagster's partitions begin at {first}, and {day} isn't loaded; see the log of "
                    "the code server, or load the code location again in the UI (Deployment)"
                )
            time.sleep(_POLL_SECONDS)

    def _first_day(self) -> dt.date:
        answer = _expect(self._ask(_FIRST_DAY)["assetNodeOrError"], "AssetNode")
        return dt.date.fromisoformat(answer["partitionKeysByDimension"][0]["partitionKeys"][0])

    def sensors(self) -> list[Sensor]:
        """The sensors, by name."""
        asked = self._ask(_SENSORS, {"repository": self._our_repository()})["sensorsOrError"]
        found = []
        for one in _expect(asked, "Sensors")["results"]:
            state = one["sensorState"]
            ticked = state["ticks"][0]["timestamp"] if state["ticks"] else None
            running = state["status"] == "RUNNING"
            found.append(Sensor(one["name"], running, ticked, state["id"]))
        return sorted(found, key=lambda one: one.name)

    def start_sensor(self, sensor: Sensor) -> None:
        """Let a sensor tick."""
        selector = {**self._our_repository(), "sensorName": sensor.name}
        _expect(self._ask(_START_SENSOR, {"sensor": selector})["startSensor"], "Sensor")

    def stop_sensor(self, sensor: Sensor) -> None:
        """Let a sensor tick no more, until it is started; a restart of `hb up` doesn't."""
        answer = self._ask(_STOP_SENSOR, {"id": sensor.state_id})["stopSensor"]
        _expect(answer, "StopSensorMutationResult")

    def launch(self, day: dt.date) -> str:
        """Launch the job for one day; the id of its run."""
        found = self._our_repository()
        parameters = {
            "selector": {**found, "jobName": JOB},
            "executionMetadata": {"tags": [{"key": _PARTITION, "value": day.isoformat()}]},
        }
        answer = self._ask(_LAUNCH, {"params": parameters})["launchRun"]
        return str(_expect(answer, "LaunchRunSuccess")["run"]["runId"])

    def runs(self, run_ids: Sequence[str]) -> list[Run]:
        """The latest attempt of each of these runs, retries by Dagster included."""
        found = self._runs({"runIds": list(run_ids)})
        retried = [run for run in found if run["status"] == "FAILURE"]
        for run in retried:
            tag = {"key": "dagster/root_run_id", "value": run["runId"]}
            found += self._runs({"tags": [tag]})
        return _latest(found)

    def backfill(self, days: Sequence[dt.date], *, rebuild: bool = False) -> str:
        """Launch a backfill of the job over these days; its id."""
        config = {"ops": {"heartbeats": {"config": {"rebuild": rebuild}}}}
        parameters = {
            "selector": {
                "partitionSetName": f"{JOB}_partition_set",
                "repositorySelector": self._our_repository(),
            },
            "partitionNames": [day.isoformat() for day in days],
            "title": f"hb backfill {days[0]} {days[-1]}" + (" --rebuild" if rebuild else ""),
            "runConfigData": config,
        }
        answer = self._ask(_BACKFILL, {"params": parameters})["launchPartitionBackfill"]
        if answer["__typename"] == "PartitionKeysNotFoundError":
            missing = ", ".join(sorted(answer["partitionKeys"])[:3])
            raise HbError(f"Dagster has no partitions of these days (first: {missing})")
        return str(_expect(answer, "LaunchBackfillSuccess")["backfillId"])

    def backfill_over(self, backfill_id: str) -> bool:
        """Whether the backfill launches no more runs. Raises HbError when it failed to launch."""
        answer = self._ask(_BACKFILL_STATUS, {"id": backfill_id})["partitionBackfillOrError"]
        found = _expect(answer, "PartitionBackfill")
        if found["status"] == "FAILED":
            reason = (found["error"] or {}).get("message", "no reason given")
            raise HbError(f"the backfill {backfill_id} failed: {reason.splitlines()[0]}")
        return found["status"] in _BACKFILL_OVER

    def backfill_runs(self, backfill_id: str) -> list[Run]:
        """The latest attempt of each run of a backfill."""
        return _latest(self._runs({"tags": [{"key": "dagster/backfill", "value": backfill_id}]}))

    def checks(self, run_id: str) -> tuple[int, int]:
        """Asset checks that a run evaluated: how many passed, how many there were."""
        passed, evaluated = 0, 0
        after = None
        while True:
            answer = self._ask(_CHECKS, {"run": run_id, "after": after})["logsForRun"]
            page = _expect(answer, "EventConnection")
            for event in page["events"]:
                if "evaluation" in event:
                    evaluated += 1
                    passed += bool(event["evaluation"]["success"])
            after = page["cursor"]
            if not page["hasMore"]:
                return passed, evaluated

    def _our_repository(self) -> dict[str, str]:
        if self._repository is None:
            answer = self._ask(_REPOSITORIES)["repositoriesOrError"]
            for node in _expect(answer, "RepositoryConnection")["nodes"]:
                if any(job["name"] == JOB for job in node["jobs"]):
                    self._repository = {
                        "repositoryName": node["name"],
                        "repositoryLocationName": node["location"]["name"],
                    }
                    break
            else:
                raise HbError(
                    f"Dagster at {self._url} has no job {JOB}: its code server may be starting, "
                    "or it failed to load (see Deployment in the UI)"
                )
        return self._repository

    def _runs(self, filter_: dict[str, Any]) -> list[dict[str, Any]]:
        answer = self._ask(_RUNS, {"filter": filter_})["runsOrError"]
        found: list[dict[str, Any]] = _expect(answer, "Runs")["results"]
        return found

    def _ask(
        self, query: str, variables: dict[str, Any] | None = None, timeout: float = _TIMEOUT
    ) -> dict[str, Any]:
        try:
            answer = self._http.post(
                "/graphql", json={"query": query, "variables": variables or {}}, timeout=timeout
            )
            body = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            kind = type(error).__name__
            raise HbError(f"Dagster at {self._url} doesn't answer ({kind})") from None
        if body.get("errors"):
            raise HbError(f"Dagster refused a query: {body['errors'][0]['message']}")
        data: dict[str, Any] = body["data"]
        return data


def room_of(settings: Settings) -> str:
    """URL of the webserver that `hb up` runs with these settings."""
    return f"http://127.0.0.1:{settings.dagster_port}"


def _expect(answer: dict[str, Any], kind: str) -> dict[str, Any]:
    if answer["__typename"] != kind:
        message = str(answer.get("message") or answer["__typename"])
        raise HbError(f"Dagster refused: {message.splitlines()[0]}")
    return answer


def _latest(found: Sequence[dict[str, Any]]) -> list[Run]:
    """The latest attempt of each root run."""
    latest: dict[str, Run] = {}
    for run in sorted(found, key=lambda run: run["creationTime"]):
        tags = {tag["key"]: tag["value"] for tag in run["tags"]}
        latest[run["rootRunId"] or run["runId"]] = Run(
            run_id=run["runId"],
            day=dt.date.fromisoformat(tags[_PARTITION]),
            status=run["status"],
            # set on a run that will be tried again, until that attempt is there
            retries=tags.get("dagster/will_retry") == "true" and run["status"] == "FAILURE",
        )
    return sorted(latest.values(), key=lambda run: run.day)
