"""Which kind of file system a path lies on, as far as it matters: one machine's own disk, or a share of several.

Linux lists every mount in `/proc/self/mountinfo` (proc(5)); what counts for a path is the mount point that is its
longest prefix, and of several on one point the last. Elsewhere there is no answer, and nothing is refused.
"""

import os
import re
from pathlib import Path

NETWORK_KINDS = frozenset(
    {
        "9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "gfs", "gfs2", "glusterfs", "gpfs", "lustre", "mmfs",
        "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "prl_fs", "pvfs2", "smb3", "smbfs", "vboxsf", "vmhgfs",
        "wekafs",
    }
)  # fmt: skip
"""Served by another machine or shared by several: `mmap` and locks do not hold between them."""

NETWORK_FUSE = frozenset(
    {
        "afp", "alluxio", "blobfuse", "blobfuse2", "ceph", "curlftpfs", "curvefs", "davfs", "dfs", "gcsfuse",
        "glusterfs", "goofys", "hdfs", "juicefs", "lizardfs", "mfs", "moosefs", "mount-s3", "mountpoint-s3",
        "objectivefs", "quobyte", "rclone", "s3backer", "s3fs", "s3ql", "saunafs", "seaweedfs", "smbnetfs", "sshfs",
        "vmhgfs",
    }
)  # fmt: skip
"""Programs behind a mount of type `fuse.<program>` that serve files from elsewhere."""

_MOUNTS = Path("/proc/self/mountinfo")


def network_file_system(path: Path) -> str | None:
    """The kind of network file system that a path lies on (`nfs4`); None where it is local, or nobody can tell.

    The path need not exist yet: its nearest folder that does is what counts.
    """
    there = Path(os.path.realpath(path))
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    point, kind = _mount_of(str(there), mounts)
    return kind if _is_network(point, kind) else None


def _mount_of(path: str, mounts: str) -> tuple[str, str]:
    """(mount point, type) of the file system under an absolute path without links."""
    found = ("", "")
    for line in mounts.splitlines():
        before, separator, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if not separator or len(fields) < 5:
            continue
        point = _unescaped(fields[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(found[0]):
            found = (point, kinds[0])
    return found


def _is_network(point: str, kind: str) -> bool:
    if kind.startswith("fuse."):
        program = kind.removeprefix("fuse.").partition("@")[0]
        return program in NETWORK_FUSE or program.removesuffix("-fuse") in NETWORK_FUSE
    # Sandboxes serve their own root as 9p; a share is mounted below it.
    return kind in NETWORK_KINDS and not (kind == "9p" and point == "/")


def _unescaped(text: str) -> str:
    r"""A field of mountinfo as the path that it means: blanks and the like stand as `\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
