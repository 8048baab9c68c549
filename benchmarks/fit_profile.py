"""Calibrate the performance model of a GPU's profile, from the times of all candidates.

    python -m benchmarks.fit_profile benchmarks/results/h200/candidates.json tuning_profiles/FILE

Needs no GPU. The profile gets the constants (`fit`) and, for each call that has none beside its
fastest candidate and where that is the one that the times say, the next best (`others`). Nothing
else of it changes.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from accel.tuning import profile_file
from accel.tuning.cost import Times, fit
from accel.tuning.profile import OTHERS, Entry

from .tuning_regret import chip_named, read

AGREES = 1.05
"""Two runs' times of one candidate within this factor are of one version of it."""


def main() -> None:
    """Calibrate and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("candidates", type=Path, help="times of all candidates")
    parser.add_argument("profile", type=Path)
    options = parser.parse_args()
    meta, measured = read(options.candidates)
    content = profile_file.read(options.profile)
    if content.meta["gpu"] != meta["gpu"]:
        parser.error(f"the profile is of {content.meta['gpu']}, the times of {meta['gpu']}")
    entries = {
        call: fields if fields.get("others") else _with_others(fields, measured.get(call, ()))
        for call, fields in content.entries.items()
    }
    fitted = fit(chip_named(meta["gpu"]), measured).to_json()
    made = dataclasses.replace(content, entries=entries, fit=fitted)
    options.profile.write_text(profile_file.written(made), encoding="utf-8")
    count = sum("others" in fields for fields in entries.values())
    print(f"{count} of {len(entries)} entries have others")


def _with_others(fields: dict[str, Any], times: Times) -> dict[str, Any]:
    best = (fields["kernel"], fields["config"])
    own = next((us for kernel, config, us in times if (kernel, dict(config)) == best), None)
    if own is None or not 1 / AGREES < own / fields["us"] < AGREES:
        return fields
    rest = sorted((t for t in times if (t[0], dict(t[1])) != best), key=lambda time: time[2])
    return Entry(*best, fields["us"], tuple(rest[:OTHERS])).to_json()


if __name__ == "__main__":
    main()
