"""deploy.py with its times scaled down: a lease of four seconds, fifteen for the survey. No test itself."""

from pyinfra import local

from tasks.lib import host_lock, remote

host_lock.LEASE_SECONDS = 4.0
remote.SURVEY_SECONDS = 15.0
remote.KILL_SECONDS, remote.SILENT_SECONDS = 1.0, 5.0

local.include("deploy.py")
