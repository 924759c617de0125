"""A real S3 server for tests: Ceph's monitor, one OSD in memory and radosgw (Debian: radosgw ceph-mon ceph-osd), on
loopback, with keys of its own. Needs no root; everything lives below one folder and ends with `stop`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool")
START_SECONDS = 300
CONF = """[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon}]
ms_bind_msgr1 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
run_dir = {folder}
admin_socket = {folder}/$name.asok
log_file = {folder}/$name.log
log_to_stderr = false
err_to_stderr = false
osd_objectstore = memstore
memstore_device_bytes = 2147483648
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data = {folder}/mon
osd_data = {folder}/osd
keyring = {folder}/keyring
setuser_match_path =
[client.rgw]
rgw_data = {folder}/rgw
rgw_frontends = beast endpoint=127.0.0.1:{rgw}
rgw_enable_ops_log = false
rgw_enable_usage_log = false
rgw_run_sync_thread = false
rgw_enable_gc_threads = false
rgw_enable_lc_threads = false
rgw_enable_quota_threads = false
rgw_thread_pool_size = 32
"""


def missing() -> str:
    """Why there can be no server here, or ""."""
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    return f"needs Debian's radosgw, ceph-mon, ceph-osd and ceph-common ({', '.join(absent)} not found)" if absent else ""


class Ceph:
    """One running server: `endpoint`, and `access`, `secret` of its user."""

    def __init__(self, folder: Path):
        self.folder, self.access, self.secret = folder, "cuvee-test", uuid.uuid4().hex
        mon, rgw = _free_port(), _free_port()
        self.endpoint = f"http://127.0.0.1:{rgw}"
        self._running: list[subprocess.Popen] = []
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir(parents=True)
        fsid, self._conf = str(uuid.uuid4()), folder / "ceph.conf"
        self._conf.write_text(CONF.format(fsid=fsid, mon=mon, rgw=rgw, folder=folder))
        (folder / "keyring").touch()
        try:
            self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{mon}]", str(folder / "map"))
            self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(folder / "map"))
            self._start("ceph-mon", "-i", "a")
            osd = str(uuid.uuid4())
            self._run("ceph", "osd", "new", osd)
            self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
            self._start("ceph-osd", "-i", "0")
            self._run("radosgw-admin", "user", "create", "--uid", "cuvee", "--display-name", "cuvee", "--access-key",
                      self.access, "--secret-key", self.secret)
            self._start("radosgw", "-n", "client.rgw")
            self._wait()
        except BaseException:
            self.stop()
            raise

    def restrict(self, suspended: bool) -> None:
        """Take the user's permission away, or give it back."""
        self._run("radosgw-admin", "user", "suspend" if suspended else "enable", "--uid", "cuvee")

    def environment(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.access, "AWS_SECRET_ACCESS_KEY": self.secret,
                "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}

    def stop(self) -> None:
        for process in reversed(self._running):
            process.kill()
            process.wait()

    def _run(self, *command: str) -> str:
        done = subprocess.run([command[0], "-c", str(self._conf), *command[1:]] if command[0] != "monmaptool"
                              else list(command), capture_output=True, text=True, timeout=START_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
        return done.stdout

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "w") as out:
            self._running.append(subprocess.Popen([command[0], "-c", str(self._conf), "-f", *command[1:]], stdout=out,
                                                  stderr=subprocess.STDOUT, env=os.environ | {"CEPH_ARGS": ""}))

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(self.endpoint, timeout=2)
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"radosgw did not answer; see {self.folder}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
