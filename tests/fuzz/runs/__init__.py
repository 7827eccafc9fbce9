"""Mutated runs: damaged bytes, foreign structure, bombs, and data that contradict themselves."""

from tests.fuzz.kinds import Kind
from tests.fuzz.runs import base_runs, data, doors, files, hdf5_files, zarr_stores, zip_archives

RUNS = Kind(
    name="runs",
    mutators={
        name: mutator
        for room in (files, hdf5_files, zarr_stores, zip_archives, data)
        for name, mutator in room.MUTATORS.items()
    },
    prepare=base_runs.prepare,
    warm_up=doors.warm_up,
    doors=doors.open_doors,
    command=lambda subject: f"depthscope check {subject['path']}",
)
