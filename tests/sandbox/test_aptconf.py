"""The hosts' apt sources come from the machine's: what is taken, what is left, in both of apt's formats."""

import pytest

from sandbox import aptconf
from sandbox.aptconf import Source

KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"

ONE_LINE = """
# a comment
deb http://mirror.invalid/debian bookworm main contrib
deb-src http://mirror.invalid/debian bookworm main
deb [arch=amd64 signed-by=/k/debian-archive-bookworm.gpg] http://mirror.invalid/sec bookworm-security main
deb [signed-by=/etc/apt/keyrings/vendor.gpg] http://vendor.invalid/debian bookworm main
deb http://vendor.invalid/tools bookworm stable
deb http://vendor.invalid/sql bookworm-pgdg main  # another suite
"""

DEB822 = """
Types: deb deb-src
# where from
URIs: http://a.invalid/debian http://b.invalid/debian
Suites: bookworm
 bookworm-updates
Components: main non-free
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Enabled: no
Types: deb
URIs: http://off.invalid/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://inline.invalid/debian
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 xyz
 -----END PGP PUBLIC KEY BLOCK-----
"""


def test_one_line_sources_keep_the_archive_and_drop_vendors():
    found = aptconf.debian_sources(aptconf.one_line_sources(ONE_LINE), "bookworm", "trixie")
    assert found == [
        Source("http://mirror.invalid/debian", "trixie", ("main",), KEYS),
        Source("http://mirror.invalid/sec", "trixie-security", ("main",), "/k/debian-archive-bookworm.gpg"),
    ]


def test_deb822_stanzas_multiply_out_and_an_inline_key_becomes_the_archives_keyring():
    found = aptconf.debian_sources(aptconf.deb822_sources(DEB822), "bookworm", "trixie")
    assert aptconf.lines(found) == [
        f"deb [signed-by={KEYS}] http://a.invalid/debian trixie main",
        f"deb [signed-by={KEYS}] http://a.invalid/debian trixie-updates main",
        f"deb [signed-by={KEYS}] http://b.invalid/debian trixie main",
        f"deb [signed-by={KEYS}] http://b.invalid/debian trixie-updates main",
        f"deb [signed-by={KEYS}] http://inline.invalid/debian trixie-security main",
    ]


def test_inside_a_root_its_own_keyring_is_named():
    source = Source("http://a.invalid/debian", "trixie", ("main",), "/somewhere/debian-archive-x.gpg")
    assert aptconf.lines([source], KEYS) == [f"deb [signed-by={KEYS}] http://a.invalid/debian trixie main"]


def test_both_formats_are_read_from_the_folder(tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("deb http://a.invalid/debian trixie main\n")
    (tmp_path / "sources.list.d" / "x.list").write_text("deb http://b.invalid/debian trixie main\n")
    (tmp_path / "sources.list.d" / "x.sources").write_text(
        "Types: deb\nURIs: http://c.invalid/debian\nSuites: trixie\nComponents: main\n"
    )
    (tmp_path / "sources.list.d" / "x.list.save").write_text("deb http://d.invalid/debian trixie main\n")
    assert [s.uri[7] for s in aptconf.machine_sources(tmp_path)] == ["a", "b", "c"]


def test_a_machine_without_debian_sources_gives_none():
    assert aptconf.debian_sources(aptconf.one_line_sources(ONE_LINE), "", "trixie") == []


@pytest.mark.parametrize(
    ("line", "carried"),
    [
        ('Acquire::http::Proxy "http://127.0.0.1:3142";', True),
        ('Acquire::http::Proxy::mirror.invalid "DIRECT";', True),
        ('Acquire::https::CAInfo "/etc/ssl/own.crt";', True),
        ('Acquire::Check-Valid-Until "false";', True),
        ('Acquire::http::Proxy "";', False),  # an empty value says nothing
        ('Acquire::http::Proxy-Auto-Detect "/usr/bin/find-proxy";', False),  # a program that hosts lack
        ('Acquire::AllowInsecureRepositories "true";', False),  # never, whatever the machine does
        ('APT::Get::AllowUnauthenticated "true";', False),
    ],
)  # fmt: skip
def test_which_settings_of_the_machine_reach_the_hosts(line, carried):
    assert (aptconf.carried_settings(line) == [line]) is carried


def test_only_certificate_files_that_exist_are_carried(tmp_path):
    (there := tmp_path / "own.crt").write_text("certificate")
    settings = [f'Acquire::https::CAInfo "{there}";', 'Acquire::https::CAInfo "/nowhere.crt";']
    assert aptconf.carried_files(settings) == [there]
