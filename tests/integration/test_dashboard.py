"""A person who opens Ray's dashboard finds the study: its job, its spec, its ranks by name. In a real browser."""

from __future__ import annotations

import json
import os
import re
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from http.cookies import SimpleCookie
from pathlib import Path

import pytest
from browser import Browser, find_chromium
from cluster import Cluster
from program import Program, wait_until
from toys import HOLD_S

from tune_service import metrics

pytestmark = pytest.mark.slow


@pytest.fixture
def browser(cluster: Cluster) -> Iterator[Browser]:
    """Signed in, as the dashboard's own form does it."""
    found = Browser(find_chromium())
    try:
        request = urllib.request.Request(
            f"{cluster.url}/api/authenticate", method="POST", headers={"Authorization": f"Bearer {cluster.token}"}
        )
        with urllib.request.urlopen(request) as answer:
            for name, cookie in SimpleCookie(answer.headers["Set-Cookie"]).items():
                found.set_cookie(cluster.url, name, cookie.value)
        yield found
    finally:
        found.close()


def test_the_dashboard_shows_the_study(cluster: Cluster, browser: Browser, program: Program, tmp_path: Path) -> None:
    pictures = Path(os.environ.get("TUNE_SERVICE_TEST_PICTURES", tmp_path))
    holds = {"faults": [{"x": x, "epoch": 3, "does": "hold"} for x in (0, 1)]}
    patience = {"step_timeout_s": HOLD_S}
    spec = program.spec("mrpc", {"training": holds, "resources": {"workers": 2}, "faults": patience})
    program.run("submit", spec, "--address", cluster.url, env=cluster.env())
    program.wait_for_note("mrpc", "hold", x=1, epoch=3, rank=0)

    text = browser.open(f"{cluster.url}/#/jobs", until="mrpc-1")
    browser.picture(pictures / "jobs.png")
    assert "RUNNING" in text and "\nmrpc\n" in text.replace("\t", "\n")
    text = browser.open(f"{cluster.url}/#/jobs/mrpc-1", until="trainable: toys:steady")
    browser.picture(pictures / "job.png")
    assert "study" in text
    text = browser.open(f"{cluster.url}/#/actors", until="mrpc slot 0 rank 1")
    browser.picture(pictures / "actors.png")
    assert {"mrpc slot 0 rank 0", "mrpc slot 1 rank 0", "mrpc slot 1 rank 1"} <= set(
        re.findall(r"mrpc slot \d rank \d", text)
    )

    def is_published() -> bool:
        lines = published(cluster)
        trials = re.search(r'ray_tune_service_trials{.*state="running".*study="mrpc".*} 2.0', lines)
        return bool(trials and re.search(r'ray_tune_service_trial_epoch{.*study="mrpc".*trial="1".*} 2.0', lines))

    wait_until(is_published, 90.0, "the study's numbers")

    program.release("mrpc")
    wait_until(lambda: cluster.jobs()["mrpc-1"]["status"] == "SUCCEEDED", 60.0, "the study's end")


def published(cluster: Cluster) -> str:
    """Our lines of what Prometheus would read from the nodes that the dashboard names to it."""
    targets = [target for group in cluster.get("/api/prometheus/sd") for target in group["targets"]]
    lines = []
    for target in targets:
        with suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as page:
            lines += page.read().decode().splitlines()
    return "\n".join(line for line in lines if line.startswith("ray_tune_service"))


def test_grafana_asks_for_what_a_study_publishes() -> None:
    file = Path(metrics.__file__).with_name("grafana_dashboard.json")
    expressions = " ".join(
        target["expr"] for panel in json.loads(file.read_text())["panels"] for target in panel["targets"]
    )
    published = {metrics.BEST, metrics.TRIALS, metrics.EPOCH, metrics.TOKENS_PER_S}
    assert set(re.findall(r"ray_(tune_service_\w+)", expressions)) == published
