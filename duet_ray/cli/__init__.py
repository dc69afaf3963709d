"""The command `duet`: a thin layer over `duet_ray.Study`, one file a verb."""

from duet_ray.cli.app import main

__all__ = ["main"]
