"""This machine's apt settings, rewritten for the hosts' Debian release.

The project names no mirror: hosts use the mirror of this machine. Signatures are always checked.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
ONE_LINE = re.compile(r"^deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>.+)$")
# Settings that decide how the archive is reached. Other apt settings of the machine are not copied.
CARRIED = re.compile(
    r"^Acquire::(?:(?:http|https|ftp)::(?!Proxy-Auto-Detect)[\w:.-]*|Check-Valid-Until|Check-Date|Retries"
    r"|ForceIPv[46]|By-Hash) \"[^\"]"
)
NAMED_FILE = re.compile(r"^Acquire::https::\S*(?:CAInfo|CAPath|CrlFile) \"(?P<file>/[^\"]+)\"")


@dataclass(frozen=True)
class Source:
    """One suite of one archive; `signed_by` is empty if the machine gives no keyring file."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str = ""


def machine_sources(etc: Path = Path("/etc/apt")) -> list[Source]:
    """All enabled binary package sources, from files in both of apt's formats."""
    folder = etc / "sources.list.d"
    sources: list[Source] = []
    for file in [etc / "sources.list", *sorted(folder.glob("*.list"))]:
        if file.exists():
            sources += one_line_sources(file.read_text())
    for file in sorted(folder.glob("*.sources")):
        sources += deb822_sources(file.read_text())
    return sources


def one_line_sources(text: str) -> list[Source]:
    """The sources of lines `deb [options] URI SUITE COMPONENT...`, see sources.list(5)."""
    matches = (ONE_LINE.match(line.split("#")[0].strip()) for line in text.splitlines())
    return [
        Source(
            m["uri"],
            m["suite"],
            tuple(m["components"].split()),
            next((o[10:] for o in (m["options"] or "").split() if o.startswith("signed-by=")), ""),
        )
        for m in matches
        if m
    ]


def deb822_sources(text: str) -> list[Source]:
    """The sources of stanzas `Field: value`, see sources.list(5); an inline key counts as no keyring file."""
    return [
        Source(uri, suite, tuple(fields.get("components", "").split()), _keyring(fields.get("signed-by", "")))
        for fields in _stanzas(text)
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() not in ("no", "false", "0")
        for uri in fields.get("uris", "").split()
        for suite in fields.get("suites", "").split()
    ]


def debian_sources(sources: list[Source], codename: str, wanted: str) -> list[Source]:
    """The Debian archive's sources of a machine that runs release `codename`, changed to the release `wanted`.

    Other vendors' sources are left out: they have other suite names, no `main`, or another keyring.
    """
    renamed = {f"{codename}{end}": f"{wanted}{end}" for end in ("", "-updates", "-security")}
    entries = [
        Source(s.uri, renamed[s.suite], ("main",), s.signed_by or KEYRING)
        for s in sources
        if s.suite in renamed
        and "main" in s.components
        and (not s.signed_by or Path(s.signed_by).name.startswith("debian-archive"))
    ]
    return list(dict.fromkeys(entries))


def lines(sources: list[Source], keyring: str = "") -> list[str]:
    """Lines of a sources.list; `keyring`, if given, replaces the machine's keyring files."""
    return [f"deb [signed-by={keyring or s.signed_by}] {s.uri} {s.suite} {' '.join(s.components)}" for s in sources]


def carried_settings(dump: str) -> list[str]:
    """Lines for apt.conf from `apt-config dump`: proxies, certificates, date checks, retries."""
    return [line for line in dump.splitlines() if CARRIED.match(line)]


def carried_files(settings: list[str]) -> list[Path]:
    """The existing certificate files that these settings name."""
    named = [Path(m["file"]) for m in map(NAMED_FILE.match, settings) if m]
    return [file for file in named if file.is_file()]


def config_dump() -> str:
    return subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout


def codename(os_release: Path = Path("/etc/os-release")) -> str:
    """The machine's release name; empty if it has none (Debian unstable) or is not Debian."""
    fields = dict(line.split("=", 1) for line in os_release.read_text().splitlines() if "=" in line)
    return fields.get("VERSION_CODENAME", "").strip('"') if fields.get("ID", "").strip('"') == "debian" else ""


def _keyring(value: str) -> str:
    return value if value.startswith("/") else ""


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    for block in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        field = ""
        for line in block.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace():
                fields[field] = f"{fields.get(field, '')} {line.strip()}".strip()
            elif ":" in line:
                field, value = line.split(":", 1)
                field = field.strip().lower()
                fields[field] = value.strip()
        yield fields
