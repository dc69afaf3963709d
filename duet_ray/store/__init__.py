"""What a study knows, kept: `Store` is the only writer and the only truth that a resume reads."""

from duet_ray.store.opening import find_store, open_folder, open_store
from duet_ray.store.store import NoStudy, Store, StudyRecord

__all__ = ["NoStudy", "Store", "StudyRecord", "find_store", "open_folder", "open_store"]
