"""Calibrate the performance model of a GPU's profile, from the times of all candidates.

    python -m benchmarks.fit_profile benchmarks/results/h200/candidates.json tuning_profiles/FILE

Needs no GPU. The profile gets the constants (`fit`) and, for each call whose fastest candidate is
the one that the times say, the next best (`others`). Nothing else of it changes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

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
    document = json.loads(options.profile.read_text(encoding="utf-8"))
    if document["meta"]["gpu"] != meta["gpu"]:
        parser.error(f"the profile is of {document['meta']['gpu']}, the times of {meta['gpu']}")
    document["fit"] = fit(chip_named(meta["gpu"]), measured).to_json()
    known = document["entries"]
    document["entries"] = {
        call: _with_others(fields, measured.get(call, ())) for call, fields in known.items()
    }
    text = json.dumps(document, indent=0, sort_keys=True)
    options.profile.write_text(text + "\n", encoding="utf-8")
    count = sum("others" in fields for fields in document["entries"].values())
    print(f"{count} of {len(known)} entries have others")


def _with_others(fields: dict[str, Any], times: Times) -> dict[str, Any]:
    best = (fields["kernel"], fields["config"])
    own = next((us for kernel, config, us in times if (kernel, dict(config)) == best), None)
    if own is None or not 1 / AGREES < own / fields["us"] < AGREES:
        return {name: value for name, value in fields.items() if name != "others"}
    rest = sorted((t for t in times if (t[0], dict(t[1])) != best), key=lambda time: time[2])
    return Entry(*best, fields["us"], tuple(rest[:OTHERS])).to_json()


if __name__ == "__main__":
    main()
