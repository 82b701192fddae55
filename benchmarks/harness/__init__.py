"""The one harness: see `bench`."""

from benchmarks.harness.bench import Bench
from benchmarks.harness.cells import (
    DTYPES,
    Cell,
    Check,
    Contender,
    Options,
    TooSlowError,
    Trial,
    UnavailableError,
    Work,
    dtype_name,
    when_installed,
)
from benchmarks.harness.machine import ROOT, commit, label, machine, slug, versions
from benchmarks.harness.memory import copies_beyond_cache, limit_memory, peak_memory
from benchmarks.harness.records import RESULTS, Recorder, default_output, read_records
from benchmarks.harness.timing import quantile

__all__ = [
    "DTYPES",
    "RESULTS",
    "ROOT",
    "Bench",
    "Cell",
    "Check",
    "Contender",
    "Options",
    "Recorder",
    "TooSlowError",
    "Trial",
    "UnavailableError",
    "Work",
    "commit",
    "copies_beyond_cache",
    "default_output",
    "dtype_name",
    "label",
    "limit_memory",
    "machine",
    "peak_memory",
    "quantile",
    "read_records",
    "slug",
    "versions",
    "when_installed",
]
