"""The write-ahead log: the store itself.

:class:`~space.wal.log.Log` is the machine; ``segment_*`` are the format (pure), ``watermark`` and
``recovery`` decide what survived, ``disk`` is the only way to the disk.
"""

from space.wal.disk import Disk, File, RealDisk
from space.wal.log import Finding, Log, SegmentInfo, StoredBatch
from space.wal.recovery import RecoveryReport
from space.wal.segment_format import RecordInfo, RecordKind
from space.wal.segment_reader import Damage

__all__ = [
    "Damage",
    "Disk",
    "File",
    "Finding",
    "Log",
    "RealDisk",
    "RecordInfo",
    "RecordKind",
    "RecoveryReport",
    "SegmentInfo",
    "StoredBatch",
]
