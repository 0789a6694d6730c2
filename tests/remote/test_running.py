"""Commands of package managers that fail, wait for another process, or find an installation that was cut off."""

from __future__ import annotations

import packages
import pytest
import running


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A program whose n-th call prints the n-th text and ends with 100; after the last one it ends with 0."""

    def make(*texts):
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.text").write_text(text)
        path = tmp_path / "program"
        path.write_text(
            f'#!/bin/sh\ncd {tmp_path}\nfor text in *.text; do [ -e "$text" ] || break; cat "$text"; rm "$text"; exit 100; '
            'done\necho "$@" >>done\n'
        )
        path.chmod(0o755)
        return [str(path)]

    monkeypatch.setattr(running, "LOCK_POLL_SECONDS", 0.01)
    return make


@pytest.mark.parametrize(("manager", "text"), [
    # cfengine#2477: on a first boot the lists are locked, where apt does not wait whatever DPkg::Lock::Timeout says.
    (packages.Apt, "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 2023 (apt-get)\n"),
    (packages.Apt, "E: Unable to acquire the dpkg frontend lock (/var/lib/dpkg/lock-frontend), is another process?\n"),
    (packages.Dnf, "error: can't create transaction lock on /var/lib/rpm/.rpm.lock (Resource temporarily unavailable)\n"),
    (packages.Zypper, "System management is locked by the application with pid 12 (zypper).\n"),
    (packages.Pacman, "error: failed to init transaction (unable to lock database)\n"),
])  # fmt: skip
def test_a_lock_is_waited_for(program, manager, text, capsys):
    running.run(program(text, text), "it failed", manager)
    assert capsys.readouterr().out.count("waiting for it") == 1  # said once, tried three times


def test_a_lock_that_is_never_released(program, monkeypatch):
    monkeypatch.setattr(running, "LOCK_SECONDS", 0.0)
    with pytest.raises(
        running.Failed, match=r"it failed \(exit code 100, after waiting 0 s for another process\): E: Cou"
    ):
        running.run(program("E: Could not get lock /x\n", "E: Could not get lock /x\n"), "it failed", packages.Apt)


def test_an_installation_that_was_cut_off_is_finished_first(program, tmp_path, monkeypatch):
    command = program("E: dpkg was interrupted, you must manually run 'dpkg --configure -a'\n")
    monkeypatch.setattr(
        packages.Apt, "mend", staticmethod(lambda text: [*command, "mend"] if "dpkg was" in text else None)
    )
    running.run([*command, "install"], "it failed", packages.Apt)
    assert (tmp_path / "done").read_text() == "mend\ninstall\n"


def test_dpkg_says_what_it_needs():
    text = "E: dpkg was interrupted, you must manually run 'dpkg --configure -a' to correct the problem."
    assert packages.Apt.mend(text) == ["dpkg", "--configure", "-a"] and packages.Apt.mend("E: No space left") is None


def test_a_failure_has_the_last_lines(program):
    with pytest.raises(running.Failed, match=r"it failed \(exit code 100\): one \| No space left on device"):
        running.run(program("one\nNo space left on device\n"), "it failed", packages.Apt)


def test_of_curl_s_message_the_first_line_is_said(program):
    """ollama/ollama#5446: behind it curl explains in six lines what a certificate is."""
    said = ["curl: (60) SSL certificate problem: unable to get local issuer certificate",
            "More details here: https://curl.se/docs/sslcerts.html", "", "curl failed to verify the legitimacy"]  # fmt: skip
    with pytest.raises(
        running.Failed, match=r"cannot download \(exit code 100\): curl: \(60\) SSL [\w :]*certificate$"
    ):
        running.run(program("\n".join(said)), "cannot download")
