"""The command and its page in a real browser: search, choose two runs, see both their curves."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from run_writer import logged, write_run


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """``(directory, address)`` of the command at work."""
    home = tmp_path_factory.mktemp("ui")
    for i in range(12):
        write_run(
            home / "runs", f"kd-{i:02}", seed=i, accuracy=0.7 + 0.02 * i, started=f"2026-01-{i + 1:02}T00:00:00+00:00"
        )
    write_run(home / "runs", "other-0", method="sinkd", started="2025-01-01T00:00:00+00:00")
    going = write_run(home / "runs", "going", done=False, started="2024-01-01T00:00:00+00:00")
    going.rows(logged()[:10])
    command = [sys.executable, "-m", "stillhouse", "ui", "runs", "--port", "0"]
    process = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    line = process.stdout.readline()
    address = re.match(r"(http://127\.0\.0\.1:\d+/)  \(this machine only; Ctrl-C ends it\)", line)
    assert address, line + process.stdout.read()
    yield home / "runs", address[1]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0
    assert process.stdout.read() == ""


@pytest.fixture(params=[1280, 390])
def tab(request, chromium, served):
    tab = chromium.open(served[1], width=request.param, height=844)
    yield tab
    assert tab.errors == []
    assert all(address.startswith(served[1]) for address in tab.requests)
    tab.close()


ROWS = "[...document.querySelectorAll('tr[data-text]')].filter(r => r.offsetParent).length"


def test_search_choose_two_and_see_both_curves(tab):
    assert tab.see(ROWS) == 14
    assert tab.see("document.querySelector('button[data-at-once]').disabled")
    tab.type("input[name=q]", "kd-0 digits")
    tab.until(f"{ROWS} === 10")
    for name in ("kd-03", "kd-07"):
        tab.click(f"input[value='{name}']")
    assert tab.see("document.querySelector('button[data-at-once]').textContent") == "Compare 2 runs"
    loads = tab.loads
    tab.click("button[data-at-once]")
    tab.loaded(loads + 1)
    assert tab.see("document.querySelector('h1').textContent") == "2 runs side by side"
    chart = "document.querySelector('svg[aria-label^=\"validation/accuracy\"]')"
    strokes = tab.see(f"[...{chart}.querySelectorAll('polyline')].map(p => getComputedStyle(p).stroke)")
    assert len(strokes) == 2
    assert len(set(strokes)) == 2
    assert tab.see("[...document.images].every(i => i.complete && i.naturalWidth)")
    assert tab.see("document.images.length") == 2
    assert tab.see("document.documentElement.scrollWidth") == tab.see("document.documentElement.clientWidth")


def test_the_list_fits_is_sorted_by_its_headings_and_leads_to_reports(tab):
    assert tab.see("document.documentElement.scrollWidth") == tab.see("document.documentElement.clientWidth")
    loads = tab.loads
    tab.click("thead a[href*='sort=number']")
    tab.loaded(loads + 1)
    assert tab.see("document.querySelector('tr[data-text] a').textContent") == "kd-11"
    tab.click("tr[data-text] a")
    tab.loaded(loads + 2)
    assert tab.see("document.querySelector('h1').textContent") == "kd"
    assert tab.see("document.querySelectorAll('.copy:not([hidden])').length") > 0
    tab.click(".brand a")
    tab.loaded(loads + 3)
    assert tab.see(ROWS) == 14


def test_enter_searches_and_a_state_can_be_chosen_without_scripts(chromium, served):
    tab = chromium.open(served[1], script=False)
    tab.command("Emulation.setScriptExecutionDisabled", value=False)
    loads = tab.loads
    tab.type("input[name=q]", "sinkd")
    tab.press_enter()
    tab.loaded(loads + 1)
    assert tab.see(ROWS) == 1
    tab.close()


def test_a_running_run_is_seen_to_go_on(chromium, served):
    runs, address = served
    log = runs / "going" / "metrics.jsonl"
    os.utime(log)
    tab = chromium.open(f"{address}?q=going")
    assert "step 50 of 200" in tab.see("document.querySelector('tr[data-text]').textContent")
    tab.click("input[name=run][value=going]")
    with log.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in logged()[10:20]))
    tab.see("refresh()")
    assert "step 100 of 200" in tab.see("document.querySelector('tr[data-text]').textContent")
    # What was chosen stays so.
    assert tab.see("document.querySelector('input[name=run][value=going]').checked")
    assert tab.errors == []
    tab.close()


def test_it_listens_on_this_machine_alone(served):
    port = int(served[1].rsplit(":", 1)[1].strip("/"))
    # Another address of this machine's own, where a service that listens on all of them would answer.
    with socket.socket() as other:
        other.settimeout(5)
        assert other.connect_ex(("127.0.0.2", port)) != 0
