"""Which mount a path lies on, from texts as Linux writes them."""

from pathlib import Path

import pytest

from duet_ray import file_systems
from duet_ray.file_systems import network_file_system

MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
40 27 0:40 / /home rw,relatime shared:1 - nfs4 server:/home rw,vers=4.2,addr=10.0.0.1
41 40 0:41 / /home/me/local rw shared:2 master:1 - xfs /dev/sdb rw
42 27 0:42 / /mnt/my\\040shared\\040disk rw - cifs //server/share rw
43 27 0:43 / /mnt/remote rw - fuse.sshfs me@server:/ rw,user_id=0
44 27 0:44 / /mnt/bucket rw - fuse.gcsfuse bucket rw
45 27 0:45 / /mnt/stick rw - fuseblk /dev/sdc1 rw
46 27 0:46 / /mnt/crypt rw - fuse.gocryptfs /home/crypt rw
47 27 0:47 / /mnt/twice rw - nfs server:/a rw
48 27 0:48 / /mnt/twice rw - tmpfs tmpfs rw
49 27 0:40 /projects /data/projects rw,relatime shared:1 - nfs4 server:/home rw,vers=4.2
50 27 0:50 / /mnt/quobyte rw - fuse.quobyte@registry rw
51 27 0:51 / /mnt/ceph rw - fuse.ceph-fuse ceph-fuse rw
52 27 0:52 / /mnt/shared rw - 9p host rw,trans=virtio
53 27 0:53 / /mnt/fast rw - lustre mgs@tcp:/fast rw
a line that means nothing
"""


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    file = tmp_path / "mountinfo"
    file.write_text(MOUNTS, encoding="utf-8")
    monkeypatch.setattr(file_systems, "_MOUNTS", file)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(file_systems.os.path, "realpath", str)
    return file


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/studies", None),
        ("/home/me/studies/x", "nfs4"),
        ("/home", "nfs4"),
        ("/homework/x", None),
        ("/home/me/local/x", None),
        ("/mnt/my shared disk/x", "cifs"),
        ("/mnt/remote/x", "fuse.sshfs"),
        ("/mnt/bucket", "fuse.gcsfuse"),
        ("/mnt/stick/x", None),
        ("/mnt/crypt/x", None),
        ("/mnt/twice/x", None),
        ("/data/projects/x", "nfs4"),
        ("/mnt/quobyte/x", "fuse.quobyte@registry"),
        ("/mnt/ceph/x", "fuse.ceph-fuse"),
        ("/mnt/shared/x", "9p"),
        ("/mnt/fast/x", "lustre"),
    ],
)
def test_the_longest_mount_point_counts(mounts: Path, path: str, kind: str | None) -> None:
    assert network_file_system(Path(path)) == kind


def test_a_sandbox_whose_root_is_9p_is_no_share(mounts: Path) -> None:
    mounts.write_text("1 0 0:1 / / rw - 9p none rw,trans=fd\n2 1 0:2 / /data rw - 9p host rw\n", encoding="utf-8")
    assert network_file_system(Path("/root/x")) is None
    assert network_file_system(Path("/data/x")) == "9p"


def test_where_there_is_no_list_of_mounts_nothing_is_refused(mounts: Path) -> None:
    mounts.unlink()
    assert network_file_system(Path("/home/me")) is None


def test_links_are_followed_and_a_path_may_not_exist_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    share = tmp_path / "share"
    share.mkdir()
    (tmp_path / "link").symlink_to(share)
    file = tmp_path / "mountinfo"
    file.write_text(f"1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:2 / {share} rw - nfs server:/ rw\n", encoding="utf-8")
    monkeypatch.setattr(file_systems, "_MOUNTS", file)
    assert network_file_system(tmp_path / "link" / "studies" / "new") == "nfs"
    assert network_file_system(tmp_path / "studies" / "new") is None
