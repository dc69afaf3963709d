"""What a study knows, on disk: `Store` is the only writer and the only truth that a resume reads."""

from duet_ray.store.store import Store, StudyRecord

__all__ = ["Store", "StudyRecord"]
