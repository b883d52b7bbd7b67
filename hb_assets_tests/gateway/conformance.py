"""Checks the gateway against /openapi.json with schemathesis; `make api-check` runs this.

One run against a gateway on a real socket, with an API key. It is no part of the other tests, since
it takes most of a minute. What schemathesis has to be told about our interface is in
`conformance_hooks`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hb_assets.core.settings import Settings
from hb_assets.gateway.auth import keyring
from hb_assets_tests.conftest import VALKEY
from hb_assets_tests.gateway.conftest import running

SECONDS = int(os.environ.get("HB_API_CHECK_SECONDS", "45"))


@VALKEY
def test_does_what_the_document_says(settings: Settings, tmp_path: Path) -> None:
    _, token = keyring.create(settings, "conformance", [keyring.ADMIN])
    # a limit would answer 429 to everything that comes after the first seconds
    settings = settings.model_copy(
        update={"limit_key": None, "limit_ip": None, "limit_user": None, "limit_queries": None}
    )
    hooks = Path(__file__).with_name("conformance_hooks.py")
    (tmp_path / "schemathesis.toml").write_text(
        f"hooks = {str(hooks)!r}\n"
        # times of several fields, or of now, are out of JSON Schema's reach: see the hooks
        "[headers]\n"
        f'Authorization = "Bearer {token}"\n',
        encoding="utf-8",
    )
    with running(settings) as client:
        done = subprocess.run(
            [
                *(Path(sys.executable).with_name("schemathesis"), "run"),
                *(f"{client.base_url}/openapi.json", "--checks", "all"),
                *("--max-time", str(SECONDS), "--max-examples", "50", "--seed", "1"),
                "--continue-on-failure",
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
    print(done.stdout)  # noqa: T201  # what was found
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    # a machine too slow to get that far has shown nothing
    for phase in ("Examples", "Coverage", "Fuzzing"):
        assert f"✅ {phase}" in done.stdout.replace("  ", " "), f"{phase}: not reached in time"
