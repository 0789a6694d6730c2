"""What connections, sudo, disks and shells say, and the sentence that the operator gets: the cause and a way out."""

import re

import pytest

from llamafleet import causes

# As pyinfra and paramiko say it, and as OpenSSH does (tests/hosts).
CONNECTIONS = [
    ("SSH host key error (Host key for 10.0.0.1 does not match.)", "another SSH key", "ssh-keygen -R"),
    ("@@@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @@@\nHost key verification failed.", "another SSH key", "-R"),
    ("SSH error (StrictPolicy: No host key for box found in known_hosts)", "not in your known_hosts", "accept-new"),
    ("No ED25519 host key is known for box and you have requested strict checking.\nHost key verification failed.",
     "not in your known_hosts", "accept-new"),
    ("SSH error (PyinfraError: No such private key file: /nowhere)", "names no file", "private key"),
    ("Authentication error (username=ops, key=/k)", "refuses the login", "authorized_keys"),
    ("root@box: Permission denied (publickey,password).", "refuses the login", "ssh_user"),
    ("SSH error (No authentication methods available)", "refuses the login", "ssh_key"),
    ("Could not resolve hostname ([Errno -2] Name or service not known)", "name is not known", "DNS"),
    ("ssh: Could not resolve hostname box: Temporary failure in name resolution", "name is not known", "ssh_hostname"),
    ("Could not connect ([Errno None] Unable to connect to port 22 on 10.0.0.1)", "nothing answers", "sshd"),
    ("ssh: connect to host box port 22: Connection refused", "nothing answers", "ssh_port"),
    ("ssh: connect to host box port 22: No route to host", "no way to it", "VPN"),
    ("Could not connect (timed out)", "does not answer", "firewall"),
    ("ssh: connect to host box port 22: Connection timed out", "does not answer", "is up"),
    ("SSH error (Error reading SSH protocol banner)", "SSH server", "ssh_port"),
    ("EOF error ()", "went down or starts again", "run again"),
    ("SSHException: the connection is closed", "went down or starts again", "run again"),
    ("'NoneType' object has no attribute 'open_session'", "went down or starts again", "run again"),
    ("ConnectionResetError: [Errno 104] Connection reset by peer", "went down or starts again", "run again"),
]  # fmt: skip
COMMANDS = [
    ("sudo: a password is required", "without a password", "NOPASSWD"),
    ("sudo: a terminal is required to read the password; either use the -S option", "without a password", "ssh_user"),
    ("sudo: sorry, you must have a tty to run sudo", "without a password", "ssh_user"),
    ("sudo: 1 incorrect password attempt", "password that was given", "right one"),
    ("ops is not in the sudoers file.", "may not run commands as root", "/etc/sudoers.d"),
    ("Sorry, user ops is not allowed to execute '/bin/sh' as root on box.", "may not run commands as root", "root"),
    ("sudo: /usr/bin/sudo must be owned by uid 0 and have the setuid bit set", "may not become root", "connect as root"),
    ("/bin/sh: 1: sudo: not found", "no sudo", "--sudo"),
    ("bash: line 1: sudo: command not found", "no sudo", "install sudo"),
    ("sh: 1: python3: not found", "python3 is missing", "apt-get install python3"),
    ("python3: can't open file '/opt/llamafleet/helpers/current/job.py': [Errno 2] No such file", "no helpers",
     "deploy.py first"),
    ("System has not been booted with systemd as init system (PID 1). Can't operate.", "systemd does not run", "container"),
    ("error: cannot write /etc/x: Read-only file system", "mounted read-only", "dmesg"),
    ("OSError: [Errno 12] Cannot allocate memory", "no memory left", "systemd-cgtop"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("said", "program"),
    [
        ("[Errno 2] No such file or directory: 'git'", "git"),
        ("[Errno 2] No such file or directory: '/usr/bin/ssh'", "ssh"),
        ("/bin/sh: 1: ssh: not found", "ssh"),
        ("bash: line 1: ssh: command not found", "ssh"),
        ("error: cannot run ssh: No such file or directory\nfatal: unable to fork", "ssh"),
        ("SSH error (FileNotFoundError: [Errno 2] No such file or directory: 'ssh')", "ssh"),
    ],
)
def test_a_program_that_the_operator_lacks_is_named_with_the_way_out(said, program):
    for told in (causes.of_local(said), causes.of_connection(said)):
        assert told.startswith(
            f"{program} is missing on this machine, where you run llamafleet: install it (apt-get install "
        )


@pytest.mark.parametrize("said", ["fatal: repository '/git' not found", "ssh: connect to host box port 22: No route to host",
                                  "[Errno 2] No such file or directory: '/home/me/keys'"])  # fmt: skip
def test_what_is_no_missing_program_is_left_as_it_is(said):
    assert causes.of_local(said) == said


@pytest.mark.parametrize(("said", "cause", "way_out"), CONNECTIONS)
def test_a_connection_s_cause_and_way_out(said, cause, way_out):
    told = causes.of_connection(said)
    assert cause in told and way_out in told
    assert " ".join(said.split())[:40] in told, "what was said is lost"
    assert "\n" not in told


@pytest.mark.parametrize(("said", "cause", "way_out"), COMMANDS)
def test_a_command_s_cause_and_way_out(said, cause, way_out):
    told = causes.of_command(f"warning: something else\n{said}")
    assert cause in told and way_out in told and said.split(":")[-1].strip()[:30] in told


@pytest.mark.parametrize(
    "text",
    [
        "error: https://example.net/x.gguf: Connection refused",  # a download on the host, not its SSH
        "E: Temporary failure resolving 'mirror.example.net'",
        "curl: (28) Connection timed out after 60 s",
        "the disk is on fire",
    ],
)
def test_what_a_job_says_of_its_own_network_is_left_as_it_is(text):
    assert causes.of_command(text) == text


def test_a_long_output_is_cut():
    assert len(causes.of_command("sudo: a password is required " + "x" * 10_000)) < 1000


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("error: cannot write /var/lib/x: No space left on device", True),
        ("cp: Disk quota exceeded", True),
        ("exit code 1; the disk of /var/lib/llamafleet/jobs has no space left", True),
        ("all went well", False),
    ],
)
def test_a_full_disk(text, full):
    assert causes.is_full(text) is full


def test_the_paths_of_a_message():
    text = "error: cannot write '/var/lib/a b': see /opt/x/y.gguf; https://host/no/path, /opt/x/y.gguf and ./rel/ative."
    assert causes.paths_in(text) == ["/var/lib/a", "/opt/x/y.gguf"]


DF = """\
bytes /var/lib/x tmpfs 2097152 2097152 0 100% /var/lib/llamafleet
files /var/lib/x tmpfs 500000 12 499988 1% /var/lib/llamafleet
bytes /opt/y /dev/sda1 1000000000 10 999999990 1% /
files /opt/y /dev/sda1 - - - - /
nonsense
"""


def test_the_bytes_of_the_full_file_system_are_told():
    assert causes.space(DF.splitlines()) == (
        "0 of 2097152 bytes are free where /var/lib/x is, on the file system at /var/lib/llamafleet"
    )


def test_files_that_ran_out_are_told_instead_of_bytes():
    lines = DF.replace("2097152 0 100%", "1 2097151 1%").replace("12 499988 1%", "500000 0 100%").splitlines()
    assert causes.space(lines).startswith("0 of 500000 files are free")


def test_where_no_disk_is_full_any_more_all_are_told():
    lines = DF.replace("2097152 0 100%", "1 2097151 1%").splitlines()
    assert re.findall("at (/[a-z/]*)", causes.space(lines)) == ["/var/lib/llamafleet", "/"]
    assert causes.space([]) == ""
