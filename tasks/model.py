"""Stage: download the models' files and verify them; only then they get their names."""

from __future__ import annotations

from typing import Any

from pyinfra.api.deploy import deploy
from pyinfra.context import ctx_host

from llamafleet.hub.source import ModelFiles, RemoteFile
from llamafleet.remote.common import RUN
from llamafleet.service.desired import Desired
from llamafleet.service.disks import MODEL_RESERVE_BYTES
from llamafleet.service.model_folders import model_folder, store_of, stored_at
from llamafleet.settings import secrets
from llamafleet.settings.schema import Instance
from tasks.lib import jobs, lookups, operations, paths, site_members, site_models
from tasks.lib.decision import for_stage

# A tmpfs: the token is on the host only while it downloads.
TOKEN = RUN + "/hub-token.curl"


@deploy("Fetch the models")
def model() -> None:
    """Fetch every model that the host does not have yet; instances may share a model."""
    now = for_stage("model")
    if now is None:
        return
    token = secrets.hub_token(now.desired.settings.hub_token_file, now.desired.settings.hub_endpoint)
    host = ctx_host.get()
    in_common = site_members.has_a_model_in_common(host, now.desired.settings)
    site, shared = site_members.of(host, now.desired.settings) if in_common else None, []
    models = {
        folder: (serving.instance, one) for serving in now.desired.servings for folder, one in serving.models.items()
    }
    for folder, (instance, one) in operations.each(models.items(), lambda pair: pair[0]):
        needed = folder in now.changes.models
        first = one.files[0].name
        there = stored_at(one, now.desired.settings, now.desired.installed) or folder
        sent, asked = tuple(paths.sent_files(one, there)), spec(now.desired, instance, one, token is not None)
        is_under_way = jobs.name_of("fetch", one.folder) in now.desired.installed.jobs
        of_site = site_models.Model(one.folder, asked, needed, _curl_config(token), sent, is_under_way)
        if site and of_site.can_be_shared:
            shared.append(of_site)
            continue
        if not now.has_work:
            continue
        if sent:
            operations.send_files(name=f"Send {first}", needed=needed, files=sent, reserve_bytes=MODEL_RESERVE_BYTES)
        operations.run_job(
            name=f"Fetch {first}", needed=needed, job=f"fetch-{one.folder}", program="fetch.py",
            spec=asked, secret=_curl_config(token), network=lookups.network(now.desired.settings),
        )  # fmt: skip
    if site:
        site.join(host, now.desired, shared)
        site_models.fetch_in_site(name="Fetch the models of the site", site=site, models=tuple(shared))


def _curl_config(token: str | None) -> jobs.Secret | None:
    """The Hub token as curl reads it, on the host only while it downloads."""
    return jobs.Secret(TOKEN, f'header = "Authorization: Bearer {token}"\n') if token is not None else None


def spec(desired: Desired, instance: Instance, model: ModelFiles, with_token: bool) -> dict[str, Any]:
    """What `llamafleet/remote/fetch.py` needs to know."""
    return {
        "directory": model_folder(model),
        **({"store": store} if (store := store_of(model, desired.settings)) else {}),
        "owner": None,
        "files": [_file(desired, instance, model, file) for file in model.files],
        "curl_config": TOKEN if with_token else None,
        "token_origin": desired.settings.hub_endpoint,
        "reserve_bytes": MODEL_RESERVE_BYTES,
    }


def _file(desired: Desired, instance: Instance, model: ModelFiles, file: RemoteFile) -> dict[str, Any]:
    """One file of the spec. Where its sha256 is not known, it is the one that the host verified earlier, or the model
    may do without."""
    sha256 = file.sha256 or desired.installed.models.get(f"{model_folder(model)}/{file.name}")
    urls = [] if file.place == "operator" else [file.url, *file.mirrors]
    entry = {"name": file.name, "urls": urls, "size_bytes": file.size_bytes, "sha256": sha256}
    return entry if sha256 else {**entry, "unverified": instance.allow_unverified or file.place == "host"}
